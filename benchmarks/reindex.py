"""The cost of keeping a table consistent: a run after a few documents changed, against the run that made the table.

One percent of the documents have changed texts, half a percent are gone, and as many are new.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator

from benchmarks.measure import BenchmarkError, Ratio, Report, Run, Side, median, run_side
from benchmarks.models import find_models
from benchmarks.texts import make_sentences

SIZE, COUNT, REPETITIONS = "small", 100_000, 1
CEILING = 0.1
FIRST, SECOND = "full run", "run after changes"


def write_records(path: str, count: int, again: bool) -> int:
    """Writes JSON lines and returns how many of them have to be encoded."""
    n_new = 0
    with open(path, "w", encoding="utf-8") as file:
        for name, text, is_new in list_records(count, again):
            n_new += is_new
            file.write(json.dumps({"id": name, "text": text}) + "\n")
    return n_new


def list_records(count: int, again: bool) -> Iterator[tuple[str, str, bool]]:
    """Id, text, and whether it has to be encoded: number 0 of 200 is gone, 1 and 2 of 200 have changed."""
    for i, text in enumerate(make_sentences(count)):
        text = f"{i}: {text}"  # no two are equal
        if not again or i % 200 > 2:
            yield f"d{i}", text, not again
        elif i % 200:
            yield f"d{i}", text + " and more", True
    if again:
        for i, text in enumerate(make_sentences(count // 200, seed=2)):
            yield f"new{i}", f"new {i}: {text}", True


def run(options: argparse.Namespace) -> Report:
    if options.count < 1000:
        raise BenchmarkError(f"--count={options.count} leaves too few changes; use 1000 or more")
    encoder, preprocessor = find_models(options.encoder, options.preprocessor, options.size, options.models)
    corpus, table = os.path.join(options.folder, "corpus.jsonl"), os.path.join(options.folder, "table")
    flags = {"input": corpus, "id_field": "id", "output": table, "encoder": encoder, "preprocessor": preprocessor}
    side = Side("benchmarks.child:embed", {"arguments": [f"--{name}={value}" for name, value in flags.items()]})
    runs: dict[str, list[Run]] = {FIRST: [], SECOND: []}
    facts: dict[str, int | str] = {"encoder": encoder}
    for turn in range(options.repetitions):
        shutil.rmtree(table, ignore_errors=True)
        for name, again in ((FIRST, False), (SECOND, True)):
            wanted = write_records(corpus, options.count, again)
            done = run_side(side, options.folder)
            encoded = count_encoded(table)
            if encoded != wanted:
                raise BenchmarkError(f"the {name} encoded {encoded:,} texts instead of {wanted:,}")
            facts[f"texts encoded, {name}"] = encoded
            runs[name].append(done)
            print(f"  run {turn + 1}, {name}: {done['whole_seconds']:.1f} s", file=sys.stderr, flush=True)
    share = median(runs[SECOND], "whole_seconds") / median(runs[FIRST], "whole_seconds")
    ratios = [Ratio("time of the run after changes, of the full run's", share, at_most=CEILING)]
    title = f"{options.count:,} documents, of which 1% changed, 0.5% went and 0.5% came"
    return Report(title, "texts", runs, ratios, facts)


def count_encoded(table: str) -> int:
    with open(os.path.join(table, "CURRENT"), encoding="utf-8") as pointer:
        manifest = os.path.join(table, "snapshots", pointer.read().strip(), "manifest.json")
    with open(manifest, encoding="utf-8") as file:
        return int(json.load(file)["counts"]["encode"]["rows"])
