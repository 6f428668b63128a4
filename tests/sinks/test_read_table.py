"""The table on disk: our readers against plain TensorFlow, TFXIO and pyarrow, and the manifest against the files.

Most files here are written by the sinks alone, from rows made of random numbers. One whole run for each kind of file
shows that a run writes such files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import threading
from dataclasses import replace
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
from pipeline.engines.runner import make_runner
from pipeline.errors import TableError
from pipeline.read_config import KeptField
from pipeline.records import Row, pack_kept
from pipeline.sinks.index import digest_kept, read_index
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.writing import BUFFERED_RECORDS, RowFormat, Shard, WriteRecords
from pipeline.tables.manifest import Manifest, open_table
from pipeline.tables.publish import Publication, build_manifest
from pipeline.tables.read import iter_table
from pipeline.vectors.storing import quantize_vectors
from tests.support.corpora import as_records, some_texts
from tests.support.official import expected_vector, official_pack, official_tokens
from tests.support.runs import embed_records
from tests.support.steps import Outputs, make_dead_letter, publish_rows
from tests.support.tables import Rows, hash_folder

FORMATS = [("tfrecord", "none"), ("tfrecord", "gzip"), ("parquet", "none")]
DTYPES = ["float32", "float16", "int8", "binary"]
NUMPY_DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1", "binary": "u1"}
N, DIMENSION = 30, 61  # no multiple of 8
NUMBERS = range(N)
GOOD = [None if i % 7 == 3 else i % 2 == 0 for i in NUMBERS]
KEPT = [{"year": 1900 + i, "score": i / 4, "good": GOOD[i], "tag": None if i % 5 == 0 else f"té{i}"} for i in NUMBERS]
KEEP = tuple(map(KeptField, KEPT[0], ("int", "float", "bool", "string")))
LAYOUT = TableLayout("float32", DIMENSION, keep_text=True, kept=KEEP)


def make_vector(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal(DIMENSION).astype(np.float32)


def make_matrix(i: int) -> np.ndarray:
    """`[n_tokens, DIMENSION]`, of several sizes."""
    return np.random.default_rng(i).standard_normal((2 + i % 7, DIMENSION)).astype(np.float32)


def make_rows(layout: TableLayout = LAYOUT) -> list[Row]:
    rows = []
    for i in NUMBERS:
        exact = make_matrix(i).reshape(1, -1) if layout.tokens else make_vector(i)[None]
        (stored,), (scale,) = quantize_vectors(exact, layout.dtype)
        n_tokens = 2 + i % 7
        kept = pack_kept(list(KEPT[i].values()))
        text = f"téxt {i}" if layout.keep_text else None
        rows.append(Row(str(i), 0, stored.tobytes(), float(scale), n_tokens, i % 3, f"{i:032x}", kept, text))
    return rows


def write_table(folder: Path, output_format: str, compression: str = "none", **layout: Any) -> str:
    """A table of the rows; keywords change its layout."""
    form = RowFormat(output_format, replace(LAYOUT, **layout), compression)
    publish_rows(str(folder / "table"), make_rows(form.layout), form)
    return str(folder / "table")


def live_folder(table: str) -> Path:
    return Path(open_table(table)[1])


def decode(stored: bytes, dtype: str, scale: float = 0.0) -> np.ndarray:
    """Stored bytes as README and docs say that anybody can read them: no code of ours."""
    numbers = np.frombuffer(stored, NUMPY_DTYPES[dtype])
    if dtype == "int8":
        return numbers * np.float32(scale)
    if dtype == "binary":
        return np.unpackbits(numbers)[:DIMENSION].astype(np.float32) * 2 - 1
    return numbers.astype(np.float32)


def check_vector(actual: np.ndarray, exact: np.ndarray, dtype: str, tolerance: float = 0.0) -> None:
    """Within the bound of the stored dtype, which is none for float32."""
    assert actual.shape == exact.shape
    largest = float(np.abs(exact).max())
    bound = {"float32": 0, "float16": largest * 2**-11, "int8": 1.001 * largest / 254, "binary": 1 + largest}[dtype]
    assert np.abs(actual - exact).max() <= bound + tolerance
    if dtype == "binary":
        assert ((actual > 0) == (exact > 0)).all()


def parse_tfrecords(table: str) -> list[dict[str, Any]]:
    """All rows by plain tf.data and the schema that lies beside the files."""
    folder = live_folder(table)
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
    dataset = tf.data.TFRecordDataset(files, "GZIP" if files[0].endswith(".gz") else "")
    parsed = [tf.io.parse_example(example, features) for example in dataset]
    return [{name: value.numpy() for name, value in example.items()} for example in parsed]


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
def test_readers_give_the_rows_that_were_written(output_format, compression, dtype, tmp_path):
    table = write_table(tmp_path, output_format, compression, dtype=dtype)
    rows = {(row["id"], row["chunk"]): row for row in iter_table(table)}
    assert set(rows) == {(str(i), 0) for i in NUMBERS}
    for i in NUMBERS:
        row = rows[str(i), 0]
        check_vector(row["embedding"], make_vector(i), dtype)
        assert (row["text"], row["n_tokens"], row["n_truncated"]) == (f"téxt {i}", 2 + i % 7, i % 3)
        assert {name: row[name] for name in KEPT[i]} == KEPT[i]
        assert [type(row[name]) for name in ("year", "score", "good")] == [int, float, type(GOOD[i])]
    ids, matrix = read_table(table)
    assert (matrix.dtype, matrix.shape) == (np.float32, (N, DIMENSION))
    for name, vector in zip(ids, matrix, strict=True):
        assert (vector == rows[name, 0]["embedding"]).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
def test_token_matrices_come_back_with_their_shapes(output_format, compression, dtype, tmp_path):
    table = write_table(tmp_path, output_format, compression, dtype=dtype, tokens=True)
    for row in iter_table(table):
        check_vector(row["embedding"], make_matrix(int(row["id"])), dtype)
    with pytest.raises(TableError, match="iter_table"):
        read_table(table)


@pytest.mark.parametrize(("compression", "dtype"), [*(("none", dtype) for dtype in DTYPES), ("gzip", "float32")])
def test_plain_tf_data_reads_the_files_by_their_schema(compression, dtype, tmp_path):
    rows = {
        row["id"].decode(): row for row in parse_tfrecords(write_table(tmp_path, "tfrecord", compression, dtype=dtype))
    }
    assert len(rows) == N
    for i in NUMBERS:
        row = rows[str(i)]
        stored = row["embedding"]
        if dtype != "float32":
            stored = decode(stored, dtype, float(row.get("scale", 0)))
        check_vector(stored, make_vector(i), dtype)
        assert (row["chunk"], row["n_tokens"], row["n_truncated"]) == (0, 2 + i % 7, i % 3)
        assert row["text"].decode() == f"téxt {i}"
        assert row["tag"].tolist() == ([] if i % 5 == 0 else [f"té{i}".encode()])  # null is absent
        assert row["good"].tolist() == ([] if GOOD[i] is None else [int(GOOD[i])])
        assert [row[name].tolist() for name in ("year", "score")] == [[1900 + i], [i / 4]]


def test_plain_tf_data_reads_token_matrices(tmp_path):
    rows = parse_tfrecords(write_table(tmp_path, "tfrecord", tokens=True))
    assert len(rows) == N
    for row in rows:
        check_vector(row["embedding"].reshape(row["n_tokens"], -1), make_matrix(int(row["id"])), "float32")


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_tfxio_reads_the_files_by_their_schema(compression, tmp_path):
    from tfx_bsl.public import tfxio

    folder = live_folder(write_table(tmp_path, "tfrecord", compression))
    schema = text_format.Parse((folder / "schema.pbtxt").read_text(), schema_pb2.Schema())
    source = tfxio.TFExampleRecord(str(folder / "embeddings-*"), schema=schema, telemetry_descriptors=["test"])
    adapter = source.TensorAdapter()
    assert adapter.TypeSpecs()["embedding"].shape.as_list() == [None, DIMENSION]

    def check(batches: list[Any]) -> None:
        columns: dict[str, list] = {}
        for batch in batches:
            for name in batch.schema.names:
                columns.setdefault(name, []).extend(batch.column(name).to_pylist())
        ids = [int(value[0]) for value in columns["id"]]
        assert sorted(ids) == list(NUMBERS)
        for i, vector in zip(ids, columns["embedding"], strict=True):
            check_vector(np.array(vector, np.float32), make_vector(i), "float32")
        assert [value[0].decode() for value in columns["text"]] == [f"téxt {i}" for i in ids]

    options = beam.options.pipeline_options.PipelineOptions([])
    with beam.Pipeline(runner=make_runner(options), options=options) as p:
        assert_that(p | source.BeamSource(), check)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pyarrow_alone_reads_parquet_files(dtype, tmp_path):
    (path,) = live_folder(write_table(tmp_path, "parquet", dtype=dtype)).glob("embeddings-*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert {row["id"] for row in rows} == set(map(str, NUMBERS))
    for row in rows:
        i = int(row["id"])
        stored = np.array(row["embedding"], NUMPY_DTYPES[dtype]).tobytes()
        check_vector(decode(stored, dtype, row.get("scale", 0)), make_vector(i), dtype)
        assert {name: row[name] for name in KEPT[i]} == KEPT[i]
        assert (row["text"], row["n_tokens"]) == (f"téxt {i}", 2 + i % 7)


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_a_column_may_be_null_throughout(output_format, tmp_path):
    layout = replace(LAYOUT, keep_text=False, counts_tokens=False)
    empty = [row._replace(kept=pack_kept([None] * 4), n_tokens=None, n_truncated=None) for row in make_rows(layout)]
    publish_rows(str(tmp_path / "table"), empty, RowFormat(output_format, layout))
    rows = list(iter_table(str(tmp_path / "table")))
    assert len(rows) == N
    assert all({name: row[name] for name in KEPT[0]} == dict.fromkeys(KEPT[0]) for row in rows)
    assert not {"n_tokens", "n_truncated", "text"} & set(rows[0])


@pytest.mark.parametrize(
    ("output_format", "compression", "damage"),
    [
        (*form, damage)
        for form in FORMATS
        for damage in ("cut", "flipped", "gone")
        # a Parquet footer has no checksum: the manifest's sha256 tells
        if (form[0], damage) != ("parquet", "flipped")
    ],
)
def test_a_damaged_file_is_an_error_and_no_shorter_table(output_format, compression, damage, tmp_path):
    table = write_table(tmp_path, output_format, compression)
    (path,) = live_folder(table).glob("embeddings-*")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(TableError, match="damaged"):
        list(iter_table(table))


def test_a_file_with_too_few_rows_is_damaged(tmp_path):
    table = write_table(tmp_path, "tfrecord")
    (path,) = live_folder(table).glob("embeddings-*")
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records[:-1]:
            writer.write(record)
    with pytest.raises(TableError, match="it has 29 rows instead of 30"):
        list(iter_table(table))


def test_gzip_files_are_gzip_files(tmp_path):
    (path,) = live_folder(write_table(tmp_path, "tfrecord", "gzip")).glob("embeddings-*")
    assert path.name.endswith(".tfrecord.gz")
    assert gzip.decompress(path.read_bytes())


# --- files, manifest, snapshots ---------------------------------------------------------------------------------------


def count_rows(path: Path) -> int:
    if path.suffix == ".jsonl":
        return len(path.read_text().splitlines())
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).metadata.num_rows
    return sum(1 for _ in tf.data.TFRecordDataset(str(path), "GZIP" if path.suffix == ".gz" else ""))


def check_manifest(table: str) -> dict[str, Any]:
    """Compares all that the manifest says of files with the files, and returns it."""
    folder = live_folder(table)
    manifest = json.loads((folder / "manifest.json").read_text())
    rows, dead_letters, indexes = (manifest[name] for name in ("files", "dead_letter_files", "index_files"))
    named = {"manifest.json", *(file["name"] for file in [*rows, *dead_letters, *indexes])}
    assert set(os.listdir(folder)) == named | ({"schema.pbtxt"} if manifest["file_format"] == "tfrecord" else set())
    for file in [*rows, *dead_letters, *indexes]:
        content = (folder / file["name"]).read_bytes()
        assert (file["n_bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    for file in [*rows, *dead_letters]:
        assert file["rows"] == count_rows(folder / file["name"])
    for file, index in zip(rows, indexes, strict=True):
        assert file["rows"] == index["rows"] == len(read_index(str(folder / index["name"])).entries)
    assert manifest["rows"] == sum(file["rows"] for file in rows)
    assert sum(manifest["dead_letters"].values()) == sum(file["rows"] for file in dead_letters)
    assert manifest["snapshot"] == folder.name
    return manifest


@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
def test_the_manifest_says_what_the_files_are(output_format, compression, tmp_path):
    form = RowFormat(output_format, LAYOUT, compression)
    dead_letters = [
        make_dead_letter("a", str(i), reason) for i, reason in enumerate(["wrong_type", "too_large", "too_large"])
    ]
    published = publish_rows(str(tmp_path), make_rows(), form, dead_letters, shard_bytes=1)
    manifest = check_manifest(str(tmp_path))
    assert len(manifest["files"]) > 3 and manifest["rows"] == N
    assert manifest["dead_letters"] == {"wrong_type": 1, "too_large": 2}
    assert Manifest.from_json(published.to_json()) == published == open_table(str(tmp_path))[0]


def test_the_index_says_whose_rows_a_file_has(tmp_path):
    rows = [row._replace(source=f"file {i % 4}") for i, row in enumerate(make_rows())]
    publish_rows(str(tmp_path), rows, RowFormat("parquet", LAYOUT))
    (path,) = live_folder(str(tmp_path)).glob("index-*")
    index = read_index(str(path))
    for row, entry in zip(rows, index.entries, strict=True):
        digest = hashlib.blake2b(row.id.encode(), digest_size=16).digest()
        assert (entry["id"].ljust(16, b"\0"), entry["content"].rjust(16, b"\0")[-1]) == (digest, int(row.id))
        assert (entry["kept"], entry["chunk"], entry["n_chunks"]) == (digest_kept(row.kept), 0, 1)
        assert index.sources[entry["source"]] == row.source


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_a_new_file_is_begun_at_shard_bytes(output_format, tmp_path):
    rows = [
        row._replace(id=f"{i}-{row.id}", vector=make_vector(N * i + int(row.id)).tobytes())
        for i in range(60)
        for row in make_rows()
    ]
    step = WriteRecords(str(tmp_path), RowFormat(output_format, LAYOUT), 300_000, None)
    found = Outputs()
    found.add_bundle(step, rows)
    shards: list[Shard] = found["main"]
    sizes = [os.path.getsize(shard.path) for shard in shards]
    assert sizes == [shard.n_bytes for shard in shards] and sum(shard.rows for shard in shards) == len(rows)
    one_write = BUFFERED_RECORDS * 500  # bytes at most
    assert len(shards) > 1 and all(300_000 <= size < 300_000 + one_write for size in sizes[:-1])
    (counted,) = found["bundle_counts"]
    counts = json.loads(counted.counts)
    assert (counted.stage, counts["records"], counts["bytes"]) == ("write_embeddings", len(rows), sum(sizes))
    facts = {"file_format": output_format, "compression": "none", "layout": LAYOUT}
    facts |= {"embeam": "0", "fingerprint": "", "identity": {}, "settings": {}}
    manifest = build_manifest(Publication("", "n", "", "", 0.0, facts, 1.0), shards, {})
    n, suffix = len(shards), {"tfrecord": ".tfrecord", "parquet": ".parquet"}[output_format]
    assert [file.name for file in manifest.files] == [f"embeddings-{i:05d}-of-{n:05d}{suffix}" for i in range(n)]
    firsts = [next(iter_ids(shard)) for shard in sorted(shards, key=lambda shard: shard.first)]
    assert firsts == sorted(firsts), "files are in the order of their first rows"


def iter_ids(shard: Shard) -> Any:
    if shard.suffix == ".parquet":
        return iter(pq.read_table(shard.path).column("id").to_pylist())
    examples = (tf.train.Example.FromString(record.numpy()) for record in tf.data.TFRecordDataset(shard.path))
    return (example.features.feature["id"].bytes_list.value[0].decode() for example in examples)


def test_a_second_publication_leaves_the_first_as_it_was(tmp_path):
    form = RowFormat("tfrecord", LAYOUT)
    first = publish_rows(str(tmp_path), make_rows(), form)
    assert (tmp_path / "CURRENT").read_text() == first.snapshot + "\n"
    before = hash_folder(tmp_path / "snapshots" / first.snapshot)
    second = publish_rows(str(tmp_path), make_rows()[:3], form)
    assert (tmp_path / "CURRENT").read_text() == second.snapshot + "\n"
    assert second.previous == first.snapshot != second.snapshot
    assert len(read_table(str(tmp_path))[0]) == 3
    assert hash_folder(tmp_path / "snapshots" / first.snapshot) == before  # whoever still reads the old one can


def test_a_reader_sees_one_snapshot_or_the_other_while_others_are_published(tmp_path):
    table, form = str(tmp_path), RowFormat("parquet", LAYOUT)
    publish_rows(table, make_rows()[:1], form)
    seen, stop, has_read = [], threading.Event(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            manifest, folder = open_table(table)
            sizes = [Path(folder, file.name).stat().st_size for file in manifest.files]
            seen.append((manifest.rows, sizes == [file.n_bytes for file in manifest.files]))
            has_read.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for n in range(2, N):
            has_read.clear()
            publish_rows(table, make_rows()[:n], form)
            assert has_read.wait(10), "the reader has failed"
    finally:
        stop.set()
        reader.join()
    assert len({rows for rows, _ in seen}) > 3
    assert all(is_whole for _, is_whole in seen)
    assert [rows for rows, _ in seen] == sorted(rows for rows, _ in seen)


# --- whole runs -------------------------------------------------------------------------------------------------------

TEXTS = some_texts(N, seed=21)


def expected(text: str, vector: str = "pooled_output") -> np.ndarray:
    return expected_vector(official_pack([text], len(official_tokens(text)) + 2), vector)


def check_whole_run(rows: Rows, dtype: str, vector: str = "pooled_output") -> None:
    assert set(rows) == {(str(i), 0) for i in NUMBERS}
    for i, text in enumerate(TEXTS):
        row, exact = rows[str(i), 0], expected(text, vector)
        if dtype == "binary":  # numbers next to zero may become either sign
            clear = np.abs(exact) > 2e-5
            assert ((row["embedding"] > 0) == (exact > 0))[clear].all()
        else:
            check_vector(row["embedding"], exact, dtype, tolerance=2e-5)
        assert row["n_tokens"] == len(official_tokens(text)) + 2
        assert {name: row[name] for name in KEPT[i]} == KEPT[i] and row["text"] == text


def run_whole(folder: Path, **settings: Any) -> tuple[Rows, Manifest]:
    records = [record | kept for record, kept in zip(as_records(TEXTS), KEPT, strict=True)]
    records += [{"id": "x"}, {"id": "1", "text": "the id is taken"}]
    settings = {"keep_fields": "year,score,good,tag", "keep_text": True, "max_dead_fraction": 0.5, **settings}
    return embed_records(folder, records, **settings)


@pytest.mark.numeric
@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
def test_a_run_writes_what_anybody_can_read(output_format, compression, tmp_path):
    rows, _ = run_whole(tmp_path, output_format=output_format, compression=compression)
    check_whole_run(rows, "float32")
    table = str(tmp_path / "table")
    manifest = check_manifest(table)
    assert manifest["dead_letters"] == {"missing_field": 1, "duplicate_id": 1} and manifest["rows"] == N
    if output_format == "parquet":
        (path,) = live_folder(table).glob("embeddings-*.parquet")
        found = {row["id"]: np.array(row["embedding"], np.float32) for row in pq.read_table(path).to_pylist()}
    else:
        found = {row["id"].decode(): row["embedding"] for row in parse_tfrecords(table)}
    assert {name for name, _ in rows} == set(found)
    assert all(np.array_equal(rows[name, 0]["embedding"], vector) for name, vector in found.items())


@pytest.mark.exhaustive
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("output_format", "compression"), FORMATS)
@pytest.mark.parametrize("vector", ["pooled_output", "sequence_output:tokens"])
def test_a_run_writes_every_kind_of_row(vector, output_format, compression, dtype, tmp_path):
    rows, _ = run_whole(tmp_path, output_format=output_format, compression=compression, dtype=dtype, vector=vector)
    check_whole_run(rows, dtype, vector)
    check_manifest(str(tmp_path / "table"))
