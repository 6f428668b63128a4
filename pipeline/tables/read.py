"""Reads a table: as a whole, or row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.errors import TableError
from pipeline.sinks.layout import Columns
from pipeline.tables.manifest import Manifest
from pipeline.tables.store import Table
from pipeline.tables.stores import find_table


def open_live(table: str) -> tuple[Manifest, Table]:
    """The manifest of a table's live state, and the table.

    Args:
      table: a folder, or what `--output` names a database's table by.

    Raises:
      TableError: if there is no such table.
    """
    found = find_table(table)
    manifest = found.read_live().manifest
    if manifest is None:
        raise TableError(
            f"{table} is not a table: nothing was published there; embeam embed --output={table} makes one"
        )
    return manifest, found


def read_table(table: str) -> tuple[list[str], np.ndarray]:
    """Reads the live snapshot of a table.

    Args:
      table: the table's folder, on any file system that Beam reads, or a database's table.

    Returns:
      The ids, and the vectors as float32 `[rows, D]`, in no particular order. With `--on_long=chunk` an id occurs
      once for each of its chunks. int8 and binary vectors are restored approximately.

    Raises:
      TableError: if there is no such table, it is damaged, or its rows are token matrices (use `iter_table`).
    """
    manifest, _ = open_live(table)
    if manifest.layout.tokens:
        raise TableError(f"{table} holds one matrix per row, of different sizes; read it with iter_table")
    ids: list[str] = []
    vectors: list[np.ndarray] = [np.zeros((0, manifest.layout.dimension), np.float32)]
    for columns, matrix in iter_columns(table):
        assert matrix is not None
        ids.extend(columns["id"])
        vectors.append(matrix)
    return ids, np.concatenate(vectors)


def iter_table(table: str) -> Iterator[dict[str, Any]]:
    """Streams the rows of the live snapshot: column name to value.

    `embedding` is float32 `[D]`, or `[n_tokens, D]` for token matrices; a null is None.

    Raises:
      TableError: as `read_table`.
    """
    layout = open_live(table)[0].layout
    for columns, matrix in iter_columns(table):
        for i in range(len(columns["id"])):
            row = {name: values[i] for name, values in columns.items() if name != "embedding"}
            if matrix is not None:
                row["embedding"] = matrix[i]
            else:
                scales = [columns["scale"][i]] if "scale" in columns else None
                row["embedding"] = layout.restore_tokens(columns["embedding"][i], row["n_tokens"], scales)
            yield row


def iter_columns(table: str) -> Iterator[tuple[Columns, np.ndarray | None]]:
    """Streams a table about a thousand rows at a time: its columns, and the vectors as float32 `[B, D]`.

    The matrix is None for token matrices, which are only given as stored bytes in `embedding`.
    """
    manifest, found = open_live(table)
    layout = manifest.layout
    for columns in found.read_columns(manifest):
        if layout.tokens:
            yield columns, None
        else:
            yield columns, layout.restore(b"".join(columns["embedding"]), len(columns["id"]), columns.get("scale"))
