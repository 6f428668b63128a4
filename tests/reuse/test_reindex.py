"""The same command run again: only what is new or changed is encoded, and the table is as if made from scratch.

What is right is said by the official encoder, called directly, or by a run from scratch into another folder. What was
encoded is counted at the encoder itself, not taken from the counts of the run. These runs are whole; what they decide
case by case is tested in `test_reruns.py`.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from pipeline.encoders.handler import LoadedEncoder
from pipeline.errors import ConfigError, InputError, RunError, TableError, ValidationError
from pipeline.sources.planning import plan_input
from pipeline.tables.manifest import Manifest, open_table
from tests.support.corpora import as_records, change, some_texts, write_jsonl
from tests.support.official import official_tokens, official_vector
from tests.support.runs import PROCESSES, THREADS, make_config, run_pipeline, watch_encoder
from tests.support.tables import (
    Rows,
    assert_close,
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


def dead_letters_of(table: Path) -> list[tuple[str | None, str]]:
    return sorted((dead_letter["id"], dead_letter["reason"]) for dead_letter in read_dead_letters(str(table)))


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


@pytest.mark.numeric
def test_new_changed_moved_and_deleted_documents(folder):
    old = read_rows(str(folder / "table"))
    records = change(RECORDS, n3="another text", n50="a new document", n51="a new document", n52=RECORDS[0]["text"])
    records = [record for record in records if record["id"] != "7"]
    write_jsonl(folder / "corpus.jsonl", records[:20])
    write_jsonl(folder / "other.jsonl", records[20:])
    rows, manifest, encoded = embed(folder)
    assert encoded == ["a new document", "another text"]
    assert_official(rows, records)
    reuse, merge = manifest.counts["reuse"], manifest.counts["merge"]
    assert (reuse["documents"], reuse["new"], reuse["changed"], reuse["unchanged"]) == (N + 2, 3, 1, N - 2)
    assert (reuse["reused"], reuse["same_text"]) == (1, 1)
    assert (merge["deleted"], merge["stale"], merge["kept"]) == (1, 0, 0)
    assert manifest.counts["encode"]["rows"] == 2
    for key in set(rows) & set(old) - {("3", 0)}:
        assert np.array_equal(rows[key]["embedding"], old[key]["embedding"])  # copied, not computed
    names = {path.name for path in (folder / "table").iterdir()}
    assert names == {"CURRENT", "snapshots", "attempts", "lock"} and not list((folder / "table/attempts").iterdir())


def test_nothing_changed_links_the_files(folder):
    before = live_files(folder / "table")
    rows, manifest, encoded = embed(folder)
    assert encoded == []
    after = live_files(folder / "table")
    assert len(list_snapshots(folder / "table")) == 2
    assert {name: stat.st_ino for name, stat in after.items()} == {name: stat.st_ino for name, stat in before.items()}
    assert manifest.counts["merge"]["linked_rows"] == manifest.counts["reuse"]["unchanged"] == N
    assert manifest.counts["encode"].get("rows", 0) == 0
    assert_official(rows, RECORDS)


def test_a_line_inserted_at_the_top_of_a_text_shard_costs_one_encoding_and_a_new_name_none(tmp_path):
    def assert_lines(rows: Rows, texts: Sequence[str]) -> None:
        """Ids are places in a file, and so sort as its lines do."""
        vectors = [row["embedding"] for _, row in sorted(rows.items(), key=lambda item: int(item[0][0].split("@")[1]))]
        assert len(vectors) == len(texts)
        for vector, text in zip(vectors, texts, strict=True):
            assert_close(vector, official_vector(text), text)

    texts, settings = some_texts(30, seed=8, words=(2, 12)), {"input": str(tmp_path / "*.txt"), "id_field": ""}
    shard = tmp_path / "shard.txt"
    shard.write_text("".join(text + "\n" for text in texts))
    old, _, _ = embed(tmp_path, **settings)
    texts = ["a line at the top", *texts]
    shard.write_text("".join(text + "\n" for text in texts))
    rows, manifest, encoded = embed(tmp_path, **settings)
    assert encoded == ["a line at the top"]
    assert len(set(rows) & set(old)) <= 1, "the insertion should shift the ids"
    assert manifest.counts["reuse"]["reused"] == 30
    assert_lines(rows, texts)
    shard.rename(tmp_path / "another.txt")
    renamed, manifest, encoded = embed(tmp_path, **settings)
    assert encoded == [] and not set(rows) & set(renamed), "the new name should give new ids"
    assert_lines(renamed, texts)


def test_other_columns_and_files_are_no_new_encoding(folder):
    records = [{**record, "year": i, "score": i / 7, "ok": i % 2 == 0} for i, record in enumerate(RECORDS)]
    write_jsonl(folder / "corpus.jsonl", records)
    settings = {"output_format": "parquet", "keep_fields": "year,score,ok", "keep_text": True}
    rows, manifest, encoded = embed(folder, **settings)
    assert encoded == [] and manifest.counts["reuse"]["updated"] == N and manifest.file_format == "parquet"
    assert_official(rows, records, ["year", "score", "ok", "text"])
    records[4]["year"] = 1999
    write_jsonl(folder / "corpus.jsonl", records)
    rows, manifest, encoded = embed(folder, **settings)
    assert encoded == []
    assert (manifest.counts["reuse"]["updated"], manifest.counts["reuse"]["unchanged"]) == (1, N - 1)
    assert_official(rows, records, ["year", "score", "ok", "text"])
    rows, manifest, encoded = embed(folder, compression="gzip")
    assert encoded == [] and not {"year", "text"} & set(rows["0", 0])
    assert all(file.name.endswith(".tfrecord.gz") for file in manifest.files)
    assert_official(rows, RECORDS)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "settings",
    [
        {"on_long": "chunk", "max_tokens": 16, "chunk_overlap": 3, "dtype": "int8"},
        {"on_long": "average", "max_tokens": 16, "normalize": True, "dimensions": 24},
        pytest.param({"dtype": "int8"}, marks=pytest.mark.exhaustive),
        pytest.param({"dtype": "float16"}, marks=pytest.mark.exhaustive),
        pytest.param({"dtype": "binary", "output_format": "parquet"}, marks=pytest.mark.exhaustive),
        pytest.param({"vector": "sequence_output:tokens", "output_format": "parquet"}, marks=pytest.mark.exhaustive),
        pytest.param({"vector": "sequence_output:tokens", "dtype": "int8"}, marks=pytest.mark.exhaustive),
    ],
    ids=["chunks", "average", "int8", "float16", "binary", "tokens", "int8 tokens"],
)
def test_every_kind_of_row_equals_a_run_from_scratch(tmp_path, settings):
    """Copied, reused under another id, updated and new rows in one rerun."""
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
    assert manifest.counts["reuse"]["reused"] == 3 and manifest.counts["reuse"]["unchanged"] == N - 5
    if settings.get("on_long") == "chunk":
        assert len(rows) > len(records) and sum(key == "3" for key, _ in rows) > 2
    fresh, _, _ = embed(tmp_path, output=str(tmp_path / "fresh"), **settings)
    assert_same_rows(rows, fresh, settings.get("dtype", "float32"))


def test_pairs_and_prefixes_are_part_of_the_text(tmp_path):
    records = [{**record, "other": f"pair {i}"} for i, record in enumerate(RECORDS[:12])]
    settings = {"pair_field": "other", "text_prefix": "query: "}
    write_jsonl(tmp_path / "corpus.jsonl", records)
    embed(tmp_path, **settings)
    records[2]["other"] = "another second segment"
    write_jsonl(tmp_path / "corpus.jsonl", records)
    _, _, encoded = embed(tmp_path, **settings)
    assert encoded == [records[2]["text"]]


# Equal texts


def test_equal_texts_that_cannot_be_encoded_leave_every_old_vector_and_a_dead_letter_each(tmp_path):
    """In two bundles, each of which encodes its own first one."""
    settings = {"on_long": "reject", "max_tokens": 40, "max_dead_fraction": 1.0, "split_bytes": 300}
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    embed(tmp_path, **settings)
    long_text = " ".join(["dog"] * 40)
    write_jsonl(tmp_path / "corpus.jsonl", change(RECORDS, n3=long_text, n4=long_text, n30=long_text, n90=long_text))
    rows, manifest, _ = embed(tmp_path, THREADS, **settings)
    assert dead_letters_of(tmp_path / "table") == [(str(i), "too_long") for i in (3, 30, 4, 90)]
    assert manifest.dead_letters == {"too_long": 4} and manifest.counts["merge"]["stale"] == 3
    assert_official(rows, RECORDS)
    for dead_letter in read_dead_letters(str(tmp_path / "table")):
        assert dead_letter["text"] == long_text and dead_letter["file"] == str(tmp_path / "corpus.jsonl")


# Deletions


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
    assert manifest.counts["merge"]["deleted"] == 12
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

    zipped = as_records(some_texts(120, seed=3, words=(20, 60)))
    plain = [{"id": f"p{i}", "text": f"plain {i}"} for i in range(10)]
    whole = write_gz(zipped)
    write_jsonl(tmp_path / "b.jsonl", plain)
    settings = {"input": [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl")], "max_tokens": 16}
    rows, _, _ = embed(tmp_path, **settings)
    assert len(rows) == 130
    changed = change(zipped, n0="changed at the begin", n119="changed at the end")
    write_gz([record for record in changed if record["id"] != "1"])
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[: len(whole) // 2])
    write_jsonl(tmp_path / "b.jsonl", plain[3:])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz is cut off.*--on_bad_file=skip"):
        embed(tmp_path, **settings)
    assert len(read_rows(str(tmp_path / "table"))) == 130
    rows, manifest, _ = embed(tmp_path, **settings, on_bad_file="skip")
    n_read = manifest.counts["read"]["documents"] - 7
    assert 20 < n_read < 110, "the file should be cut in the middle"
    assert not dead_letters_of(tmp_path / "table")
    assert [(bad.file, bad.reason) for bad in manifest.bad_files] == [(settings["input"][0], "truncated_file")]
    assert manifest.counts["reuse"]["changed"] == 1
    assert (manifest.counts["merge"]["stale"], manifest.counts["merge"]["deleted"]) == (120 - n_read, 3)
    assert_official(rows, [*change(zipped, n0="changed at the begin"), *plain[3:]], max_tokens=16)
    write_gz([record for record in changed if record["id"] != "1"])
    rows, manifest, encoded = embed(tmp_path, **settings)
    assert encoded == ["changed at the end"]
    assert (manifest.counts["merge"]["stale"], manifest.counts["merge"]["deleted"]) == (0, 1)
    assert_official(rows, [*(r for r in changed if r["id"] != "1"), *plain[3:]], max_tokens=16)


def test_a_text_with_half_of_a_surrogate_pair_is_one_dead_letter(folder):
    write_jsonl(folder / "corpus.jsonl", change(RECORDS, n3="broken \ud83d text", n50="broken \ud83d text"))
    rows, manifest, _ = embed(folder)
    assert dead_letters_of(folder / "table") == [("3", "invalid_utf8"), ("50", "invalid_utf8")]
    assert manifest.counts["merge"]["stale"] == 1
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


def test_rows_cannot_be_kept_beside_those_of_another_model(folder):
    before = remember(folder / "table")
    with pytest.raises(ConfigError, match=r"--deletes=keep.*max_tokens 512 -> 16"):
        run_pipeline(folder, max_tokens=16, deletes="keep")
    assert_unchanged(folder / "table", before)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"vector": "sequence_output:mean"}, "vector pooled_output -> sequence_output:mean"),
        ({"text_prefix": "query: "}, "preprocessing.prefix  -> query: "),
        ({"normalize": True, "dimensions": 8}, "dimensions 64 -> 8; normalize False -> True"),
    ],
)
def test_what_differs_from_the_table_is_told(folder, settings, told):
    """Whatever it is, it is found before anything runs."""
    with pytest.raises(TableError, match=re.escape(f"was made with other settings ({told})")):
        run_pipeline(folder, on_model_change="stop", **settings)


# Validation


def test_a_run_whose_encoder_gives_other_vectors_by_now_is_stopped(folder):
    before = remember(folder / "table")
    encode = LoadedEncoder.encode

    def turn(self: LoadedEncoder, batch: Any) -> Any:
        encoded = encode(self, batch)
        return encoded._replace(vectors=[-vector for vector in encoded.vectors])

    write_jsonl(folder / "corpus.jsonl", change(RECORDS[1:], n50="a new document"))
    with mock.patch.object(LoadedEncoder, "encode", turn):
        with pytest.raises(ValidationError, match=r"is kept in .*rejected/.*encoded again"):
            run_pipeline(folder)
        assert_unchanged(folder / "table", before)
        assert run_pipeline(folder, validate="off").snapshot == open_table(str(folder / "table"))[0].snapshot


# Engines


def mix(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    mixed = change(records[2:], n3="another text", n4="a third text", n50="another text", n51=records[0]["text"])
    return [*mixed, *({"id": f"same {i}", "text": "the same text"} for i in range(6))]


@pytest.mark.parametrize(
    "beam_flags",
    [["--direct_runner_bundle_repeat=1"], pytest.param(PROCESSES, marks=pytest.mark.engine)],
    ids=["bundle repeat", "processes"],
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
    merge = manifest.counts["merge"]
    assert (merge["deleted"], merge["stale"], manifest.counts["reuse"]["unchanged"]) == (2, 0, N - 4)
    assert 3 <= manifest.counts["encode"]["rows"] <= 7  # equal texts once in each process, or each bundle
    assert list_snapshots(tmp_path / "table")[-1] == manifest.snapshot
    assert not list((tmp_path / "table" / "attempts").iterdir())
    assert not manifest.dead_letters
