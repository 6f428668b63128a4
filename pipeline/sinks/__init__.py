"""Where rows go: one file per table format, which both writes and reads it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pipeline.sinks import parquet, tfrecord


class TableFormat(NamedTuple):
    """How rows become files and files rows. "Stored" rows are what the format copies without looking inside.

    Attributes:
      suffix: of the files.
      writer: `(stream, layout)` gives a RowWriter for one file.
      read: `(stream, layout)` yields stored rows, about a thousand at a time.
      select: `(stored rows, positions [n])` gives some of them.
      decode: `(stored rows, layout)` gives column name to values; `embedding` is stored bytes.
    """

    suffix: str
    writer: Callable[..., Any]
    read: Callable[..., Iterator[Any]]
    select: Callable[..., Any]
    decode: Callable[..., dict[str, list]]


SINKS = {
    name: TableFormat(kind.SUFFIX, writer, kind.read_stored, kind.select_stored, kind.decode_stored)
    for name, kind, writer in (
        ("tfrecord", tfrecord, tfrecord.TfrecordWriter),
        ("parquet", parquet, parquet.ParquetWriter),
    )
}
