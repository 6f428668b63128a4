"""Tables in databases: the same rows as a folder's after the same history, whatever happens on the way."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apache_beam.io.filesystems import FileSystems

import pipeline.job
import pipeline.tables.bigquery
from pipeline.bigquery import client
from pipeline.errors import ConfigError, EmbeamError, RunError, TableError
from pipeline.files import join
from pipeline.tables.lock import LOCK, TableLock
from pipeline.tables.manifest import Manifest
from pipeline.tables.store import open_store
from tests.support import tables
from tests.support.bigquery import BigQueryEmulator, start_bigquery
from tests.support.corpora import some_texts, write_jsonl
from tests.support.emulators import start_gcs
from tests.support.official import expected_vector, official_pack, official_tokens
from tests.support.paths import ENCODER, ROOT
from tests.support.runs import run_pipeline
from tests.support.tables import Rows, assert_close, read_rows

N_TEXTS = 80
SETTINGS = {
    "keep_fields": "year:int,score:float,fine:bool,name",
    "on_long": "reject",
    "max_tokens": 80,
    "max_dead_fraction": 0.5,
    "output_format": "parquet",  # of the folder: floats of 64 bits, as databases have them
}


@pytest.fixture(scope="module")
def cloud() -> Iterator[BigQueryEmulator]:
    with start_gcs() as gcs, start_bigquery(gcs) as emulator, emulator.used_here():
        client().create_dataset("tables")
        yield emulator


assert_same_rows = functools.partial(tables.assert_same_rows, ignored=("source",))  # a column of databases only
Target = Callable[[str], dict[str, Any]]  # name of a table -> settings of its output


@pytest.fixture(params=["duckdb", "bigquery"])
def target(request, tmp_path) -> Target:
    if request.param == "duckdb":
        return lambda name: {"output": f"duckdb://{tmp_path}/vectors.duckdb/{name}"}
    emulator = request.getfixturevalue("cloud")
    prefix = f"t{abs(hash(request.node.name)) % 10**8}"
    return lambda name: {
        "output": f"bq://{emulator.project}.tables.{prefix}_{name}",
        "work_dir": emulator.gcs.path("work"),
    }


def first_records() -> list[dict[str, Any]]:
    records = [
        {"id": f"n{i}", "text": text, "year": i, "score": i / 3, "fine": i % 2 == 0, "name": f"Müller {i}"}
        for i, text in enumerate(some_texts(N_TEXTS, seed=5, words=(1, 20)))
    ]
    records[3] |= {"year": None, "score": None, "fine": None, "name": None}
    records += [records[i] | {"id": f"twin{i}"} for i in range(4)]
    return records


def second_records() -> list[dict[str, Any]]:
    """New, changed, updated, renamed and deleted documents, and one that has grown too long."""
    records = [dict(record) for record in first_records()]
    records[10]["text"] = "the text has changed"
    records[11]["year"] = -11
    records[12]["id"] = "renamed"
    records[13]["text"] = "dog " * 200
    del records[20:26]
    return [*records, {"id": "new", "text": "a new one", "year": 1, "score": 2.5, "fine": True, "name": 'it\'s "new"'}]


def run(folder: Path, records: list[dict[str, Any]], **settings: Any) -> tuple[Rows, Manifest]:
    write_jsonl(folder / "corpus.jsonl", records)
    manifest = run_pipeline(folder, **{**SETTINGS, **settings})
    return read_rows(settings["output"]), manifest


def test_a_history_gives_the_rows_that_a_folder_has(target, tmp_path):
    folder = {"output": str(tmp_path / "folder")}
    for records in (first_records(), second_records(), second_records()):
        rows, manifest = run(tmp_path, records, **target("notes"))
        expected, folder_manifest = run(tmp_path, records, **folder)
        assert_same_rows(rows, expected)
        assert manifest.rows == folder_manifest.rows == len(rows)
        assert manifest.counts["recall"] == folder_manifest.counts["recall"]
        for name in ("deleted", "stale", "unchanged"):
            assert manifest.counts["carry"][name] == folder_manifest.counts["carry"][name], name
    for text in ("a new one", "the text has changed"):
        key = {"a new one": "new", "the text has changed": "n10"}[text], 0
        packed = official_pack([text], len(official_tokens(text)) + 2)
        assert_close(rows[key]["embedding"], expected_vector(packed, "pooled_output"), text)


def test_the_second_run_encodes_only_what_is_new(target, tmp_path):
    _, first = run(tmp_path, first_records(), **target("notes"))
    assert first.counts["encode"]["rows"] == N_TEXTS and first.counts["recall"]["equal_texts"] == 4
    _, second = run(tmp_path, second_records(), **target("notes"))
    assert second.counts["encode"]["rows"] == 2  # changed and new; the long one is a dead letter
    assert second.counts["carry"] | {"deleted": 7, "stale": 1} == second.counts["carry"]
    assert second.dead_letters == {"too_long": 1}
    assert second.previous == first.snapshot


def test_chunks_of_a_document_are_replaced_together(target, tmp_path):
    settings = {"on_long": "chunk", "max_tokens": 12}
    records = first_records()
    records[0]["text"] = "dogs and cats " * 10
    before, _ = run(tmp_path, records, **settings, **target("notes"))
    assert sum(key[0] == "n0" for key in before) > 2
    records[0]["text"] = "short"
    rows, _ = run(tmp_path, records, **settings, **target("notes"))
    assert [key for key in rows if key[0] == "n0"] == [("n0", 0)]
    assert_same_rows(rows, run(tmp_path, records, **settings, output=str(tmp_path / "folder"))[0])


def test_another_model_replaces_every_row(target, tmp_path):
    run(tmp_path, first_records(), **target("notes"))
    rows, manifest = run(tmp_path, second_records(), max_tokens=40, dimensions=32, **target("notes"))
    expected, _ = run(tmp_path, second_records(), max_tokens=40, dimensions=32, output=str(tmp_path / "folder"))
    assert {row["embedding"].shape for row in rows.values()} == {(32,)}
    assert_same_rows(rows, expected)
    assert manifest.counts["carry"]["lost"] == 1


def test_kept_fields_come_and_go(target, tmp_path):
    run(tmp_path, first_records(), keep_fields="year:int", **target("notes"))
    rows, manifest = run(tmp_path, first_records(), keep_fields="name,fine:bool", keep_text=True, **target("notes"))
    assert manifest.counts["encode"].get("rows", 0) == 0
    assert rows["n5", 0]["name"] == "Müller 5" and rows["n5", 0]["text"] == first_records()[5]["text"]
    assert "year" not in rows["n5", 0]


def test_dead_letters_are_tried_again(target, tmp_path, monkeypatch):
    from pipeline.encoders.handler import LoadedEncoder

    encode = LoadedEncoder.encode

    def fail_often(self: Any, batch: Any) -> Any:
        done = encode(self, batch)
        bad = [i for i, chunk in enumerate(batch) if chunk.document.text == first_records()[7]["text"]]
        for i in bad:
            done.vectors[i], done.errors[i] = None, "out of luck"
        return done

    monkeypatch.setattr(LoadedEncoder, "encode", fail_often)
    rows, manifest = run(tmp_path, first_records(), **target("notes"))
    assert manifest.dead_letters == {"encoder_error": 1} and ("n7", 0) not in rows
    monkeypatch.undo()
    manifest = run_pipeline(tmp_path, **SETTINGS, **target("notes"), retry_dead_letters=True)
    rows = read_rows(target("notes")["output"])
    assert manifest.dead_letters == {} and manifest.counts["encode"]["rows"] == 1
    assert_same_rows(rows, run(tmp_path, first_records(), output=str(tmp_path / "folder"))[0])
    with pytest.raises(RunError, match="has no dead letters"):
        run_pipeline(tmp_path, **SETTINGS, **target("notes"), retry_dead_letters=True)


def test_too_many_deletes_change_nothing(target, tmp_path):
    before, _ = run(tmp_path, first_records(), **target("notes"))
    with pytest.raises(RunError, match="--max_delete_fraction"):
        run(tmp_path, [*first_records()[:30], {"id": "x", "text": "only now"}], **target("notes"))
    assert_same_rows(read_rows(target("notes")["output"]), before)
    some = [*first_records()[:30], {"id": "x", "text": "only now"}]
    rows, manifest = run(tmp_path, some, max_delete_fraction=1, **target("notes"))
    assert len(rows) == 31 and manifest.counts["encode"].get("rows", 0) == 0  # the journal has it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "--dtype=int8"),
        ({"vector": "sequence_output:tokens"}, "one vector a row"),
        ({"keep_fields": "run_id"}, "collide with the table's own column 'run_id'"),
    ],
)
def test_what_a_database_cannot_hold_is_said_first(target, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, [first_records()[0] | {"run_id": "b"}], **{**target("notes"), **settings})


# --- DuckDB ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["duckdb://", "duckdb://file.duckdb", "duckdb://file.duckdb/my table"])
def test_names_of_duckdb_tables(output, tmp_path):
    with pytest.raises(ConfigError, match="--output=duckdb://"):
        run(tmp_path, first_records(), output=output)


def test_a_duckdb_table_of_somebody_else_is_left_alone(tmp_path):
    import duckdb

    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        connection.execute("CREATE TABLE notes (id VARCHAR)")
    with pytest.raises(TableError, match="that embeam did not make"):
        run(tmp_path, first_records(), output=f"duckdb://{tmp_path}/v.duckdb/notes")


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "v.duckdb").write_text("this is no database at all" * 1000)
    with pytest.raises(TableError, match="cannot be used"):
        run(tmp_path, first_records(), output=f"duckdb://{tmp_path}/v.duckdb/notes")


def test_a_database_that_another_process_has_open(tmp_path):
    code = f"import duckdb, sys; c = duckdb.connect('{tmp_path}/v.duckdb'); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(TableError, match="close the other program"):
            run(tmp_path, first_records(), output=f"duckdb://{tmp_path}/v.duckdb/notes")
    finally:
        other.communicate("")


def nearest_by_index(path: Path, vector: np.ndarray) -> tuple[str, str]:
    """The nearest id by the database's own search, and the plan of that query."""
    import duckdb

    with duckdb.connect(str(path), read_only=True) as connection:
        connection.execute("LOAD vss")
        query = "SELECT id FROM notes ORDER BY array_cosine_distance(embedding, ?::FLOAT[64]) LIMIT 1"
        plan = connection.execute("EXPLAIN " + query, [vector.tolist()]).fetchall()
        return connection.execute(query, [vector.tolist()]).fetchone()[0], str(plan)


