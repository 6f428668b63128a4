"""The interface of a format of a table's files: writes rows to a file and reads them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Union

import numpy as np
import pyarrow as pa

from pipeline.records import Row
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sources.compression import ByteReader

StoredRows = Union[list[bytes], pa.RecordBatch]  # opaque rows that a format copies; only of its own kind


class ByteWriter(Protocol):
    """A stream for writing; Parquet also needs `tell` and `closed`."""

    def write(self, data: bytes, /) -> int: ...


class RowWriter(Protocol):
    """Writes the rows of one file; `close` ends its content and leaves the stream open."""

    def write(self, rows: list[Row], /) -> None: ...

    def write_stored(self, stored: StoredRows, /) -> None: ...

    def close(self) -> None: ...


class TableFormat(NamedTuple):
    """Writes and reads the files of one format.

    Attributes:
      suffix: of the files.
      writer: gives the writer of one file.
      read: yields stored rows, about a thousand at a time.
      select: gives the stored rows at some positions `[n]`.
      decode: gives the columns of stored rows; `embedding` is stored bytes.
    """

    suffix: str
    writer: Callable[[ByteWriter, TableLayout], RowWriter]
    read: Callable[[ByteReader, TableLayout], Iterator[StoredRows]]
    select: Callable[[StoredRows, np.ndarray], StoredRows]
    decode: Callable[[StoredRows, TableLayout], Columns]
