"""The table on disk: our readers against plain TensorFlow, TFXIO and pyarrow, and the manifest against the files."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from apache_beam.testing.util import assert_that
from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2

from pipeline import read_table
from pipeline.engine import make_runner
from pipeline.errors import TableError
from pipeline.tables.manifest import open_table
from pipeline.tables.read import iter_table
from tests.support.corpora import as_records, some_texts
from tests.support.official import expected_vector, official_pack, official_tokens
from tests.support.runs import embed_records

FORMATS = [("tfrecord", "none"), ("tfrecord", "gzip"), ("parquet", "none")]
PARQUET_FLIPPED = ("parquet", "none", "flipped")
DTYPES = ["float32", "float16", "int8", "binary"]
NUMPY_DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1", "binary": "u1"}
TEXTS = some_texts(30, seed=21)
KEPT = [
    {"year": 1900 + i, "score": i / 4, "good": i % 2 == 0, "tag": None if i % 5 == 0 else f"té{i}"} for i in range(30)
]
RECORDS = [record | kept for record, kept in zip(as_records(TEXTS), KEPT, strict=True)]
KEEP = {"keep_fields": "year,score,good,tag", "keep_text": True}


def snapshot_folder(table: Path) -> Path:
    return table / "snapshots" / (table / "CURRENT").read_text().strip()


def expected(text: str, vector: str = "pooled_output") -> np.ndarray:
    return expected_vector(official_pack([text], len(official_tokens(text)) + 2), vector)


def decode(stored: bytes, dtype: str, scale: float = 0.0) -> np.ndarray:
    """Stored bytes as README and docs say that anybody can read them: no code of ours."""
    numbers = np.frombuffer(stored, NUMPY_DTYPES[dtype])
    if dtype == "int8":
        return numbers * np.float32(scale)
    if dtype == "binary":
        return np.unpackbits(numbers).astype(np.float32) * 2 - 1
    return numbers.astype(np.float32)


def error_bound(vector: np.ndarray, dtype: str) -> float:
    largest = float(np.abs(vector).max())
    return 2e-5 + {"float32": 0, "float16": largest * 2**-11, "int8": largest / 254, "binary": 1 + largest}[dtype]


def check_vector(actual: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    assert actual.shape == exact.shape
    assert np.abs(actual - exact).max() <= error_bound(exact, dtype)
    if dtype == "binary":  # numbers next to zero may round to either side
        clear = np.abs(exact) > 2e-5
        assert ((actual > 0) == (exact > 0))[clear].all()


def parse_tfrecords(table: Path, compression: str = "none") -> list[dict[str, Any]]:
    """All rows by plain tf.data and the schema that lies beside the files."""
    folder = snapshot_folder(table)
    schema = text_format.Parse((folder / "schema.pbtxt").read_text(), schema_pb2.Schema())
    kinds = {schema_pb2.BYTES: tf.string, schema_pb2.INT: tf.int64, schema_pb2.FLOAT: tf.float32}
    features: dict[str, Any] = {}
    for feature in schema.feature:
        if feature.HasField("shape"):
            sizes = [dim.size for dim in feature.shape.dim]
            # A column of one value is a scalar; only the embedding is a vector.
            shape = sizes if sizes != [1] else []
            features[feature.name] = tf.io.FixedLenFeature(shape, kinds[feature.type])
        else:
            features[feature.name] = tf.io.RaggedFeature(kinds[feature.type])
    files = sorted(str(path) for path in folder.glob("embeddings-*"))
    dataset = tf.data.TFRecordDataset(files, "GZIP" if compression == "gzip" else "")
    parsed = [tf.io.parse_example(example, features) for example in dataset]
    return [{name: value.numpy() for name, value in example.items()} for example in parsed]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
def test_readers_give_the_rows_that_were_written(output_format, compression, dtype, tmp_path):
    rows, _ = embed_records(
        tmp_path, RECORDS, output_format=output_format, compression=compression, dtype=dtype, **KEEP
    )
    assert set(rows) == {(str(i), 0) for i in range(30)}
    for i, text in enumerate(TEXTS):
        row = rows[str(i), 0]
        check_vector(row["embedding"], expected(text), dtype)
        assert row["text"] == text
        assert {name: row[name] for name in KEPT[i]} == KEPT[i]
        assert [type(row[name]) for name in ("year", "score", "good")] == [int, float, bool]
    ids, matrix = read_table(str(tmp_path / "table"))
    assert (matrix.dtype, matrix.shape) == (np.float32, (30, 64))
    for name, vector in zip(ids, matrix, strict=True):
        assert (vector == rows[name, 0]["embedding"]).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
def test_token_matrices_come_back_with_their_shapes(output_format, compression, dtype, tmp_path):
    vector = "sequence_output:tokens"
    settings = {"output_format": output_format, "compression": compression, "dtype": dtype, "vector": vector}
    rows, _ = embed_records(tmp_path, RECORDS, **settings)
    assert len({row["embedding"].shape for row in rows.values()}) > 5
    for i, text in enumerate(TEXTS):
        check_vector(rows[str(i), 0]["embedding"], expected(text, vector), dtype)
    with pytest.raises(TableError, match="iter_table"):
        read_table(str(tmp_path / "table"))


@pytest.mark.parametrize(("compression", "dtype"), [*(("none", dtype) for dtype in DTYPES), ("gzip", "float32")])
def test_plain_tf_data_reads_the_files_by_their_schema(compression, dtype, tmp_path):
    embed_records(tmp_path, RECORDS, compression=compression, dtype=dtype, **KEEP)
    rows = {row["id"].decode(): row for row in parse_tfrecords(tmp_path / "table", compression)}
    assert len(rows) == 30
    for i, text in enumerate(TEXTS):
        row = rows[str(i)]
        stored = row["embedding"]
        if dtype != "float32":
            stored = decode(stored, dtype, float(row.get("scale", 0)))
        check_vector(stored, expected(text), dtype)
        assert (row["chunk"], row["n_tokens"], row["n_truncated"]) == (0, len(official_tokens(text)) + 2, 0)
        assert row["text"].decode() == text
        assert row["tag"].tolist() == ([] if i % 5 == 0 else [f"té{i}".encode()])  # null is absent
        assert (row["year"].tolist(), row["score"].tolist(), row["good"].tolist()) == (
            [1900 + i],
            [i / 4],
            [int(i % 2 == 0)],
        )


def test_plain_tf_data_reads_token_matrices(tmp_path):
    embed_records(tmp_path, RECORDS, vector="sequence_output:tokens")
    for row in parse_tfrecords(tmp_path / "table"):
        exact = expected(TEXTS[int(row["id"])], "sequence_output:tokens")
        check_vector(row["embedding"].reshape(row["n_tokens"], -1), exact, "float32")


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_tfxio_reads_the_files_by_their_schema(compression, tmp_path):
    from tfx_bsl.public import tfxio

    embed_records(tmp_path, RECORDS, compression=compression, **KEEP)
    folder = snapshot_folder(tmp_path / "table")
    schema = text_format.Parse((folder / "schema.pbtxt").read_text(), schema_pb2.Schema())
    source = tfxio.TFExampleRecord(str(folder / "embeddings-*"), schema=schema, telemetry_descriptors=["test"])
    adapter = source.TensorAdapter()
    assert adapter.TypeSpecs()["embedding"].shape.as_list() == [None, 64]

    def check(batches: list[Any]) -> None:
        columns: dict[str, list] = {}
        for batch in batches:
            for name in batch.schema.names:
                columns.setdefault(name, []).extend(batch.column(name).to_pylist())
        ids = [int(value[0]) for value in columns["id"]]
        assert sorted(ids) == list(range(30))
        for i, vector in zip(ids, columns["embedding"], strict=True):
            check_vector(np.array(vector, np.float32), expected(TEXTS[i]), "float32")
        assert [value[0].decode() for value in columns["text"]] == [TEXTS[i] for i in ids]

    options = beam.options.pipeline_options.PipelineOptions([])
    with beam.Pipeline(runner=make_runner(options), options=options) as p:
        assert_that(p | source.BeamSource(), check)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pyarrow_alone_reads_parquet_files(dtype, tmp_path):
    embed_records(tmp_path, RECORDS, output_format="parquet", dtype=dtype, **KEEP)
    (path,) = snapshot_folder(tmp_path / "table").glob("embeddings-*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert {row["id"] for row in rows} == set(map(str, range(30)))
    for row in rows:
        i = int(row["id"])
        stored = np.array(row["embedding"], NUMPY_DTYPES[dtype]).tobytes()
        check_vector(decode(stored, dtype, row.get("scale", 0)), expected(TEXTS[i]), dtype)
        assert {name: row[name] for name in KEPT[i]} == KEPT[i]
        assert row["text"] == TEXTS[i]


# --- manifest, shards, snapshots --------------------------------------------------------------------------------------


def count_rows(path: Path) -> int:
    if path.suffix == ".jsonl":
        return len(path.read_text().splitlines())
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).metadata.num_rows
    return sum(1 for _ in tf.data.TFRecordDataset(str(path), "GZIP" if path.suffix == ".gz" else ""))


@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
def test_the_manifest_says_what_the_files_are(output_format, compression, tmp_path):
    records = [*RECORDS[:28], {"id": "x"}, {"id": "1", "text": "the id is taken"}]
    settings = {"output_format": output_format, "compression": compression, "max_dead_fraction": 0.5}
    embed_records(tmp_path, records, **settings)
    folder = snapshot_folder(tmp_path / "table")
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [*manifest["files"], *manifest["dead_letter_files"]]
    assert [file["rows"] for file in manifest["index_files"]] == [file["rows"] for file in manifest["files"]]
    for file in manifest["index_files"]:
        content = (folder / file["name"]).read_bytes()
        assert (file["n_bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    named = {"manifest.json", *(file["name"] for file in files)}
    if output_format == "tfrecord":
        named.add("schema.pbtxt")
    assert set(os.listdir(folder)) == named | {file["name"] for file in manifest["index_files"]}
    for file in files:
        path = folder / file["name"]
        content = path.read_bytes()
        assert (file["n_bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert file["rows"] == count_rows(path)
    assert manifest["rows"] == sum(file["rows"] for file in manifest["files"]) == 28
    assert sum(file["rows"] for file in manifest["dead_letter_files"]) == 2
    assert manifest["dead_letters"] == {"missing_field": 1, "duplicate_id": 1}
    assert manifest["snapshot"] == folder.name


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_a_new_file_is_begun_at_shard_bytes(output_format, tmp_path):
    texts = some_texts(2000, seed=22, words=(1, 4))
    rows, manifest = embed_records(
        tmp_path, as_records(texts), output_format=output_format, shard_bytes=100_000, batch_tokens=20_000
    )
    assert len(rows) == 2000
    assert len(manifest.files) > 3
    folder = snapshot_folder(tmp_path / "table")
    sizes = [(folder / file.name).stat().st_size for file in manifest.files]
    one_write = 256 * 400  # rows are written by 256, of some 400 bytes each
    assert all(size < 100_000 + one_write for size in sizes)
    assert sum(size >= 100_000 for size in sizes) >= len(sizes) - 2  # the last of the encoded, and of equal texts
    n = len(manifest.files)
    suffix = {"tfrecord": ".tfrecord", "parquet": ".parquet"}[output_format]
    assert [file.name for file in manifest.files] == [f"embeddings-{i:05d}-of-{n:05d}{suffix}" for i in range(n)]


def test_current_names_the_snapshot_and_a_second_run_replaces_it(tmp_path):
    table = tmp_path / "table"
    first_rows, first = embed_records(tmp_path, as_records(["one", "two"]))
    assert (table / "CURRENT").read_text() == first.snapshot + "\n"
    content = {path: path.read_bytes() for path in (table / "snapshots" / first.snapshot).iterdir()}
    second_rows, second = embed_records(tmp_path, as_records(["one", "three", "four"]))
    assert (table / "CURRENT").read_text() == second.snapshot + "\n"
    assert second.previous == first.snapshot != second.snapshot
    assert set(first_rows) == {("0", 0), ("1", 0)}
    assert set(second_rows) == {("0", 0), ("1", 0), ("2", 0)}
    assert {path: path.read_bytes() for path in content} == content  # whoever still reads the old one can
    assert {path.name for path in table.iterdir()} <= {"CURRENT", "snapshots", "attempts", "lock"}
    assert not list((table / "attempts").iterdir())


def test_a_reader_sees_one_snapshot_or_the_other_while_runs_publish(tmp_path):
    table = tmp_path / "table"
    embed_records(tmp_path, as_records(["one"] * 1))
    seen, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            manifest, folder = open_table(str(table))
            total = sum(Path(folder, file.name).stat().st_size == file.n_bytes for file in manifest.files)
            seen.append((manifest.rows, total == len(manifest.files)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for n in (2, 3):
            embed_records(tmp_path, as_records(["one"] * n))
    finally:
        stop.set()
        reader.join()
    assert {rows for rows, _ in seen} >= {1, 2}
    assert all(is_whole for _, is_whole in seen)
    assert [rows for rows, _ in seen] == sorted(rows for rows, _ in seen)


def test_a_failed_run_leaves_the_live_snapshot_alone(tmp_path):
    table = tmp_path / "table"
    embed_records(tmp_path, as_records(["one", "two"]))
    before = (table / "CURRENT").read_text()
    with pytest.raises(Exception, match="max_dead_fraction"):
        embed_records(tmp_path, [{"id": "0"}, {"id": "1", "text": "one"}, {"id": "2"}])
    assert (table / "CURRENT").read_text() == before
    assert read_table(str(table))[0] == ["0", "1"]
    assert len(list((table / "snapshots").iterdir())) == 1


@pytest.mark.parametrize(
    ("output_format", "compression", "damage"),
    # not parquet flipped: its pages have no checksums, the manifest's sha256 tells
    [
        (*form, damage)
        for form in FORMATS
        for damage in ("cut", "flipped", "gone")
        if (*form, damage) != PARQUET_FLIPPED
    ],
)
def test_a_damaged_file_is_an_error_and_no_shorter_table(output_format, compression, damage, tmp_path):
    embed_records(tmp_path, RECORDS, output_format=output_format, compression=compression)
    (path,) = snapshot_folder(tmp_path / "table").glob("embeddings-*")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(TableError, match="damaged"):
        list(iter_table(str(tmp_path / "table")))


def test_gzip_files_are_gzip_files(tmp_path):
    embed_records(tmp_path, RECORDS, compression="gzip")
    (path,) = snapshot_folder(tmp_path / "table").glob("embeddings-*")
    assert path.name.endswith(".tfrecord.gz")
    assert gzip.decompress(path.read_bytes())
