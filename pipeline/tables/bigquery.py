"""A table in BigQuery: `bq://PROJECT.DATASET.TABLE`. Every run is one MERGE.

New rows, and markers for deleted ids, are loaded into a staging table; then one transaction replaces the rows of every
id in it and writes the run's manifest. The folder WORK_DIR/PROJECT.DATASET.TABLE holds the lock, the journal and
dead letters.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError, TableError, ValidationError, first_line
from pipeline.files import create_file, exists, is_local, join, open_file, read_text
from pipeline.signals import PUBLISHING
from pipeline.sinks.index import Index
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.parquet import decode_stored, read_stored
from pipeline.sinks.readers import VectorReader
from pipeline.sinks.writing import ROWS, Shard
from pipeline.sources.bigquery import open_table_session, read_stream
from pipeline.sources.bigquery_client import BigQueryName, LoadParameters, client
from pipeline.tables.attempts import clean_up
from pipeline.tables.bigquery_sql import (
    MARKER,
    RUN_COLUMNS,
    SQL_TYPES,
    TOO_LATE,
    check_column_names,
    make_column_statement,
    make_index_statement,
    make_merge,
    make_script,
    read_types,
    runs_of,
    schema_fields,
    staging_fields,
)
from pipeline.tables.database import (
    RUNS_SUFFIX,
    DatabaseReader,
    DatabaseStore,
    build_indexes,
    check_columns,
    check_database_config,
    complete_changes,
    database_columns,
    describe_run,
    index_columns,
    keep_dead_letters,
    list_removed,
)
from pipeline.tables.manifest import Manifest, attempts_folder
from pipeline.tables.store import CommitPlan, Committer, Live, Results

if TYPE_CHECKING:
    from google.cloud.bigquery import Client

_STAGING_HOURS = 24


class BigqueryStore(DatabaseStore):
    """A table of BigQuery."""

    def __init__(self, output: str, work_dir: str = "") -> None:
        self.shown = output
        self.name = BigQueryName.parse(output, "output")
        self.work = join(work_dir, self.name.plain) if work_dir else ""

    def check(self, config: EmbedConfig) -> None:
        check_database_config(config)
        check_column_names(config.read.kept_fields(), self.shown)
        if not self.work or is_local(self.work):
            raise ConfigError(
                f"--output={self.shown} needs a folder of Cloud Storage for what is loaded and for the journal; "
                "add --work_dir=gs://BUCKET/FOLDER"
            )
        with explained(self.name):
            connection = client(self.name.project)
            connection.get_dataset(f"{self.name.project}.{self.name.dataset}")
            if find_table(connection, self.name) and not find_table(connection, runs_of(self.name)):
                raise TableError(f"--output={self.shown} is a table that embeam did not make; name another one")

    def check_columns(self, live: Manifest | None, layout: TableLayout) -> None:
        with explained(self.name):
            connection = client(self.name.project)
            there = read_types(connection, self.name) if find_table(connection, self.name) else {}
        check_columns(self.name, there, SQL_TYPES, layout)

    def check_writable(self) -> None:
        """Does nothing: loading reports errors. A trial table would count against the quota of the dataset."""

    def read_live(self) -> Live:
        with explained(self.name):
            connection = client(self.name.project)
            runs = runs_of(self.name)
            if not find_table(connection, runs):
                return Live(None, "")
            query = f"SELECT run_id, manifest FROM {runs.sql} ORDER BY run_id DESC LIMIT 1"
            rows = list(connection.query(query).result())
        return Live(Manifest.from_json(rows[0]["manifest"]), rows[0]["run_id"]) if rows else Live(None, "")

    def read_indexes(self, live: Manifest, scratch: str, lost: set[str]) -> Iterator[tuple[str, Index]]:
        rows = (row for batch in self._read(index_columns(live.layout)) for row in batch.to_pylist())
        yield from build_indexes(rows, live.layout, scratch)

    def reader(self, live: Manifest, scratch: str) -> VectorReader:
        return BigqueryReader(live.layout, scratch, self.name)

    def committer(self, plan: CommitPlan) -> BigqueryCommit:
        return BigqueryCommit(plan, self.name)

    def read_columns(self, live: Manifest) -> Iterator[Columns]:
        names = list(live.layout.columns())
        for batch in self._read([*names, "embedding"]):
            columns = {name: batch.column(name).to_pylist() for name in names}
            yield columns | {"embedding": [pack_vector(row) for row in batch.column("embedding").to_pylist()]}

    def _read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for stream in open_table_session(self.name, columns).streams:
            for batch, _, _ in read_stream(stream, str(self.name)):
                yield batch


@dataclass(frozen=True)
class BigqueryReader(DatabaseReader):
    """Reads vectors from BigQuery by content."""

    name: BigQueryName

    def fetch(self, contents: Sequence[str]) -> list[dict[str, Any]]:
        from google.cloud import bigquery

        names = ", ".join(self.fetched)
        query = f"SELECT {names}, embedding FROM {self.name.sql} WHERE content_hash IN UNNEST(@contents)"
        parameters = [bigquery.ArrayQueryParameter("contents", "STRING", list(contents))]
        with explained(self.name):
            found = client(self.name.project).query(query, bigquery.QueryJobConfig(query_parameters=parameters))
            rows = [dict(row) for row in found.result()]
        return [row | {"embedding": pack_vector(row["embedding"])} for row in rows]


class Changes(NamedTuple):
    """What a run loads; kept in the attempt's folder, so that a repeated commit loads the same.

    Attributes:
      rows: files with new rows.
      dead_letters: files with dead letters.
      removed: file with the ids of documents whose rows are removed.
      n_staged: rows and markers together.
      manifest: of the run.
    """

    rows: list[str]
    dead_letters: list[list[Any]]
    removed: str
    n_staged: int
    manifest: str


@dataclass(frozen=True)
class BigqueryCommit(Committer):
    """Publishes a run: `commit` completes it and makes the staging table, `finish` loads and merges."""

    plan: CommitPlan
    name: BigQueryName

    @property
    def staging(self) -> BigQueryName:
        run = re.sub(r"\W", "_", self.plan.publication.name)
        return self.name._replace(table=f"{self.name.table}_staging_{run}")

    def commit(self, results: Results) -> str:
        """Checks and completes what a run has produced. Returns the path of its `Changes`.

        Raises:
          RunError: if there is too little to publish, or validation stops it.
        """
        publication = self.plan.publication
        folder = attempts_folder(publication.table, publication.name)
        path = join(folder, "changes.json")
        if not exists(path):  # else the commit is repeated
            completion = complete_changes(self.plan, results)
            manifest, dead_letters = describe_run(completion)
            removed = list(list_removed(completion))
            create_file(join(folder, "removed.json"), json.dumps(removed).encode())
            rows = [shard for shard in completion.shards if shard.kind == ROWS]
            changes = Changes(
                [shard.path for shard in rows],
                [list(dead_letter) for dead_letter in dead_letters],
                join(folder, "removed.json"),
                sum(shard.rows for shard in rows) + len(removed),
                manifest.to_json(),
            )
            create_file(path, json.dumps(changes).encode())
        with explained(self.name):
            self._make_staging()
        return path

    def finish(self, pipeline: beam.Pipeline, committed: beam.PCollection) -> beam.PCollection:
        """Loads the changes and merges them: PCollection[str] with the run's name."""
        layout = self.plan.form.layout
        folder = attempts_folder(self.plan.publication.table, self.plan.publication.name)
        rows = (
            committed
            | "ListParts" >> beam.FlatMap(list_parts).with_output_types(tuple[str, str])
            | "SpreadParts" >> beam.Reshuffle()
            | "ReadPart" >> beam.ParDo(ReadPart(self.plan)).with_output_types(dict[str, Any])
        )
        # Rows and markers come from one step, because the local engine holds the inputs of a Flatten in memory.
        written = rows | "LoadStaging" >> beam.io.WriteToBigQuery(
            self.staging.beam,
            schema={"fields": staging_fields(layout)},
            method=beam.io.WriteToBigQuery.Method.FILE_LOADS,
            temp_file_format="AVRO",
            custom_gcs_temp_location=join(folder, "load"),
            create_disposition=beam.io.BigQueryDisposition.CREATE_NEVER,
            write_disposition=beam.io.BigQueryDisposition.WRITE_TRUNCATE,
            additional_bq_parameters=LoadParameters(),
        )
        return (
            pipeline
            | "BeginMerge" >> beam.Create([None], reshuffle=False)
            | "MergeStaging"
            >> beam.ParDo(
                MergeStaging(self),
                beam.pvalue.AsSingleton(committed),
                beam.pvalue.AsList(written.destination_load_jobid_pairs),  # waits for the load jobs
                beam.pvalue.AsList(written.destination_copy_jobid_pairs),
            )
        )

    def merge(self, path: str) -> str:
        """Replaces the rows of all ids of the staging table, and removes temporary files and tables of the run.

        Raises:
          ValidationError: if the staging table does not hold what was loaded.
          TableError: if another run has published meanwhile.
        """
        publication = self.plan.publication
        changes = Changes(*json.loads(read_text(path)))
        manifest = Manifest.from_json(changes.manifest)
        layout, work = self.plan.form.layout, publication.table
        with PUBLISHING, explained(self.name):
            connection = client(self.name.project)
            self._make_tables(connection)
            if self._is_published(connection):
                return publication.name
            (row,) = connection.query(f"SELECT COUNT(*) AS n FROM {self.staging.sql}").result()
            if row["n"] != changes.n_staged:
                raise ValidationError(
                    f"{self.staging} holds {row['n']:,} rows instead of {changes.n_staged:,}; "
                    "run the same command again"
                )
            columns = [*database_columns(layout), "embedding"]
            merge = make_merge(self.name, self.staging, columns) if changes.n_staged else "SELECT 1"
            run_script(connection, make_script(self.name, merge, manifest, publication.version))
            if not self._is_published(connection):
                raise TableError(
                    f"another run has changed {self.name} since this one started; run the same command again"
                )
            if publication.reindex.create_vector_index:
                connection.query(make_index_statement(self.name)).result()
            connection.delete_table(self.staging.plain, not_found_ok=True)
        keep_dead_letters(work, manifest, [Shard(*dead_letter) for dead_letter in changes.dead_letters])
        clean_up(work, publication.name, manifest.fingerprint)
        return publication.name

    def _make_staging(self) -> None:
        from google.cloud import bigquery

        connection = client(self.name.project)
        connection.delete_table(self.staging.plain, not_found_ok=True)
        schema = [bigquery.SchemaField.from_api_repr(field) for field in staging_fields(self.plan.form.layout)]
        table = bigquery.Table(self.staging.plain, schema)
        table.expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=_STAGING_HOURS)
        connection.create_table(table)

    def _make_tables(self, connection: Client) -> None:
        from google.cloud import bigquery

        layout = self.plan.form.layout
        table = bigquery.Table(self.name.plain, list(map(bigquery.SchemaField.from_api_repr, schema_fields(layout))))
        table.clustering_fields = ["id"]
        table.description = f"Embeddings, written by embeam; {self.name.table}{RUNS_SUFFIX} says how"
        connection.create_table(table, exists_ok=True)
        there = read_types(connection, self.name)
        check_columns(self.name, there, SQL_TYPES, layout)
        schema = [bigquery.SchemaField(name, kind) for name, kind in RUN_COLUMNS]
        connection.create_table(bigquery.Table(runs_of(self.name).plain, schema), exists_ok=True)
        for name, kind in database_columns(layout).items():
            if name not in there:
                connection.query(make_column_statement(self.name, name, kind)).result()

    def _is_published(self, connection: Client) -> bool:
        from google.cloud import bigquery

        query = f"SELECT COUNT(*) AS n FROM {runs_of(self.name).sql} WHERE run_id = @run"
        parameters = [bigquery.ScalarQueryParameter("run", "STRING", self.plan.publication.name)]
        (row,) = connection.query(query, bigquery.QueryJobConfig(query_parameters=parameters)).result()
        return bool(row["n"])


