"""One contract for every place of a table: a folder, a file of DuckDB, BigQuery.

Every kind of rerun at once, and what a place itself may do wrong: columns that come and go, values of every type, rows
of several chunks, vectors of another size. The runs are stepped through; two that are whole stand at the end.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from google.cloud.bigquery import SchemaField

import pipeline
from pipeline.config import EmbedConfig
from pipeline.encoders.handler import LoadedEncoder
from pipeline.errors import ConfigError, RunError, TableError
from pipeline.read_config import KeptField
from pipeline.records import Document, pack_kept
from pipeline.report.summary import format_summary, locate_dead_letters
from pipeline.sinks import SINKS
from pipeline.sources.bigquery_client import client
from pipeline.tables.bigquery_sql import check_column_names
from pipeline.tables.manifest import DATABASES
from pipeline.tables.read import iter_table
from pipeline.tables.stores import STORES, open_store
from tests.support.bigquery import BigQueryEmulator, start_bigquery
from tests.support.emulators import start_gcs
from tests.support.kept_values import FIELDS, IDS, KEPT_CASES, expect_kept, write_kept
from tests.support.official import official_tokens, official_vector
from tests.support.reruns import assert_rows, dated, documents, join_cases, list_dead
from tests.support.runs import run_embed, run_pipeline, watch_encoder
from tests.support.steps import DIMENSION, LAYOUT, SteppedTable, draw_vector, make_document
from tests.support.stores import N_TEXTS, SETTINGS, assert_same_rows, first_records, run, second_records
from tests.support.tables import assert_close, read_rows

emulator = pytest.mark.emulator
UNKNOWN = 1  # id of [UNK] in the vocabulary of the tests
KINDS = ("year:int", "score:float", "fine:bool", "name:string")
VALUES: list[list[Any]] = [
    [1, 0.1, True, 'it\'s "new"'],
    [-(2**40), 1e300, False, "Müller\n東京"],
    [None, None, None, None],
    [0, 0.0, False, ""],
]


@pytest.fixture(scope="module")
def cloud() -> Iterator[BigQueryEmulator]:
    with start_gcs() as gcs, start_bigquery(gcs) as bigquery, bigquery.used_here():
        client().create_dataset("tables")
        yield bigquery


def name_output(kind: str, request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, str]:
    """`--output` and `--work_dir` of a new table."""
    if kind == "folder":
        return {"output": str(tmp_path / "a table")}
    if kind == "duckdb":
        return {"output": f"duckdb://{tmp_path}/vectors.duckdb/notes"}
    bigquery = request.getfixturevalue("cloud")
    table = f"t{abs(hash(request.node.name)) % 10**8}"
    return {"output": f"bq://{bigquery.project}.tables.{table}", "work_dir": bigquery.gcs.path("work")}


@pytest.fixture(params=["folder", "duckdb", pytest.param("bigquery", marks=emulator)])
def table(request, tmp_path) -> SteppedTable:
    return SteppedTable(**name_output(request.param, request, tmp_path), output_format="parquet")


def test_every_kind_of_rerun_at_once(table):
    case = join_cases()
    first = table.run(case.before)
    assert_rows(first.rows, case.before)
    outcome = table.run(case.after, case.dead_letters, case.fails)
    assert outcome.encoded == sorted(case.encoded)
    assert_rows(outcome.rows, case.rows)
    assert outcome.manifest.rows == len(case.rows) and outcome.manifest.previous == first.manifest.snapshot
    assert list_dead(table.output, table.work_dir) == case.dead
    again = table.run(case.after, case.dead_letters, case.fails)
    assert_rows(again.rows, case.rows)
    assert set(again.encoded) == set(case.fails)
    outcome = table.run(case.after)  # all can be read and embedded by now
    assert_rows(outcome.rows, case.after)
    assert outcome.encoded == sorted(set(case.fails)) and list_dead(table.output, table.work_dir) == []


def test_kept_fields_of_every_type_come_and_go(table):
    def valued(kept: list[list[Any]]) -> list[Document]:
        return [one._replace(kept=pack_kept(values)) for one, values in zip(documents(*"abcd"), kept, strict=True)]

    fields = tuple(map(KeptField.parse, KINDS))
    table.run(documents(*"abcd"))
    table.layout = replace(LAYOUT, kept=fields, keep_text=True)
    outcome = table.run(valued(VALUES))
    assert outcome.encoded == [] and outcome.count("reused") == {"reused": 4}
    found = [[outcome.rows[name, 0][field.name] for field in fields] for name in "abcd"]
    assert found == VALUES
    assert [[type(value) for value in row] for row in found[:2]] == [[int, float, bool, str]] * 2
    assert [outcome.rows[name, 0]["text"] for name in "abcd"] == ["text a", "text b", "text c", "text d"]
    changed = [VALUES[0], [7, *VALUES[1][1:]], *VALUES[2:]]
    outcome = table.run(valued(changed))
    assert outcome.count("unchanged", "reused") == {"unchanged": 3, "reused": 1}
    assert [outcome.rows[name, 0]["year"] for name in "abcd"] == [1, 7, None, 0]
    table.layout = replace(LAYOUT, kept=fields[:1])
    outcome = table.run([*dated(5, "a", "b"), *dated(6, "x=a")], deletes="keep")
    assert outcome.encoded == [] and not {"name", "text", "score"} & set(outcome.rows["a", 0])
    assert {name: row["year"] for (name, _), row in outcome.rows.items()} == {"a": 5, "b": 5, "x": 6, "c": None, "d": 0}


def test_chunks_of_a_document_are_replaced_together(table):
    table.layout = replace(LAYOUT, chunked=True)
    long = "one two three four five six seven"
    outcome = table.run([make_document("a", long), make_document("b", long), *documents("c")])
    assert {key for key in outcome.rows if key[0] == "b"} == {("b", 0), ("b", 1), ("b", 2)}
    outcome = table.run([make_document("a", "short"), make_document("d", long), *documents("c")])
    assert outcome.encoded == ["short"]
    assert set(outcome.rows) == {("a", 0), ("d", 0), ("d", 1), ("d", 2), ("c", 0)}
    assert np.array_equal(outcome.rows["d", 2]["embedding"], draw_vector("seven"))


def test_another_model_replaces_every_row(table):
    table.run(documents(*"abc"))
    table.model, table.layout = "two", replace(LAYOUT, dimension=DIMENSION // 2)
    outcome = table.run(documents("a", "b=x", "d"), fails=["text x"])
    assert set(outcome.rows) == {("a", 0), ("d", 0)} and outcome.count("lost") == {"lost": 1}
    for name in "ad":
        half = draw_vector(f"text {name}", "two")[: DIMENSION // 2]
        assert np.array_equal(outcome.rows[name, 0]["embedding"], half)


def test_too_many_deletions_change_nothing(table):
    table.run(documents(*"abcdef"))
    after = documents("a", "b", "x")
    with pytest.raises(RunError, match=r"4 of the table's 6 .*--max_delete_fraction"):
        table.run(after, max_delete_fraction=0.5)
    assert_rows(read_rows(table.output), documents(*"abcdef"))
    outcome = table.run(after)
    assert outcome.encoded == [], "the journal has it"
    assert_rows(outcome.rows, after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "--dtype=int8"),
        ({"vector": "sequence_output:tokens"}, "one vector a row"),
        ({"keep_fields": ("run_id",)}, "collide with the table's own column 'run_id'"),
        ({"keep_fields": ("source",)}, "--keep_fields=source would collide with the table's own column 'source'"),
        ({"keep_fields": ("Chunk",)}, "--keep_fields=Chunk would collide with the table's own column 'chunk'"),
        ({"keep_fields": ("year", "meta.Lang:int", "META_lang")}, "--keep_fields=META_lang .* the field 'meta.Lang'"),
    ],
)
@pytest.mark.parametrize("output", ["duckdb://vectors.duckdb/notes", "bq://my-project.data.notes"])
def test_what_a_database_cannot_hold_is_said_first(output, settings, message):
    with pytest.raises(ConfigError, match=message):
        open_store(output, "gs://bucket/work").check(EmbedConfig.from_flat({"output": output, **settings}))


@pytest.mark.parametrize(
    "name", ["größe", "a b", "0", "choices.0.größe", "a" * 301, "_partition_day", "_TABLE_x", "_FILE_x", "Is_Marker"]
)
def test_names_that_bigquery_does_not_allow_are_refused_first(name, tmp_path):
    def check(field: str, output: str) -> None:
        open_store(output, "gs://bucket/work").check(EmbedConfig.from_flat({"output": output, "keep_fields": field}))

    with pytest.raises(ConfigError, match=rf"--keep_fields={name}: bq://my-project.data.notes cannot .* in the input"):
        check(name, "bq://my-project.data.notes")
    check(name, f"duckdb://{tmp_path}/v.duckdb/notes")
    check_column_names([KeptField("a" * 300), KeptField("_1"), KeptField("File_")], "bq://my-project.data.notes")


def test_columns_of_chunks_and_of_unknown_tokens_come_later(table):
    table.run(documents(*"ab"))
    table.layout = replace(LAYOUT, keep_unknown=True)
    outcome = table.run(documents(*"abc"))
    assert outcome.encoded == ["text c"] and outcome.count("reused") == {"reused": 2}
    assert [outcome.rows[name, 0]["n_unknown"] for name in "abc"] == [None, None, None]
    kept = (KeptField("lang", "string", "meta.lang"),)
    table.model, long = "two", "one two three four  five"
    table.layout = replace(table.layout, chunked=True, has_offsets=True, keep_text=True, kept=kept)
    run = [make_document("a", long, kept=pack_kept(["en"])), *dated(None, "b")]
    outcome = table.run(run)
    columns = ("n_chunks", "char_start", "char_end", "n_unknown", "text", "lang")
    found = {key: tuple(row[name] for name in columns) for key, row in outcome.rows.items()}
    assert found == {
        ("a", 0): (2, 0, 13, 0, "one two three", "en"),
        ("a", 1): (2, 14, 24, 1, "four  five", "en"),
        ("b", 0): (1, 0, 6, 0, "text b", None),
    }
    assert table.run(run).count("unchanged") == {"unchanged": 2}


def test_a_column_of_another_type_or_spelling_is_found_before_anything_is_encoded(database_table):
    """Where a database can change the type of its own column, it may differ."""
    table = database_table
    store = open_store(table.output, table.work_dir)
    store.check_columns(None, LAYOUT)
    table.layout = replace(LAYOUT, kept=(KeptField("year", "int"),))
    live = table.run(dated(1, *"ab")).manifest
    add_columns(table, moment="TIMESTAMP", Page="STRING", text="BIGINT")
    for field, message in (
        (
            KeptField("moment", "int"),
            "'moment' of type TIMESTAMP, but .*; rename the field in the input, or give anoth",
        ),
        (
            KeptField("page", "string"),
            "has a column 'Page', and in databases 'page' is the same name; rename the field",
        ),
        (KeptField("YEAR", "int"), "has a column 'year', and in databases 'YEAR' is the same"),
        (KeptField("Page", "int", "meta.page"), "--keep_fields=meta.page:string, or give another --output"),
    ):
        with pytest.raises(TableError, match=message):
            store.check_columns(live, replace(LAYOUT, kept=(field,)))
    with pytest.raises(TableError, match=r"has a column 'text' of type .*; rename that column in the database"):
        store.check_columns(live, replace(LAYOUT, keep_text=True))
    wider = replace(LAYOUT, kept=(KeptField("year", "float"), KeptField("Page", "string")))
    if table.output.startswith("duckdb://"):
        store.check_columns(live, wider)
    else:
        with pytest.raises(
            TableError, match=r"'year' of type INT64, but FLOAT64 is needed; keep .*fields=year:int, or"
        ):
            store.check_columns(live, wider)


def test_publishing_leaves_the_journal_of_another_model(table):
    table.run(documents(*"ab"))
    table.model = "two"
    with pytest.raises(RunError, match="max_dead_fraction"):
        table.run(documents("a", "b", "x"), fails=["text x"], max_dead_fraction=0.1)
    table.model = "one"
    assert table.run(documents(*"abc")).encoded == ["text c"]
    table.model = "two"
    assert table.run(documents(*"abc")).encoded == ["text c"], "a and b are in the journal"


# Columns that the user has added to a table of a database


@pytest.fixture
def database_table(database) -> SteppedTable:
    return SteppedTable(**database)


def run_sql(table: SteppedTable, statement: str) -> list[tuple[Any, ...]]:
    """Runs a statement on a database's table, which `{}` stands for."""
    if table.output.startswith("duckdb://"):
        path, _, name = table.output.removeprefix("duckdb://").rpartition("/")
        with duckdb.connect(path) as connection:
            return connection.execute(statement.format(name)).fetchall()
    rows = client().query(statement.format(f"`{table.output[5:]}`")).result()
    return [tuple(row.values()) for row in rows]