def test_the_vector_index_is_built_again_after_every_run(tmp_path):
    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    run(tmp_path, first_records(), output=output, create_vector_index=True)
    rows, _ = run(tmp_path, second_records(), output=output)
    for key in (("new", 0), ("n10", 0)):
        name, plan = nearest_by_index(tmp_path / "v.duckdb", rows[key]["embedding"])
        assert name == key[0] and "HNSW_INDEX_SCAN" in plan


def test_an_index_that_a_dead_run_has_dropped_is_built_again(tmp_path):
    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    run(tmp_path, first_records(), output=output, create_vector_index=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.tables.duckdb.DuckdbCommit, "_write", lambda *_: 1 / 0)
        with pytest.raises(EmbeamError):
            run(tmp_path, second_records(), output=output)
    assert_same_rows(read_rows(output), run(tmp_path, first_records(), output=str(tmp_path / "folder"))[0])
    rows, _ = run(tmp_path, second_records(), output=output)
    assert "HNSW_INDEX_SCAN" in nearest_by_index(tmp_path / "v.duckdb", rows["new", 0]["embedding"])[1]


def test_a_transaction_that_fails_changes_nothing(tmp_path, monkeypatch):
    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    before, _ = run(tmp_path, first_records(), output=output)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "to_json", lambda _: "this is no JSON")  # the last statement of the transaction fails
        with pytest.raises(EmbeamError):
            run(tmp_path, second_records(), output=output)
    assert_same_rows(read_rows(output), before)
    rows, manifest = run(tmp_path, second_records(), output=output)
    assert manifest.counts["encode"].get("rows", 0) == 0
    assert ("new", 0) in rows


