"""A table in BigQuery: its columns, runs that die or are overtaken, tables and queries as input; and all on gs://."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apache_beam.io.filesystems import FileSystems

import pipeline.run.job
import pipeline.tables.bigquery
from pipeline.cli.main import main
from pipeline.errors import ConfigError, EmbeamError, TableError
from pipeline.files import join
from pipeline.run.dry_run import make_dry_run
from pipeline.sources.bigquery_client import BigQueryName, client
from pipeline.tables.bigquery_sql import make_index_statement, make_search_query
from pipeline.tables.lock import LOCK, TableLock
from pipeline.tables.stores import open_store
from tests.support.bigquery import BigQueryEmulator, start_bigquery
from tests.support.corpora import write_jsonl
from tests.support.emulators import start_gcs
from tests.support.paths import ENCODER, ROOT
from tests.support.runs import make_config, run_pipeline, watch_encoder
from tests.support.stores import SETTINGS, assert_same_rows, first_records, run, second_records
from tests.support.tables import Rows, read_rows

emulator = pytest.mark.emulator


@pytest.fixture(scope="module")
def cloud() -> Iterator[BigQueryEmulator]:
    with start_gcs() as gcs, start_bigquery(gcs) as bigquery, bigquery.used_here():
        client().create_dataset("tables")
        yield bigquery


@emulator
def test_columns_are_described_and_clustered(cloud, tmp_path):
    output = f"bq://{cloud.project}.tables.described"
    run(tmp_path, first_records(), output=output, work_dir=cloud.gcs.path("described"))
    table = client().get_table(output.removeprefix("bq://"))
    assert table.clustering_fields == ["id"]
    fields = {field.name: field for field in table.schema}
    assert all(field.description for field in fields.values())
    assert (fields["embedding"].field_type, fields["embedding"].mode) == ("FLOAT", "REPEATED")
    assert {name: fields[name].field_type for name in ("id", "chunk", "embedded_at", "score", "fine", "year")} == {
        "id": "STRING",
        "chunk": "INTEGER",
        "embedded_at": "TIMESTAMP",
        "score": "FLOAT",
        "fine": "BOOLEAN",
        "year": "INTEGER",
    }
    (row,) = client().query(f"SELECT * FROM `{output[5:]}_runs`").result()
    assert json.loads(row["manifest"])["rows"] == 84
    left = [name for name in cloud.gcs.objects() if name.startswith("described/")]
    assert not left, "the journal, the lock or loaded files were left"


@emulator
@pytest.mark.parametrize(("value", "kind"), [(9.99, "FLOAT64"), ("ten", "STRING")])
def test_a_kept_field_whose_type_changes_is_refused_before_anything_is_encoded(cloud, tmp_path, value, kind):
    """BigQuery would refuse the rows themselves, only later and in other words."""
    settings = {"output": f"bq://{cloud.project}.tables.typed_{kind}", "work_dir": cloud.gcs.path(f"typed_{kind}")}
    records = [{"id": "a", "text": "a dog", "price": 10}]
    rows, _ = run(tmp_path, records, **settings, keep_fields="price")
    records.append({"id": "b", "text": "a cat", "price": value})
    stop = f"has a column 'price' of type INT64, but {kind} is needed; keep the type with --keep_fields=price:int, or"
    with watch_encoder() as watched, pytest.raises(TableError, match=stop):
        run(tmp_path, records, **settings, keep_fields="price")
    assert watched.n_batches == 0
    (said,) = make_dry_run(make_config(tmp_path, **{**SETTINGS, **settings, "keep_fields": "price"})).stops
    assert stop in said
    assert_same_rows(read_rows(settings["output"]), rows)
    rows, manifest = run(tmp_path, records, **settings, keep_fields="price:int")
    assert [rows[name, 0]["price"] for name in "ab"] == [10, None] and manifest.counts["reuse"]["unchanged"] == 1


@emulator
def test_missing_datasets_and_work_folders_are_said_first(cloud, tmp_path):
    with pytest.raises(TableError, match=r"bq mk .*:nowhere"):
        run(tmp_path, first_records(), output=f"bq://{cloud.project}.nowhere.t", work_dir=cloud.gcs.path("work"))
    with pytest.raises(ConfigError, match="add --work_dir=gs://"):
        run(tmp_path, first_records(), output=f"bq://{cloud.project}.tables.t")


@emulator
def test_a_bigquery_table_of_somebody_else_is_left_alone(cloud, tmp_path):
    client().query(f"CREATE TABLE `{cloud.project}.tables.foreign` AS SELECT 'a' AS id").result()
    with pytest.raises(TableError, match="that embeam did not make"):
        run(tmp_path, first_records(), output=f"bq://{cloud.project}.tables.foreign", work_dir=cloud.gcs.path("work"))


def list_staging(table: str) -> list[str]:
    return [t.table_id for t in client().list_tables("tables") if t.table_id.startswith(f"{table}_staging")]


@emulator
def test_a_run_that_dies_between_loading_and_merging(cloud, tmp_path):
    """A real process, killed while the staging table is full and the table is unchanged."""
    name = f"{cloud.project}.tables.killed"
    settings = {"output": f"bq://{name}", "work_dir": cloud.gcs.path("killed")}
    before, _ = run(tmp_path, first_records(), **settings)
    write_jsonl(tmp_path / "corpus.jsonl", second_records())
    process = start_embed(tmp_path, settings)
    try:
        deadline = time.monotonic() + 90
        while not (found := list_staging("killed")) or count_rows(f"{cloud.project}.tables.{found[0]}") == 0:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert_same_rows(read_rows(settings["output"]), before)
    with pytest.raises(TableError, match="is in use"):
        run_pipeline(tmp_path, **{**SETTINGS, **settings})
    FileSystems.delete([join(open_store(*settings.values()).work, LOCK)])  # which would else expire after 90 seconds
    manifest = run_pipeline(tmp_path, **{**SETTINGS, **settings})
    assert manifest.counts["encode"].get("rows", 0) == 0, "the journal had all of it"
    rows = read_rows(settings["output"])
    run(tmp_path, first_records(), output=str(tmp_path / "folder"))
    assert_same_rows(rows, run(tmp_path, second_records(), output=str(tmp_path / "folder"))[0])


def start_embed(folder: Path, settings: dict[str, Any]) -> subprocess.Popen:
    """The command in a process of its own, over the JSON lines of a folder."""
    flags = {**SETTINGS, **settings, "input": f"{folder}/*.jsonl", "encoder": ENCODER, "id_field": "id"}
    flags["on_empty"] = "embed"
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "embed",
        *(f"--{key}={value}" for key, value in flags.items()),
    ]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def count_rows(name: str) -> int:
    (row,) = client().query(f"SELECT COUNT(*) AS n FROM `{name}`").result()
    return row["n"]


@emulator
@pytest.mark.parametrize("point", ["before the merge", "after the merge"])
def test_a_run_that_fails_around_its_merge_is_completed_by_the_next(cloud, tmp_path, monkeypatch, point):
    name = f"failed_{point.split()[0]}"
    settings = {"output": f"bq://{cloud.project}.tables.{name}", "work_dir": cloud.gcs.path(name)}
    run(tmp_path, first_records(), **settings)
    run_script = pipeline.tables.bigquery.run_script

    def fail(connection: Any, script: str) -> None:
        if point == "after the merge":
            run_script(connection, script)
        raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.tables.bigquery, "run_script", fail)
        with pytest.raises(EmbeamError, match="the network is gone"):
            run(tmp_path, second_records(), **settings)
    rows, manifest = run(tmp_path, second_records(), **settings)
    assert manifest.counts["encode"].get("rows", 0) == 0
    run(tmp_path, first_records(), output=str(tmp_path / "folder"))
    assert_same_rows(rows, run(tmp_path, second_records(), output=str(tmp_path / "folder"))[0])


@emulator
def test_the_later_of_two_runs_that_began_together_changes_nothing(cloud, tmp_path, monkeypatch):
    """This run's lock is removed on purpose: the transaction detects that another run has published."""
    settings = {"output": f"bq://{cloud.project}.tables.raced", "work_dir": cloud.gcs.path("raced")}
    run(tmp_path, first_records(), **settings)
    (tmp_path / "other").mkdir()
    write_jsonl(tmp_path / "other" / "corpus.jsonl", second_records())
    run_script = pipeline.tables.bigquery.run_script

    def run_another_first(connection: Any, script: str) -> None:
        process = start_embed(tmp_path / "other", settings)
        assert process.wait(100) == 0, process.communicate()
        run_script(connection, script)

    class NoLock(TableLock):
        def acquire(self) -> None:
            pass

    monkeypatch.setattr(pipeline.run.job, "TableLock", NoLock)
    monkeypatch.setattr(pipeline.tables.bigquery, "run_script", run_another_first)
    with pytest.raises(TableError, match="another run has changed"):
        run(tmp_path, [*first_records(), {"id": "late", "text": "too late"}], **settings)
    run(tmp_path, first_records(), output=str(tmp_path / "folder"))
    expected = run(tmp_path, second_records(), output=str(tmp_path / "folder"))[0]
    assert_same_rows(read_rows(settings["output"]), expected)