def add_columns(table: SteppedTable, **columns: str) -> None:
    """Gives a table columns of the user; in BigQuery by its API, because the emulator's API omits those of DDL."""
    if table.output.startswith("duckdb://"):
        for name, kind in columns.items():
            run_sql(table, f"ALTER TABLE {{}} ADD COLUMN {name} {kind}")
        return
    there = client().get_table(table.output[5:])
    kinds = {name: kind.replace("BIGINT", "INTEGER") for name, kind in columns.items()}
    there.schema = [*there.schema, *(SchemaField(name, kind) for name, kind in kinds.items())]
    client().update_table(there, ["schema"])


def add_notes(table: SteppedTable) -> None:
    run_sql(table, "ALTER TABLE {} ADD COLUMN note STRING")
    run_sql(table, "UPDATE {} SET note = 'my own' WHERE TRUE")


def read_notes(table: SteppedTable) -> dict[str, str | None]:
    return dict(run_sql(table, "SELECT id, note FROM {}"))


def test_columns_of_the_user_stay_and_replaced_rows_lose_their_values(database_table):
    table = database_table
    table.layout = replace(LAYOUT, kept=(KeptField("year", "int"),))
    table.run([*dated(1, *"abcd")])
    add_notes(table)
    outcome = table.run([*dated(1, "a", "b=x", "new"), *dated(2, "c")])
    assert outcome.encoded == ["text new", "text x"]
    assert read_notes(table) == {"a": "my own", "b": None, "c": None, "new": None}