def test_show_and_query_read_a_database(tmp_path):
    from pipeline.report.query import find_nearest
    from pipeline.report.summary import format_table

    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    run(tmp_path, first_records(), output=output, keep_text=True)
    assert "84 of 64 x float32" in format_table(output, 1)
    (hit,) = find_nearest(output, first_records()[30]["text"], top=1)
    assert hit.id == "n30" and hit.score > 0.999


# --- BigQuery --------------------------------------------------------------------------------------------------------


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


def test_missing_datasets_and_work_folders_are_said_first(cloud, tmp_path):
    with pytest.raises(TableError, match=r"bq mk .*:nowhere"):
        run(tmp_path, first_records(), output=f"bq://{cloud.project}.nowhere.t", work_dir=cloud.gcs.path("work"))
    with pytest.raises(ConfigError, match="add --work_dir=gs://"):
        run(tmp_path, first_records(), output=f"bq://{cloud.project}.tables.t")


def test_a_bigquery_table_of_somebody_else_is_left_alone(cloud, tmp_path):
    client().query(f"CREATE TABLE `{cloud.project}.tables.foreign` AS SELECT 'a' AS id").result()
    with pytest.raises(TableError, match="that embeam did not make"):
        run(tmp_path, first_records(), output=f"bq://{cloud.project}.tables.foreign", work_dir=cloud.gcs.path("work"))


