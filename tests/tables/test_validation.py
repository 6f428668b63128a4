"""Validation of a snapshot: its rows, its numbers, and texts that are encoded again."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import partitions
from pipeline.errors import ValidationError
from pipeline.records import Row
from pipeline.reuse.complete import number_files
from pipeline.sinks.index import ENTRY, Index, SourceNumbers, index_rows
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.readers import FileReader
from pipeline.sinks.writing import RowFormat, Shard, write_index
from pipeline.tables.manifest import open_table
from pipeline.tables.validation import Expected, check_rows, check_vectors, compare_row, restore_row
from pipeline.vectors.storing import quantize_vectors
from tests.support.steps import LAYOUT, SteppedTable, draw_vector, make_document, write_shards
from tests.support.tables import assert_unchanged, remember

FORM = RowFormat("tfrecord", LAYOUT)


def make_row(name: str, vector: np.ndarray, chunk: int = 0, dtype: str = "float32") -> Row:
    stored, scales = quantize_vectors(vector[None].astype(np.float32), dtype)
    return Row(name, chunk, stored[0].tobytes(), float(scales[0]), 3, 0, f"{hash(name) & 0xFFFF:032x}", b"", None)


def drawn(names: range, **more: int) -> list[Row]:
    return [make_row(str(name), draw_vector(str(name)), **more) for name in names]


# Its rows


def count(shards: list[Shard], least: int, most: int, staying: np.ndarray | None = None) -> None:
    blocks = [] if staying is None else [staying]
    check_rows(shards, blocks, sum(map(len, blocks)), Expected(least, most))


def test_every_document_has_its_rows_once(tmp_path):
    shards = write_shards([*drawn(range(9)), *drawn(range(4), chunk=1)], FORM, str(tmp_path), shard_bytes=1)
    assert len(shards) > 2
    count(shards, 9, 9)
    for least, most in ((10, 10), (8, 8), (10, 12)):
        with pytest.raises(ValidationError, match=f"rows of 9 documents were written instead of {least}"):
            count(shards, least, most)
    with pytest.raises(ValidationError, match="2 rows have an id and chunk that another row has too"):
        count([*shards, *write_shards(drawn(range(2)), FORM, str(tmp_path))], 9, 9)


def test_rows_that_stay_in_a_database_count_too(tmp_path):
    shards = write_shards(drawn(range(5)), FORM, str(tmp_path))
    count(shards, 7, 7, index_rows(drawn(range(5, 7)), SourceNumbers()))
    with pytest.raises(ValidationError, match="1 rows have an id and chunk"):
        count(shards, 6, 6, index_rows(drawn(range(4, 6)), SourceNumbers()))


def test_an_index_that_is_too_short_is_found(tmp_path):
    shards = write_shards(drawn(range(5)), FORM, str(tmp_path))
    with pytest.raises(ValidationError, match="has 6 rows and an index of 5"):
        count([shards[0]._replace(rows=6)], 6, 6)


def test_rows_in_many_parts_are_told_apart_too(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "PART_BYTES", 100)
    shards = write_shards([*drawn(range(300)), *drawn(range(40), chunk=1)], FORM, str(tmp_path), shard_bytes=10_000)
    count(shards, 300, 300)
    with pytest.raises(ValidationError, match="7 rows have an id and chunk that another row has too"):
        count(shards, 300, 300, index_rows(drawn(range(7)), SourceNumbers()))


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "PART_BYTES", 1 << 19)

    def peak(n: int) -> int:
        entries = np.zeros(n, ENTRY)
        entries["id"] = np.frombuffer(np.random.default_rng(1).bytes(16 * n), "S16")
        path, size = write_index(str(tmp_path), Index(entries, ["a.txt"]))
        del entries
        shard = Shard("rows", "embeddings", "", n, 0, "", "", path, size)
        tracemalloc.start()
        check_rows([shard], [], 0, Expected(n, n), str(tmp_path))
        measured = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return measured

    few, many = peak(200_000), peak(800_000)
    assert many - few < 600_000  # bytes: less than one for each row more


# Its numbers


def look_at(tmp_path: Path, rows: list[Row], layout: TableLayout = LAYOUT) -> None:
    files = number_files(write_shards(rows, RowFormat("parquet", layout), str(tmp_path)), 0)
    check_vectors(files, FileReader("parquet", layout, "none"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_good_vectors_pass(tmp_path, dtype):
    look_at(tmp_path, drawn(range(40), dtype=dtype), replace(LAYOUT, dtype=dtype))


def test_vectors_that_are_no_numbers_are_found(tmp_path):
    bad = draw_vector("bad")
    for value in (np.nan, np.inf):
        bad[3] = value
        with pytest.raises(ValidationError, match="holds NaN or infinity"):
            look_at(tmp_path, [*drawn(range(40)), make_row("bad", bad)])


def test_vectors_that_are_one_number_throughout_are_found(tmp_path):
    for number in (0.0, 1.5):
        flat = [make_row(f"flat {i}", np.full(LAYOUT.dimension, number)) for i in range(2)]
        look_at(tmp_path, [*drawn(range(198)), *flat])
        with pytest.raises(ValidationError, match="2 of 199 vectors are one number throughout"):
            look_at(tmp_path, [*drawn(range(197)), *flat])


def test_vectors_that_are_all_the_same_are_found_from_twenty_texts_on(tmp_path):
    """An encoder without case may well give one vector for two texts."""
    same = [make_row(str(i), draw_vector("any")) for i in range(20)]
    look_at(tmp_path, same[:19])
    with pytest.raises(ValidationError, match="all 20 vectors that were looked at are the same, for 20 texts"):
        look_at(tmp_path, same)


# Texts that are encoded again


def compare(first: np.ndarray, again: np.ndarray, dtype: str) -> None:
    layout = TableLayout(dtype, first.size)
    row, spot_check = make_row("a", first, dtype=dtype), make_row("a", again, dtype=dtype)
    compare_row(spot_check, {"embedding": [row.vector], "scale": [row.scale], "n_tokens": [3]}, layout, "file")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_vector_may_differ_by_rounding_only(dtype):
    vector = np.random.default_rng(1).standard_normal(64)
    across = np.random.default_rng(2).standard_normal(64)
    across -= vector * (across @ vector) / (vector @ vector)  # at a right angle
    across *= np.linalg.norm(vector) / np.linalg.norm(across)
    for angle in (0.0, 0.02, 0.04):  # cosine 0.9992
        compare(vector, np.cos(angle) * vector + np.sin(angle) * across, dtype)
    for angle in (0.05, 1.0, np.pi):  # cosine 0.9988
        with pytest.raises(ValidationError, match="encoded again, gives another vector"):
            compare(vector, np.cos(angle) * vector + np.sin(angle) * across, dtype)
    compare(np.zeros(64), np.zeros(64), dtype)
    with pytest.raises(ValidationError, match=r"cosine 0\.0000"):
        compare(np.zeros(64), vector, dtype)


def test_a_few_bits_may_differ():
    vector = np.random.default_rng(1).standard_normal(64)
    for n_bits in (0, 1, 2):
        compare(vector, np.where(np.arange(64) < n_bits, -vector, vector), "binary")
    with pytest.raises(ValidationError, match="3 of 64 bits"):
        compare(vector, np.where(np.arange(64) < 3, -vector, vector), "binary")


def test_another_number_of_tokens_is_found():
    layout = replace(LAYOUT, tokens=True)
    rows = [Row("a", 0, bytes(4 * 8 * n), 0.0, n, 0, "0" * 32, b"", None) for n in (3, 4)]
    columns = {"embedding": [rows[0].vector], "n_tokens": [3]}
    assert restore_row(columns, 0, layout).shape == (3, 8)
    with pytest.raises(ValidationError, match=r"gives \(4, 8\) numbers instead of \(3, 8\)"):
        compare_row(rows[1], columns, layout, "file")


# Whole tables


@pytest.fixture(params=[False, True], ids=["index", "joins"])
def table(request, tmp_path) -> SteppedTable:
    return SteppedTable(str(tmp_path / "table"), joins=request.param)


DOCUMENTS = [make_document(f"d{i:02d}", f"text {i}") for i in range(30)]


@pytest.mark.parametrize("changed", [False, True], ids=["linked", "copied"])
def test_an_encoder_that_gives_other_vectors_by_now_is_found(table, changed):
    table.run(DOCUMENTS)
    before = remember(table.output)
    table.encoder = lambda text, model: -draw_vector(text, model)
    documents = [*DOCUMENTS[1:], make_document("new", "new")] if changed else DOCUMENTS
    with pytest.raises(ValidationError, match=r"is kept in .*rejected/.*encoded again"):
        table.run(documents)
    assert_unchanged(table.output, before)
    (rejected,) = Path(table.output, "rejected").iterdir()
    assert (rejected / "manifest.json").exists() and list(rejected.glob("embeddings-*"))
    outcome = table.run(documents, validate="off")
    assert open_table(table.output)[0].snapshot == outcome.manifest.snapshot != before["snapshot"]


def test_new_vectors_that_are_all_one_number_are_found(table):
    table.run(DOCUMENTS)
    before = remember(table.output)
    table.encoder = lambda text, model: draw_vector(text) * ("new" not in text)
    with pytest.raises(ValidationError, match="one number throughout"):
        table.run([*DOCUMENTS, make_document("new", "new"), make_document("newer", "newer")])
    assert_unchanged(table.output, before)


def test_few_texts_of_each_kind_are_encoded_again(table):
    table.run(DOCUMENTS)
    new = [make_document(f"new {i:02d}", f"new {i}") for i in range(20)]
    outcome = table.run([*DOCUMENTS, *new])
    assert outcome.encoded == sorted(one.text for one in new)
    n_new = sum(text.startswith("new") for text in outcome.spot_checks)
    assert (n_new, len(outcome.spot_checks) - n_new) == (3, 3), "the first, the fourth and the sixteenth"
    many = [make_document(f"d{i:03d}", f"text {i}") for i in range(70)]
    assert len(table.run(many).spot_checks) == 3 + 3
    assert len(table.run(many).spot_checks) == 4


def test_spot_checks_of_dead_letters_do_not_stop_a_run(table):
    table.run(DOCUMENTS)
    new = [make_document(f"new {i}", f"new {i}") for i in range(4)]
    outcome = table.run([*DOCUMENTS, *new], fails=[one.text for one in new])
    assert len(outcome.rows) == len(DOCUMENTS) and outcome.manifest.dead_letters == {"encoder_error": 4}
