"""Parquet: a file is split into row groups; only the needed columns are read."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.read_config import ReadConfig
from pipeline.sources.arrow_schema import count_leaves, describe_schema, find_leaves
from pipeline.sources.arrow_values import batch_to_rows
from pipeline.sources.compression import ByteReader, DamagedFile, FileError, WrongColumns, open_file
from pipeline.sources.source import (
    TO_THE_END,
    FileRange,
    InputFile,
    Record,
    Source,
    explain_missing,
    explain_repeated,
    needed_fields,
)

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

    def describe_fields(self, file: InputFile, config: ReadConfig) -> dict[str, str]:
        with open_file(file.path) as stream:
            return describe_schema(open_parquet(stream, file).schema_arrow)

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        file = file_range.file
        with open_file(file.path) as stream:
            parquet = open_parquet(stream, file)
            columns = select_columns(parquet, file, config)
            metadata = parquet.metadata
            end = metadata.num_row_groups if file_range.end == TO_THE_END else file_range.end
            rows = [metadata.row_group(i).num_rows for i in range(end)]
            position, n_rows, done = sum(rows[: file_range.start]), sum(rows[file_range.start :]), 0
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


def select_columns(parquet: pq.ParquetFile, file: InputFile, config: ReadConfig) -> list[str]:
    """The paths of the Parquet columns that hold the needed fields: of nested ones no more than is needed.

    Raises:
      WrongColumns: if an id or a text column is missing, or there are two columns of one needed name.
    """
    schema, names = parquet.schema_arrow, parquet.schema_arrow.names
    found = {name: leaves for name in needed_fields(config) if (leaves := find_leaves(list(schema), name)) is not None}
    if missing := explain_missing(names, config, found):
        raise WrongColumns(f"{file.path}: {missing}")
    outermost = sorted({name if name in names else name.partition(".")[0] for name in found})
    if repeated := explain_repeated(names, outermost):
        raise WrongColumns(f"{file.path}: {repeated}")
    if sum(count_leaves(field.type) for field in schema) != len(parquet.schema):
        return outermost
    wanted = sorted({leaf for leaves in found.values() for leaf in leaves})
    return [parquet.schema.column(leaf).path for leaf in wanted]


def _guard(batches: Iterator[pa.RecordBatch], file: InputFile) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            raise DamagedFile(f"{file.path} is damaged: {error}") from error
        yield batch
