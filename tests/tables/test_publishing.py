"""Regression tests of writing and publishing."""

import io
import json
import os

import numpy as np
import pytest
import tensorflow as tf

import pipeline
from pipeline.config import EmbedConfig, VectorChoice
from pipeline.errors import ConfigError, TableError
from pipeline.files import list_files
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.writing import HashingStream, Shard
from pipeline.tables.publish import Publication, build_manifest, check_folder, place_files
from pipeline.vectors.pooling import pool_outputs
from tests.support.paths import ENCODER


def build(tmp_path, lines, **settings):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "input": str(tmp_path / "a.jsonl"),
        "output": str(tmp_path / "table"),
        "encoder": str(ENCODER),
        **settings,
    }
    return pipeline.build_table(EmbedConfig.from_flat(values))


OURS = ("snapshots", "attempts", "rejected", "journal", "lock", "CURRENT", "CURRENT.0a1b2c3d.new", ".DS_Store")


@pytest.mark.parametrize("name", OURS)
def test_a_folder_with_what_a_table_has_may_become_one(tmp_path, name):
    (tmp_path / name).mkdir()
    check_folder(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["locksmith.txt", "journal-2024", "lock.txt", "CURRENT.old", "CURRENT.0a1b2c3.new", "snapshots2", "current", "x"],
)
def test_a_folder_with_anything_else_is_no_table(tmp_path, name):
    for folder in (*OURS, name):
        (tmp_path / folder).mkdir()
    with pytest.raises(TableError, match=f"holds '{name}' and is not a table"):
        check_folder(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([*OURS, name]), "nothing was written"


def test_a_stream_without_a_file_number_is_finished_all_the_same():
    class Upload(io.BytesIO):  # as Beam's writers of object stores
        def fileno(self):
            raise io.UnsupportedOperation("fileno")

    stream = HashingStream(Upload())
    stream.write(b"abc")
    assert stream.finish().startswith("ba7816bf") and stream.n_bytes == 3


def test_padding_never_reaches_a_pooled_vector():
    outputs = {"sequence_output": tf.constant([[[1.0], [3.0], [np.nan]], [[2.0], [np.inf], [np.nan]]])}
    mask = tf.constant([[1, 1, 0], [1, 0, 0]])
    for pooling, expected in (("mean", [[2], [2]]), ("max", [[3], [2]]), ("cls", [[1], [2]])):
        pooled = pool_outputs(outputs, mask, VectorChoice("sequence_output", None, pooling))
        np.testing.assert_array_equal(pooled, expected)


def test_a_repeated_publication_leaves_no_file_that_a_glob_would_read(tmp_path):
    facts = {
        "embeam": "0",
        "file_format": "parquet",
        "compression": "none",
        "layout": TableLayout("float32", 2),
        "fingerprint": "",
        "identity": {},
        "settings": {},
    }
    plan = Publication(str(tmp_path), "n1", "", "", 0.0, facts, 0.1)
    folder = tmp_path / "snapshots" / "n1"
    folder.mkdir(parents=True)
    (folder / "embeddings-00000-of-00003.parquet").write_bytes(b"of an attempt with other files")
    for name in ("shard", "index"):
        (tmp_path / name).write_bytes(b"rows")
    shards = [Shard(str(tmp_path / "shard"), "embeddings", ".parquet", 1, 4, "", "a", str(tmp_path / "index"), (4, ""))]
    manifest = build_manifest(plan, shards, {"read": {"records": 1}})
    for _ in range(2):
        place_files(manifest, shards, str(folder))
    names = sorted(path.rpartition("/")[2] for path in list_files(str(folder)))
    assert names == ["embeddings-00000-of-00001.parquet", "index-00000-of-00001.bin", "manifest.json"]


def test_a_manifest_may_hold_fields_of_another_version(tmp_path):
    manifest = build(tmp_path, [{"text": "a"}])
    path = tmp_path / "table" / "snapshots" / manifest.snapshot / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"predicted": {"documents": 1.0}}))
    assert pipeline.open_table(str(tmp_path / "table"))[0] == manifest
    again = build(tmp_path, [{"text": "a"}])
    assert (again.previous, again.counts["reuse"]["unchanged"]) == (manifest.snapshot, 1)


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a dog\n")
    values = {"input": "~/a.txt", "output": "~/table", "encoder": str(ENCODER)}
    pipeline.build_table(EmbedConfig.from_flat(values))
    assert pipeline.read_table("~/table")[0] == ["a.txt@0"]
    assert (tmp_path / "table" / "CURRENT").exists()


def test_pairs_must_match_their_texts(tmp_path):
    build(tmp_path, [{"text": "a"}])
    with pytest.raises(ConfigError, match="1 texts have 0 pairs"):
        pipeline.load_embedder(str(tmp_path / "table")).embed(["a"], [])
