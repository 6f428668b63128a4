"""Reading rows with vectors, file by file: those of a table, and those of the journal."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.errors import TableError
from pipeline.files import open_file
from pipeline.sinks import SINKS
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.table_format import StoredRows

ROWS = "rows"  # the kind of a file of a table


@dataclass(frozen=True)
class VectorFile:
    """A file that holds vectors: rows `first` to `first + rows` of the index, in the file's order.

    Attributes:
      path: of the file; "" where a database holds the rows.
      kind: `rows` of a table's file, or a `segment` of the journal.
      first: the number of its first row.
      rows: how many there are.
    """

    path: str
    kind: str
    first: int
    rows: int


class Stored(NamedTuple):
    """Some rows as they are stored, and their numbers `[n]`, ascending."""

    numbers: np.ndarray
    rows: Any  # in the reader's own form


class VectorReader(Protocol):
    """Reads rows with vectors, file by file.

    Attributes:
      layout: of the rows.
    """

    @property
    def layout(self) -> TableLayout: ...

    def read(self, file: VectorFile, wanted: np.ndarray) -> Iterator[Stored]:
        """Yields rows of a file in order: all of them, or those among `wanted` at least.

        Args:
          file: the file.
          wanted: ascending numbers of rows `[m]`.

        Raises:
          TableError: if it is damaged.
        """

    def select(self, stored: Stored, positions: np.ndarray) -> StoredRows:
        """Some rows as they are stored; only for files with rows."""

    def columns(self, stored: Stored, positions: np.ndarray) -> Columns:
        """Some rows, column by column; `embedding` is stored bytes."""


@dataclass(frozen=True)
class FileReader:
    """Reads a table's files.

    Attributes:
      file_format: a key of `SINKS`.
      layout: of the rows.
      compression: none or gzip.
    """

    file_format: str
    layout: TableLayout
    compression: str

    def read(self, file: VectorFile, wanted: np.ndarray) -> Iterator[Stored]:
        first = file.first
        try:
            with open_file(file.path) as raw:
                stream = gzip.GzipFile(fileobj=raw) if self.compression == "gzip" else raw
                for rows in SINKS[self.file_format].read(stream, self.layout):
                    yield Stored(np.arange(first, first + len(rows)), rows)
                    first += len(rows)
        except Exception as error:  # each format and file system raises its own exceptions
            raise damaged(file.path, str(error)) from error
        if first != file.first + file.rows:
            raise damaged(file.path, f"it has {first - file.first} rows instead of {file.rows}")

    def select(self, stored: Stored, positions: np.ndarray) -> StoredRows:
        return SINKS[self.file_format].select(stored.rows, positions)

    def columns(self, stored: Stored, positions: np.ndarray) -> Columns:
        return SINKS[self.file_format].decode(self.select(stored, positions), self.layout)


def damaged(path: str, why: str) -> TableError:
    """The error for a part of the live table that cannot be read."""
    return TableError(
        f"{path} is damaged: {why}; run embeam embed again with --verify_live, which makes its rows again"
    )
