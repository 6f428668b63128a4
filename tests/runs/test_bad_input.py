"""Whatever is wrong with input, encoder, output or disk: a dead letter with its place, or one clear error, and the
table that was published before stays what it was."""

import bz2
import gzip
import json
import shutil
import struct
import subprocess

import google_crc32c
import numpy as np
import pytest
import zstandard

import pipeline
from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError, EmbeamError, EncoderError, InputError, RunError, TableError
from pipeline.sources.tfrecord import mask_crc
from pipeline.tables.read import iter_table, read_table
from tests.support.corpora import write_lines
from tests.support.paths import ENCODER, PREPROCESSOR
from tests.support.runs import run_embed
from tests.support.tables import assert_unchanged, list_snapshots, read_dead_letters, remember, summarize


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A table of three rows; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "a.txt").write_text("a dog\na cat\na horse\n")
    run_embed(folder / "a.txt", folder / "table", keep_text=True)
    return folder / "table"


@pytest.fixture
def table(published, tmp_path):
    return shutil.copytree(published, tmp_path / "table")


def ids_of(table):
    return sorted(read_table(str(table))[0])


# Records that cannot be embedded.


def test_bad_lines_of_text_become_dead_letters_and_the_rest_is_embedded(tmp_path):
    good = write_lines(tmp_path / "b.txt", "first", "last")
    lines = [b"\xef\xbb\xbfbehind a mark", b"bad \xff bytes", b"with\0nul", b"", b" \t ", b"x" * 50_000_000, b"end"]
    bad = write_lines(tmp_path / "a.txt", *lines)
    run_embed([bad, good], tmp_path / "table", keep_text=True)
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()
    assert summarize(read_dead_letters(tmp_path / "table")) == [
        ("a.txt", starts[1], "invalid_utf8"),
        ("a.txt", starts[3], "empty_text"),
        ("a.txt", starts[4], "empty_text"),
        ("a.txt", starts[5], "too_large"),
    ]
    assert {row["id"]: row["text"] for row in iter_table(str(tmp_path / "table"))} == {
        "a.txt@0": "behind a mark",
        f"a.txt@{starts[2]}": "with\0nul",
        f"a.txt@{starts[6]}": "end",
        "b.txt@0": "first",
        "b.txt@6": "last",
    }


def test_bad_rows_of_json_lines_become_dead_letters_and_the_rest_is_embedded(tmp_path):
    rows = [
        ("fine", '{"id": "a", "text": "fine", "n": 1}'),
        ("missing_field", '{"id": "b", "n": 1}'),
        ("missing_field", '{"id": "c", "text": null}'),
        ("wrong_type", '{"id": "d", "text": 7}'),
        ("wrong_type", '{"id": "e", "text": ["a", "b"]}'),
        ("invalid_utf8", '{"id": "f", "text": "half \\ud83d"}'),
        ("invalid_utf8", '{"id": "\\ude00", "text": "half an id"}'),
        ("malformed_json", '{"id": "g", "text": "cut'),
        ("duplicate_id", '{"id": "a", "text": "again"}'),
        ("wrong_type", '{"id": "h", "text": "kept", "n": "one"}'),
        ("wrong_type", '{"id": "i", "text": "kept", "n": 9223372036854775808}'),
        ("wrong_type", '{"id": "j", "text": "kept", "n": ' + "9" * 6000 + "}"),
        ("wrong_type", '{"id": true, "text": "a truth"}'),
        ("fine", '{"id": "k", "text": "kept", "n": 9223372036854775807}'),
        ("fine", '{"id": 7, "text": "kept", "n": -9223372036854775808}'),
    ]
    source = write_lines(tmp_path / "a.jsonl", *(line for _, line in rows))
    run_embed(source, tmp_path / "table", id_field="id", keep_fields="n:int")
    starts = np.cumsum([0, *(len(line) + 1 for _, line in rows)]).tolist()
    expected = [
        ("a.jsonl", start, reason) for (reason, _), start in zip(rows, starts, strict=False) if reason != "fine"
    ]
    assert summarize(read_dead_letters(tmp_path / "table")) == expected
    assert {row["id"]: row["n"] for row in iter_table(str(tmp_path / "table"))} == {
        "a": 1,
        "k": 2**63 - 1,
        "7": -(2**63),
    }


