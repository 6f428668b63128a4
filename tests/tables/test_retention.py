"""Old snapshots: how long they stay for readers, how one becomes live again; and what killed runs leave."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

import pipeline.tables.folder
from pipeline.errors import RunError, TableError
from pipeline.records import Row
from pipeline.sinks.writing import RowFormat
from pipeline.tables.attempts import sweep_dead_attempts
from pipeline.tables.lock import TableLock
from pipeline.tables.manifest import open_table
from pipeline.tables.publish import name_snapshot
from pipeline.tables.retention import expire_snapshots, roll_back
from tests.support.steps import LAYOUT, SteppedTable, draw_vector, make_document, publish_rows
from tests.support.tables import list_snapshots, read_rows

DOCUMENTS = [make_document(f"d{i}", f"text {i}") for i in range(6)]


@pytest.fixture
def table(tmp_path) -> SteppedTable:
    return SteppedTable(str(tmp_path / "table"))


def publish(table: SteppedTable, n: int = 6, **settings: object) -> str:
    return table.run(DOCUMENTS[:n], **settings).manifest.snapshot


def live(table: SteppedTable) -> str:
    return open_table(table.output)[0].snapshot


def date_back(table: SteppedTable, name: str, created_at: str) -> None:
    """Gives a snapshot another time of its publication."""
    path = Path(table.output, "snapshots", name, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created_at": created_at}))


def test_names_of_one_second_keep_their_order():
    """A run on a warm machine takes less than a second, and names must still say which snapshot is older."""
    names = [name_snapshot() for _ in range(50)]
    assert names == sorted(names)


def test_old_snapshots_expire(table):
    first = publish(table)
    second = publish(table, grace_seconds=3600, keep_snapshots=1)
    assert list_snapshots(table.output) == [first, second], "a reader may still be in the first"
    third = publish(table, grace_seconds=0, keep_snapshots=2)
    assert list_snapshots(table.output) == [second, third]
    fourth = publish(table, grace_seconds=0, keep_snapshots=1)
    assert list_snapshots(table.output) == [fourth]
    assert len(read_rows(table.output)) == 6, "its files were linked through all of them"


def test_the_grace_begins_when_the_next_snapshot_is_published(table):
    first = publish(table)
    date_back(table, first, "2020-01-01T00:00:00+00:00")
    second = publish(table)
    assert expire_snapshots(table.output, 1, 1000) == []
    date_back(table, second, "2020-01-02T00:00:00+00:00")
    assert expire_snapshots(table.output, 1, 1000) == [first]
    assert list_snapshots(table.output) == [second]


def test_a_rollback_and_back(table):
    first, second = publish(table, 6), publish(table, 5)
    assert roll_back(table.output).snapshot == first == live(table)
    assert len(read_rows(table.output)) == 6
    outcome = table.run(DOCUMENTS[:4])
    assert outcome.manifest.previous == first and outcome.count("deleted") == {"deleted": 2}
    third = outcome.manifest.snapshot
    assert list_snapshots(table.output) == [first, second, third]
    assert roll_back(table.output, second).snapshot == second == live(table)
    assert len(read_rows(table.output)) == 5
    with pytest.raises(TableError, match="no other snapshot 20000101T000000Z-000000; there are: "):
        roll_back(table.output, "20000101T000000Z-000000")
    with pytest.raises(TableError, match=f"no other snapshot {second}"):
        roll_back(table.output, second)
    assert live(table) == second
    again = table.run(DOCUMENTS[:5])
    assert again.encoded == [] and again.count("unchanged") == {"unchanged": 5}


def test_the_first_snapshot_has_none_before_it(table):
    first = publish(table)
    with pytest.raises(TableError, match="no snapshot before the live one; the live one is the only one"):
        roll_back(table.output)
    assert live(table) == first


def test_a_table_that_is_being_written_is_not_rolled_back(table):
    first = publish(table)
    second = publish(table)
    with TableLock(table.output, "a run"), pytest.raises(TableError, match="run a run on"):
        roll_back(table.output)
    assert live(table) == second
    assert roll_back(table.output).snapshot == first


def test_the_snapshot_that_was_live_until_now_outlives_one_that_was_rolled_back(table):
    first, second = publish(table), publish(table)
    roll_back(table.output)
    third = publish(table, keep_snapshots=2, grace_seconds=0)
    assert list_snapshots(table.output) == [first, third], f"{second} was rolled back from"
    assert roll_back(table.output).snapshot == first


def test_readers_of_the_snapshot_that_was_live_until_now_have_their_grace(table):
    first, second = publish(table), publish(table)
    roll_back(table.output)
    date_back(table, second, "2020-01-01T00:00:00+00:00")  # older than the grace, but it took no reader from the first
    publish(table, keep_snapshots=1, grace_seconds=1000)
    assert first in list_snapshots(table.output)


# What killed runs leave


@pytest.mark.parametrize("joins", [False, True], ids=["index", "joins"])
@pytest.mark.parametrize("dies", [False, True], ids=["fails", "dies"])
@pytest.mark.parametrize("point", ["before placing", "after placing", "before the pointer", "after the pointer"])
def test_a_run_that_ends_while_it_publishes(table, monkeypatch, point, dies, joins):
    table.joins = joins
    first = publish(table)
    when, _, what = point.partition(" ")
    name = {"placing": "place_files", "the pointer": "make_live"}[what]
    step = getattr(pipeline.tables.folder, name)

    def broken(*arguments: object) -> None:
        if when == "after":
            step(*arguments)
        raise OSError("the disk is gone")

    changed = [*DOCUMENTS[1:], make_document("new", "a new text")]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.tables.folder, name, broken)
        with pytest.raises(Exception, match="the disk is gone"):
            table.run(changed, dies=dies)
    assert table.encoded == ["a new text"]
    is_live = point == "after the pointer"
    assert (live(table) != first) == is_live
    assert {name for name, _ in read_rows(table.output)} == {one.id for one in (changed if is_live else DOCUMENTS)}
    outcome = table.run(changed)
    assert outcome.encoded == [], "the journal or the table has it"
    assert {name for name, _ in outcome.rows} == {one.id for one in changed}
    assert list_snapshots(table.output) == sorted({first, outcome.manifest.previous, outcome.manifest.snapshot})
    assert not os.listdir(Path(table.output, "attempts")) and not Path(table.output, "journal").exists()


def test_a_snapshot_whose_run_ended_too_early_may_be_rolled_back_from(table, monkeypatch):
    first, step = publish(table), pipeline.tables.folder.make_live

    def broken(plan: object) -> None:
        step(plan)
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.tables.folder, "make_live", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            publish(table, 5)
    second = live(table)
    assert roll_back(table.output).snapshot == first != second
    publish(table, 4)
    assert second in list_snapshots(table.output), "it was live, whatever became of its run"
    assert roll_back(table.output, second).snapshot == second and len(read_rows(table.output)) == 5


@pytest.mark.parametrize("joins", [False, True], ids=["index", "joins"])
def test_of_two_runs_that_began_together_the_first_to_end_is_live(table, joins):
    """The lock prevents this; without it, the comparison of the pointer does."""
    table.joins = joins
    first, others = publish(table), []

    def let_another_run_end(text: str, model: str) -> np.ndarray:
        vector = draw_vector(text, model)
        if not others:
            row = Row("other", 0, vector.tobytes(), 0.0, 3, 0, "0" * 32, b"", None)
            others.append(publish_rows(table.output, [row], RowFormat("tfrecord", LAYOUT)).snapshot)
        return vector

    table.encoder = let_another_run_end
    with pytest.raises(TableError, match=f"another run has published .* since this one started from {first}"):
        table.run([*DOCUMENTS, make_document("new", "a new text")])
    assert [live(table)] == others
    assert [name for name, _ in read_rows(table.output)] == ["other"]
    assert len(list_snapshots(table.output)) == 3, "this one's is complete, and its owner may want it"


def test_a_failed_run_leaves_its_dead_letters_until_the_next(table):
    publish(table)
    with pytest.raises(RunError, match="max_dead_fraction"):
        table.run([*DOCUMENTS, make_document("bad", "bad")], fails=["bad"], max_dead_fraction=0.1)
    (attempt,) = Path(table.output, "attempts").iterdir()
    (dead_letters,) = attempt.iterdir()
    assert json.loads(dead_letters.read_text())["id"] == "bad"
    publish(table)
    assert not os.listdir(attempt.parent)


def test_nothing_is_removed_where_there_are_no_locks(table):
    publish(table)
    attempt = Path(table.output, "attempts", "someone")
    attempt.mkdir()
    (attempt / "embeddings-x.tfrecord").write_bytes(b"rows")
    sweep_dead_attempts("hdfs://" + table.output)
    assert attempt.exists()
    sweep_dead_attempts(table.output)
    assert not attempt.exists()


def test_a_snapshot_of_a_killed_run_is_removed_and_an_older_one_is_not(table):
    first, second = publish(table), publish(table)
    for name in (first, second, "29990101T000000.000000Z-abcdef", "unfinished"):
        Path(table.output, "attempts", name).mkdir()
    for name in ("29990101T000000.000000Z-abcdef", "unfinished"):
        Path(table.output, "snapshots", name).mkdir()
    Path(table.output, "snapshots", "29990101T000000.000000Z-abcdef", "manifest.json").write_text("{}")
    sweep_dead_attempts(table.output)
    assert sorted(path.name for path in Path(table.output, "snapshots").iterdir()) == [first, second]


# Journals of runs that never published


def leave_journal(table: SteppedTable, days: float) -> Path:
    """The folder of the journal that a failed run of another model has left some days ago."""
    table.model = "other"
    with pytest.raises(RunError, match="max_dead_fraction"):
        table.run(DOCUMENTS, fails=["text 0"], max_dead_fraction=0.1)
    table.model = "one"
    (folder,) = Path(table.output, "journal").iterdir()
    written = time.time() - days * 86400
    for path in folder.iterdir():
        os.utime(path, (written, written))
    return folder


@pytest.mark.parametrize(("days", "stays"), [(0, True), (29, True), (31, False)])
def test_a_journal_stays_for_its_model_for_a_month(table, caplog, days, stays):
    publish(table)
    folder = leave_journal(table, days)
    publish(table)
    assert folder.exists() == stays == folder.parent.exists()
    assert ("vectors of a run that never published" in caplog.text) != stays


# Once the pointer is replaced the run has succeeded


@pytest.mark.parametrize("name", ["delete_journal", "delete_folder", "expire_journals"])
def test_what_cannot_be_cleaned_up_is_a_warning(table, caplog, monkeypatch, name):
    def refuse(*_: str) -> None:
        raise OSError("the disk is tired")

    with monkeypatch.context() as patch:
        patch.setattr(f"pipeline.tables.attempts.{name}", refuse)
        first = publish(table)
    assert live(table) == first and "the disk is tired" in caplog.text
    publish(table)
    assert not os.listdir(Path(table.output, "attempts")) and not Path(table.output, "journal").exists()


def test_a_damaged_manifest_of_an_old_snapshot_is_a_warning(table, caplog):
    first = publish(table)
    publish(table)
    Path(table.output, "snapshots", first, "manifest.json").write_text("{")
    third = publish(table)
    assert live(table) == third and first in caplog.text
