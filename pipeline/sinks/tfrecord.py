"""Tables as TFRecord files of tf.Example, through tfx-bsl's Arrow coder; any tf.data pipeline or TFXIO reads them.

A float32 vector is a FLOAT feature; other dtypes are one BYTES feature, because a tf.Example has no smaller numbers.
A null is a feature without values.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from pipeline.records import Row
from pipeline.sinks.arrow import list_bytes
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.table_format import ByteWriter
from pipeline.sources.compression import ByteReader
from pipeline.sources.tfrecord import iterate_frames, mask_crc

SUFFIX = ".tfrecord"
_ARROW = {"string": pa.binary(), "int": pa.int64(), "float": pa.float32(), "bool": pa.int64()}
_FEATURES = {"string": "BYTES", "int": "INT", "float": "FLOAT", "bool": "INT"}
_READ_ROWS = 1024
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")


class TfrecordWriter:
    """Writes rows to one file."""

    def __init__(self, stream: ByteWriter, layout: TableLayout) -> None:
        from tfx_bsl.coders.example_coder import RecordBatchToExamplesEncoder

        self._stream = stream
        self._layout = layout
        self._encoder = RecordBatchToExamplesEncoder(build_schema(layout))

    def write(self, rows: list[Row]) -> None:
        self.write_stored(self._encoder.encode(build_record_batch(rows, self._layout)))

    def write_stored(self, records: list[bytes]) -> None:
        self._stream.write(b"".join(map(frame_record, records)))

    def close(self) -> None:
        """Ends the file's content; the stream stays open."""


def frame_record(record: bytes) -> bytes:
    """One record of a file: length, masked checksum of the length, data, masked checksum of the data."""
    return _frame_length(len(record)) + record + _CHECKSUM.pack(mask_crc(google_crc32c.value(record)))


@functools.lru_cache  # the records of a table have few different lengths
def _frame_length(n_bytes: int) -> bytes:
    length = _LENGTH.pack(n_bytes)
    return length + _CHECKSUM.pack(mask_crc(google_crc32c.value(length)))


def read_stored(stream: ByteReader, layout: TableLayout) -> Iterator[list[bytes]]:
    """Yields the records of a file as they are stored, about a thousand at a time.

    Raises:
      ValueError, FileError: if the file is damaged.
    """
    records: list[bytes] = []
    for frame in iterate_frames(stream, limit=1 << 40):
        if not frame.is_intact:
            raise ValueError("a record has a wrong checksum")
        records.append(frame.data)
        if len(records) == _READ_ROWS:
            yield records
            records = []
    if records:
        yield records


def select_stored(records: list[bytes], positions: np.ndarray) -> list[bytes]:
    return [records[i] for i in positions.tolist()]


def decode_stored(records: list[bytes], layout: TableLayout) -> Columns:
    return _read_batch(_decoder(layout).DecodeBatch(records), layout)


@functools.lru_cache(maxsize=4)
def _decoder(layout: TableLayout) -> Any:
    from tfx_bsl.coders.example_coder import ExamplesToRecordBatchDecoder

    return ExamplesToRecordBatchDecoder(build_schema(layout).SerializeToString())


def build_schema(layout: TableLayout) -> Any:
    """The table's TensorFlow Metadata schema, as written to `schema.pbtxt`."""
    from tensorflow_metadata.proto.v0 import schema_pb2

    schema = schema_pb2.Schema()
    features = {name: (_FEATURES[kind], 1) for name, kind in layout.columns().items()}
    if layout.dtype == "float32":
        features["embedding"] = ("FLOAT", 0 if layout.tokens else layout.dimension)
    else:
        features["embedding"] = ("BYTES", 1)
    always = {"id", "chunk", "n_chunks", "content_hash", "embedding", "scale", "n_tokens", "text"}
    for name in sorted(features):
        kind, size = features[name]
        feature = schema.feature.add(name=name, type=schema_pb2.FeatureType.Value(kind))
        if name in always:
            feature.presence.min_fraction = 1.0
            feature.presence.min_count = 1
        if size and name in always:
            feature.shape.dim.add(size=size)
        else:
            feature.value_count.min = 0 if name in always else 1
            if size:
                feature.value_count.max = size
    return schema


def build_record_batch(rows: list[Row], layout: TableLayout) -> pa.RecordBatch:
    """Rows as an Arrow batch in which every column is a list, as tfx-bsl's encoder wants it."""
    columns = {name: _one_value_lists(values, layout.columns()[name]) for name, values in layout.values(rows).items()}
    if layout.dtype == "float32":
        numbers = pa.array(np.frombuffer(b"".join(row.vector for row in rows), "<f4"))
        ends = np.cumsum([0, *(len(row.vector) // 4 for row in rows)])
        columns["embedding"] = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), numbers)
    else:
        columns["embedding"] = _lists(pa.array([row.vector for row in rows], pa.binary()))
    names = sorted(columns)
    return pa.RecordBatch.from_arrays([columns[name] for name in names], names)


def _one_value_lists(values: list[Any], kind: str) -> pa.Array:
    if kind == "bool":
        values = [None if value is None else int(value) for value in values]
    array = pa.array(values, _ARROW[kind])
    if array.null_count:
        return pa.array([None if value is None else [value] for value in values], pa.large_list(_ARROW[kind]))
    return _lists(array)


def _lists(values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(np.arange(len(values) + 1), pa.int64()), values)


def _read_batch(batch: pa.RecordBatch, layout: TableLayout) -> Columns:
    read: Columns = {}
    for name, kind in layout.columns().items():
        values = [lists[0] if lists else None for lists in batch.column(name).to_pylist()]
        if kind == "string":
            values = [None if value is None else value.decode() for value in values]
        elif kind == "bool":
            values = [None if value is None else bool(value) for value in values]
        read[name] = values
    embedding = batch.column("embedding")
    if layout.dtype == "float32":
        read["embedding"] = list_bytes(embedding)
    else:
        read["embedding"] = [lists[0] for lists in embedding.to_pylist()]
    return read