def test_of_equal_ids_the_first_in_the_order_of_files_and_places_wins(tmp_path):
    write_lines(tmp_path / "2.jsonl", '{"id": "x", "text": "two x"}', '{"id": "y", "text": "two y"}')
    write_lines(tmp_path / "1.jsonl", '{"id": "y", "text": "one y"}', '{"id": "y", "text": "one y again"}')
    inputs = [tmp_path / "2.jsonl", tmp_path / "1.jsonl"]
    run_embed(inputs, tmp_path / "table", id_field="id", keep_text=True, split_bytes=20)
    assert {row["id"]: row["text"] for row in iter_table(str(tmp_path / "table"))} == {"x": "two x", "y": "one y"}
    letters = read_dead_letters(tmp_path / "table")
    assert summarize(letters) == [("1.jsonl", 29, "duplicate_id"), ("2.jsonl", 29, "duplicate_id")]


@pytest.mark.parametrize(("on_empty", "n_rows", "n_dead"), [("reject", 2, 2), ("skip", 2, 0), ("embed", 4, 0)])
def test_blank_texts_go_where_on_empty_says(tmp_path, on_empty, n_rows, n_dead):
    source = write_lines(tmp_path / "a.txt", "a dog", "", "   ", "a cat")
    manifest = run_embed(source, tmp_path / "table", on_empty=on_empty)
    assert (manifest.rows, len(read_dead_letters(tmp_path / "table"))) == (n_rows, n_dead)
    assert np.isfinite(read_table(str(tmp_path / "table"))[1]).all()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.bz2", "a.txt.zst"])
