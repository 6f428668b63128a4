"""The same command run again: only what is new or changed is encoded, and the table is as if made from scratch.

What is right is said by the official encoder, called directly, or by a run from scratch into another folder. What was
encoded is counted at the encoder itself, not taken from the counts of the run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from pipeline.encoders.handler import LoadedEncoder
from pipeline.errors import ConfigError, GateError, RunError, TableError
from pipeline.sinks import writing
from pipeline.sources.planning import plan_input
from pipeline.tables.manifest import Manifest, open_table
from pipeline.tables.publish import name_snapshot
from pipeline.tables.retention import roll_back
from tests.support.corpora import as_records, change, some_texts, write_jsonl
from tests.support.official import official_tokens
from tests.support.runs import PROCESSES, THREADS, make_config, run_pipeline, watch_encoder
from tests.support.tables import (
    Rows,
    assert_official,
    assert_same_rows,
    assert_unchanged,
    list_snapshots,
    read_dead_letters,
    read_rows,
    remember,
)

N = 40
RECORDS = as_records(some_texts(N, seed=5, words=(3, 30)))


def embed(folder: Path, beam_flags: Sequence[str] = (), **settings: Any) -> tuple[Rows, Manifest, list[str]]:
    """Embeds what lies in the folder; returns rows, manifest and the texts that were encoded, sorted."""
    with watch_encoder() as run:
        manifest = run_pipeline(folder, beam_flags, **settings)
    assert manifest.counts["encode"].get("rows", 0) <= len(run.texts)
    return read_rows(settings.get("output", str(folder / "table"))), manifest, sorted(run.texts)


def letters_of(table: Path) -> list[tuple[str | None, str]]:
    return sorted((letter["id"], letter["reason"]) for letter in read_dead_letters(str(table)))


def live_files(table: Path) -> dict[str, os.stat_result]:
    manifest, folder = open_table(str(table))
    return {file.name: os.stat(Path(folder, file.name)) for file in manifest.files}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a corpus and its table."""
    folder = tmp_path_factory.mktemp("base")
    write_jsonl(folder / "corpus.jsonl", RECORDS)
    assert len({record["text"] for record in RECORDS}) == N
    assert sum(len(official_tokens(record["text"])) > 14 for record in RECORDS) > 5
    rows, _, encoded = embed(folder)
    assert_official(rows, RECORDS)
    assert encoded == sorted(record["text"] for record in RECORDS)
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A copy of `base` for one test."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    return tmp_path


# What is encoded again


def test_new_changed_and_deleted_documents(folder):
    old = read_rows(str(folder / "table"))
    records = [record for record in change(RECORDS, n3="another text", n50="a new document") if record["id"] != "7"]
    write_jsonl(folder / "corpus.jsonl", records)
    rows, manifest, encoded = embed(folder)
    assert encoded == ["a new document", "another text"]
    assert_official(rows, records)
    recall, carry = manifest.counts["recall"], manifest.counts["carry"]
    assert (recall["documents"], recall["new"], recall["changed"], recall["unchanged"]) == (N, 1, 1, N - 2)
    assert (carry["deleted"], carry["unchanged"], carry["stale"], carry["kept"]) == (1, N - 2, 0, 0)
    assert manifest.counts["encode"]["rows"] == 2
    for key in set(rows) - {("3", 0), ("50", 0)}:
        assert np.array_equal(rows[key]["embedding"], old[key]["embedding"])  # copied, not computed


def test_nothing_changed_links_the_files(folder):
    before = live_files(folder / "table")
    rows, manifest, encoded = embed(folder)
    assert encoded == []
    after = live_files(folder / "table")
    assert len(list_snapshots(folder / "table")) == 2
    assert {name: stat.st_ino for name, stat in after.items()} == {name: stat.st_ino for name, stat in before.items()}
    assert manifest.counts["carry"]["linked_rows"] == manifest.counts["recall"]["unchanged"] == N
    assert manifest.counts["encode"].get("rows", 0) == 0
    assert_official(rows, RECORDS)


def test_a_file_with_a_deleted_row_is_copied_and_its_snapshot_stays(folder):
    before = remember(folder / "table")
    write_jsonl(folder / "corpus.jsonl", RECORDS[1:])
    embed(folder)
    assert before["snapshot"] in list_snapshots(folder / "table")
    older = folder / "table" / "snapshots" / before["snapshot"]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in older.iterdir()}
    assert files == before["files"]


