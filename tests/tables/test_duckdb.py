"""A table in a file of DuckDB: its names, its neighbours in the file, its vector index, its transactions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest

import pipeline.tables.duckdb
from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError, TableError
from pipeline.read_config import KeptField
from pipeline.records import pack_kept
from pipeline.report.summary import format_table
from pipeline.search.nearest import find_nearest
from pipeline.tables.manifest import Manifest
from pipeline.tables.stores import open_store
from tests.support.reruns import assert_rows, dated, documents
from tests.support.steps import DIMENSION, LAYOUT, SteppedTable, draw_vector
from tests.support.stores import first_records, run
from tests.support.tables import read_rows


@pytest.fixture
def table(tmp_path) -> SteppedTable:
    return SteppedTable(f"duckdb://{tmp_path}/v.duckdb/notes")


def check(output: str) -> None:
    """What a run does before anything else."""
    open_store(output).check(EmbedConfig.from_flat({"output": output}))


@pytest.mark.parametrize("output", ["duckdb://", "duckdb://file.duckdb", "duckdb://file.duckdb/my table"])
def test_names_of_tables(output):
    with pytest.raises(ConfigError, match="--output=duckdb://"):
        check(output)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(TableError, match=f"there is no folder {tmp_path}/none; make it first"):
        check(f"duckdb://{tmp_path}/none/v.duckdb/notes")


def test_a_table_of_somebody_else_is_left_alone(table, tmp_path):
    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        connection.execute("CREATE TABLE notes (id VARCHAR)")
    with pytest.raises(TableError, match="that embeam did not make"):
        run(tmp_path, first_records(), output=table.output)


def test_other_tables_of_the_file_stay(table, tmp_path):
    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        connection.execute("CREATE TABLE other AS SELECT 7 AS seven")
    other = SteppedTable(f"duckdb://{tmp_path}/v.duckdb/more")
    other.run(documents(*"xy"))
    table.run(documents(*"ab"))
    table.run(documents(*"a"))
    assert_rows(read_rows(other.output), documents(*"xy"))
    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        assert connection.execute("SELECT * FROM other").fetchall() == [(7,)]


def test_a_file_that_is_no_database(table, tmp_path):
    (tmp_path / "v.duckdb").write_text("this is no database at all" * 1000)
    with pytest.raises(TableError, match="cannot be used"):
        check(table.output)


def test_a_database_that_another_process_has_open(table, tmp_path):
    code = f"import duckdb, sys; c = duckdb.connect('{tmp_path}/v.duckdb'); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(TableError, match="close the other program"):
            check(table.output)
    finally:
        other.communicate("")


def test_every_run_is_written_down(table, tmp_path):
    names = [table.run(documents(*some)).manifest.snapshot for some in ("abc", "ab", "abd")]
    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        runs = connection.execute("SELECT run_id, manifest FROM notes_runs ORDER BY run_id").fetchall()
        rows = connection.execute("SELECT id, run_id, fingerprint FROM notes ORDER BY id").fetchall()
        comments = connection.execute("SELECT comment FROM duckdb_columns() WHERE table_name = 'notes'").fetchall()
    assert [run for run, _ in runs] == names
    assert [Manifest.from_json(text).rows for _, text in runs] == [3, 2, 3]
    assert [(name, run) for name, run, _ in rows] == [("a", names[0]), ("b", names[0]), ("d", names[2])]
    assert {fingerprint for _, _, fingerprint in rows} == {Manifest.from_json(runs[2][1]).fingerprint}
    assert all(comment for (comment,) in comments)


def test_dead_letters_of_earlier_runs_are_gone(table, tmp_path):
    table.run(documents("a", "b"), fails=["text b"])
    work = tmp_path / "v.duckdb.embeam" / "notes"
    assert len(list((work / "dead_letters").iterdir())) == 1
    table.run(documents("a", "b"))
    assert not list(work.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("before", "after"),
    [(("int", 1), ("float", 1.5)), (("string", "a"), ("int", 7)), (("float", 0.5), ("string", "b"))],
)
def test_a_kept_field_may_change_its_type(table, before, after):
    """A column for whole numbers must not round 1.5 to 2, and a row that stays keeps what fits."""
    (first, value), (second, other) = before, after
    for kind, kept, names in ((first, value, "abc"), (second, other, "ab")):
        table.layout = replace(LAYOUT, kept=(KeptField("field", kind),))
        some = [one._replace(kept=pack_kept([kept])) for one in documents(*names)]
        outcome = table.run(some, deletes="keep")
    assert outcome.encoded == []
    stays = {"float": 1.0, "int": None, "string": "0.5"}[second]
    assert {name: row["field"] for (name, _), row in outcome.rows.items()} == {"a": other, "b": other, "c": stays}


def test_a_kept_field_that_is_a_column_of_the_user_with_another_type_is_refused(table, tmp_path):
    table.run(documents(*"ab"))
    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        connection.execute("ALTER TABLE notes ADD COLUMN year VARCHAR")
    table.layout = replace(LAYOUT, kept=(KeptField("year", "int"),))
    with pytest.raises(TableError, match="has a column 'year' of type VARCHAR, but BIGINT is needed; keep"):
        table.run(dated(1, *"ab"))
    assert_rows(read_rows(table.output), documents(*"ab"))
    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        connection.execute("ALTER TABLE notes DROP COLUMN year")
    assert_rows(table.run(dated(1, *"ab")).rows, dated(1, *"ab"))


# Vector indexes


def nearest_by_index(path: Path, vector: np.ndarray) -> tuple[str, str]:
    """The nearest id by the database's own search, and the plan of that query."""
    with duckdb.connect(str(path), read_only=True) as connection:
        connection.execute("LOAD vss")
        query = f"SELECT id FROM notes ORDER BY array_cosine_distance(embedding, ?::FLOAT[{DIMENSION}]) LIMIT 1"
        plan = connection.execute("EXPLAIN " + query, [vector.tolist()]).fetchall()
        return connection.execute(query, [vector.tolist()]).fetchone()[0], str(plan)


