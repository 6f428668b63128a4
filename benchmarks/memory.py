"""Measures whether memory grows with the corpus: peak resident memory of `embeam embed` over ten times the documents.

Reference: the same command over a tenth of them. With plain text, with JSON lines and an id field, where a first pass
looks for duplicate ids, with documents that all have one text, and with documents that all have one id.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil

from benchmarks.measure import BenchmarkError, Ratio, Report, Side, alternate, median
from benchmarks.models import find_models
from benchmarks.texts import make_phrases, write_jsonl, write_lines

SIZE, COUNT, REPETITIONS = "tiny", 1_000_000, 1
FEWER = 10
CEILING_MB = 100.0
MAX_TOKENS = 16
SAME = {"same_text": {"text": "a text that every document has"}, "same_id": {"id": "an id that every document has"}}
KINDS = ("text", "jsonl", "same_text", "same_id")


def write_input(kind: str, count: int, path: str) -> list[str]:
    """Streams the documents to a file and returns the flags that read it."""
    if kind == "jsonl":
        write_jsonl(path, make_phrases(count))
    elif kind in SAME:
        fields = SAME[kind]
        records = ({"id": fields.get("id", str(i)), "text": fields.get("text", f"text {i}")} for i in range(count))
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    if kind != "text":
        return [f"--input={path}", "--input_format=jsonl", "--id_field=id", "--max_dead_fraction=1"]
    write_lines(path, make_phrases(count))
    return [f"--input={path}", "--input_format=text"]


def run(options: argparse.Namespace) -> Report:
    most = options.count
    if most < FEWER:
        raise BenchmarkError(f"--count={most} leaves no document for the smaller side; use {FEWER} or more")
    folder, table = options.folder, os.path.join(options.folder, "table")
    encoder, preprocessor = find_models(options.encoder, options.preprocessor, options.size, options.models)
    settings = {"output": table, "encoder": encoder, "preprocessor": preprocessor, "max_tokens": MAX_TOKENS}
    common = [f"--{name}={value}" for name, value in settings.items()]
    sides: dict[str, Side] = {}
    for kind in KINDS:
        for count in (most // FEWER, most):
            flags = write_input(kind, count, os.path.join(folder, f"{kind}-{count}"))
            sides[_name_side(kind, count)] = Side("benchmarks.child:embed", {"arguments": [*flags, *common]})
    runs = alternate(sides, options.repetitions, folder, lambda name: shutil.rmtree(table, ignore_errors=True))
    ratios = []
    for kind in KINDS:
        few, many = (median(runs[_name_side(kind, count)], "peak_bytes") for count in (most // FEWER, most))
        name = f"{kind}: peak beyond that of a tenth of the documents"
        ratios.append(Ratio(name, (many - few) / 1e6, at_most=CEILING_MB, unit="MB"))
    title = f"peak memory at {most // FEWER:,} and at {most:,} documents of a few words"
    return Report(title, "documents", runs, ratios, {"encoder": encoder})


def _name_side(kind: str, count: int) -> str:
    return f"{kind}, {count:,}"