def test_a_compressed_file_that_is_cut_off_is_read_up_to_there(tmp_path, name):
    lines = [f"line {i} {i**9:x}".encode() for i in range(400)]
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.compress}[name.rpartition(".")[2]]
    half = len(lines) // 2
    parts = [compress(b"\n".join(part) + b"\n") for part in (lines[:half], lines[half:])]
    (tmp_path / name).write_bytes(parts[0] + parts[1][: len(parts[1]) // 2])
    write_lines(tmp_path / "b.txt", "whole")
    manifest = run_embed(tmp_path / "*.*", tmp_path / "table")
    (letter,) = read_dead_letters(tmp_path / "table")
    assert letter["reason"] == "truncated_file" and letter["file"] == str(tmp_path / name)
    assert half <= letter["row"] == manifest.rows - 1


def test_a_tfrecord_with_a_wrong_checksum_loses_that_record_only(tmp_path):
    from tensorflow.core.example.example_pb2 import Example

    frames = []
    for text in (b"one", b"two", b"three"):
        example = Example()
        example.features.feature["text"].bytes_list.value.append(text)
        data = example.SerializeToString()
        length = struct.pack("<Q", len(data))
        crc = mask_crc(google_crc32c.value(data)) ^ (text == b"two")
        frames.append(length + struct.pack("<I", mask_crc(google_crc32c.value(length))) + data + struct.pack("<I", crc))
    (tmp_path / "a.tfrecord").write_bytes(b"".join(frames))
    run_embed(tmp_path / "a.tfrecord", tmp_path / "table", keep_text=True)
    assert summarize(read_dead_letters(tmp_path / "table")) == [("a.tfrecord", 1, "bad_checksum")]
    assert [row["text"] for row in iter_table(str(tmp_path / "table"))] == ["one", "three"]


def test_dead_letters_hold_as_much_of_a_text_as_is_asked_for(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", '{"text": "fine"}', '{"text": ["my secret"]}', '{"my secret')
    held = {}
    for rule in ("full", "hash", "none"):
        run_embed(source, tmp_path / rule, dead_letter_text=rule)
        held[rule] = read_dead_letters(tmp_path / rule)
    assert [letter.get("text") for letter in held["full"]] == [None, '{"my secret']
    assert len(held["hash"][1]["text_sha256"]) == 64
    assert "my secret" not in json.dumps(held["hash"]) and "my secret" not in json.dumps(held["none"])
    assert not any({"text", "text_sha256"} & set(letter) for letter in held["none"])


# Inputs that cannot be read at all.


def test_an_empty_file_beside_good_ones_is_passed_over(tmp_path):
    write_lines(tmp_path / "a.txt", "a dog")
    (tmp_path / "b.txt").touch()
    assert run_embed(tmp_path / "*.txt", tmp_path / "table").rows == 1


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.txt", b"", "only empty files"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), "no documents"),
        ("empty.jsonl", b"\n\n", "no documents"),
        ("blank.txt", b"\n \n", "--on_empty"),
    ],
)
def test_input_without_documents_is_an_error_that_says_so(tmp_path, table, name, data, says):
    before = remember(table)
    (tmp_path / name).write_bytes(data)
    with pytest.raises((InputError, RunError), match=says):
        run_embed(tmp_path / name, table, on_empty="skip")
    assert_unchanged(table, before)


def test_a_glob_that_matches_nothing_names_itself(tmp_path):
    with pytest.raises(InputError, match=r"--input=.*nothing-\*\.txt matches no file"):
        run_embed(tmp_path / "nothing-*.txt", tmp_path / "table")
    assert not (tmp_path / "table").exists()


# Encoders and preprocessors that are none.


@pytest.fixture
def encoder(tmp_path):
    return shutil.copytree(ENCODER, tmp_path / "encoder")


def check_encoder_error(tmp_path, says, error=EncoderError, **settings):
    source = write_lines(tmp_path / "a.txt", "a dog")
    with pytest.raises(error) as caught:
        run_embed(source, tmp_path / "table", **settings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not list_snapshots(tmp_path / "table")
    return str(caught.value)


def test_a_folder_without_an_encoder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no encoder")
    check_encoder_error(tmp_path, "the folder holds no saved_model.pb", encoder=str(tmp_path / "empty"))
    check_encoder_error(tmp_path, "no such folder", encoder=str(tmp_path / "none"))
    check_encoder_error(tmp_path, "is a file", encoder=str(tmp_path / "file"))


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "middle"])
def test_a_damaged_graph(tmp_path, encoder, damage):
    path = encoder / "saved_model.pb"
    data = path.read_bytes()
    middle = data[: len(data) // 2] + b"\xff" * 64 + data[len(data) // 2 + 64 :]
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": b"no graph", "empty": b"", "middle": middle}[damage])
    check_encoder_error(tmp_path, str(encoder), encoder=str(encoder))


@pytest.mark.parametrize(
    "missing", ["variables", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
def test_missing_weights_are_found_before_anything_is_read(tmp_path, encoder, missing, monkeypatch):
    path = encoder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr("pipeline.job.build_pipeline", lambda *_: pytest.fail("the run had begun"))
    check_encoder_error(tmp_path, str(encoder), encoder=str(encoder))


def test_cut_weights_are_found_before_anything_is_read(tmp_path, encoder, monkeypatch):
    path = encoder / "variables/variables.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setattr("pipeline.job.build_pipeline", lambda *_: pytest.fail("the run had begun"))
    check_encoder_error(tmp_path, str(encoder), encoder=str(encoder))


def test_encoder_and_preprocessor_swapped(tmp_path):
    said = check_encoder_error(tmp_path, str(PREPROCESSOR), EmbeamError, encoder=str(PREPROCESSOR))
    assert "preprocessor" in said.replace(str(PREPROCESSOR), "")
    check_encoder_error(tmp_path, "is it an encoder?", preprocessor=str(ENCODER))


def test_a_model_that_takes_no_text(tmp_path):
    import tensorflow as tf

    class Image(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], tf.float32)])
        def __call__(self, pixels):
            return {"pooled_output": tf.reduce_mean(pixels, [1, 2])}

    class Nothing(tf.Module):
        @tf.function(input_signature=[])
        def __call__(self):
            return {"pooled_output": tf.zeros([1, 3])}

    for kind in (Image, Nothing):
        folder = str(tmp_path / kind.__name__)
        tf.saved_model.save(kind(), folder)
        check_encoder_error(tmp_path, "no text encoder", encoder=folder)


def test_a_vocabulary_larger_than_the_encoders(tmp_path, encoder):
    (vocabulary,) = (encoder / "assets").glob("*.txt")
    vocabulary.write_text(vocabulary.read_text() + "".join(f"piece{i}\n" for i in range(10)))
    check_encoder_error(tmp_path, "they do not belong together", ConfigError, encoder=str(encoder))


# No room, and outputs that cannot be.


