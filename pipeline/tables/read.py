"""Reading a table back: whole, or row by row."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

import numpy as np
from apache_beam.io.filesystems import FileSystems

from pipeline.errors import TableError
from pipeline.runtime import load_tensorflow
from pipeline.sinks import SINKS
from pipeline.sources.compression import FileError
from pipeline.tables.manifest import Manifest, open_table


def read_table(table: str) -> tuple[list[str], np.ndarray]:
    """Reads the live snapshot of a table.

    Args:
      table: the table's folder, on any file system that Beam reads.

    Returns:
      The ids, and the vectors as float32 `[rows, D]`, in no particular order. With `--on_long=chunk` an id occurs
      once for each of its chunks. int8 and binary vectors are restored as far as they can be.

    Raises:
      TableError: if there is no such table, it is damaged, or its rows are token matrices (use `iter_table`).
    """
    manifest, _ = open_table(table)
    if manifest.layout.tokens:
        raise TableError(f"{table} holds one matrix per row, of different sizes; read it with iter_table")
    ids: list[str] = []
    vectors = [np.zeros((0, manifest.layout.dimension), np.float32)]
    for columns, matrix in iter_columns(table):
        ids.extend(columns["id"])
        vectors.append(matrix)
    return ids, np.concatenate(vectors)


def iter_table(table: str) -> Iterator[dict[str, Any]]:
    """Streams the rows of the live snapshot: column name to value.

    `embedding` is float32 `[D]`, or `[n_tokens, D]` for token matrices; a null is None.

    Raises:
      TableError: as `read_table`.
    """
    manifest, _ = open_table(table)
    layout = manifest.layout
    for columns, matrix in iter_columns(table):
        for i in range(len(columns["id"])):
            row = {name: values[i] for name, values in columns.items() if name != "embedding"}
            if matrix is not None:
                row["embedding"] = matrix[i]
            else:
                scales = [columns["scale"][i]] if "scale" in columns else None
                row["embedding"] = layout.restore_tokens(columns["embedding"][i], row["n_tokens"], scales)
            yield row


def iter_columns(table: str) -> Iterator[tuple[dict[str, list], np.ndarray | None]]:
    """Streams a table about a thousand rows at a time: its columns, and the vectors as float32 `[B, D]`.

    The matrix is None for token matrices, which are only given as stored bytes in `embedding`.
    """
    manifest, folder = open_table(table)
    layout = manifest.layout
    for columns in _iter_files(manifest, folder):
        if layout.tokens:
            yield columns, None
        else:
            yield columns, layout.restore(b"".join(columns["embedding"]), len(columns["id"]), columns.get("scale"))


def _iter_files(manifest: Manifest, folder: str) -> Iterator[dict[str, list]]:
    load_tensorflow()  # tfx-bsl would import it with all its noise
    sink = SINKS[manifest.file_format]
    for file in manifest.files:
        path = FileSystems.join(folder, file.name)
        n_rows = 0
        try:
            with FileSystems.open(path, compression_type="uncompressed") as raw:
                stream = gzip.GzipFile(fileobj=raw) if manifest.compression == "gzip" else raw
                for stored in sink.read(stream, manifest.layout):
                    n_rows += len(stored)
                    yield sink.decode(stored, manifest.layout)
        except (OSError, EOFError, ValueError, FileError) as error:
            raise TableError(f"{path} is damaged: {error}; run embeam embed again") from error
        if n_rows != file.rows:
            raise TableError(f"{path} is damaged: it has {n_rows} rows instead of {file.rows}; run embeam embed again")
