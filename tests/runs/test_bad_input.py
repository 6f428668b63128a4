"""Whatever is wrong with input, encoder or output: a dead letter with its place, or one clear error, and the table that
was published before stays what it was.

What is wrong with a record is decided by the sources, with a setting by `resolve`, with an encoder by the plan, with a
table by its readers, and tested there. Here is what takes a whole run.
"""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from pipeline.encoders import handler
from pipeline.errors import ConfigError, EncoderError, RunError, TableError
from pipeline.tables import folder
from pipeline.tables.read import iter_table, read_table
from tests.support.corpora import as_records, write_lines
from tests.support.official import INPUTS, save_module, vocabulary
from tests.support.paths import PREPROCESSOR
from tests.support.runs import embed_records, run_embed
from tests.support.tables import assert_unchanged, read_dead_letters, remember, summarize


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A table of three rows; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("published")
    write_lines(folder / "a.txt", "a dog", "a cat", "a horse")
    run_embed(folder / "a.txt", folder / "table", keep_text=True)
    return folder / "table"


@pytest.fixture
def table(published, tmp_path):
    return shutil.copytree(published, tmp_path / "table")


@pytest.fixture
def never_begins(monkeypatch):
    monkeypatch.setattr("pipeline.run.job.build_pipeline", lambda *_: pytest.fail("the run had begun"))


def ids_of(table):
    return sorted(read_table(str(table))[0])


# Records that cannot be embedded.


def write_examples(path, *texts):
    """A TFRecord file of tf.Examples; returns where each record begins."""
    starts = []
    with tf.io.TFRecordWriter(str(path)) as writer:
        for text in texts:
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
            data = tf.train.Example(features=tf.train.Features(feature={"text": feature})).SerializeToString()
            writer.write(data)
            starts.append(len(data) + 16)
    return np.cumsum([0, *starts]).tolist()