def test_a_disk_that_is_too_small_is_refused_before_the_run(tmp_path, table, monkeypatch):
    before = remember(table)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("pipeline.job.build_pipeline", lambda *_: pytest.fail("the run had begun"))
    with pytest.raises(RunError, match=r"--output=.* GB free; free some"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table)
    assert_unchanged(table, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_during_the_run(tmp_path, small_disk, published, monkeypatch):
    table = shutil.copytree(published, small_disk / "table")
    before = remember(table)
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    source = write_lines(tmp_path / "b.txt", *(f"dog {i} " + "x" * 500 for i in range(4000)))
    with pytest.raises(RunError, match="disk is full"):
        run_embed(source, table, keep_text=True, shard_bytes=100_000)
    assert_unchanged(table, before)
    assert not list((table / "attempts").iterdir())
    assert run_embed(write_lines(tmp_path / "c.txt", "a dog"), table).rows == 1


@pytest.mark.parametrize("at", ["schema.pbtxt", "manifest.json", "CURRENT"])
def test_a_disk_that_fills_up_while_publishing(tmp_path, table, monkeypatch, at):
    from pipeline.tables import pointer, publish

    write = publish.write_atomically

    def fail(path, text):
        if path.endswith(at):
            raise OSError(28, "No space left on device", path)
        write(path, text)

    before = remember(table)
    module = pointer if at == "CURRENT" else publish
    monkeypatch.setattr(module, "write_atomically", fail)
    with pytest.raises(RunError, match="disk is full"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table)
    assert_unchanged(table, before)
    monkeypatch.setattr(module, "write_atomically", write)
    assert run_embed(tmp_path / "b.txt", table).rows == 1


def test_outputs_that_cannot_hold_a_table(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.txt", "a dog")
    monkeypatch.setattr("pipeline.job.build_pipeline", lambda *_: pytest.fail("the run had begun"))
    (tmp_path / "full").mkdir()
    write_lines(tmp_path / "full" / "thesis.doc", "precious")
    with pytest.raises(TableError, match=r"holds 'thesis.doc' and is no table; give"):
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


def test_an_output_that_may_not_be_written(tmp_path, small_disk, published):
    table = shutil.copytree(published, small_disk / "table")
    before = remember(table)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TableError, match="cannot be written to"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table)
    assert_unchanged(table, before)


# Tables that are damaged.


def damage_pointer_nowhere(table):
    (table / "CURRENT").write_text("20200101T000000Z-000000\n")


def damage_pointer_empty(table):
    (table / "CURRENT").write_text("")


def damage_pointer_bytes(table):
    (table / "CURRENT").write_bytes(b"\xff\xfe\n")


def damage_manifest_cut(table):
    (path,) = table.glob("snapshots/*/manifest.json")
    path.write_text(path.read_text()[:200])


def damage_manifest_list(table):
    (path,) = table.glob("snapshots/*/manifest.json")
    path.write_text("[]")


def damage_manifest_layout(table):
    (path,) = table.glob("snapshots/*/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": "none"}))


def damage_manifest_bytes(table):
    (path,) = table.glob("snapshots/*/manifest.json")
    path.write_bytes(b"\xff" + path.read_bytes())


