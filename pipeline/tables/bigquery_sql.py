"""The columns and the statements of a table in BigQuery."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.read_config import KeptField
from pipeline.sinks.layout import TableLayout
from pipeline.sources.bigquery_client import BigQueryName
from pipeline.tables.database import DESCRIPTIONS, KEPT_DESCRIPTION, RUNS_SUFFIX, database_columns
from pipeline.tables.manifest import Manifest

if TYPE_CHECKING:
    from google.cloud.bigquery import Client

TYPES = {"string": "STRING", "int": "INTEGER", "float": "FLOAT", "bool": "BOOLEAN", "timestamp": "TIMESTAMP"}
SQL_TYPES = {"string": "STRING", "int": "INT64", "float": "FLOAT64", "bool": "BOOL", "timestamp": "TIMESTAMP"}
MARKER = "is_marker"
RUN_COLUMNS = (("run_id", "STRING"), ("created_at", "TIMESTAMP"), ("manifest", "STRING"))  # of the table of manifests
TOO_LATE = "another run was faster"
# https://cloud.google.com/bigquery/docs/schemas#column_names
_COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,299}")
_RESERVED = re.compile(r"_TABLE_|_FILE_|_PARTITION|_ROW_TIMESTAMP|__ROOT__|_COLIDENTIFIER|_CHANGE_", re.IGNORECASE)


def runs_of(name: BigQueryName) -> BigQueryName:
    """The table of manifests beside a table."""
    return name._replace(table=name.table + RUNS_SUFFIX)


def check_column_names(fields: Iterable[KeptField], output: str) -> None:
    """Raises ConfigError if a kept field has a name that BigQuery does not allow, or that the staging table needs."""
    for field in fields:
        if not _COLUMN_NAME.fullmatch(field.name) or _RESERVED.match(field.name) or field.name.lower() == MARKER:
            raise ConfigError(
                f"--keep_fields={field.source}: {output} cannot have a column {field.name!r}; rename the field in the "
                "input: at most 300 letters (a to z), digits and _, no digit first, no name or prefix that BigQuery "
                f"or embeam reserves (_TABLE_, _FILE_, _PARTITION, _CHANGE_, {MARKER})"
            )


def read_types(connection: Client, name: BigQueryName) -> dict[str, str]:
    """The columns of a table, with their types as in `SQL_TYPES`."""
    spelled = {TYPES[kind]: SQL_TYPES[kind] for kind in TYPES}  # the service may return the older names
    types = {}
    for field in connection.get_table(name.plain).schema:
        kind = spelled.get(field.field_type, field.field_type)
        types[field.name] = f"ARRAY<{kind}>" if field.mode == "REPEATED" else kind
    return types


def schema_fields(layout: TableLayout) -> list[dict[str, Any]]:
    """The columns as BigQuery's API takes them."""
    fields = [
        {
            "name": name,
            "type": TYPES[kind],
            "mode": "NULLABLE",
            "description": DESCRIPTIONS.get(name, KEPT_DESCRIPTION),
        }
        for name, kind in database_columns(layout).items()
    ]
    vector = {"name": "embedding", "type": "FLOAT", "mode": "REPEATED", "description": DESCRIPTIONS["embedding"]}
    return [*fields, vector]


def staging_fields(layout: TableLayout) -> list[dict[str, Any]]:
    """As `schema_fields`, of the staging table: `is_marker` is true for rows that stand for an id alone."""
    return [*schema_fields(layout), {"name": MARKER, "type": "BOOLEAN", "mode": "NULLABLE"}]


def make_column_statement(name: BigQueryName, column: str, kind: str) -> str:
    """The DDL that gives a table a column that it may have already."""
    return f"ALTER TABLE {name.sql} ADD COLUMN IF NOT EXISTS `{column}` {SQL_TYPES[kind]}"


def make_merge(target: BigQueryName, staging: BigQueryName, columns: Sequence[str]) -> str:
    """One statement after which every id of the staging table has exactly its staged rows: none if it was deleted.

    The source has one row more for each id, with the id in `replaced`. It alone matches what the target has of that
    id, so that no row of the target matches two rows of the source, which BigQuery refuses. It is idempotent.

    Args:
      target: table with the columns; `id` is one of them.
      staging: table with the columns, and `is_marker`, true for rows that stand for an id alone: one that is gone.
      columns: their names.
    """
    names = ", ".join(f"`{name}`" for name in columns)
    values = ", ".join(f"S.`{name}`" for name in columns)
    return f"""MERGE {target.sql} AS T
USING (
  SELECT id AS replaced, {names} FROM {staging.sql}
  WHERE TRUE QUALIFY ROW_NUMBER() OVER (PARTITION BY id ORDER BY id) = 1
  UNION ALL
  SELECT CAST(NULL AS STRING), {names} FROM {staging.sql} WHERE NOT is_marker
) AS S
ON T.id = S.replaced
WHEN MATCHED THEN DELETE
WHEN NOT MATCHED BY TARGET AND S.replaced IS NULL THEN INSERT ({names}) VALUES ({values})"""


def make_script(name: BigQueryName, merge: str, manifest: Manifest, version: str) -> str:
    """The transaction: it does nothing if another run has published since this one began.

    Args:
      name: of the table.
      merge: statement that changes its rows.
      manifest: of the run.
      version: of the table when the run began: the name of the last run, or "".
    """
    runs, run = runs_of(name).sql, json.dumps(manifest.snapshot)
    rest = json.dumps(manifest.to_json(), ensure_ascii=False)
    return f"""BEGIN TRANSACTION;
{merge};
INSERT INTO {runs} (run_id, created_at, manifest)
SELECT {run}, TIMESTAMP {json.dumps(manifest.created_at)}, {rest};
SELECT IF((SELECT COALESCE(MAX(run_id), '') FROM {runs} WHERE run_id != {run}) = {json.dumps(version)},
  1, ERROR('embeam: {TOO_LATE}'));
COMMIT TRANSACTION;"""


def make_index_statement(name: BigQueryName) -> str:
    """The DDL of a vector index by cosine distance. BigQuery builds none on tables under 10 MB."""
    return (
        f"CREATE VECTOR INDEX IF NOT EXISTS `{name.table}_embedding` ON {name.sql} (embedding)\n"
        "OPTIONS (index_type = 'IVF', distance_type = 'COSINE')"
    )


def make_search_query(name: BigQueryName, dimension: int) -> str:
    """A query for the rows nearest to a vector."""
    return f"""DECLARE query_vector ARRAY<FLOAT64> DEFAULT [/* {dimension} numbers: the vector of a query */];
SELECT base.id, base.chunk, distance
FROM VECTOR_SEARCH(
  TABLE {name.sql}, 'embedding', (SELECT query_vector AS embedding), 'embedding',
  top_k => 10, distance_type => 'COSINE')
ORDER BY distance"""
