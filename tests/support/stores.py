"""Whole runs into databases: two states of a small corpus whose kept fields are of every type."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pipeline.tables.manifest import Manifest
from tests.support import tables
from tests.support.corpora import some_texts, write_jsonl
from tests.support.runs import run_pipeline
from tests.support.tables import Rows, read_rows

N_TEXTS = 80
SETTINGS = {
    "keep_fields": "year:int,score:float,fine:bool,name",
    "on_long": "reject",
    "max_tokens": 80,
    "max_dead_fraction": 0.5,
    "output_format": "parquet",  # of the folder: floats of 64 bits, as databases have them
}
assert_same_rows = functools.partial(tables.assert_same_rows, ignored=("source",))  # a column of databases only


def first_records() -> list[dict[str, Any]]:
    records = [
        {"id": f"n{i}", "text": text, "year": i, "score": i / 3, "fine": i % 2 == 0, "name": f"Müller {i}"}
        for i, text in enumerate(some_texts(N_TEXTS, seed=5, words=(1, 20)))
    ]
    records[3] |= {"year": None, "score": None, "fine": None, "name": None}
    records += [records[i] | {"id": f"twin{i}"} for i in range(4)]
    return records


def second_records() -> list[dict[str, Any]]:
    """New, changed, updated, renamed and deleted documents, and one that has grown too long."""
    records = [dict(record) for record in first_records()]
    records[10]["text"] = "the text has changed"
    records[11]["year"] = -11
    records[12]["id"] = "renamed"
    records[13]["text"] = "dog " * 200
    del records[20:26]
    return [*records, {"id": "new", "text": "a new one", "year": 1, "score": 2.5, "fine": True, "name": 'it\'s "new"'}]


def run(folder: Path, records: list[dict[str, Any]], **settings: Any) -> tuple[Rows, Manifest]:
    write_jsonl(folder / "corpus.jsonl", records)
    manifest = run_pipeline(folder, **{**SETTINGS, **settings})
    return read_rows(settings["output"]), manifest