def damage_manifest_newer(table):
    (path,) = table.glob("snapshots/*/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99, "unheard_of": 1}))


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_refused_by_every_reader_and_by_the_next_run(tmp_path, table, damage):
    from pipeline.report.query import find_nearest
    from pipeline.report.summary import format_table

    damage(table)
    source = write_lines(tmp_path / "b.txt", "a dog")
    attempts = (
        lambda: read_table(str(table)),
        lambda: format_table(str(table), 3),
        lambda: find_nearest(str(table), "a dog"),
        lambda: run_embed(source, table),
    )
    for attempt in attempts:
        with pytest.raises(TableError) as caught:
            attempt()
        said = str(caught.value)
        assert str(table) in said and "\n" not in said
        assert ("newer than this embeam reads" if damage is damage_manifest_newer else " is damaged") in said
        assert ";" in said, f"no cure is named: {said}"


@pytest.mark.parametrize(
    "settings", [{}, {"compression": "gzip"}, {"output_format": "parquet"}], ids=["tfrecord", "gzip", "parquet"]
)
@pytest.mark.parametrize("damage", ["deleted", "cut", "cut by one", "flipped", "emptied"])
def test_a_table_file_that_is_gone_or_cut_is_named(damaged_tables, damage, settings):
    table, path = damaged_tables(settings)
    data = path.read_bytes()
    middle = len(data) // 3
    path.write_bytes(
        {
            "deleted": b"",
            "cut": data[: len(data) // 2],
            "cut by one": data[:-1],
            "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
            "emptied": b"",
        }[damage]
    )
    if damage == "deleted":
        path.unlink()
    from pipeline.report.query import find_nearest
    from pipeline.report.summary import format_table

    readers = [read_table, lambda t: format_table(t, 1000)]
    if damage == "cut":  # loads an encoder, which takes its time
        readers.append(lambda t: find_nearest(t, "a dog"))
    for attempt in readers:
        with pytest.raises(TableError) as caught:
            attempt(str(table))
        assert path.name in str(caught.value) and "run embeam embed again" in str(caught.value)


@pytest.fixture(scope="module")
def damaged_tables(tmp_path_factory):
    """Gives a fresh copy of a table of one file, made once for each format."""
    made = {}

    def copy(settings):
        key = json.dumps(settings)
        if key not in made:
            folder = tmp_path_factory.mktemp("format")
            write_lines(folder / "a.txt", *(f"dog {i}" for i in range(300)))
            run_embed(folder / "a.txt", folder / "table", **settings)
            made[key] = folder / "table"
        table = shutil.copytree(made[key], tmp_path_factory.mktemp("copy") / "table")
        (path,) = table.glob("snapshots/*/embeddings-*")
        return table, path

    return copy


def test_a_damaged_table_is_mended_by_the_run_that_its_message_asks_for(tmp_path, table):
    (path,) = table.glob("snapshots/*/embeddings-*")
    path.write_bytes(path.read_bytes()[:-10])
    run_embed(write_lines(tmp_path / "a.txt", "a dog", "a cat", "a horse"), table)
    assert ids_of(table) == ["a.txt@0", "a.txt@12", "a.txt@6"]


def test_a_flipped_byte_is_mended_where_checksums_are_looked_at(tmp_path, table):
    (path,) = table.glob("snapshots/*/embeddings-*")
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 255]) + data[101:])
    source = write_lines(tmp_path / "a.txt", "a dog", "a cat")
    with pytest.raises(TableError, match="run embeam embed again with --verify_live"):
        run_embed(source, table)
    run_embed(source, table, verify_live=True)
    assert ids_of(table) == ["a.txt@0", "a.txt@6"]


def test_a_damaged_index_is_made_anew(tmp_path, table):
    (path,) = table.glob("snapshots/*/index-*")
    path.write_bytes(path.read_bytes()[:-1])
    run_embed(write_lines(tmp_path / "a.txt", "a dog", "a cat"), table)
    assert ids_of(table) == ["a.txt@0", "a.txt@6"]


# Too many dead letters.


def count_encoded(monkeypatch):
    from pipeline.encoders import handler

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
    letters = [json.loads(line) for path in attempt.glob("dead_letters-*") for line in path.read_text().splitlines()]
    assert len(letters) >= 300 and {letter["reason"] for letter in letters} == {"empty_text"}
    assert not list(attempt.glob("embeddings-*"))


def test_the_share_of_dead_letters_is_judged_exactly_before_publishing(tmp_path, table):
    before = remember(table)
    source = write_lines(tmp_path / "b.txt", *(["a dog"] * 7), *([""] * 3))
    with pytest.raises(RunError, match=r"3 of 10 documents .*--max_dead_fraction=0.29"):
        run_embed(source, table, max_dead_fraction=0.29)
    assert_unchanged(table, before)
    assert run_embed(source, table, max_dead_fraction=0.3).rows == 7


@pytest.mark.parametrize(("period", "share"), [(11, 0.1), (2, 0.6)])
def test_a_run_with_few_enough_dead_letters_is_never_stopped(tmp_path, period, share):
    lines = ["" if i % period == period - 1 else "a dog" for i in range(3001)]
    manifest = run_embed(write_lines(tmp_path / "a.txt", *lines), tmp_path / "table", max_dead_fraction=share)
    assert manifest.dead_letters == {"empty_text": lines.count("")}


# Settings that cannot work, and runs that meet.


def test_a_trial_does_not_replace_a_table(tmp_path, table):
    before = remember(table)
    with pytest.raises(ConfigError, match="--limit=1 is for trials"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table, limit=1)
    assert_unchanged(table, before)