def test_the_vector_index_is_built_again_after_every_run(table, tmp_path):
    table.run(documents(*"abcdefgh"), create_vector_index=True)
    table.run(documents(*"abcdefg", "x", "h=y"))
    for name, text in (("x", "text x"), ("h", "text y"), ("a", "text a")):
        found, plan = nearest_by_index(tmp_path / "v.duckdb", draw_vector(text))
        assert found == name and "HNSW_INDEX_SCAN" in plan


def test_an_index_that_a_dead_run_has_dropped_is_built_again(table, tmp_path, monkeypatch):
    table.run(documents(*"abcdefgh"), create_vector_index=True)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.tables.duckdb.DuckdbCommit, "_write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.run(documents(*"abcdefgx"), dies=True)
    assert_rows(read_rows(table.output), documents(*"abcdefgh"))
    table.run(documents(*"abcdefgx"))
    found, plan = nearest_by_index(tmp_path / "v.duckdb", draw_vector("text x"))
    assert found == "x" and "HNSW_INDEX_SCAN" in plan


# Transactions


def test_a_transaction_that_fails_changes_nothing(table, monkeypatch):
    table.run(documents(*"abc"))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "to_json", lambda _: "this is no JSON")  # its last statement fails
        with pytest.raises(TableError, match="cannot be used"):
            table.run(documents("a", "b=x", "d"))
    assert_rows(read_rows(table.output), documents(*"abc"))
    outcome = table.run(documents("a", "b=x", "d"))
    assert outcome.encoded == [], "the journal has it"
    assert_rows(outcome.rows, documents("a", "b=x", "d"))


def test_the_later_of_two_runs_that_began_together_changes_nothing(table, tmp_path):
    """The lock prevents this; without it, the transaction detects it."""
    table.run(documents(*"abc"))

    def let_another_run_end(text: str, model: str) -> np.ndarray:
        with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
            connection.execute("INSERT INTO notes_runs SELECT '2999', created_at, manifest FROM notes_runs")
        return draw_vector(text, model)

    table.encoder = let_another_run_end
    with pytest.raises(TableError, match="another run has changed notes"):
        table.run(documents("a", "b", "late"))
    assert_rows(read_rows(table.output), documents(*"abc"))


def test_show_and_query_read_a_database(tmp_path):
    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    run(tmp_path, first_records(), output=output, keep_text=True)
    assert "84 of 64 x float32" in format_table(output, 1)
    (hit,) = find_nearest(output, first_records()[30]["text"], top=1)
    assert hit.id == "n30" and hit.score > 0.999