def test_a_line_inserted_at_the_top_of_a_text_shard_costs_one_encoding(tmp_path):
    texts = some_texts(30, seed=8, words=(2, 12))
    shard = tmp_path / "shard.txt"
    shard.write_text("".join(text + "\n" for text in texts))
    old, _, _ = embed(tmp_path, input=str(shard), id_field="")
    shard.write_text("".join(text + "\n" for text in ["a line at the top", *texts]))
    rows, manifest, encoded = embed(tmp_path, input=str(shard), id_field="")
    assert encoded == ["a line at the top"]
    assert len(rows) == 31 and len(set(rows) & set(old)) <= 1, "the insertion should shift the ids"
    assert manifest.counts["recall"]["recalled"] == 30
    fresh, _, _ = embed(tmp_path, input=str(shard), id_field="", output=str(tmp_path / "fresh"))
    assert_same_rows(rows, fresh)


def test_a_renamed_file_costs_nothing(tmp_path):
    texts = some_texts(20, seed=9, words=(2, 12))
    (tmp_path / "a.txt").write_text("".join(text + "\n" for text in texts))
    old, _, _ = embed(tmp_path, input=str(tmp_path / "*.txt"), id_field="")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    rows, _, encoded = embed(tmp_path, input=str(tmp_path / "*.txt"), id_field="")
    assert encoded == [] and len(rows) == 20
    assert not set(rows) & set(old), "the new name should give new ids"
    fresh, _, _ = embed(tmp_path, input=str(tmp_path / "*.txt"), id_field="", output=str(tmp_path / "fresh"))
    assert_same_rows(rows, fresh)


def test_documents_that_swap_texts_are_not_encoded(folder):
    records = change(RECORDS, n0=RECORDS[1]["text"], n1=RECORDS[0]["text"])
    write_jsonl(folder / "corpus.jsonl", records)
    rows, manifest, encoded = embed(folder)
    assert encoded == [] and manifest.counts["recall"]["recalled"] == 2
    assert_official(rows, records)


def test_documents_that_move_between_files_stay(folder):
    write_jsonl(folder / "corpus.jsonl", RECORDS[:10])
    write_jsonl(folder / "other.jsonl", RECORDS[10:])
    rows, manifest, encoded = embed(folder)
    assert encoded == [] and manifest.counts["recall"]["unchanged"] == N
    assert_official(rows, RECORDS)
    write_jsonl(folder / "other.jsonl", RECORDS[10:20])  # where its rows come from is known by now
    rows, manifest, _ = embed(folder, max_delete_fraction=0.6)
    assert manifest.counts["carry"]["deleted"] == N - 20
    assert_official(rows, RECORDS[:20])


def test_a_changed_kept_field_is_no_new_encoding(tmp_path):
    records = [{**record, "year": i, "note": f"note {i}"} for i, record in enumerate(RECORDS)]
    write_jsonl(tmp_path / "corpus.jsonl", records)
    embed(tmp_path, keep_fields="year,note")
    records[4]["year"], records[9]["note"] = 1999, "an other\nnote: ü"
    write_jsonl(tmp_path / "corpus.jsonl", records)
    rows, manifest, encoded = embed(tmp_path, keep_fields="year,note")
    assert encoded == []
    assert (manifest.counts["recall"]["updated"], manifest.counts["recall"]["unchanged"]) == (2, N - 2)
    assert_official(rows, records, ["year", "note"])


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_other_columns_are_no_new_encoding(folder, output_format):
    """Kept fields added and taken away again, and the text beside the vector."""
    run_pipeline(folder, output_format=output_format)
    records = [{**record, "year": i, "score": i / 7, "ok": i % 2 == 0} for i, record in enumerate(RECORDS)]
    write_jsonl(folder / "corpus.jsonl", records)
    settings = {"output_format": output_format, "keep_fields": "year,score,ok", "keep_text": True}
    rows, manifest, encoded = embed(folder, **settings)
    assert encoded == [] and manifest.counts["recall"]["updated"] == N
    fresh, _, _ = embed(folder, output=str(folder / "fresh"), **settings)
    assert_same_rows(rows, fresh)
    assert all(rows[record["id"], 0]["text"] == record["text"] for record in records)
    _, manifest, encoded = embed(folder, **settings)
    assert encoded == [] and manifest.counts["recall"]["unchanged"] == N
    rows, _, encoded = embed(folder, output_format=output_format)
    assert encoded == [] and "year" not in rows["0", 0] and "text" not in rows["0", 0]
    assert_official(rows, RECORDS)


