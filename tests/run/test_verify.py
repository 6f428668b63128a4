"""`embeam verify` and `embeam rollback`: every inconsistency of a table is found, and nothing else."""

import hashlib
import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError, TableError
from pipeline.run.checked_table import KINDS, Finding
from pipeline.run.verify import verify_table
from pipeline.sinks import SINKS
from pipeline.tables.manifest import open_table
from tests.support.corpora import some_texts, write_jsonl
from tests.support.processes import assert_one_line
from tests.support.runs import embed_records, make_config, run_pipeline
from tests.support.steps import LAYOUT, SteppedTable, make_document
from tests.support.tables import read_dead_letters

N = 150
SETTINGS = {"keep_fields": "year:int", "shard_bytes": 20_000, "keep_text": True, "max_tokens": 16}
FORMATS = {"tfrecord": {}, "parquet": {"output_format": "parquet"}}


def make_records(n=N):
    return [{"id": f"d{i}", "text": text, "year": i} for i, text in enumerate(some_texts(n, words=(1, 12)))]


@pytest.fixture(scope="module", params=FORMATS)
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for n in (N // 2, N):
        embed_records(folder, make_records(n), **SETTINGS, **FORMATS[request.param])
    assert len(open_table(str(folder / "table"))[0].files) > 1
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that tests may damage: `corpus.jsonl` and `table`."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def verify(folder, *inputs, **settings):
    return verify_table(str(folder / "table"), [str(folder / name) for name in inputs], **settings)


def kinds(findings):
    assert all(isinstance(finding, Finding) and finding.kind in KINDS for finding in findings)
    return sorted({finding.kind for finding in findings})


def snapshot(folder):
    return Path(open_table(str(folder / "table"))[1])


def edit_file(path, change):
    """Changes the bytes of a file in place: it gets a new inode, as snapshots may share files."""
    data = bytearray(path.read_bytes())
    data = change(data) or data
    path.unlink()
    path.write_bytes(bytes(data))


def flip_byte(data):
    data[len(data) // 2] ^= 0x41


def edit_manifest(folder, change):
    path = snapshot(folder) / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_rows(folder, change, *, index=False):
    """Rewrites the first file with rows, or its index, and updates the manifest: only the rows show the change."""
    manifest, root = open_table(str(folder / "table"))
    name = (manifest.index_files if index else manifest.files)[0].name
    edit_file(Path(root, name), lambda data: change(bytes(data), manifest))
    data = Path(root, name).read_bytes()

    def agree(values):
        for file in values["index_files" if index else "files"]:
            if file["name"] == name:
                file |= {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(folder, agree)


def edit_columns(change):
    """Bytes of a file with rows -> bytes, through the tf.Examples or the Arrow table in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tensorflow as tf

    from pipeline.sinks.tfrecord import frame_record

    def run(data, manifest):
        sink = SINKS[manifest.file_format]
        if manifest.file_format == "parquet":
            table = pq.read_table(BytesIO(data))
            rows = table.to_pylist()
            rows = change(rows) or rows
            stream = BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, table.schema), stream)
            return stream.getvalue()
        stored = list(sink.read(BytesIO(data), manifest.layout))
        examples = [tf.train.Example.FromString(record) for block in stored for record in block]
        fields = {"id": "bytes_list", "content_hash": "bytes_list", "embedding": "float_list"}
        rows = []
        for example in examples:
            row = {name: list(getattr(example.features.feature[name], kind).value) for name, kind in fields.items()}
            row |= {name: row[name][0].decode() for name in ("id", "content_hash")}
            row["year"] = example.features.feature["year"].int64_list.value[0]
            row["example"] = example
            rows.append(row)
        rows = change(rows) or rows
        records = []
        for row in rows:
            example = tf.train.Example()
            example.CopyFrom(row["example"])
            for name, kind in fields.items():
                values = row[name] if name == "embedding" else [row[name].encode()]
                getattr(example.features.feature[name], kind).value[:] = values
            example.features.feature["year"].int64_list.value[:] = [row["year"]]
            records.append(frame_record(example.SerializeToString()))
        return b"".join(records)

    return run


def set_row(i, **values):
    def change(rows):
        for name, value in values.items():
            rows[i][name] = value(rows[i][name]) if callable(value) else value

    return edit_columns(change)


def test_a_consistent_table_is_consistent(folder):
    assert verify(folder) == []
    assert verify(folder, "corpus.jsonl", sample=20) == []
    assert verify(folder, sample=20) == [], "texts come from the table itself"


def test_damaged_bytes_are_found(folder):
    name = open_table(str(folder / "table"))[0].files[1].name
    edit_file(snapshot(folder) / name, flip_byte)
    findings = verify(folder)
    assert "wrong_checksum" in kinds(findings) and {finding.what.split()[0] for finding in findings} == {name}
    assert "damaged_file" in kinds(findings), "every format has checksums of its own"
    assert verify(folder, "corpus.jsonl") == findings, "rows that cannot be read are not missing as well"


def test_a_damaged_index_is_found(folder):
    name = open_table(str(folder / "table"))[0].index_files[0].name
    edit_file(snapshot(folder) / name, lambda data: flip_byte(data[: len(data) // 4]) or data.__setitem__(3, 0))
    assert kinds(verify(folder)) == ["wrong_checksum", "wrong_index"]


def test_a_truncated_file_is_found(folder):
    name = open_table(str(folder / "table"))[0].files[0].name
    edit_file(snapshot(folder) / name, lambda data: data[: len(data) * 2 // 3])
    assert kinds(verify(folder)) == ["damaged_file", "wrong_size"]
    edit_file(snapshot(folder) / name, lambda data: b"")
    findings = verify(folder)
    assert "wrong_size" in kinds(findings)
    assert "damaged_file" in kinds(findings)


def test_missing_and_surplus_files_are_found(folder):
    manifest, root = open_table(str(folder / "table"))
    Path(root, manifest.files[0].name).unlink()
    Path(root, "embeddings-extra.tfrecord").write_bytes(b"x")
    Path(root, ".DS_Store").write_bytes(b"x")
    Path(root, "more").mkdir()
    expected = [("missing_file", manifest.files[0].name), ("surplus_file", "embeddings-extra.tfrecord")]
    assert [finding[:2] for finding in verify(folder, "corpus.jsonl")] == [*expected, ("surplus_file", "more")]
    Path(root, manifest.index_files[0].name).unlink()
    found = [finding.what for finding in verify(folder, "corpus.jsonl") if finding.kind == "missing_document"]
    assert len(found) == manifest.files[0].rows, "without its index nothing says whose rows the file had"


def test_numbers_that_do_not_add_up_are_found(folder):
    edit_manifest(folder, lambda values: values.update(rows=N + 1, dead_letters={"empty_text": 3}))
    assert [finding.kind for finding in verify(folder)] == ["wrong_count", "wrong_count"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_row(2, embedding=lambda numbers: [float("nan"), *numbers[1:]]), "not_finite"),
        (set_row(2, id="somebody"), "wrong_index"),
        (set_row(2, content_hash="0" * 32), "wrong_index"),
        (set_row(2, content_hash="0" * 31), "wrong_row"),
        (set_row(2, year=77), "wrong_index"),
    ],
    ids=["nan", "id", "hash", "no hash", "kept"],
)
def test_an_edited_row_is_found_without_any_checksum(folder, change, expected):
    edit_rows(folder, change)
    findings = verify(folder)
    assert expected in kinds(findings)
    assert all(" row 2" in finding.what for finding in findings)


@pytest.mark.parametrize("original", ["tfrecord"], indirect=True)  # Parquet's lists of a fixed size hold no other
def test_a_vector_of_another_size_is_found(folder):
    edit_rows(folder, set_row(0, embedding=lambda numbers: numbers[:-1]))
    assert kinds(verify(folder)) == ["wrong_dimension"]


def test_rows_that_are_there_twice_are_found(folder):
    edit_rows(folder, edit_columns(lambda rows: [*rows[:1], *rows[:1], *rows[2:]]))
    findings = verify(folder, "corpus.jsonl")
    assert kinds(findings) == ["duplicate_row", "missing_document", "wrong_index"]
    duplicate = next(finding for finding in findings if finding.kind == "duplicate_row")
    assert duplicate.what in {record["id"] for record in make_records()}


def test_another_vector_is_found_by_the_sample(folder):
    edit_rows(folder, set_row(1, embedding=lambda numbers: [-number for number in numbers]))
    assert verify(folder, "corpus.jsonl") == []
    (finding,) = verify(folder, "corpus.jsonl", sample=N)
    assert finding.kind == "wrong_vector" and "cosine -1.0" in finding.message


def test_documents_that_changed_are_found(folder):
    records = make_records()
    records[3]["text"] += " more"
    records[4]["year"] += 1
    gone = records.pop(5)["id"]
    write_jsonl(folder / "corpus.jsonl", [*records, {"id": "fresh", "text": "a dog", "year": 1}, records[9]])
    findings = verify(folder, "corpus.jsonl")
    assert {finding[:2] for finding in findings} == {
        ("stale_row", "d3"),
        ("stale_row", "d4"),
        ("surplus_row", gone),
        ("missing_document", "fresh"),
    }
    messages = {finding.what: finding.message for finding in findings}
    assert "another text" in messages["d3"] and "other kept fields" in messages["d4"]
    assert kinds(verify(folder, "corpus.jsonl", sample=N)) == kinds(findings), "changed texts are not encoded"


def test_the_first_of_two_documents_with_one_id_counts(folder):
    records = make_records()
    write_jsonl(folder / "corpus.jsonl", [*records, {**records[0], "text": "another"}])
    assert verify(folder, "corpus.jsonl") == []


# Documents and rows that dead letters explain.


def test_dead_letters_explain_missing_documents_and_stale_rows(tmp_path):
    texts = ["a dog", "a cat", "a horse and a dog and a cat and a cow", "a bird", ""]
    records = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    settings = {"on_long": "reject", "max_tokens": 8, "on_empty": "reject", "max_dead_fraction": 1, "keep_fields": ()}
    embed_records(tmp_path, records, **settings)
    records[3]["text"] = texts[2]  # its old row stays
    embed_records(tmp_path, records, **settings)
    assert sorted(dead_letter["reason"] for dead_letter in read_dead_letters(str(tmp_path / "table"))) == [
        "empty_text",
        "too_long",
        "too_long",
    ]
    assert verify(tmp_path, "corpus.jsonl") == []
    records[1] = {"id": "1", "text": 3}  # now unreadable: its row may not be surplus
    write_jsonl(tmp_path / "corpus.jsonl", records)
    assert verify(tmp_path, "corpus.jsonl") == []
    write_jsonl(tmp_path / "corpus.jsonl", [records[0], *records[2:]])
    assert [finding[:2] for finding in verify(tmp_path, "corpus.jsonl")] == [("surplus_row", "1")]
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("{no json\n")  # its id cannot be read: it may be document 1
    assert verify(tmp_path, "corpus.jsonl") == []


def test_deleted_documents_may_be_kept(tmp_path):
    records = make_records(10)
    embed_records(tmp_path, records)
    embed_records(tmp_path, records[:9], deletes="keep")
    assert verify(tmp_path, "corpus.jsonl") == []


def test_chunks_that_are_missing_are_found(tmp_path):
    settings = {"on_long": "chunk", "max_tokens": 8, "dtype": "int8"}
    rows, manifest = embed_records(tmp_path, make_records(20), **settings)
    assert len(rows) > 20
    assert verify(tmp_path, "corpus.jsonl", sample=50) == []

    def drop_last_chunk(data, manifest):
        sink, stream = SINKS["tfrecord"], BytesIO()
        blocks = list(sink.read(BytesIO(data), manifest.layout))
        columns = sink.decode(blocks[0], manifest.layout)
        last = max(i for i, chunk in enumerate(columns["chunk"]) if chunk)
        writer = sink.writer(stream, manifest.layout)
        writer.write_stored([record for i, record in enumerate(blocks[0]) if i != last])
        return stream.getvalue()

    edit_rows(tmp_path, drop_last_chunk)
    assert {"damaged_file", "wrong_index", "missing_chunk"} & set(kinds(verify(tmp_path)))
    (snapshot(tmp_path) / manifest.index_files[0].name).unlink()
    assert "missing_chunk" in kinds(verify(tmp_path))


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"text": lambda text: text + "!"}, "characters of text, and says that they are"),
        ({"char_end": lambda end: end + 1}, "characters of text, and says that they are"),
        ({"char_start": 9, "char_end": 8}, "it has the characters 9 to 8 of its document"),
        ({"char_start": -2, "char_end": lambda end: end - 2}, "it has the characters -2 to"),
        ({"text": "", "char_start": 0, "char_end": 0}, "it has the characters 0 to 0 of its document, and the chunk"),
        ({"text": "xy", "char_end": 2, "char_start": 0}, "it has the characters 0 to 2 of its document, and"),
    ],
    ids=["text", "end", "order", "negative", "empty", "overlap"],
)
def test_chunks_with_other_characters_than_they_say_are_found(tmp_path, overlap, values, says):
    settings = {"on_long": "chunk", "max_tokens": 8, "chunk_overlap": overlap, "keep_text": True}
    rows, _ = embed_records(tmp_path, make_records(20), **settings, output_format="parquet")
    assert verify(tmp_path, "corpus.jsonl") == []
    number = next(i for i, (_, chunk) in enumerate(rows) if chunk == 1)
    edit_rows(tmp_path, set_row(number, **values))
    findings = verify(tmp_path)
    assert {finding.kind for finding in findings} == {"wrong_row"}
    assert says in findings[0].message and findings[0].what.endswith(f" row {number}")


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "binary", "tokens", "int8 tokens", "chunks"])
def test_rows_of_every_kind_are_consistent(tmp_path, kind, output_format):
    dtype = kind.split()[0] if kind.split()[0] in ("float16", "int8", "binary") else "float32"
    layout = replace(LAYOUT, dtype=dtype, tokens="tokens" in kind, chunked=kind == "chunks")
    table = SteppedTable(str(tmp_path / "table"), layout=layout, output_format=output_format)
    for n in (4, 6):
        table.run(make_document(f"d{i}", "word " * (i + 1)) for i in range(n))
    assert verify(tmp_path) == []


@pytest.mark.numeric
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16", "normalize": True, "compression": "gzip"},
        {"on_long": "average", "max_tokens": 8, "text_prefix": "query: "},
        pytest.param({"dtype": "binary"}, marks=pytest.mark.exhaustive),
        pytest.param({"vector": "sequence_output:tokens", "dtype": "float16"}, marks=pytest.mark.exhaustive),
        pytest.param({"keep_fields": "year:float,id:string"}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_tables_of_all_kinds_are_consistent(tmp_path, settings):
    records = [record | {"year": i / 3} for i, record in enumerate(make_records(12))]
    if "keep_fields" in settings:
        settings = settings | {"keep_fields": "year:float"}
    embed_records(tmp_path, records, **settings)
    sample = 0 if "vector" in settings else 12
    assert verify(tmp_path, "corpus.jsonl", sample=sample) == []
    if not sample:
        with pytest.raises(ConfigError, match="matrix per text"):
            verify(tmp_path, "corpus.jsonl", sample=1)
    if "keep_fields" in settings:
        records[0]["year"] += 1
        write_jsonl(tmp_path / "corpus.jsonl", records)
        assert [finding[:2] for finding in verify(tmp_path, "corpus.jsonl")] == [("stale_row", "d0")]


def test_wrong_usage_is_said(tmp_path):
    with pytest.raises(TableError, match="is not a table"):
        verify(tmp_path)
    embed_records(tmp_path, make_records(3))
    with pytest.raises(ConfigError, match="matches no file"):
        verify(tmp_path, "nothing*.jsonl")
    with pytest.raises(ConfigError, match="keeps no texts"):
        verify(tmp_path, sample=1)


# The verbs.


def test_verify_prints_what_it_finds(tmp_path, call):
    embed_records(tmp_path, make_records(40))
    table, corpus = tmp_path / "table", tmp_path / "corpus.jsonl"
    code, out, _ = call("verify", table, f"--input={corpus}")
    assert code == 0 and f"{table} is consistent" in out and "40 documents" in out
    write_jsonl(corpus, make_records(10))
    code, out, _ = call("verify", table, f"--input={corpus}")
    assert code == 1 and "is not consistent: 30 findings" in out and "surplus_row 30" in out and "and 10 more" in out
    code, out, _ = call("verify", table, f"--input={corpus}", "--all")
    assert code == 1 and sum(line.startswith("surplus_row d") for line in out.splitlines()) == 30
    code, out, _ = call("verify", table, f"--input={corpus}", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and len(found) == 30 and set(found[0]) == {"kind", "what", "message"}


def test_rollback_returns_to_the_snapshot_before(tmp_path, call):
    embed_records(tmp_path, make_records(10))
    first = open_table(str(tmp_path / "table"))[0]
    embed_records(tmp_path, make_records(11))
    second = open_table(str(tmp_path / "table"))[0]
    table = tmp_path / "table"
    code, out, _ = call("rollback", table, "--list")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2
    assert lines[0].startswith(first.snapshot) and "10 rows" in lines[0] and "live" not in lines[0]
    assert lines[1].startswith(second.snapshot) and "11 rows" in lines[1] and lines[1].endswith("live")
    code, out, _ = call("rollback", table)
    assert code == 0 and first.snapshot in out and second.snapshot in out
    assert open_table(str(table))[0].snapshot == first.snapshot
    assert verify(tmp_path) == []
    call("rollback", table, f"--to={second.snapshot}")
    assert open_table(str(table))[0] == second
    code, _, err = call("rollback", table, "--to=nothing")
    assert code == 1 and "no other snapshot" in assert_one_line(err)
    code, _, err = call("rollback", table, "--to=nothing", "--list")
    assert code == 2 and "--list" in assert_one_line(err)
    manifest = run_pipeline(tmp_path)
    assert manifest.previous == second.snapshot and np.isfinite(manifest.seconds)
    assert make_config(tmp_path).write.output == str(table)
