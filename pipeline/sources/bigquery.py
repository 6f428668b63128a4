"""BigQuery: a table is split into the streams of a read session; only the needed columns are read.

A session shows the table as it was when the session was made. A stream gives the same rows in the same order whenever
it is read, for the six hours that a session lasts; the rows of two sessions are cut up differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.errors import ConfigError, InputError, first_line
from pipeline.read_config import ReadConfig
from pipeline.sources.arrow_schema import describe_schema, find_leaves
from pipeline.sources.arrow_values import batch_to_rows
from pipeline.sources.bigquery_client import BigQueryName, billing_project, client, read_client
from pipeline.sources.source import TO_THE_END, FileRange, InputFile, Record, Source, explain_missing, needed_fields

MAX_STREAMS = 1000  # the service gives no more
SESSION_HOURS = 6
_BATCH_ROWS = 1024


class TableSession(NamedTuple):
    """A read session.

    Attributes:
      schema: the columns that it gives.
      streams: names of its streams; none for an empty table.
      n_bytes: that it reads, about.
    """

    schema: pa.Schema
    streams: list[str]
    n_bytes: int


class BigQuerySource(Source):
    """Tables, as ranges of one stream each.

    A range's `start` is the number of its stream and `end` how many streams there are; the file's `name` is the
    stream's. A position is unique in the table and ascends in a stream, but says nothing outside of its session.
    """

    reads_compressed = False
    is_text = False

    def split_file(self, file: InputFile, config: ReadConfig) -> list[FileRange]:
        wanted = max(1, -(-file.size // config.split_bytes))
        streams = open_session(BigQueryName.parse(file.path), config, min(wanted, MAX_STREAMS)).streams
        n = len(streams)
        sizes = [end - start for start, end in pairwise(file.size * i // n for i in range(n + 1))] if n else []
        return [
            FileRange(file._replace(name=stream), i, n, size)
            for i, (stream, size) in enumerate(zip(streams, sizes, strict=True))
        ]

    def describe_fields(self, file: InputFile, config: ReadConfig) -> dict[str, str]:
        return describe_schema(_create_session(BigQueryName.parse(file.path), [], "", 1).schema)

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        file, number, n_streams = file_range.file, file_range.start, file_range.end
        streams = [file.name]
        if n_streams == TO_THE_END:
            streams, n_streams = open_session(BigQueryName.parse(file.path), config, 1).streams, 1
        n_read, row = 0, 0
        for stream in streams:
            for batch, begin, end in read_stream(stream, file.path):
                for i, values in enumerate(batch_to_rows(batch), start=1):
                    share = begin + (end - begin) * i / batch.num_rows
                    n_read = max(n_read, round(file_range.n_bytes * share))
                    yield Record(row * n_streams + number, n_read, values)
                    row += 1


def require_id_field(path: str, config: ReadConfig) -> None:
    """Checks that there is an id field: rows of a table have no lasting positions to make ids from.

    Raises:
      ConfigError: if there is no id field.
    """
    if not config.id_field:
        raise ConfigError(
            f"--input={path}: the rows of a BigQuery table have no lasting order to make ids from; name the column "
            "that holds the id, as in --id_field=id"
        )


def measure_table(name: BigQueryName, config: ReadConfig) -> int:
    """About how many bytes of a table a run reads; 0 if it is empty.

    Args:
      name: the table.
      config: names of the fields.

    Raises:
      InputError: if it cannot be read, or lacks the id or a text column.
    """
    return open_session(name, config, 1).n_bytes


def open_session(name: BigQueryName, config: ReadConfig, max_streams: int) -> TableSession:
    """Makes a read session for the needed columns.

    Args:
      name: the table.
      config: names of the fields, and `row_restriction`: a condition in SQL that the read rows fulfil.
      max_streams: how many streams there may be; a table under a megabyte has one.

    Raises:
      InputError: if it cannot be read, or lacks the id or a text column.
    """
    schema = _create_session(name, [], "", 1).schema
    needed = [path for path in needed_fields(config) if find_leaves(list(schema), path) is not None]
    if missing := explain_missing(schema.names, config, needed):
        raise InputError(f"{name}: {missing}")
    selected = list(dict.fromkeys(path.partition(".")[0] for path in needed))  # no column has a dot in its name
    return _create_session(name, selected, config.row_restriction, max_streams)


def open_table_session(name: BigQueryName, columns: Sequence[str]) -> TableSession:
    """Makes a read session of one stream for some columns of all rows.

    Raises:
      InputError: if the table cannot be read.
    """
    return _create_session(name, list(columns), "", 1)


def materialize_query(sql: str, into: BigQueryName, hours: int = 48) -> None:
    """Runs a query and keeps its rows in a table that removes itself.

    Args:
      sql: one SELECT.
      into: the table, which is replaced if there is one.
      hours: until BigQuery drops it.

    Raises:
      InputError: if the query fails.
    """
    from google.api_core.exceptions import GoogleAPIError

    lifetime = f"expiration_timestamp = TIMESTAMP_ADD(CURRENT_TIMESTAMP(), INTERVAL {hours} HOUR)"
    select = sql.strip().rstrip(";")
    statement = f"CREATE OR REPLACE TABLE {into.sql}\nOPTIONS ({lifetime})\nAS (\n{select}\n)"
    try:
        client(into.project).query(statement).result()
    except GoogleAPIError as error:
        raise InputError(f"the query for the input fails: {first_line(error)}") from error


def read_stream(stream: str, path: str) -> Iterator[tuple[pa.RecordBatch, float, float]]:
    """Reads a stream from its first row on.

    Args:
      stream: its name.
      path: of its table, for errors.

    Yields:
      Rows, and which share of the stream was read before and after them.

    Raises:
      InputError: if the service fails.
    """
    from google.api_core.exceptions import GoogleAPIError

    schema = None
    try:
        for message in read_client().read_rows(stream):
            if schema is None:
                schema = _parse_schema(message)
            batch = pa.ipc.read_record_batch(pa.py_buffer(message.arrow_record_batch.serialized_record_batch), schema)
            progress = message.stats.progress
            begin, width = progress.at_response_start, progress.at_response_end - progress.at_response_start
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                piece = batch.slice(start, _BATCH_ROWS)
                shares = (start / batch.num_rows, (start + piece.num_rows) / batch.num_rows)
                yield piece, begin + width * shares[0], begin + width * shares[1]
    except GoogleAPIError as error:
        raise InputError(
            f"{path} could not be read to its end: {first_line(error)}; finished vectors are kept, run the same "
            f"command again (a table can be read for {SESSION_HOURS} hours from the start of a run)"
        ) from error


def _create_session(name: BigQueryName, selected: list[str], restriction: str, max_streams: int) -> TableSession:
    from google.api_core.exceptions import GoogleAPIError
    from google.cloud.bigquery_storage_v1 import types

    options = types.ReadSession.TableReadOptions(selected_fields=selected, row_restriction=restriction)
    wanted = types.ReadSession(table=name.resource, data_format=types.DataFormat.ARROW, read_options=options)
    try:
        session = read_client().create_read_session(
            parent=f"projects/{billing_project(name)}", read_session=wanted, max_stream_count=max_streams
        )
    except GoogleAPIError as error:
        raise InputError(f"--input={name} cannot be read: {first_line(error)}") from error
    streams = [stream.name for stream in session.streams]
    return TableSession(_parse_schema(session), streams, session.estimated_total_bytes_scanned)


def _parse_schema(message: Any) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(message.arrow_schema.serialized_schema))