def test_columns_of_the_user_stay_when_every_row_is_replaced(database_table):
    table = database_table
    table.run(documents(*"ab"))
    add_notes(table)
    table.model, table.layout = "two", replace(LAYOUT, dimension=DIMENSION // 2)
    outcome = table.run(documents(*"ab"))
    assert outcome.encoded == ["text a", "text b"] and read_notes(table) == {"a": None, "b": None}
    assert all(row["embedding"].shape == (DIMENSION // 2,) for row in outcome.rows.values())


def test_a_column_that_is_no_longer_kept_stays_and_is_null(database_table):
    table = database_table
    table.layout = replace(LAYOUT, kept=(KeptField("year", "int"),))
    table.run(dated(1, *"ab"))
    table.layout = LAYOUT
    assert table.run(documents(*"ab")).encoded == []
    assert run_sql(table, "SELECT year FROM {}") == [(None,), (None,)]
    table.layout = replace(LAYOUT, kept=(KeptField("year", "int"),))
    assert_rows(table.run(dated(3, *"ab")).rows, dated(3, *"ab"))


def test_the_schemes_of_databases_are_those_of_the_stores():
    assert set(DATABASES) == {scheme for scheme in STORES if scheme}


@pytest.mark.parametrize("output", ["duckdb://vectors.duckdb/notes", "bq://my-project.data.notes"])
def test_a_table_of_a_database_has_no_folder_to_open(output):
    with pytest.raises(ConfigError, match=f"{output} is a database's table and has no folder; use read_table or"):
        pipeline.open_table(output)


@pytest.mark.parametrize("read", [pipeline.open_table, pipeline.read_table, lambda table: next(iter_table(table))])
def test_a_table_on_a_file_system_that_is_none(read):
    with pytest.raises(ConfigError, match=r"nowhere://bucket/table: no file system for nowhere:// is installed"):
        read("nowhere://bucket/table")


# Whole runs


@pytest.mark.parametrize("kind", ["tfrecord", "parquet", "duckdb", pytest.param("bigquery", marks=emulator)])
def test_kept_fields_of_every_kind_and_all_columns_come_back(kind, request, tmp_path):
    texts = {"a": "a dog runs and then it sleeps. ☃ ☃ one more cat", "b": "☃", "c": "a dog"}
    path = tmp_path / "corpus.parquet"
    settings = {"id_field": "id", "keep_fields": FIELDS, "on_long": "chunk", "max_tokens": 8, "chunk_overlap": 2}
    settings |= {"keep_text": True, "keep_source": True, "keep_unknown": True}
    settings |= {"output_format": kind} if kind in SINKS else {}
    settings |= name_output("folder" if kind in SINKS else kind, request, tmp_path)
    output = settings.pop("output")
    for changed, counted in (("", {}), ("", {"unchanged": 3}), ("object", {"unchanged": 1, "updated": 2})):
        write_kept(path, texts, changed)
        with watch_encoder() as watched:
            manifest = run_embed(path, output, **settings)
        rows = read_rows(output)
        assert bool(watched.texts) == (not counted)
        assert {name: manifest.counts["reuse"].get(name, 0) for name in counted} == counted
        assert manifest.counts["read"].get("kept_nulls", 0) == 0
        assert {name for name, _ in rows} == set(IDS)
        for (name, chunk), row in rows.items():
            kept = {column: row[column] for column in KEPT_CASES}
            assert kept == expect_kept(name, changed)
            assert [type(value) for value in kept.values()] == [type(v) for v in expect_kept(name, changed).values()]
            own = texts[name][row["char_start"] : row["char_end"]]
            assert row["text"] == own and own.strip() == own != ""
            tokens = official_tokens(own)
            assert (row["n_unknown"], row["n_tokens"]) == (tokens.count(UNKNOWN), len(tokens) + 2)
            assert row["source"] == str(path) and row["n_chunks"] == sum(key[0] == name for key in rows) > chunk
    assert sum(row["n_unknown"] for row in rows.values()) >= 3 and rows["a", 0]["n_chunks"] > 1


def test_the_summary_names_the_files_of_the_dead_letters(tmp_path, monkeypatch):
    """Where they are, whatever the table is kept in."""
    monkeypatch.chdir(tmp_path)
    for output in ("duckdb://v.duckdb/notes", "table"):
        _, manifest = run(tmp_path, second_records(), output=output)
        (line,) = (line for line in format_summary(manifest, output).splitlines() if line.startswith("  dead letters"))
        (file,) = glob.glob(line.partition(", in ")[2])
        assert json.loads(Path(file).read_text())["reason"] == "too_long"
    settings = manifest.settings | {"work_dir": "gs://bucket/work"}
    place = locate_dead_letters(replace(manifest, settings=settings), "bq://my-project.data.notes")
    assert place == "gs://bucket/work/my-project.data.notes/dead_letters/dead_letters-*"


@pytest.fixture(params=["duckdb", pytest.param("bigquery", marks=emulator)])
def database(request, tmp_path) -> dict[str, str]:
    return name_output(request.param, request, tmp_path)


@pytest.mark.numeric
def test_a_history_gives_the_rows_that_a_folder_has(database, tmp_path):
    for records in (first_records(), second_records()):
        rows, manifest = run(tmp_path, records, **database)
        expected, folder_manifest = run(tmp_path, records, output=str(tmp_path / "folder"))
        assert_same_rows(rows, expected)
        assert manifest.rows == folder_manifest.rows == len(rows)
        assert manifest.counts["reuse"] == folder_manifest.counts["reuse"]
        for name in ("deleted", "stale"):
            assert manifest.counts["merge"][name] == folder_manifest.counts["merge"][name], name
    assert manifest.counts["encode"]["rows"] == 2  # changed and new; the long one is a dead letter
    assert manifest.counts["merge"] | {"deleted": 7, "stale": 1} == manifest.counts["merge"]
    assert manifest.dead_letters == {"too_long": 1}
    for key, text in ((("new", 0), "a new one"), (("n10", 0), "the text has changed")):
        assert_close(rows[key]["embedding"], official_vector(text), text)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "database",
    [pytest.param("duckdb", marks=pytest.mark.exhaustive), pytest.param("bigquery", marks=emulator)],
    indirect=True,
)
def test_dead_letters_are_tried_again(database, tmp_path, monkeypatch):
    encode = LoadedEncoder.encode

    def fail_often(self: Any, batch: Any) -> Any:
        done = encode(self, batch)
        bad = [i for i, chunk in enumerate(batch) if chunk.document.text == first_records()[7]["text"]]
        for i in bad:
            done.vectors[i], done.errors[i] = None, "out of luck"
        return done

    monkeypatch.setattr(LoadedEncoder, "encode", fail_often)
    rows, manifest = run(tmp_path, first_records(), **database)
    assert manifest.dead_letters == {"encoder_error": 1} and ("n7", 0) not in rows
    assert manifest.counts["encode"]["rows"] == N_TEXTS - 1
    monkeypatch.undo()
    manifest = run_pipeline(tmp_path, **SETTINGS, **database, retry_dead_letters=True)
    rows = read_rows(database["output"])
    assert manifest.dead_letters == {} and manifest.counts["encode"]["rows"] == 1
    assert_same_rows(rows, run(tmp_path, first_records(), output=str(tmp_path / "folder"))[0])
    with pytest.raises(RunError, match="has no dead letters"):
        run_pipeline(tmp_path, **SETTINGS, **database, retry_dead_letters=True)
