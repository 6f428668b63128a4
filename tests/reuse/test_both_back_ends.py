"""Random runs on a table, by both back ends: the same rows, texts to encode, dead letters and counts, run after run.

Besides what the histories try, the form of the table changes: kept fields, file format, compression, stored texts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EmbeamError
from pipeline.read_config import KeptField
from pipeline.records import DeadLetter, Document, Origin, pack_kept
from tests.support.reruns import list_dead
from tests.support.steps import LAYOUT, Outcome, SteppedTable, make_dead_letter

FILES = ("a.jsonl", "b.jsonl", "c.jsonl")
TEXTS = [f"text {i}" + " word" * (i % 5) for i in range(12)]
NAMES = [f"d{i}" for i in range(20)]
COUNTS = (
    *("documents", "new", "changed", "updated", "remade", "unchanged", "reused", "same_text", "encoded"),
    *("live", "deleted", "moved", "stale", "kept", "lost"),
)


def change_corpus(corpus: dict[str, Document], rng: random.Random) -> None:
    """Adds, edits, removes and moves some documents."""
    for _ in range(rng.randint(1, 8)):
        name, origin = rng.choice(NAMES), Origin(rng.choice(FILES), rng.randrange(1000), "byte")
        if name not in corpus or rng.random() < 0.4:
            pair = rng.choice([None, None, None, "a pair"])
            corpus[name] = Document(name, rng.choice(TEXTS), pair, pack_kept([rng.randrange(3)]), origin)
        elif rng.random() < 0.6:
            del corpus[name]
        else:
            corpus[name] = corpus[name]._replace(origin=origin)


def choose_form(rng: random.Random, chunked: bool) -> dict[str, Any]:
    """Settings of a table, of which the next run changes some."""
    kept = (KeptField("year", "int"),) if rng.random() < 0.7 else ()
    return {
        "layout": replace(LAYOUT, kept=kept, keep_text=rng.random() < 0.3, chunked=chunked),
        **rng.choice(
            [{"output_format": "parquet", "compression": "none"}]
            + [{"output_format": "tfrecord", "compression": zipped} for zipped in ("none", "none", "gzip")]
        ),
        "model": rng.choice(["one", "one", "one", "one", "two"]),
    }


def list_unread(rng: random.Random) -> Iterator[DeadLetter]:
    """Dead letters of a record that could not be told, and of one that could."""
    if rng.random() < 0.5:
        yield make_dead_letter(rng.choice(FILES))
    if rng.random() < 0.3:
        yield make_dead_letter(FILES[0], rng.choice(NAMES), "missing_field")


def describe(outcome: Outcome, table: SteppedTable) -> dict[str, Any]:
    rows = {key: row | {"embedding": row["embedding"].tobytes()} for key, row in outcome.rows.items()}
    dead, counts = list_dead(table.output), outcome.count(*COUNTS)
    return {"rows": rows, "encoded": outcome.encoded, "dead letters": dead, **counts}


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(i, marks=pytest.mark.history) for i in range(20, 200))])
def test_both_back_ends_do_the_same(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shard_bytes, chunked = rng.choice([1, 600, 1 << 20]), rng.random() < 0.4
    tables = [SteppedTable(str(tmp_path / f"{joins}"), joins, shard_bytes=shard_bytes) for joins in (False, True)]
    corpus: dict[str, Document] = {}
    for _ in range(rng.randint(4, 12)):
        change_corpus(corpus, rng)
        documents = sorted(corpus.values(), key=lambda document: document.origin)
        form, dead_letters = choose_form(rng, chunked), list(list_unread(rng))
        if not form["layout"].kept:
            documents = [document._replace(kept=b"") for document in documents]
        fails = [text for text in TEXTS if rng.random() < 0.25]
        deletes = "keep" if rng.random() < 0.2 else "apply"
        found: list[Any] = []
        for table in tables:
            for name, value in form.items():
                setattr(table, name, value)
            try:
                found.append(describe(table.run(documents, dead_letters, fails, deletes=deletes), table))
            except EmbeamError as error:
                found.append(str(error).replace(table.output, "the table"))
        assert found[0] == found[1]