@emulator
def test_bigquery_tables_and_queries_are_read(cloud, tmp_path):
    rows = ", ".join(
        f"STRUCT('r{i}' AS id, 'text number {i}' AS text, {i} AS year, {i % 3 == 0} AS public)" for i in range(40)
    )
    name = f"{cloud.project}.tables.corpus"
    client().query(f"CREATE TABLE `{name}` AS SELECT * FROM UNNEST([{rows}])").result()
    common = {"keep_fields": "year", "input": ()}
    table = run_pipeline(tmp_path, output=str(tmp_path / "a"), **{**common, "input": f"bq://{name}"})
    assert table.rows == 40
    part = run_pipeline(
        tmp_path, output=str(tmp_path / "b"), row_restriction="public", **{**common, "input": f"bq://{name}"}
    )
    query = f"SELECT id, text, year FROM `{name}` WHERE public"
    settings = {**common, "query": query, "query_dataset": f"{cloud.project}.tables"}
    asked = run_pipeline(tmp_path, output=str(tmp_path / "c"), **settings)
    assert part.rows == asked.rows == 14
    assert set(read_rows(str(tmp_path / "c"))) == {(f"r{i}", 0) for i in range(0, 40, 3)}
    again = run_pipeline(tmp_path, output=str(tmp_path / "c"), **settings)
    assert again.counts["reuse"] == {"documents": 14, "unchanged": 14}
    with pytest.raises(ConfigError, match="name the column that holds the id"):
        run_pipeline(tmp_path, output=str(tmp_path / "d"), id_field="", input=f"bq://{name}")
    with pytest.raises(EmbeamError, match=r"--input=bq://.*nothing_here cannot be read"):
        run_pipeline(tmp_path, output=str(tmp_path / "d"), input=f"bq://{cloud.project}.tables.nothing_here")