def list_parts(path: str) -> Iterator[tuple[str, str]]:
    """The files that hold a run's changes, and what is in each."""
    changes = Changes(*json.loads(read_text(path)))
    yield from (("rows", part) for part in changes.rows)
    yield "markers", changes.removed


class ReadPart(beam.DoFn):
    """A file of changes -> rows of the staging table."""

    def __init__(self, plan: CommitPlan) -> None:
        self.plan = plan

    def process(self, part: tuple[str, str]) -> Iterator[dict[str, Any]]:
        kind, path = part
        layout, facts = self.plan.form.layout, self.plan.publication
        written = datetime.datetime.fromtimestamp(facts.started, datetime.UTC)
        own = {"fingerprint": facts.facts["fingerprint"], "run_id": facts.name, "embedded_at": written}
        if kind == "markers":
            nothing = dict.fromkeys(database_columns(layout))
            for name in json.loads(read_text(path)):
                yield {**nothing, "id": name, "embedding": [], MARKER: True}
            return
        with open_file(path) as stream:
            for batch in read_stored(stream, layout):
                columns = decode_stored(batch, layout)
                vectors = columns.pop("embedding")
                for i, vector in enumerate(vectors):
                    values = {name: column[i] for name, column in columns.items()}
                    yield {**values, **own, "embedding": np.frombuffer(vector, "<f4").tolist(), MARKER: False}