def test_other_columns_and_a_new_text_together(folder):
    records = change(RECORDS, n3="another text")
    records = [{**record, "year": i} for i, record in enumerate(records)]
    write_jsonl(folder / "corpus.jsonl", records[:-2])
    rows, manifest, encoded = embed(folder, keep_fields="year", deletes="keep")
    assert encoded == ["another text"] and manifest.counts["carry"]["kept"] == 2
    kept = [{"year": None, **record} for record in RECORDS[-2:]]  # its rows have no value in a field that is new
    assert_official(rows, records[:-2] + kept, ["year"])


@pytest.mark.parametrize(
    "formats",
    [
        [{"output_format": "tfrecord"}, {"output_format": "parquet"}, {"output_format": "tfrecord"}],
        [{"compression": "gzip"}, {"compression": "none"}, {"compression": "gzip"}],
    ],
    ids=["formats", "compression"],
)
def test_another_file_format_is_no_new_encoding(folder, formats):
    records = list(RECORDS)
    for number, settings in enumerate(formats):
        records = change(records, **{f"n{number}": f"changed in round {number}"})
        write_jsonl(folder / "corpus.jsonl", records)
        rows, manifest, encoded = embed(folder, **settings)
        assert encoded == [f"changed in round {number}"]
        assert_official(rows, records)
        assert manifest.file_format == settings.get("output_format", "tfrecord")
        if settings.get("compression") == "gzip":
            assert all(file.name.endswith(".gz") for file in manifest.files)
    rows, manifest, encoded = embed(folder, **formats[-1])
    assert encoded == [] and manifest.counts["carry"]["linked_rows"] == N
    assert_official(rows, records)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "int8"},
        {"dtype": "float16"},
        {"dtype": "binary", "output_format": "parquet"},
        {"vector": "sequence_output:tokens", "output_format": "parquet"},
        {"vector": "sequence_output:tokens", "dtype": "int8"},
        {"on_long": "chunk", "max_tokens": 16, "chunk_overlap": 3},
        {"on_long": "average", "max_tokens": 16, "normalize": True, "dimensions": 24},
    ],
    ids=["int8", "float16", "binary", "tokens", "int8 tokens", "chunks", "average"],
)
def test_every_kind_of_row_equals_a_run_from_scratch(tmp_path, settings):
    """Copied, recalled under another id, updated and new rows in one rerun."""
    records = [{**record, "year": i} for i, record in enumerate(RECORDS)]
    settings = {"keep_fields": "year", **settings}
    write_jsonl(tmp_path / "corpus.jsonl", records)
    embed(tmp_path, **settings)
    long_text = " ".join(RECORDS[5]["text"].split()[::-1] + RECORDS[6]["text"].split())
    assert len(official_tokens(long_text)) > 16
    records = change(records[:-3], n3=long_text, n50="a new document", n60=RECORDS[-1]["text"], n61=RECORDS[0]["text"])
    records[8]["year"] = -1
    write_jsonl(tmp_path / "corpus.jsonl", records)
    rows, manifest, encoded = embed(tmp_path, **settings)
    assert set(encoded) == {long_text, "a new document"}
    assert manifest.counts["recall"]["recalled"] == 3 and manifest.counts["recall"]["unchanged"] == N - 5
    if settings.get("on_long") == "chunk":
        assert len(rows) > len(records) and sum(key == "3" for key, _ in rows) > 2
    fresh, _, _ = embed(tmp_path, output=str(tmp_path / "fresh"), **settings)
    assert_same_rows(rows, fresh, settings.get("dtype", "float32"))


def test_a_text_that_shrinks_leaves_no_chunk_behind(tmp_path):
    settings = {"on_long": "chunk", "max_tokens": 16}
    long_text = " ".join(["dog", "cat", "the", "of"] * 20)
    write_jsonl(tmp_path / "corpus.jsonl", change(RECORDS, n3=long_text))
    rows, _, _ = embed(tmp_path, **settings)
    assert sum(key == "3" for key, _ in rows) > 3
    write_jsonl(tmp_path / "corpus.jsonl", change(RECORDS, n3="dog", n90=long_text))
    rows, _, encoded = embed(tmp_path, **settings)
    assert encoded == ["dog"] and [chunk for key, chunk in rows if key == "3"] == [0]
    fresh, _, _ = embed(tmp_path, output=str(tmp_path / "fresh"), **settings)
    assert_same_rows(rows, fresh)