def test_bad_records_of_every_format_become_dead_letters_and_the_rest_is_embedded(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = [b"\xef\xbb\xbfbehind a mark", b"bad \xff bytes", b"with\0nul", b"", b"x" * 11_000_000, b"end"]
    write_lines(corpus / "a.txt", *lines)
    write_lines(corpus / "b.jsonl", '{"text": "json"}', '{"text": 7}', '{"text": "cut', '{"text": null}')
    write_lines(corpus / "c.csv", "n,text", "1,comma", "2", '3,"two\nlines"')
    pq.write_table(pa.table({"text": ["parquet", None]}), corpus / "d.parquet")
    starts = write_examples(corpus / "e.tfrecord", "one", "two", "three")
    records = bytearray((corpus / "e.tfrecord").read_bytes())
    records[starts[1] + 14] ^= 1  # within the data of "two"
    (corpus / "e.tfrecord").write_bytes(records)
    packed = gzip.compress(b"first\nsecond\n") + gzip.compress(b"third\n" * 1000)[:20]
    (corpus / "f.txt.gz").write_bytes(packed)
    (corpus / "g.txt").touch()

    manifest = run_embed(corpus / "*", tmp_path / "table", keep_text=True, on_bad_file="skip")

    dead_letters = read_dead_letters(tmp_path / "table")
    places = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()
    (cut,) = manifest.bad_files
    assert (cut.file, cut.reason) == (str(corpus / "f.txt.gz"), "truncated_file")
    assert summarize(dead_letters) == [
        ("a.txt", places[1], "invalid_utf8"),
        ("a.txt", places[3], "empty_text"),
        ("a.txt", places[4], "too_large"),
        ("b.jsonl", 17, "wrong_type"),
        ("b.jsonl", 29, "malformed_json"),
        ("b.jsonl", 43, "missing_field"),
        ("c.csv", 1, "malformed_csv"),
        ("d.parquet", 1, "missing_field"),
        ("e.tfrecord", 1, "bad_checksum"),
    ]
    assert {dead_letter["reason"]: dead_letter.get("text") for dead_letter in dead_letters}[
        "malformed_json"
    ] == '{"text": "cut'
    texts = {row["id"]: row["text"] for row in iter_table(str(tmp_path / "table"))}
    thirds = [texts.pop(name) for name in sorted(texts) if name.startswith("f.txt.gz@") and name[9:] not in "01"]
    assert texts == {
        "a.txt@0": "behind a mark",
        f"a.txt@{places[2]}": "with\0nul",
        f"a.txt@{places[5]}": "end",
        "b.jsonl@0": "json",
        "c.csv@0": "comma",
        "c.csv@2": "two\nlines",
        "d.parquet@0": "parquet",
        "e.tfrecord@0": "one",
        "e.tfrecord@2": "three",
        "f.txt.gz@0": "first",
        "f.txt.gz@1": "second",
    }
    assert set(thirds) <= {"third"} and manifest.rows == len(texts) + len(thirds)


def test_of_equal_ids_the_first_counts_and_dead_letters_need_not_hold_texts(tmp_path):
    write_lines(tmp_path / "2.jsonl", '{"id": "x", "text": "two x"}', '{"id": "y", "text": "two y", "n": 2}')
    write_lines(tmp_path / "1.jsonl", '{"id": "y", "text": "one y"}', '{"id": "y", "text": "my secret"}')
    inputs = [tmp_path / "2.jsonl", tmp_path / "1.jsonl"]
    settings = {"id_field": "id", "keep_text": True, "keep_fields": "n:int", "split_bytes": 20}
    run_embed(inputs, tmp_path / "table", dead_letter_text="hash", **settings)
    rows = {row["id"]: (row["text"], row["n"]) for row in iter_table(str(tmp_path / "table"))}
    assert rows == {"x": ("two x", None), "y": ("one y", None)}
    dead_letters = read_dead_letters(tmp_path / "table")
    assert summarize(dead_letters) == [("1.jsonl", 29, "duplicate_id"), ("2.jsonl", 29, "duplicate_id")]
    assert "my secret" not in json.dumps(dead_letters) and all(
        len(dead_letter["text_sha256"]) == 64 for dead_letter in dead_letters
    )


def save_failing_encoder(folder):
    """An encoder of tokens that gives NaN for inputs with the word `the`."""
    bad = vocabulary().index("the")

    def encode(inputs):
        ids = inputs["input_word_ids"]
        breaks = tf.reduce_any(ids == bad, 1)
        sums = tf.cast(tf.reduce_sum(ids * inputs["input_mask"], 1), tf.float32)
        return {"pooled_output": tf.stack([sums, tf.where(breaks, float("nan"), 1.0)], 1)}

    specs = {name: tf.TensorSpec([None, None], tf.int32, name=name) for name in INPUTS}
    return save_module(folder, call=tf.function(encode, input_signature=[specs]))


def test_a_text_that_the_encoder_breaks_on_is_a_dead_letter_as_a_whole(tmp_path):
    settings = {"encoder": save_failing_encoder(tmp_path / "encoder"), "preprocessor": PREPROCESSOR}
    settings |= {"max_tokens": 10, "on_long": "average", "max_dead_fraction": 1}
    texts = ["and " * 30, "and " * 20 + "the", "and"]
    rows, manifest = embed_records(tmp_path, as_records(texts), **settings)
    assert set(rows) == {("0", 0), ("2", 0)}
    (dead_letter,) = read_dead_letters(tmp_path / "table")
    assert (dead_letter["id"], dead_letter["stage"], dead_letter["reason"]) == ("1", "encode", "not_finite")
    assert dead_letter["text"] == texts[1]
    assert manifest.dead_letters == {"not_finite": 1}


# What stops a run before it begins, or before it publishes.


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [("empty.txt.gz", gzip.compress(b"", mtime=0), "no documents"), ("blank.txt", b"\n \n", "--on_empty")],
    ids=["empty", "blank"],
)
def test_input_without_documents_is_an_error_that_says_so(tmp_path, table, name, data, says):
    before = remember(table)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RunError, match=says):
        run_embed(tmp_path / name, table, on_empty="skip")
    assert_unchanged(table, before)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_tokens": 10_000}, ConfigError),
        ({"max_dead_fraction": 1.5}, ConfigError),
        ({"encoder": "nowhere"}, EncoderError),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, monkeypatch, never_begins, settings, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        run_embed(write_lines(tmp_path / "a.txt", "a dog"), tmp_path / "table", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_trial_does_not_replace_a_table(tmp_path, table, never_begins):
    before = remember(table)
    with pytest.raises(ConfigError, match="--limit=1 is for trials"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table, limit=1)
    assert_unchanged(table, before)


def test_outputs_that_cannot_hold_a_table(tmp_path, never_begins):
    source = write_lines(tmp_path / "a.txt", "a dog")
    (tmp_path / "full").mkdir()
    write_lines(tmp_path / "full" / "thesis.doc", "precious")
    with pytest.raises(TableError, match=r"holds 'thesis.doc' and is not a table; give"):
        run_embed(source, tmp_path / "full")
    with pytest.raises(TableError, match="is a file; give a folder"):
        run_embed(source, source)
    with pytest.raises(TableError, match="cannot be written to"):
        run_embed(source, source / "below")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.doc"]


def test_an_output_whose_name_looks_like_a_glob(tmp_path):
    source = write_lines(tmp_path / "a.txt", "a dog")
    assert run_embed(source, tmp_path / "table[1]*?").rows == 1
    assert ids_of(tmp_path / "table[1]*?") == ["a.txt@0"]


def test_a_run_that_was_overtaken_does_not_replace_the_others_table(tmp_path, table, monkeypatch):
    (snapshot,) = (table / "snapshots").iterdir()
    shutil.copytree(snapshot, snapshot.with_name("other"))
    place = folder.place_files

    def place_while_another_publishes(*arguments):
        (table / "CURRENT").write_text("other\n")
        return place(*arguments)

    monkeypatch.setattr(folder, "place_files", place_while_another_publishes)
    with pytest.raises(TableError, match="another run has published other"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table)
    assert (table / "CURRENT").read_text() == "other\n"
    assert len(ids_of(table)) == 3
    assert not list((table / "attempts").iterdir())


# Too many dead letters.


def count_encoded(monkeypatch):
    encoded = []
    encode = handler.LoadedEncoder.encode

    def count(self, batch):
        encoded.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(handler.LoadedEncoder, "encode", count)
    return encoded


def test_a_run_with_too_many_dead_letters_stops_soon_and_says_why(tmp_path, table, monkeypatch):
    before = remember(table)
    encoded = count_encoded(monkeypatch)
    source = write_lines(tmp_path / "b.txt", *(["a dog", ""] * 10_000))
    with pytest.raises(RunError) as caught:
        run_embed(source, table, max_dead_fraction=0.3, batch_tokens=64)
    assert "empty_text" in str(caught.value) and "--max_dead_fraction=0.3" in str(caught.value)
    assert sum(encoded) < 5000
    assert_unchanged(table, before)
    (attempt,) = (table / "attempts").iterdir()
    dead_letters = [
        json.loads(line) for path in attempt.glob("dead_letters-*") for line in path.read_text().splitlines()
    ]
    assert len(dead_letters) >= 300 and {dead_letter["reason"] for dead_letter in dead_letters} == {"empty_text"}
    assert not list(attempt.glob("embeddings-*"))


def test_the_share_of_dead_letters_is_judged_exactly_before_publishing(tmp_path, table):
    before = remember(table)
    source = write_lines(tmp_path / "b.txt", *(["a dog"] * 7), *([""] * 3))
    with pytest.raises(RunError, match=r"3 of 10 documents .*--max_dead_fraction=0.29"):
        run_embed(source, table, max_dead_fraction=0.29)
    assert_unchanged(table, before)
    assert run_embed(source, table, max_dead_fraction=0.3).rows == 7


@pytest.mark.parametrize(
    ("period", "share"), [(11, 0.1), pytest.param(2, 0.6, marks=pytest.mark.exhaustive)], ids=["few", "many allowed"]
)
def test_a_run_with_few_enough_dead_letters_is_never_stopped(tmp_path, period, share):
    lines = ["" if i % period == period - 1 else "a dog" for i in range(3001)]
    manifest = run_embed(write_lines(tmp_path / "a.txt", *lines), tmp_path / "table", max_dead_fraction=share)
    assert manifest.dead_letters == {"empty_text": lines.count("")}
