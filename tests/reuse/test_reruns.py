"""What a rerun does, case by case, without Beam and without an encoder: by the local back end's index and by joins.

Vectors are drawn from texts, so a row is right if it holds exactly the numbers of its document's text.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RunError, TableError
from pipeline.read_config import KeptField
from pipeline.records import Document, pack_kept
from pipeline.tables.manifest import open_table
from tests.support.reruns import CASES, A, B, assert_rows, dated, documents, list_dead
from tests.support.steps import LAYOUT, Outcome, SteppedTable, draw_vector, make_dead_letter, make_document
from tests.support.tables import hash_folder, list_snapshots, read_dead_letters, read_rows

YEAR = replace(LAYOUT, kept=(KeptField("year", "int"),))


@pytest.fixture(params=[False, True], ids=["index", "joins"])
def table(request, tmp_path) -> SteppedTable:
    return SteppedTable(str(tmp_path / "table"), joins=request.param)


@pytest.fixture
def local(tmp_path) -> SteppedTable:
    """Only on the local back end."""
    return SteppedTable(str(tmp_path / "table"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_rerun(table, case):
    first = table.run(case.before)
    assert_rows(first.rows, case.before)
    outcome = table.run(case.after, case.dead_letters, case.fails, **case.settings)
    assert outcome.encoded == sorted(case.encoded)
    assert outcome.count(*case.counts) == case.counts
    assert_rows(outcome.rows, case.rows)
    assert list_dead(table.output) == case.dead
    assert outcome.manifest.previous == first.manifest.snapshot
    again = table.run(case.after, case.dead_letters, case.fails, **case.settings)
    assert_rows(again.rows, case.rows)
    assert set(again.encoded) == set(case.fails), "only what failed is tried again"


def test_a_stale_row_belongs_to_the_file_that_its_document_is_in_now(table):
    table.run(documents(*"ab"))
    table.run([*documents("a"), *documents("b=x", file=B)], fails=["text x"])
    outcome = table.run(documents("a"), [make_dead_letter(B)])  # which has lost the document
    assert_rows(outcome.rows, documents(*"ab"))
    assert outcome.count("stale", "deleted") == {"stale": 1, "deleted": 0}


def test_what_the_index_counts(local):
    local.layout = YEAR
    local.run(dated(1, "a", "b", "c", "d"))
    after = [*dated(1, "a"), *dated(2, "b"), *dated(1, "c=x", "e", "f=d")]
    outcome = local.run(after)
    wanted = {"documents": 5, "new": 2, "changed": 1, "updated": 1, "unchanged": 1, "reused": 2, "encoded": 2}
    assert outcome.count(*wanted, "deleted", "moved") == wanted | {"deleted": 1, "moved": 1}
    assert_rows(outcome.rows, after)


def test_in_two_bundles_an_equal_text_may_be_encoded_twice_but_every_id_has_one_row(local):
    same = documents("a", "b=a", "c=a", "d=a")
    outcome = local.run(same, bundles=2)
    assert outcome.encoded == ["text a", "text a"]
    assert_rows(outcome.rows, same)
    failed = documents("a=x", "b=x", "c=x", "d=x")
    outcome = local.run(failed, fails=["text x"], bundles=2)
    assert_rows(outcome.rows, same)
    assert sorted(dead_letter["id"] for dead_letter in read_dead_letters(local.output)) == ["a", "b", "c", "d"]
    assert outcome.count("stale") == {"stale": 4}


# Columns and files


@pytest.mark.parametrize("form", ["tfrecord", "gzip", "parquet"])
def test_a_kept_field_that_changes(table, form):
    table.layout = YEAR
    table.output_format = "parquet" if form == "parquet" else "tfrecord"
    table.compression = "gzip" if form == "gzip" else "none"
    table.run(dated(1, *"abc"))
    after = [*dated(1, "a"), *dated(2, "b"), *dated(1, "c")]
    outcome = table.run(after)
    assert outcome.encoded == [] and outcome.count("unchanged", "reused") == {"unchanged": 2, "reused": 1}
    assert_rows(outcome.rows, after)


def test_a_document_that_moves_gets_its_new_source(table):
    table.layout = replace(LAYOUT, sourced=True)
    table.run(documents(*"abc"))
    moved = [*documents("a", "b"), *documents("c", file=B)]
    outcome = table.run(moved)
    assert outcome.encoded == [] and outcome.count("unchanged", "updated") == {"unchanged": 2, "updated": 1}
    assert {name: row["source"] for (name, _), row in outcome.rows.items()} == {"a": A, "b": A, "c": B}
    assert table.run(moved).count("unchanged") == {"unchanged": 3}


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_other_columns_need_no_encoder(table, output_format):
    """Kept fields added and taken away again, and the text beside the vector; rows that stay get nulls."""
    table.output_format = output_format
    table.run(documents(*"abcd"))
    table.layout = replace(YEAR, keep_text=True)
    outcome = table.run(dated(7, "a", "b", "c=x"), deletes="keep")
    assert outcome.encoded == ["text x"]
    assert_rows(outcome.rows, [*dated(7, "a", "b", "c=x"), *documents("d")])
    assert {name: (row["year"], row["text"]) for (name, _), row in outcome.rows.items()} == {
        "a": (7, "text a"),
        "b": (7, "text b"),
        "c": (7, "text x"),
        "d": (None, ""),
    }
    table.layout = LAYOUT
    outcome = table.run(documents("a", "b", "c=x", "d"))
    assert outcome.encoded == [] and not {"year", "text"} & set(outcome.rows["a", 0])
    assert_rows(outcome.rows, documents("a", "b", "c=x", "d"))


def test_another_file_format_needs_no_encoder(table):
    names = list("abcdef")
    table.run(documents(*names))
    for number, form in enumerate([("parquet", "none"), ("tfrecord", "gzip"), ("tfrecord", "none")]):
        table.output_format, table.compression = form
        names[number] += f"={number}"
        outcome = table.run(documents(*names))
        assert outcome.encoded == [f"text {number}"]
        assert (outcome.manifest.file_format, outcome.manifest.compression) == form
        assert all(file.name.endswith(".gz") == ("gzip" in form) for file in outcome.manifest.files)
        assert_rows(outcome.rows, documents(*names))
        assert table.run(documents(*names)).encoded == []


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
@pytest.mark.parametrize("kind", ["float16", "int8", "binary", "tokens", "int8 tokens", "chunks", "int8 chunks"])
def test_rows_of_every_kind(table, tmp_path, kind, output_format):
    """Copied, reused, updated and new rows in one rerun, against a table made from scratch, bit for bit."""
    dtype = kind.split()[0] if kind.split()[0] in ("float16", "int8", "binary") else "float32"
    table.layout = replace(YEAR, dtype=dtype, tokens="tokens" in kind, chunked="chunks" in kind)
    table.output_format = output_format

    def lengthen(found: list[Document]) -> list[Document]:
        """Documents with a second sentence: one chunk more for each."""
        return [one._replace(text=f"{one.text} and one more") for one in found]

    table.run([*dated(1, "a", "b", "c"), *lengthen(dated(1, "d", "e", "f"))])
    after = [*dated(1, "a", "c=x", "y=b"), *dated(2, "b"), *lengthen(dated(1, "d", "f=x", "z=e"))]
    outcome = table.run(after)
    assert outcome.encoded == ["text x", "text x and one more"]
    fresh = replace(table, output=str(tmp_path / "fresh")).run(after)
    assert set(outcome.rows) == set(fresh.rows)
    assert len(outcome.rows) == (len(after) + 3 if "chunks" in kind else len(after))
    for key, row in outcome.rows.items():
        other = fresh.rows[key]
        assert np.array_equal(row.pop("embedding"), other.pop("embedding")) and row == other, key


def test_a_text_that_shrinks_leaves_no_chunk_behind(table):
    table.layout = replace(LAYOUT, chunked=True)
    long = "one two three four five six seven"
    outcome = table.run([make_document("a", long), *documents("b")])
    assert set(outcome.rows) == {("a", 0), ("a", 1), ("a", 2), ("b", 0)}
    outcome = table.run([make_document("a", "short"), make_document("c", long)])
    assert outcome.encoded == ["short"]
    assert set(outcome.rows) == {("a", 0), ("c", 0), ("c", 1), ("c", 2)}


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_every_row_of_a_chunk_has_its_own_slice_of_the_text(table, tmp_path, output_format):
    """New rows, and those that get a vector of the live table, the journal or a document with the same text."""
    table.layout = replace(YEAR, chunked=True, keep_text=True, has_offsets=True, keep_unknown=True)
    table.output_format = output_format

    def long(name: str, year: int, text: str = "") -> Document:
        words = f"  {text or name} 漢字 \U0001f388,  é\u0301 and\n\nfour  five six seven {text or name} "
        return make_document(name, words, kept=pack_kept([year]))

    table.run([long("updated", 1), long("stays", 1), long("old name", 1)])

    def fail(text: str, model: str) -> np.ndarray:
        if text.startswith("unlucky"):
            raise RuntimeError("the machine is lost")
        return draw_vector(text, model)

    after = [long("updated", 2), long("stays", 1), long("new name", 1, "old name"), long("lucky", 1)]
    after += [long("twin", 1, "shared"), long("other twin", 3, "shared"), long("unlucky", 1)]
    table.encoder = fail
    with pytest.raises(RuntimeError, match="lost"):
        table.run(after, dies=True)
    table.encoder = draw_vector
    outcome = table.run(after)
    assert outcome.encoded == [long("unlucky", 1).text], "the journal has the others"
    fresh = replace(table, output=str(tmp_path / "fresh")).run(after)
    assert set(outcome.rows) == set(fresh.rows) and len(outcome.rows) == 4 * len(after)
    texts = {one.id: one.text for one in after}
    for (name, chunk), row in outcome.rows.items():
        assert row["text"] == texts[name][row["char_start"] : row["char_end"]]
        assert row["text"].split() == texts[name].split()[3 * chunk : 3 * chunk + 3] and row["n_unknown"] == chunk
        other = fresh.rows[name, chunk]
        assert np.array_equal(row.pop("embedding"), other.pop("embedding")) and row == other


def test_what_a_table_did_not_count_is_null_in_rows_that_are_reused(table):
    table.layout = replace(LAYOUT, chunked=True, has_offsets=True)
    table.run([make_document("a", "one two three four")])
    table.layout = replace(table.layout, keep_unknown=True, keep_text=True)
    outcome = table.run([make_document("a", "one two three four"), make_document("b", "five")])
    assert outcome.encoded == ["five"]
    found = {key: (row["n_unknown"], row["text"]) for key, row in outcome.rows.items()}
    assert found == {("a", 0): (None, "one two three"), ("a", 1): (None, "four"), ("b", 0): (0, "five")}


def test_a_document_that_lacks_a_chunk_is_encoded_again(table):
    """Its other rows are published with its dead letter, but the document does not count as unchanged."""
    table.layout = replace(LAYOUT, chunked=True)
    long, other = "one two three four five six seven", "one two three BAD"

    def fail(text: str, model: str) -> np.ndarray:
        if "BAD" in text:
            raise ValueError("out of luck")
        return draw_vector(text, model)

    outcome = table.run([make_document("a", long), make_document("b", long), *documents("c")])
    assert set(outcome.rows) == {*((name, chunk) for name in "ab" for chunk in range(3)), ("c", 0)}
    table.encoder = fail
    broken = [make_document("a", other), make_document("b", other), *documents("c")]
    for _ in range(2):
        outcome = table.run(broken)
        assert outcome.encoded == [other] and outcome.count("stale", "unchanged") == {"stale": 0, "unchanged": 1}
        assert set(outcome.rows) == {("a", 0), ("b", 0), ("c", 0)}
        assert outcome.manifest.dead_letters == {"encoder_error": 2}
    table.encoder = draw_vector
    outcome = table.run(broken)
    assert outcome.encoded == [other] and not outcome.manifest.dead_letters
    assert set(outcome.rows) == {("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)}


def test_prefixes_and_pairs_are_part_of_the_text(table):
    table.prefix = "query: "
    pairs = [one._replace(pair=f"answer {one.id}") for one in documents(*"abc")]
    table.run(pairs)
    pairs[1] = pairs[1]._replace(pair="another answer")
    outcome = table.run(pairs)
    assert outcome.encoded == ["text b"]
    assert np.array_equal(outcome.rows["b", 0]["embedding"], draw_vector("query: text b + another answer"))
    table.prefix = "passage: "
    assert table.run(pairs).encoded == ["text a", "text b", "text c"]


# Files that stay, and many small ones


def files_of(outcome: Outcome, table: SteppedTable) -> dict[str, int]:
    """Inodes of the live files with rows by name."""
    folder = open_table(table.output)[1]
    return {file.name: os.stat(Path(folder, file.name)).st_ino for file in outcome.manifest.files}


def test_a_file_is_linked_if_all_of_it_stays_and_copied_if_not(table):
    table.shard_bytes = 1  # files of four rows
    first = table.run(documents(*"abcdefgh"))
    before, whole = files_of(first, table), hash_folder(open_table(table.output)[1])
    assert len(before) == 2
    same = table.run(documents(*"abcdefgh"))
    assert files_of(same, table) == before, "the same files under both names"
    assert same.count("linked_files", "linked_rows", "copied_rows") == {
        "linked_files": 2,
        "linked_rows": 8,
        "copied_rows": 0,
    }
    less = table.run(documents(*"abcdfgh"))
    assert less.count("linked_files", "copied_rows") == {"linked_files": 1, "copied_rows": 3}
    assert len(set(files_of(less, table).values()) & set(before.values())) == 1
    assert_rows(less.rows, documents(*"abcdfgh"))
    older = Path(table.output, "snapshots", first.manifest.snapshot)
    assert hash_folder(older) == whole, "a row that goes does not go from the snapshot before"


def test_many_small_files_become_one_and_few_stay(table):
    table.shard_bytes = 1
    many = [make_document(f"d{i:02d}", f"text {i}") for i in range(4 * 17)]
    assert len(table.run(many[: 4 * 16]).manifest.files) == 16
    table.shard_bytes = 1 << 20
    assert len(table.run(many[: 4 * 16]).manifest.files) == 16, "these are few"
    table.run(many)
    outcome = table.run(many)
    assert len(outcome.manifest.files) == 1 and outcome.count("copied_rows") == {"copied_rows": 68}
    assert_rows(outcome.rows, many)
    outcome = table.run(many)
    assert outcome.count("linked_files", "linked_rows") == {"linked_files": 1, "linked_rows": 68}
    assert_rows(outcome.rows, many)


def spoil(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.unlink()  # it may be linked elsewhere
    path.write_bytes(bytes(data))


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def test_a_damaged_file_stops_the_run_and_is_made_again_on_demand(table):
    table.shard_bytes = 1  # files of four rows
    first = table.run(documents(*"abcdefgh")).manifest
    spoil(Path(open_table(table.output)[1], first.files[1].name), flip)
    after = documents(*"abcdfgh")
    with pytest.raises(TableError, match=r"damaged.*--verify_live"):
        table.run(after)
    assert open_table(table.output)[0].snapshot == first.snapshot
    outcome = table.run(after, verify_live=True)
    assert outcome.encoded == ["text f", "text g", "text h"]
    assert_rows(outcome.rows, after)


@pytest.mark.parametrize("part", ["rows", "index"])
def test_a_file_that_was_cut_short_is_made_again_and_reported(table, caplog, part):
    table.shard_bytes = 1
    first = table.run(documents(*"abcdefgh")).manifest
    name = (first.files if part == "rows" else first.index_files)[1].name
    spoil(Path(open_table(table.output)[1], name), lambda data: data.pop())
    outcome = table.run(documents(*"abcdefgh"))
    assert outcome.encoded == ["text e", "text f", "text g", "text h"]
    assert f"{name} is damaged; its rows are made again" in caplog.text
    assert_rows(outcome.rows, documents(*"abcdefgh"))


# Where a document was last seen


def test_the_index_says_where_a_document_was_last_seen(table):
    table.run(documents(*"abc"))
    table.run([*documents("a"), *documents("b", "c", file=B)])
    outcome = table.run(documents("a"), [make_dead_letter(B)])
    assert outcome.count("stale", "deleted") == {"stale": 2, "deleted": 0}
    outcome = table.run(documents("a"), [make_dead_letter(A)])
    assert outcome.count("stale", "deleted") == {"stale": 0, "deleted": 2}
    assert_rows(outcome.rows, documents("a"))


def test_rows_that_were_kept_go_once_deletions_are_applied(table):
    table.run(documents(*"abcd"))
    for _ in range(2):
        outcome = table.run(documents("a", "x"), deletes="keep")
        assert_rows(outcome.rows, documents(*"abcdx"))
    outcome = table.run(documents("a", "x", "b"))
    assert outcome.encoded == [] and outcome.count("deleted", "kept") == {"deleted": 2, "kept": 0}
    assert_rows(outcome.rows, documents(*"abx"))


# Other models


def test_another_model_replaces_every_row(table):
    table.run(documents(*"abc"))
    table.model = "two"
    outcome = table.run(documents(*"abd"))
    assert outcome.encoded == ["text a", "text b", "text d"]
    assert_rows(outcome.rows, documents(*"abd"), "two")


def test_no_vector_of_another_model_survives(table):
    """A document that cannot be embedded loses its old vector: a table has one model's vectors only."""
    table.run(documents(*"abc"))
    table.model = "two"
    outcome = table.run(documents("a", "b=x"), [make_dead_letter(A, "c", "wrong_type")], fails=["text x"])
    assert outcome.count("lost", "stale", "kept") == {"lost": 2, "stale": 0, "kept": 0}
    assert_rows(outcome.rows, documents("a"), "two")