def test_pairs_and_prefixes_are_part_of_the_text(tmp_path):
    records = [{**record, "other": f"pair {i}"} for i, record in enumerate(RECORDS[:12])]
    settings = {"pair_field": "other", "text_prefix": "query: "}
    write_jsonl(tmp_path / "corpus.jsonl", records)
    embed(tmp_path, **settings)
    records[2]["other"] = "another second segment"
    write_jsonl(tmp_path / "corpus.jsonl", records)
    rows, _, encoded = embed(tmp_path, **settings)
    assert encoded == [records[2]["text"]]
    fresh, _, _ = embed(tmp_path, output=str(tmp_path / "fresh"), **settings)
    assert_same_rows(rows, fresh)


# Equal texts


def test_equal_texts_are_encoded_once(tmp_path):
    records = [*RECORDS[:10], *({"id": f"same {i}", "text": "the same text"} for i in range(15))]
    records += [{"id": f"again {i}", "text": RECORDS[i]["text"]} for i in range(5)]
    write_jsonl(tmp_path / "corpus.jsonl", records)
    rows, manifest, encoded = embed(tmp_path)
    assert encoded == sorted({record["text"] for record in records})
    assert manifest.counts["recall"]["equal_texts"] == 14 + 5
    assert_official(rows, records)
    fresh_again, manifest, encoded = embed(tmp_path)
    assert encoded == [] and manifest.counts["recall"]["unchanged"] == 30
    assert all(np.array_equal(fresh_again[key]["embedding"], row["embedding"]) for key, row in rows.items())


