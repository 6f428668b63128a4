"""Reading tables back, and comparing them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import read_text
from pipeline.tables.manifest import open_table
from pipeline.tables.read import iter_table, read_table
from pipeline.tables.stores import open_store
from tests.support.official import count_tokens, expected_vector, official_vector, pack_alone

TOLERANCE = 2e-5  # max abs of a vector's numbers, for two orders of summation in float32
SCALE_TOLERANCE = 1e-4  # relative, of the scale of a quantised vector: its largest number, rounded twice

Rows = dict[tuple[str, int], dict[str, Any]]  # (id, chunk) -> the table's row


def read_rows(table: str) -> Rows:
    rows: Rows = {}
    for row in iter_table(table):
        key = row["id"], row["chunk"]
        assert key not in rows, f"{key} is in the table twice"
        rows[key] = row
    return rows


def read_dead_letters(table: str | os.PathLike, work_dir: str = "") -> list[dict[str, Any]]:
    """The dead letters of the live state, in the order of their places, read as the JSON lines that they are."""
    store = open_store(str(table), work_dir)
    manifest = store.read_live().manifest
    assert manifest is not None
    dead_letters = [
        json.loads(line)
        for file in manifest.dead_letter_files
        for line in read_text(store.locate_dead_letters(manifest, file.name)).splitlines()
    ]
    assert (
        sum(manifest.dead_letters.values())
        == len(dead_letters)
        == sum(file.rows for file in manifest.dead_letter_files)
    )
    return sorted(
        dead_letters,
        key=lambda dead_letter: (dead_letter["file"], dead_letter.get("byte", dead_letter.get("row")) or 0),
    )


def assert_close(actual: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    """Max abs within the tolerance; a shape that only broadcasts is an error."""
    assert actual.shape == expected.shape, f"{what!r}: {actual.shape} instead of {expected.shape}"
    difference = float(np.max(np.abs(actual - expected), initial=0))
    assert difference <= TOLERANCE, f"{what!r} is off by {difference}"


def assert_same_rows(actual: Rows, expected: Rows, dtype: str = "float32", ignored: Sequence[str] = ()) -> None:
    """Two tables have the same rows, up to what another order of summation may change on any processor.

    Args:
      actual: rows by id and chunk.
      expected: likewise.
      dtype: in which both store their vectors: a sum that lies between two stored numbers may become either.
      ignored: columns that only one kind of table has.
    """
    assert set(actual) == set(expected)
    for key in actual:
        row, other = ({n: v for n, v in rows[key].items() if n not in ignored} for rows in (actual, expected))
        assert_same_row(row, other, dtype, key)


def assert_same_row(row: Mapping[str, Any], expected: Mapping[str, Any], dtype: str, what: object = "") -> None:
    """As `assert_same_rows`, for one row."""
    assert set(row) == set(expected), what
    for name, value in row.items():
        if name == "embedding":
            assert value.shape == expected[name].shape, what
            difference = np.abs(value - expected[name])
            if dtype == "binary":
                assert np.count_nonzero(difference) <= 1, f"{what!r} differs in more than a bit"
                continue
            step = {"float32": 0.0, "float16": 2.0**-10 * np.abs(expected[name]), "int8": row.get("scale", 0.0)}[dtype]
            excess = float(np.max(difference - 1.01 * step, initial=0))
            assert excess <= TOLERANCE, f"{what!r} is off by {difference.max()}"
        elif name == "scale":
            np.testing.assert_allclose(value, expected[name], rtol=SCALE_TOLERANCE, atol=1e-9, err_msg=str(what))
        else:
            assert value == expected[name], (what, name)


def assert_official(
    rows: Rows, records: Iterable[Mapping[str, Any]], fields: Sequence[str] = (), **settings: Any
) -> None:
    """The table holds one row for each record, with the official encoder's vector."""
    wanted = {record["id"]: record for record in records}
    assert {key for key, _ in rows} == set(wanted) and len(rows) == len(wanted)
    for (key, _), row in rows.items():
        assert_close(row["embedding"], official_vector(wanted[key]["text"], **settings), key)
        assert {name: row[name] for name in fields} == {name: wanted[key].get(name) for name in fields}


def assert_official_segments(
    rows: Rows, texts: Mapping[str, Sequence[str]], vector: str, max_tokens: int = 512
) -> None:
    """One row for each id, and in it what the official encoder gives for those segments, packed alone."""
    assert set(rows) == {(name, 0) for name in texts}
    for name, segments in texts.items():
        packed = pack_alone(segments, max_tokens)
        row = rows[name, 0]
        assert_close(row["embedding"], expected_vector(packed, vector), segments)
        assert row["n_tokens"] == packed["input_mask"].sum()
        assert row["n_truncated"] == count_tokens(segments) - row["n_tokens"]


def summarize(dead_letters: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    """(file name, place, reason) of each dead letter."""
    return [(os.path.basename(x["file"]), x.get("byte", x.get("row")), x["reason"]) for x in dead_letters]


def hash_folder(folder: str | os.PathLike) -> dict[str, str]:
    """Every file below a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def list_snapshots(table: str | os.PathLike) -> list[str]:
    """The folders that a reader could take for a snapshot: any with a manifest or with rows in it."""
    return sorted(
        path.name
        for path in Path(table, "snapshots").glob("*")
        if list(path.glob("embeddings-*")) or (path / "manifest.json").exists()
    )


def assert_unchanged(table: str | os.PathLike, before: Mapping[str, Any]) -> None:
    """The table reads as it did, and no other snapshot lies beside it."""
    manifest, folder = open_table(str(table))
    assert manifest.snapshot == before["snapshot"]
    assert list_snapshots(table) == before["snapshots"]
    assert hash_folder(folder) == before["files"]
    ids, vectors = read_table(str(table))
    assert ids == before["ids"] and np.array_equal(vectors, before["vectors"])


def remember(table: str | os.PathLike) -> dict[str, Any]:
    """What `assert_unchanged` compares with."""
    manifest, folder = open_table(str(table))
    ids, vectors = read_table(str(table))
    return {
        "snapshot": manifest.snapshot,
        "snapshots": list_snapshots(table),
        "files": hash_folder(folder),
        "ids": ids,
        "vectors": vectors,
    }