def test_a_run_that_was_overtaken_does_not_replace_the_others_table(tmp_path, table, monkeypatch):
    from pipeline.tables import folder

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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 10_000}, "--max_tokens=10000 exceeds the encoder's"),
        ({"max_tokens": 2}, "--max_tokens=2 leaves no room"),
        ({"max_tokens": 8, "on_long": "chunk", "chunk_overlap": 6}, "--chunk_overlap=6 leaves nothing new"),
        ({"chunk_overlap": 3}, "--chunk_overlap=3 needs chunks"),
        ({"chunk_overlap": -1}, "--chunk_overlap=-1 is negative"),
        ({"dimensions": 65}, "--dimensions=65 exceeds the encoder's 64"),
        ({"dimensions": -1}, "--dimensions=-1 is negative"),
        ({"vector": "pooled"}, "--vector=pooled: .* has no output 'pooled'; it gives"),
        ({"vector": "encoder_outputs/99:mean"}, "--vector=encoder_outputs/99:mean: .* layers"),
        ({"vector": "encoder_outputs/x:mean"}, "'x' is no layer number"),
        ({"vector": "encoder_outputs:mean"}, "names no layer"),
        ({"vector": "sequence_output"}, "say how to pool it"),
        ({"vector": "sequence_output:sum"}, "'sum' is no pooling"),
        ({"vector": "pooled_output:mean"}, "drop ':mean'"),
        ({"vector": "sequence_output:tokens", "on_long": "average"}, "--on_long=average cannot average"),
        ({"pair_field": "b", "on_long": "chunk"}, "--on_long=chunk cannot split pairs"),
        ({"dtype": "float8"}, "--dtype=float8 is not one of float32"),
        ({"on_long": "cut"}, "--on_long=cut is not one of truncate"),
        ({"on_empty": "drop"}, "--on_empty=drop is not one of reject"),
        ({"input_format": "xml"}, "--input_format=xml is not one of auto"),
        ({"text_mode": "page"}, "--text_mode=page is not one of line"),
        ({"output_format": "csv"}, "--output_format=csv is not one of tfrecord"),
        ({"compression": "zip"}, "--compression=zip is not one of none"),
        ({"dead_letter_text": "some"}, "--dead_letter_text=some is not one of full"),
        ({"output_format": "parquet", "compression": "gzip"}, "--compression=gzip: Parquet"),
        ({"batch_tokens": -1}, "--batch_tokens=-1 is negative"),
        ({"split_bytes": 0}, "--split_bytes=0 must be at least 1"),
        ({"shard_bytes": -1}, "--shard_bytes=-1 must be at least 1"),
        ({"max_document_bytes": 0}, "--max_document_bytes=0 must be at least 1"),
        ({"limit": -1}, "--limit=-1 is negative"),
        ({"max_dead_fraction": 1.5}, "--max_dead_fraction=1.5 is no share"),
        ({"max_dead_fraction": "nan"}, "--max_dead_fraction=nan is no share"),
        ({"text_field": ""}, "--text_field is empty"),
        ({"keep_fields": "a,a"}, "names 'a' twice"),
        ({"keep_fields": "id"}, "--keep_fields=id would collide"),
        ({"keep_fields": "text"}, "use --keep_text"),
        ({"keep_fields": "a:date"}, "--keep_fields=a:date is not name or name:type"),
        ({"keep_fields": "a"}, "--keep_fields=a: .* is plain text"),
        ({"id_field": "a"}, "--id_field=a: .* is plain text"),
        ({"normalize": "perhaps"}, "--normalize=perhaps is not true or false"),
        ({"batch_tokens": "many"}, "--batch_tokens=many is not a whole number"),
        ({"batch_tokens": 1.5}, "--batch_tokens=1.5 is not a whole number"),
        ({"max_dead_fraction": "half"}, "--max_dead_fraction=half is not a number"),
        ({"max_dead_fraction": [0.5]}, "--max_dead_fraction=.*0.5.* is not a number"),
        ({"encoder": ["a"]}, "--encoder="),
        ({"batch_token": 3}, "'batch_token'.*batch_tokens"),
        ({"input": ()}, "--input is missing"),
        ({"output": ""}, "--output is missing"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_setting_that_cannot_work_is_refused_before_anything_is_written(tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    source = write_lines(tmp_path / "a.txt", "a dog")
    with pytest.raises(ConfigError, match=says):
        run_embed(settings.pop("input", source), settings.pop("output", tmp_path / "table"), **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_package_offers_embed_however_often_it_is_asked(tmp_path):
    source = write_lines(tmp_path / "a.txt", "a dog")
    config = EmbedConfig.from_flat({"input": str(source), "output": str(tmp_path / "t"), "encoder": str(ENCODER)})
    first = pipeline.build_table(config)
    second = pipeline.build_table(config)
    assert (first.rows, second.previous) == (1, first.snapshot)
