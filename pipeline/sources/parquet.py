"""Parquet: a file is split into row groups; only the needed columns are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ReadConfig
from pipeline.sources.compression import ByteReader, DamagedFile, FileError, open_file
from pipeline.sources.source import TO_THE_END, FileRange, InputFile, Record, Source, explain_missing, needed_fields

_BATCH_ROWS = 1024


class ParquetSource(Source):
    """Parquet files, as ranges of row groups."""

    reads_compressed = False
    is_text = False

    def split_file(self, file: InputFile, config: ReadConfig) -> list[FileRange]:
        if file.size <= config.split_bytes:  # planning does not open every one of many small files
            return [FileRange.whole(file)]
        try:
            with open_file(file.path) as stream:
                metadata = open_parquet(stream, file).metadata
                sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        except FileError:  # reading reports it
            return [FileRange.whole(file)]
        return group_row_groups(file, sizes, config.split_bytes)

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        file = file_range.file
        with open_file(file.path) as stream:
            parquet = open_parquet(stream, file)
            if missing := explain_missing(parquet.schema_arrow.names, config):
                yield Record(0, file_range.n_bytes, reason="missing_field", message=missing)
                return
            metadata = parquet.metadata
            end = metadata.num_row_groups if file_range.end == TO_THE_END else file_range.end
            rows = [metadata.row_group(i).num_rows for i in range(end)]
            position, n_rows, done = sum(rows[: file_range.start]), sum(rows[file_range.start :]), 0
            columns = [name for name in needed_fields(config) if name in parquet.schema_arrow.names]
            groups = list(range(file_range.start, end))
            batches = parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=columns)
            for batch in _guard(batches, file):
                for values in batch_to_rows(batch):
                    done += 1
                    yield Record(position, file_range.n_bytes * done // n_rows, values)
                    position += 1


def group_row_groups(file: InputFile, sizes: list[int], split_bytes: int) -> list[FileRange]:
    """Cuts a file into runs of row groups of about `split_bytes` stored bytes each.

    Args:
      file: the file.
      sizes: bytes of each row group, in any unit: only their shares matter.
      split_bytes: wanted size of a range.
    """
    if not sizes:
        return [FileRange.whole(file)]
    scale = file.size / max(sum(sizes), 1)
    ranges, start, size = [], 0, 0.0
    for i, group_size in enumerate(sizes):
        if i > start and size + group_size * scale > split_bytes:
            ranges.append(FileRange(file, start, i, round(size)))
            start, size = i, 0.0
        size += group_size * scale
    return [*ranges, FileRange(file, start, len(sizes), file.size - sum(r.n_bytes for r in ranges))]


def open_parquet(stream: ByteReader, file: InputFile) -> pq.ParquetFile:
    """Reads the footer.

    Raises:
      DamagedFile: if it is not a Parquet file.
    """
    try:
        return pq.ParquetFile(stream, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(f"{file.path} is not a readable Parquet file: {error}") from error


def batch_to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as mappings; strings that are not UTF-8 come as bytes, for the field checks to reject one by one."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [_strings_to_bytes(column) for column in batch.columns]
        return pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()


def _strings_to_bytes(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()) if pa.types.is_string(column.type) else column


def _guard(batches: Iterator[pa.RecordBatch], file: InputFile) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            raise DamagedFile(f"{file.path} is damaged: {error}") from error
        yield batch