# Runs that stop


def test_too_many_deletions_stop_the_run_and_nothing_is_encoded_twice(table):
    table.run(documents(*"abcdefgh"))
    before = read_rows(table.output), list_snapshots(table.output)
    after = documents(*"abcdef", "x")
    with pytest.raises(RunError, match=r"2 of the table's 8 .*--max_delete_fraction=0\.2"):
        table.run(after, max_delete_fraction=0.2)
    assert table.encoded == ["text x"]
    assert list_snapshots(table.output) == before[1]
    assert_rows(read_rows(table.output), documents(*"abcdefgh"))
    outcome = table.run(after, max_delete_fraction=0.25)
    assert outcome.encoded == [] and outcome.count("reused") == {"reused": 1}
    assert_rows(outcome.rows, after)
    assert not Path(table.output, "journal").exists()


def test_documents_that_move_are_not_counted_as_gone(table):
    table.run(documents(*"abcd"))
    outcome = table.run(documents("x=a", "y=b", "z=c", "d"), max_delete_fraction=0.2)
    assert outcome.count("deleted", "moved") == {"deleted": 3, "moved": 3}
    with pytest.raises(RunError, match="2 of the table's 4 "):
        table.run(documents("v=a", "w=d"), max_delete_fraction=0.2)


def test_too_many_dead_letters_of_equal_texts_stop_the_run(table):
    table.run(documents(*"ab"))
    with pytest.raises(RunError, match="4 of 6 documents cannot be embedded"):
        table.run(documents("a", "b", "v=x", "w=x", "x", "y=x"), fails=["text x"], max_dead_fraction=0.5)
    assert_rows(read_rows(table.output), documents(*"ab"))


def test_a_model_that_returns_finds_its_journal(table):
    """What a stopped run has encoded is kept for its own model alone."""
    table.run(documents(*"abcd"))
    table.model = "two"
    with pytest.raises(RunError, match="max_dead_fraction"):
        table.run(documents("a", "b", "c", "x"), fails=["text x"], max_dead_fraction=0.1)
    table.model = "one"
    assert table.run(documents(*"abcd")).encoded == []


def test_retried_dead_letters_replace_nothing_else(table):
    table.run(documents(*"abc"))
    table.run(documents("a", "b=x", "c", "d=x"), fails=["text x"])
    outcome = table.run(documents("b=x", "d=x"), retry_dead_letters=True)
    assert outcome.encoded == ["text x"] and outcome.count("kept", "deleted") == {"kept": 2, "deleted": 0}
    assert_rows(outcome.rows, documents("a", "b=x", "c", "d=x"))
