"""Tables as Parquet files: vectors are Arrow fixed-size lists of their own number type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import Row
from pipeline.sinks.arrow import list_bytes
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.table_format import ByteWriter
from pipeline.sources.compression import ByteReader
from pipeline.vectors.storing import STORED_DTYPES

SUFFIX = ".parquet"
_ARROW = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_NUMBERS = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
_READ_ROWS = 1024
_GROUP_ROWS = 256


class ParquetWriter:
    """Writes rows to one file, in row groups of at least a few hundred."""

    def __init__(self, stream: ByteWriter, layout: TableLayout) -> None:
        self._layout = layout
        self._schema = build_arrow_schema(layout)
        self._writer = pq.ParquetWriter(stream, self._schema, write_page_checksum=True)
        self._waiting: list[pa.RecordBatch] = []

    def write(self, rows: list[Row]) -> None:
        values = self._layout.values(rows)
        columns = [pa.array(values[name], _ARROW[kind]) for name, kind in self._layout.columns().items()]
        joined = b"".join(row.vector for row in rows)
        numbers = pa.array(np.frombuffer(joined, STORED_DTYPES[self._layout.dtype]))
        kind = self._schema.field("embedding").type
        if pa.types.is_fixed_size_list(kind):
            embedding = pa.FixedSizeListArray.from_arrays(numbers, type=kind)
        else:
            width = np.dtype(STORED_DTYPES[self._layout.dtype]).itemsize
            ends = np.cumsum([0, *(len(row.vector) // width for row in rows)])
            embedding = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), numbers)
        self.write_stored(pa.RecordBatch.from_arrays([*columns, embedding], schema=self._schema))

    def write_stored(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        if sum(map(len, self._waiting)) >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Writes the buffered rows and the footer; the stream stays open."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema).combine_chunks())
            self._waiting = []


def build_arrow_schema(layout: TableLayout) -> pa.Schema:
    numbers = _NUMBERS[layout.dtype]
    size = -(-layout.dimension // 8) if layout.dtype == "binary" else layout.dimension
    embedding = pa.large_list(numbers) if layout.tokens else pa.list_(pa.field("item", numbers, nullable=False), size)
    fields = [(name, _ARROW[kind]) for name, kind in layout.columns().items()]
    return pa.schema([*fields, pa.field("embedding", embedding)])


def read_stored(stream: ByteReader, layout: TableLayout) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a file as Arrow batches, about a thousand at a time.

    Raises:
      ValueError, OSError: if the file is damaged.
    """
    schema = build_arrow_schema(layout)
    for batch in pq.ParquetFile(stream, page_checksum_verification=True).iter_batches(_READ_ROWS):
        yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)


def select_stored(batch: pa.RecordBatch, positions: np.ndarray) -> pa.RecordBatch:
    return batch.take(pa.array(positions))


def decode_stored(batch: pa.RecordBatch, layout: TableLayout) -> Columns:
    read = {name: batch.column(name).to_pylist() for name in layout.columns()}
    read["embedding"] = list_bytes(batch.column("embedding"))
    return read