def list_staging(table: str) -> list[str]:
    return [t.table_id for t in client().list_tables("tables") if t.table_id.startswith(f"{table}_staging")]


def test_a_run_that_dies_between_loading_and_merging(cloud, tmp_path):
    """A real process, killed while the staging table is full and the table is what it was."""
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
    command = [sys.executable, "-m", "pipeline.cli", "embed", *(f"--{key}={value}" for key, value in flags.items())]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def count_rows(name: str) -> int:
    (row,) = client().query(f"SELECT COUNT(*) AS n FROM `{name}`").result()
    return row["n"]


@pytest.mark.parametrize("point", ["before the merge", "after the merge"])
def test_a_run_that_fails_around_its_merge_is_mended_by_the_next(cloud, tmp_path, monkeypatch, point):
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


def test_the_later_of_two_runs_that_began_together_changes_nothing(cloud, tmp_path, monkeypatch):
    """This run's lock is taken away on purpose: the transaction itself notices that another run has published."""
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

    monkeypatch.setattr(pipeline.job, "TableLock", NoLock)
    monkeypatch.setattr(pipeline.tables.bigquery, "run_script", run_another_first)
    with pytest.raises(TableError, match="another run has changed"):
        run(tmp_path, [*first_records(), {"id": "late", "text": "too late"}], **settings)
    run(tmp_path, first_records(), output=str(tmp_path / "folder"))
    expected = run(tmp_path, second_records(), output=str(tmp_path / "folder"))[0]
    assert_same_rows(read_rows(settings["output"]), expected)


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
    assert again.counts["recall"] == {"documents": 14, "unchanged": 14}
    with pytest.raises(ConfigError, match="name the column that holds the id"):
        run_pipeline(tmp_path, output=str(tmp_path / "d"), id_field="", input=f"bq://{name}")
    with pytest.raises(EmbeamError, match=r"--input=bq://.*nothing_here cannot be read"):
        run_pipeline(tmp_path, output=str(tmp_path / "d"), input=f"bq://{cloud.project}.tables.nothing_here")


def test_everything_may_lie_in_cloud_storage(cloud, tmp_path):
    """Input, encoder, table and journal on gs://: two runs, the second of which takes over the first's rows."""
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
        assert manifest.counts["recall"] == local.counts["recall"]
    assert_same_rows(read_rows(gcs.path("table")), expected)
    left = [name for name in gcs.objects() if name.startswith("table/") and "/snapshots/" not in f"/{name}"]
    assert left == ["table/CURRENT"]


def test_the_search_statements_name_the_table():
    from pipeline.bigquery import BigQueryName
    from pipeline.tables.bigquery import make_index_statement, make_search_query

    name = BigQueryName("my-project", "data", "notes")
    index = make_index_statement(name)
    assert index.startswith(
        "CREATE VECTOR INDEX IF NOT EXISTS `notes_embedding` ON `my-project.data.notes` (embedding)"
    )
    assert "index_type = 'IVF', distance_type = 'COSINE'" in index
    search = make_search_query(name, 64)
    assert "VECTOR_SEARCH(\n  TABLE `my-project.data.notes`, 'embedding'" in search and "64 numbers" in search


def test_the_verb_sql_prints_both_statements(capsys):
    from pipeline.cli import main

    main(["sql", "bq://my-project.data.notes", "--dimensions=64"])
    out = capsys.readouterr().out
    assert out.startswith("CREATE VECTOR INDEX") and "VECTOR_SEARCH(" in out
    with pytest.raises(SystemExit, match="2"):
        main(["sql", "notes"])
    assert "bq://PROJECT.DATASET.TABLE" in capsys.readouterr().err