@emulator
def test_everything_may_lie_in_cloud_storage(cloud, tmp_path):
    """Input, encoder, table and journal on gs://: two runs, the second of which reuses the first's rows."""
    gcs = cloud.gcs
    for path in Path(ENCODER).rglob("*"):
        if path.is_file():
            with FileSystems.create(gcs.path("encoder", str(path.relative_to(ENCODER)))) as stream:
                stream.write(path.read_bytes())
    settings = {**SETTINGS, "encoder": gcs.path("encoder"), "output": gcs.path("table"), "split_bytes": 4000}
    expected: Rows = {}
    for records in (first_records(), second_records()):
        with FileSystems.create(gcs.path("corpus", "a.jsonl"), compression_type="uncompressed") as stream:
            stream.write("".join(json.dumps(record) + "\n" for record in records).encode())
        manifest = run_pipeline(tmp_path, **{**settings, "input": gcs.path("corpus", "*.jsonl")})
        expected, local = run(tmp_path, records, output=str(tmp_path / "folder"))
        assert manifest.counts["reuse"] == local.counts["reuse"]
    assert_same_rows(read_rows(gcs.path("table")), expected)
    left = [name for name in gcs.objects() if name.startswith("table/") and "/snapshots/" not in f"/{name}"]
    assert left == ["table/CURRENT"]


def test_the_search_statements_name_the_table():
    name = BigQueryName("my-project", "data", "notes")
    index = make_index_statement(name)
    assert index.startswith(
        "CREATE VECTOR INDEX IF NOT EXISTS `notes_embedding` ON `my-project.data.notes` (embedding)"
    )
    assert "index_type = 'IVF', distance_type = 'COSINE'" in index
    search = make_search_query(name, 64)
    assert "VECTOR_SEARCH(\n  TABLE `my-project.data.notes`, 'embedding'" in search and "64 numbers" in search


def test_the_verb_sql_prints_both_statements(capsys):
    main(["sql", "bq://my-project.data.notes", "--dimensions=64"])
    out = capsys.readouterr().out
    assert out.startswith("CREATE VECTOR INDEX") and "VECTOR_SEARCH(" in out
    with pytest.raises(SystemExit, match="2"):
        main(["sql", "notes"])
    assert "bq://PROJECT.DATASET.TABLE" in capsys.readouterr().err