class MergeStaging(beam.DoFn):
    def __init__(self, commit: BigqueryCommit) -> None:
        self.commit = commit

    def process(self, _: Any, path: str, loads: list[Any], copies: list[Any]) -> list[str]:
        return [self.commit.merge(path)]


@contextmanager
def explained(name: BigQueryName) -> Iterator[None]:
    """Turns errors of Google's client into ours."""
    from google.api_core.exceptions import GoogleAPIError, NotFound

    try:
        yield
    except NotFound as error:
        raise TableError(
            f"{name}: {first_line(error)}; check the name, and make the dataset first: "
            f"bq mk {name.project}:{name.dataset}"
        ) from error
    except GoogleAPIError as error:
        raise TableError(f"{name} cannot be used: {first_line(error)}") from error


def find_table(connection: Client, name: BigQueryName) -> bool:
    from google.api_core.exceptions import NotFound

    try:
        connection.get_table(name.plain)
    except NotFound:
        return False
    return True


def run_script(connection: Client, script: str) -> None:
    """Runs statements in one session without retries; the caller checks afterwards whether they took effect."""
    from google.api_core.exceptions import GoogleAPIError

    try:
        job = connection.query(script, retry=None, job_retry=None)  # type: ignore[arg-type]  # None is allowed
        job.result(retry=None, job_retry=None)
    except GoogleAPIError as error:
        if TOO_LATE not in str(error):
            raise


def pack_vector(numbers: Sequence[float]) -> bytes:
    return np.array(numbers, "<f4").tobytes()