@pytest.mark.parametrize("beam_flags", [[], THREADS], ids=["one bundle", "two bundles"])
def test_an_equal_text_that_cannot_be_encoded_gives_every_id_one_letter(tmp_path, beam_flags):
    long_text = " ".join(["dog"] * 40)
    records = [*RECORDS[:8], *({"id": f"long {i}", "text": long_text} for i in range(6))]
    settings = {"on_long": "reject", "max_tokens": 40, "max_dead_fraction": 1.0, "split_bytes": 300}
    write_jsonl(tmp_path / "corpus.jsonl", records)
    rows, manifest, _ = embed(tmp_path, beam_flags, **settings)
    assert letters_of(tmp_path / "table") == [(f"long {i}", "too_long") for i in range(6)]
    assert manifest.dead_letters == {"too_long": 6}
    assert_official(rows, RECORDS[:8])
    for letter in read_dead_letters(str(tmp_path / "table")):
        assert letter["text"] == long_text and letter["file"] == str(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize("beam_flags", [[], THREADS], ids=["one bundle", "two bundles"])
def test_equal_texts_that_cannot_be_encoded_leave_every_old_vector(tmp_path, beam_flags):
    settings = {"on_long": "reject", "max_tokens": 40, "max_dead_fraction": 1.0, "split_bytes": 300}
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    embed(tmp_path, **settings)
    long_text = " ".join(["dog"] * 40)
    write_jsonl(tmp_path / "corpus.jsonl", change(RECORDS, n3=long_text, n4=long_text, n30=long_text))
    rows, manifest, _ = embed(tmp_path, beam_flags, **settings)
    assert letters_of(tmp_path / "table") == [(str(i), "too_long") for i in (3, 30, 4)]
    assert manifest.counts["carry"]["stale"] == 3
    assert_official(rows, RECORDS)


# Deletions


def test_deletes_can_be_kept(folder):
    records = change(RECORDS[5:], n50="a new document")
    write_jsonl(folder / "corpus.jsonl", records)
    rows, manifest, encoded = embed(folder, deletes="keep")
    assert encoded == ["a new document"]
    assert (manifest.counts["carry"]["kept"], manifest.counts["carry"]["deleted"]) == (5, 0)
    assert_official(rows, [*records, *RECORDS[:5]])
    rows, manifest, encoded = embed(folder)
    assert encoded == [] and manifest.counts["carry"]["deleted"] == 5
    assert_official(rows, records)


def test_too_many_deletes_stop_the_run_and_nothing_is_encoded_twice(folder):
    before = remember(folder / "table")
    records = [*RECORDS[:28], *({"id": f"new {i}", "text": f"new text {i}"} for i in range(6))]
    write_jsonl(folder / "corpus.jsonl", records)
    with watch_encoder() as run, pytest.raises(RunError, match=r"12 of the table's 40 .*--max_delete_fraction=0\.2"):
        run_pipeline(folder)
    assert sorted(run.texts) == sorted(f"new text {i}" for i in range(6))
    assert_unchanged(folder / "table", before)
    rows, manifest, encoded = embed(folder, max_delete_fraction=0.3)
    assert encoded == [] and manifest.counts["encode"].get("rows", 0) == 0
    assert manifest.counts["carry"]["deleted"] == 12
    assert_official(rows, records)
    assert not (folder / "table" / "journal").exists()


def test_an_emptied_input_is_no_deletion(folder):
    before = remember(folder / "table")
    (folder / "corpus.jsonl").write_text("")
    with pytest.raises(Exception, match="only empty files"):
        run_pipeline(folder)
    assert_unchanged(folder / "table", before)


# Input that cannot be read, documents that cannot be embedded


def test_rows_of_a_file_that_is_cut_off_stay(tmp_path):
    def write_gz(records: Sequence[Mapping[str, Any]]) -> bytes:
        data = gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode(), mtime=0)
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        return data

    zipped = as_records(some_texts(400, seed=3, words=(20, 60)))
    plain = [{"id": f"p{i}", "text": f"plain {i}"} for i in range(50)]
    whole = write_gz(zipped)
    write_jsonl(tmp_path / "b.jsonl", plain)
    settings = {"input": [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl")], "max_tokens": 16}
    rows, _, _ = embed(tmp_path, **settings)
    assert len(rows) == 450
    changed = change(zipped, n0="changed at the begin", n399="changed at the end")
    write_gz([record for record in changed if record["id"] != "1"])
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[: len(whole) // 2])
    write_jsonl(tmp_path / "b.jsonl", plain[3:])
    rows, manifest, encoded = embed(tmp_path, **settings)
    n_read = manifest.counts["read"]["documents"] - 47
    assert 50 < n_read < 350, "the file should be cut in the middle"
    assert letters_of(tmp_path / "table") == [(None, "truncated_file")]
    assert encoded == ["changed at the begin"]
    assert (manifest.counts["carry"]["stale"], manifest.counts["carry"]["deleted"]) == (400 - n_read, 3)
    assert_official(rows, [*change(zipped, n0="changed at the begin"), *plain[3:]], max_tokens=16)
    write_gz([record for record in changed if record["id"] != "1"])
    rows, manifest, encoded = embed(tmp_path, **settings)
    assert encoded == ["changed at the end"]
    assert (manifest.counts["carry"]["stale"], manifest.counts["carry"]["deleted"]) == (0, 1)
    assert_official(rows, [*(r for r in changed if r["id"] != "1"), *plain[3:]], max_tokens=16)


def test_a_document_that_cannot_be_embedded_any_more_keeps_its_vector(tmp_path):
    settings = {"on_long": "reject", "max_tokens": 40}
    records = [record for record in RECORDS if len(official_tokens(record["text"])) <= 38]
    write_jsonl(tmp_path / "corpus.jsonl", records)
    embed(tmp_path, **settings)
    name = records[3]["id"]
    long_text = " ".join(["dog"] * 60)
    for _ in range(2):  # it stays so
        write_jsonl(tmp_path / "corpus.jsonl", change(records, **{f"n{name}": long_text}))
        rows, manifest, _ = embed(tmp_path, **settings)
        assert letters_of(tmp_path / "table") == [(name, "too_long")]
        assert (manifest.counts["carry"]["stale"], manifest.counts["carry"]["deleted"]) == (1, 0)
        assert_official(rows, records)
    repaired = change(records, **{f"n{name}": "short again"})
    write_jsonl(tmp_path / "corpus.jsonl", repaired)
    rows, manifest, encoded = embed(tmp_path, **settings)
    assert encoded == ["short again"] and manifest.counts["carry"]["stale"] == 0 and not manifest.dead_letters
    assert_official(rows, repaired)


def test_a_line_that_does_not_say_its_id_may_be_any_document_of_its_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:20])
    write_jsonl(tmp_path / "b.jsonl", RECORDS[20:])
    embed(tmp_path)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(['{"id": "0", "text": broken\n', *lines[2:]]))  # 0 is broken, 1 is gone
    write_jsonl(tmp_path / "b.jsonl", RECORDS[21:])  # 20 is gone
    rows, manifest, encoded = embed(tmp_path)
    assert letters_of(tmp_path / "table") == [(None, "malformed_json")]
    assert encoded == [] and (manifest.counts["carry"]["stale"], manifest.counts["carry"]["deleted"]) == (2, 1)
    assert_official(rows, [*RECORDS[:20], *RECORDS[21:]])


