"""A table in a DuckDB file: `duckdb://FILE/TABLE`. Every run is one transaction.

The folder FILE.embeam/TABLE beside the database holds the lock, the journal and dead letters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError, TableError, ValidationError, first_line
from pipeline.files import absolute_path, join, write_atomically
from pipeline.signals import PUBLISHING
from pipeline.sinks.index import Index
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.readers import VectorReader
from pipeline.tables.attempts import clean_up
from pipeline.tables.database import (
    DESCRIPTIONS,
    KEPT_DESCRIPTION,
    RUNS_SUFFIX,
    DatabaseReader,
    DatabaseStore,
    build_indexes,
    check_columns,
    check_database_config,
    check_identifier,
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
    from duckdb import DuckDBPyConnection

SCHEME = "duckdb://"
INDEXES = "indexes.json"  # in the work folder: vector indexes that are dropped during a commit
_TYPES = {
    "string": "VARCHAR",
    "int": "BIGINT",
    "float": "DOUBLE",
    "bool": "BOOLEAN",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
}


class DuckdbStore(DatabaseStore):
    """A table of a DuckDB file."""

    def __init__(self, output: str, work_dir: str = "") -> None:
        path, _, table = output.removeprefix(SCHEME).rpartition("/")
        if not path or not table:
            raise ConfigError(f"--output={output} is not duckdb://FILE/TABLE, such as duckdb://vectors.duckdb/notes")
        self.shown = output
        self.table = check_identifier(table, output)
        self.path = absolute_path(path)
        self.work = os.path.join(f"{self.path}.embeam", table)

    def check(self, config: EmbedConfig) -> None:
        check_database_config(config)
        with connect(":memory:") as connection:  # checks that DuckDB and its index extension are installed
            if config.reindex.create_vector_index:
                load_vss(connection)
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise TableError(f"--output={self.shown}: there is no folder {folder}; make it first")
        if not os.path.exists(self.path):
            return
        with connect(self.path, read_only=True) as connection:
            if has_table(connection, self.table) and not has_table(connection, self.table + RUNS_SUFFIX):
                raise TableError(
                    f"--output={self.shown}: {self.path} has a table {self.table} that embeam did not make; "
                    "name another one"
                )

    def check_columns(self, live: Manifest | None, layout: TableLayout) -> None:
        if not os.path.exists(self.path):
            return
        with connect(self.path, read_only=True) as connection:
            there = read_types(connection, self.table) if has_table(connection, self.table) else {}
        check_columns(self.table, there, _TYPES, layout, own_columns(live))

    def check_writable(self) -> None:
        with connect(self.path):
            pass

    def read_live(self) -> Live:
        if not os.path.exists(self.path):
            return Live(None, "")
        with connect(self.path, read_only=True) as connection:
            return read_last_run(connection, self.table)

    def read_indexes(self, live: Manifest, scratch: str, lost: set[str]) -> Iterator[tuple[str, Index]]:
        with connect(self.path, read_only=True) as connection:
            names = ", ".join(map(quote, index_columns(live.layout)))
            query = connection.execute(f"SELECT {names} FROM {quote(self.table)}")
            yield from build_indexes(iterate_rows(query), live.layout, scratch)

    def reader(self, live: Manifest, scratch: str) -> VectorReader:
        return DuckdbReader(live.layout, scratch, self.path, self.table)

    def committer(self, plan: CommitPlan) -> DuckdbCommit:
        return DuckdbCommit(plan, self.path, self.table)

    def read_columns(self, live: Manifest) -> Iterator[Columns]:
        with connect(self.path, read_only=True) as connection:
            names = [*live.layout.columns(), "embedding"]
            query = connection.execute(f"SELECT {', '.join(map(quote, names))} FROM {quote(self.table)}")
            for batch in query.to_arrow_reader(1024):
                columns = {name: batch.column(name).to_pylist() for name in live.layout.columns()}
                numbers = batch.column("embedding").flatten().to_numpy(zero_copy_only=False).astype("<f4")
                rows = numbers.reshape(len(batch), -1)
                yield columns | {"embedding": [row.tobytes() for row in rows]}


@dataclass(frozen=True)
class DuckdbReader(DatabaseReader):
    """Reads vectors from the database by content."""

    path: str
    table: str

    def fetch(self, contents: Sequence[str]) -> list[dict[str, Any]]:
        with connect(self.path, read_only=True) as connection:
            query = connection.execute(
                f"SELECT {', '.join(self.fetched)}, embedding FROM {quote(self.table)} WHERE content_hash IN "
                "(SELECT unnest(?))",
                [list(contents)],
            )
            rows = list(iterate_rows(query))
        return [row | {"embedding": np.array(row["embedding"], "<f4").tobytes()} for row in rows]


@dataclass(frozen=True)
class DuckdbCommit(Committer):
    """Publishes a run in one transaction."""

    plan: CommitPlan
    path: str
    table: str

    def commit(self, results: Results) -> str:
        """Checks, completes and publishes what a run has produced. Returns the run's name.

        Raises:
          RunError: if there is too little to publish, or validation stops it.
          TableError: if another run has changed the table, or the database cannot be written to.
        """
        publication, work = self.plan.publication, self.plan.publication.table
        completion = complete_changes(self.plan, results)
        manifest, dead_letters = describe_run(completion)
        removed = join(attempts_folder(work, publication.name), "removed.jsonl")
        with open(removed, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": name}) + "\n" for name in list_removed(completion))
        rows = [shard.path for shard in completion.shards if shard.kind == "embeddings"]
        with PUBLISHING, connect(self.path) as connection:
            indexes = self._drop_indexes(connection, work)
            connection.execute("BEGIN")
            self._write(connection, manifest, rows, removed)
            connection.execute("COMMIT")
            if publication.reindex.create_vector_index and not indexes:
                indexes = {f"{self.table}_embedding": "cosine"}
            build_indexes_again(connection, self.table, indexes)
            connection.execute("CHECKPOINT")
            keep_dead_letters(work, manifest, dead_letters)
            clean_up(work, publication.name, manifest.fingerprint)
        if os.path.exists(join(work, INDEXES)):
            os.remove(join(work, INDEXES))
        return publication.name

    def _write(self, connection: DuckDBPyConnection, manifest: Manifest, rows: list[str], removed: str) -> None:
        table, runs = quote(self.table), quote(self.table + RUNS_SUFFIX)
        live = read_last_run(connection, self.table)
        if live.version != self.plan.publication.version:
            raise TableError(
                f"another run has changed {self.table} in {self.path} since this one started; "
                "run the same command again"
            )
        layout = manifest.layout
        columns = {name: _TYPES[kind] for name, kind in database_columns(layout).items()}
        columns["embedding"] = f"FLOAT[{layout.dimension}]"
        defined = ", ".join(f"{quote(name)} {kind}" for name, kind in columns.items())
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({defined})")
        connection.execute(f"CREATE TABLE IF NOT EXISTS {runs} (run_id VARCHAR, created_at TIMESTAMPTZ, manifest JSON)")
        check_columns(self.table, read_types(connection, self.table), _TYPES, layout, own_columns(live.manifest))
        set_columns(connection, self.table, columns)
        if os.path.getsize(removed):
            connection.execute(
                f"DELETE FROM {table} WHERE id IN (SELECT id FROM read_json(?, columns={{id: 'VARCHAR'}}))", [removed]
            )
        if rows:
            connection.execute(
                f"INSERT INTO {table} BY NAME SELECT * REPLACE (embedding::FLOAT[{layout.dimension}] AS embedding), "
                "? AS fingerprint, ? AS run_id, ?::TIMESTAMPTZ AS embedded_at FROM read_parquet(?)",
                [manifest.fingerprint, manifest.snapshot, manifest.created_at, rows],
            )
        n_rows = count_rows(connection, f"SELECT count(*) FROM {table}")
        if n_rows != manifest.rows:
            raise ValidationError(f"{self.table} would have {n_rows:,} rows instead of {manifest.rows:,}; run again")
        connection.execute(
            f"INSERT INTO {runs} VALUES (?, ?, ?)", [manifest.snapshot, manifest.created_at, manifest.to_json()]
        )

    def _drop_indexes(self, connection: DuckDBPyConnection, work: str) -> dict[str, str]:
        """Drops vector indexes, because they may be corrupt after a crash; returns their names and metrics.

        They are written to a file first, so that the next run builds them again if this one is killed.
        """
        noted = join(work, INDEXES)
        indexes: dict[str, str] = {}
        if os.path.exists(noted):
            with open(noted, encoding="utf-8") as file:
                indexes = json.load(file)
        if has_vector_index(connection, self.table):
            load_vss(connection)
            query = "SELECT index_name, metric FROM pragma_hnsw_index_info() WHERE table_name = ?"
            indexes |= dict(connection.execute(query, [self.table]).fetchall())
        if indexes:
            write_atomically(noted, json.dumps(indexes))
            for name in indexes:
                connection.execute(f"DROP INDEX IF EXISTS {quote(name)}")
            connection.execute("CHECKPOINT")
        return indexes


@contextmanager
def connect(path: str, read_only: bool = False) -> Iterator[DuckDBPyConnection]:
    """Opens a database.

    Raises:
      ConfigError: if DuckDB is not installed.
      TableError: if the file is not a database, is in use by another process, or a statement fails.
    """
    try:
        import duckdb
    except ImportError:
        raise ConfigError("DuckDB is not installed; pip install duckdb") from None
    try:
        connection = duckdb.connect(path, read_only=read_only)
        try:
            yield connection
        finally:
            connection.close()
    except duckdb.Error as error:
        fix = "close the other program" if "lock" in str(error) else "check the file"
        raise TableError(f"{path} cannot be used: {first_line(error)}; {fix}") from error


def quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def count_rows(connection: DuckDBPyConnection, query: str, *parameters: str) -> int:
    """The single number that a query returns."""
    ((n,),) = connection.execute(query, parameters).fetchall()
    return int(n)


def has_table(connection: DuckDBPyConnection, table: str) -> bool:
    query = "SELECT count(*) FROM duckdb_tables() WHERE table_name = ? AND schema_name = 'main' AND NOT internal"
    return count_rows(connection, query, table) > 0


def read_last_run(connection: DuckDBPyConnection, table: str) -> Live:
    """The manifest of the last run, and its name as the version."""
    if not has_table(connection, table + RUNS_SUFFIX):
        return Live(None, "")
    row = connection.execute(
        f"SELECT run_id, manifest FROM {quote(table + RUNS_SUFFIX)} ORDER BY run_id DESC LIMIT 1"
    ).fetchone()
    return Live(Manifest.from_json(row[1]), row[0]) if row else Live(None, "")


def read_types(connection: DuckDBPyConnection, table: str) -> dict[str, str]:
    """The columns of a table, with their types."""
    return {row[0]: row[1] for row in connection.execute(f"DESCRIBE {quote(table)}").fetchall()}


def own_columns(live: Manifest | None) -> set[str]:
    """The columns that the last run has written, whose types may change."""
    return set(database_columns(live.layout)) if live else set()


def set_columns(connection: DuckDBPyConnection, table: str, columns: dict[str, str]) -> None:
    """Adds missing columns to a table, and leaves all other columns, including the user's.

    Args:
      connection: to the database, in a transaction.
      table: the table's name.
      columns: the needed columns, by name, with their types; values that do not fit another type become NULL.
    """
    there = read_types(connection, table)
    for name, kind in columns.items():
        column = f"{quote(table)}.{quote(name)}"
        if name not in there:
            connection.execute(f"ALTER TABLE {quote(table)} ADD COLUMN {quote(name)} {kind}")
        elif there[name] != kind:
            change = f"ALTER COLUMN {quote(name)} SET DATA TYPE {kind} USING TRY_CAST({quote(name)} AS {kind})"
            connection.execute(f"ALTER TABLE {quote(table)} {change}")
        description = DESCRIPTIONS.get(name, KEPT_DESCRIPTION).replace("'", "''")
        connection.execute(f"COMMENT ON COLUMN {column} IS '{description}'")


def iterate_rows(query: DuckDBPyConnection) -> Iterator[dict[str, Any]]:
    names = [column[0] for column in query.description]
    while rows := query.fetchmany(10_000):
        for row in rows:
            yield dict(zip(names, row, strict=True))


def has_vector_index(connection: DuckDBPyConnection, table: str) -> bool:
    query = "SELECT count(*) FROM duckdb_indexes() WHERE table_name = ? AND sql ILIKE '%USING HNSW%'"
    return count_rows(connection, query, table) > 0


def load_vss(connection: DuckDBPyConnection) -> None:
    """Loads the extension with the vector index.

    Raises:
      TableError: if it is not installed.
    """
    import duckdb

    try:
        try:
            connection.execute("LOAD vss")
        except duckdb.Error:
            from duckdb_extensions import import_extension  # a package with the extension

            import_extension("vss")
            connection.execute("LOAD vss")
    except (ImportError, duckdb.Error) as error:
        raise TableError(
            "the vector index needs DuckDB's extension vss, which is not installed; run `INSTALL vss` in DuckDB, or "
            "pip install 'embeam[duckdb]'"
        ) from error
    connection.execute("SET hnsw_enable_experimental_persistence = true")


def build_indexes_again(connection: DuckDBPyConnection, table: str, indexes: dict[str, str]) -> None:
    if indexes:
        load_vss(connection)
    for name, metric in indexes.items():
        options = f"WITH (metric = '{metric}')"
        connection.execute(f"CREATE INDEX {quote(name)} ON {quote(table)} USING HNSW (embedding) {options}")