def test_a_text_with_half_of_a_surrogate_pair_is_one_dead_letter(folder):
    write_jsonl(folder / "corpus.jsonl", change(RECORDS, n3="broken \ud83d text", n50="broken \ud83d text"))
    rows, manifest, _ = embed(folder)
    assert letters_of(folder / "table") == [("3", "invalid_utf8"), ("50", "invalid_utf8")]
    assert manifest.counts["carry"]["stale"] == 1
    assert_official(rows, RECORDS)


def test_a_second_document_with_an_id_changes_nothing(folder):
    lines = [*RECORDS, {"id": "3", "text": "somebody else's text"}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, manifest, encoded = embed(folder)
    assert letters_of(folder / "table") == [("3", "duplicate_id")]
    assert encoded == [] and manifest.counts["carry"]["stale"] == 0
    assert_official(rows, RECORDS)


# Another model


def test_another_model_embeds_everything_again(folder, caplog):
    before = remember(folder / "table")
    with pytest.raises(TableError, match=r"max_tokens 512 -> 16.*--on_model_change=stop"):
        run_pipeline(folder, max_tokens=16, on_model_change="stop")
    assert_unchanged(folder / "table", before)
    with caplog.at_level(logging.WARNING):
        rows, manifest, encoded = embed(folder, max_tokens=16)
    assert any("max_tokens 512 -> 16" in r.message and "embedded again" in r.message for r in caplog.records)
    assert encoded == sorted(record["text"] for record in RECORDS) and manifest.counts["encode"]["rows"] == N
    assert_official(rows, RECORDS, max_tokens=16)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rows, _, encoded = embed(folder, max_tokens=16, vector="sequence_output:mean")
    assert any("pooled_output" in r.message and "sequence_output:mean" in r.message for r in caplog.records)
    assert len(encoded) == N
    assert_official(rows, RECORDS, max_tokens=16, vector="sequence_output:mean")


def test_rows_cannot_be_kept_beside_those_of_another_model(folder):
    before = remember(folder / "table")
    with pytest.raises(ConfigError, match=r"--deletes=keep.*max_tokens 512 -> 16"):
        run_pipeline(folder, max_tokens=16, deletes="keep")
    assert_unchanged(folder / "table", before)


def test_no_vector_of_another_model_survives(folder):
    """A document that cannot be embedded loses its old vector, because a table has one model's vectors only."""
    write_jsonl(folder / "corpus.jsonl", change(RECORDS, n3=" ".join(["dog"] * 60)))
    settings = {"on_long": "reject", "max_tokens": 50}
    rows, manifest, _ = embed(folder, **settings)
    assert manifest.dead_letters == {"too_long": 1} and manifest.counts["carry"]["lost"] == 1
    assert_official(rows, [record for record in RECORDS if record["id"] != "3"], max_tokens=50)


# The gate


def corrupt_vectors(table: Path, wrong: Callable[[np.ndarray], np.ndarray]) -> None:
    """Gives all rows of the live snapshot other numbers, with valid checksums everywhere."""
    manifest, folder = open_table(str(table))
    text = Path(folder, "manifest.json").read_text()
    for file in manifest.files:
        path = Path(folder, file.name)
        records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
        path.unlink()  # it may be linked elsewhere
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                example = tf.train.Example.FromString(record)
                numbers = example.features.feature["embedding"].float_list
                values = wrong(np.array(numbers.value, np.float32))
                del numbers.value[:]
                numbers.value.extend(values.tolist())
                writer.write(example.SerializeToString())
        assert path.stat().st_size == file.n_bytes
        text = text.replace(file.sha256, hashlib.sha256(path.read_bytes()).hexdigest())
    Path(folder, "manifest.json").write_text(text)


@pytest.mark.parametrize("changed", [False, True], ids=["linked", "copied"])
def test_the_gate_finds_vectors_that_the_encoder_does_not_give(folder, changed):
    table = folder / "table"
    corrupt_vectors(table, lambda vector: vector[::-1])
    before = remember(table)
    if changed:
        write_jsonl(folder / "corpus.jsonl", change(RECORDS[1:], n50="a new document"))
    with pytest.raises(GateError, match=r"lies in .*rejected/.*encoded again"):
        run_pipeline(folder)
    assert_unchanged(table, before)
    (rejected,) = (table / "rejected").iterdir()
    assert (rejected / "manifest.json").exists() and list(rejected.glob("embeddings-*"))
    manifest = run_pipeline(folder, gate="off")
    assert manifest.snapshot != before["snapshot"]
    assert open_table(str(table))[0].snapshot == manifest.snapshot


def test_the_gate_compares_texts_that_were_encoded_anyway(folder):
    write_jsonl(folder / "corpus.jsonl", change(RECORDS, **{f"n{i}": f"changed {i}" for i in range(8)}))
    with watch_encoder() as run:
        run_pipeline(folder)
    assert sorted(run.texts) == [f"changed {i}" for i in range(8)]
    assert 4 <= run.n_compared <= 6  # few of each kind


def test_the_gate_finds_vectors_that_are_all_one_number(folder):
    before = remember(folder / "table")
    encode = LoadedEncoder.encode

    def flat(self: LoadedEncoder, batch: Any) -> Any:
        encoded = encode(self, batch)
        return encoded._replace(vectors=[np.zeros_like(vector) for vector in encoded.vectors])

    write_jsonl(folder / "corpus.jsonl", change(RECORDS, n3="changed", n4="changed, too"))
    with mock.patch.object(LoadedEncoder, "encode", flat), pytest.raises(GateError):
        run_pipeline(folder)
    assert_unchanged(folder / "table", before)


def test_texts_that_are_equal_to_the_encoder_pass_the_gate(folder):
    """An encoder without case gives one vector for two texts, and so it may be for all that is new."""
    assert official_tokens("A DOG") == official_tokens("a dog")
    records = change(RECORDS, n3="A DOG", n4="a dog")
    write_jsonl(folder / "corpus.jsonl", records)
    rows, _, encoded = embed(folder)
    assert encoded == ["A DOG", "a dog"]
    assert_official(rows, records)
    write_jsonl(folder / "corpus.jsonl", [{"id": "x", "text": "A DOG"}, {"id": "y", "text": "a dog"}])
    rows, _, _ = embed(folder, output=str(folder / "other"))
    assert len(rows) == 2


def test_a_damaged_table_stops_the_run_and_is_made_anew_on_demand(folder):
    write_jsonl(folder / "corpus.jsonl", RECORDS[1:])
    manifest, snapshot = open_table(str(folder / "table"))
    path = Path(snapshot, manifest.files[0].name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(TableError, match=r"damaged.*--verify_live"):
        run_pipeline(folder)
    assert open_table(str(folder / "table"))[0].snapshot == manifest.snapshot
    rows, _, encoded = embed(folder, verify_live=True)
    assert_official(rows, RECORDS[1:])
    assert len(encoded) >= len(RECORDS) - 1


# Snapshots


def test_old_snapshots_expire(folder):
    table = folder / "table"
    first = open_table(str(table))[0].snapshot
    second = run_pipeline(folder, grace_seconds=3600, keep_snapshots=1).snapshot
    assert list_snapshots(table) == sorted([first, second])  # a reader may still be in the first
    third = run_pipeline(folder, grace_seconds=0, keep_snapshots=2).snapshot
    assert list_snapshots(table) == sorted([second, third])
    fourth = run_pipeline(folder, grace_seconds=0, keep_snapshots=1).snapshot
    assert list_snapshots(table) == [fourth]
    assert_official(read_rows(str(table)), RECORDS)  # its files were linked through all of them


def test_a_rerun_after_a_rollback_starts_from_the_older_snapshot(folder):
    table = folder / "table"
    first = open_table(str(table))[0].snapshot
    changed = change(RECORDS[1:], n3="another text")
    write_jsonl(folder / "corpus.jsonl", changed)
    second = run_pipeline(folder).snapshot
    assert roll_back(str(table)).snapshot == first
    assert_official(read_rows(str(table)), RECORDS)
    rows, manifest, _ = embed(folder)
    assert manifest.previous == first
    assert (manifest.counts["carry"]["deleted"], manifest.counts["recall"]["changed"]) == (1, 1)
    assert_official(rows, changed)
    assert {first, second} <= set(list_snapshots(table))
    with pytest.raises(TableError, match="no other snapshot"):
        roll_back(str(table), "20000101T000000Z-000000")
    assert roll_back(str(table), second).snapshot == second
    rows, _, encoded = embed(folder)
    assert encoded == []
    assert_official(rows, changed)


def test_the_snapshot_that_was_live_until_now_outlives_one_that_was_rolled_back(folder):
    table = folder / "table"
    first = open_table(str(table))[0].snapshot
    run_pipeline(folder)
    assert roll_back(str(table)).snapshot == first
    manifest = run_pipeline(folder, keep_snapshots=2, grace_seconds=0)
    assert manifest.previous == first and first in list_snapshots(table)
    assert roll_back(str(table)).snapshot == first


def test_readers_of_the_snapshot_that_was_live_until_now_have_their_grace(folder):
    table = folder / "table"
    first = open_table(str(table))[0].snapshot
    run_pipeline(folder)
    roll_back(str(table))
    time.sleep(1.5)  # the second snapshot is older than the grace, but it took no reader from the first
    run_pipeline(folder, keep_snapshots=1, grace_seconds=1)
    assert first in list_snapshots(table)


def test_two_runs_of_one_second_keep_their_order():
    """A run on a warm machine takes less than a second, and names must still say which snapshot is older."""
    names = [name_snapshot() for _ in range(50)]
    assert names == sorted(names)


def test_many_small_files_become_one(tmp_path):
    for i in range(20):
        write_jsonl(tmp_path / f"{i:02d}.jsonl", RECORDS[2 * i : 2 * i + 2])
    with mock.patch.object(writing, "BUFFERED_RECORDS", 2):
        rows, manifest, _ = embed(tmp_path, shard_bytes=1)
    assert len(manifest.files) == 20 and len(rows) == N
    rows, manifest, encoded = embed(tmp_path)
    assert encoded == [] and len(manifest.files) == 1
    assert_official(rows, RECORDS)
    rows, manifest, _ = embed(tmp_path)
    assert manifest.counts["carry"]["linked_files"] == len(manifest.files) == 1
    assert_official(rows, RECORDS)


def test_few_small_files_stay(tmp_path):
    for i in range(4):
        write_jsonl(tmp_path / f"{i}.jsonl", RECORDS[10 * i : 10 * i + 10])
    with mock.patch.object(writing, "BUFFERED_RECORDS", 10):
        _, manifest, _ = embed(tmp_path, shard_bytes=1)
    assert len(manifest.files) == 4
    write_jsonl(tmp_path / "3.jsonl", RECORDS[30:39])
    rows, manifest, encoded = embed(tmp_path)
    assert encoded == [] and manifest.counts["carry"]["linked_files"] == 3
    assert manifest.counts["carry"]["copied_rows"] == 9
    assert_official(rows, RECORDS[:39])


# Engines


def mix(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    mixed = change(records[2:], n3="another text", n4="a third text", n50="another text", n51=records[0]["text"])
    return [*mixed, *({"id": f"same {i}", "text": "the same text"} for i in range(6))]


@pytest.mark.parametrize(
    "beam_flags", [PROCESSES, ["--direct_runner_bundle_repeat=1"]], ids=["processes", "bundle repeat"]
)
def test_other_engines_give_the_same_table(tmp_path, beam_flags):
    def write(records: Sequence[Mapping[str, Any]]) -> None:
        for i in range(4):
            write_jsonl(tmp_path / f"{i}.jsonl", records[i::4])

    settings = {"split_bytes": 1500}
    write(RECORDS)
    assert len(plan_input(make_config(tmp_path, **settings).read).splits) >= 3
    embed(tmp_path, **settings)
    records = mix(RECORDS)
    write(records)
    manifest = run_pipeline(tmp_path, beam_flags, **settings)
    rows = read_rows(str(tmp_path / "table"))
    assert_official(rows, records)
    carry = manifest.counts["carry"]
    assert (carry["deleted"], carry["unchanged"], carry["stale"]) == (2, N - 4, 0)
    assert 3 <= manifest.counts["encode"]["rows"] <= 7  # equal texts once in each process, or each bundle
    assert list_snapshots(tmp_path / "table")[-1] == manifest.snapshot
    assert not list((tmp_path / "table" / "attempts").iterdir())
    assert not manifest.dead_letters
