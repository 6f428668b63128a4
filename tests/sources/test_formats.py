"""The same documents come out of every format and compression, and however the input is cut up."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.read_config import KeptField, ReadConfig
from pipeline.records import Document
from pipeline.sources import SOURCES
from pipeline.sources.lines import iterate_lines, join_paragraphs, read_whole
from pipeline.sources.planning import plan_input
from pipeline.sources.read import ReadSplit, read_range
from pipeline.sources.sampling import infer_kept_fields, sample_input

DOCUMENTS = [
    {"key": "a", "body": "plain words", "other": "second", "year": 1999, "score": 0.5, "ok": True, "lang": "en"},
    {"key": "b", "body": "Größe – 東京 🙂", "other": "ünï", "year": -3, "score": -2.0, "ok": False, "lang": "日本"},
    {"key": "c", "body": "  spaces around  ", "other": "x", "year": 0, "score": 1e-30, "ok": True, "lang": ""},
    {"key": "d", "body": "nul\0inside", "other": "y", "year": 2**62, "score": 3.25, "ok": False, "lang": "null"},
    {"key": "e", "body": "tab-free", "other": "z", "year": 7, "score": 1024.0, "ok": True, "lang": "fr"},
]
KEPT = ("year", "score", "ok", "lang")
TYPED = ("year:int", "score:float", "ok:bool", "lang:string")
COMPRESS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
    ".bz2": lambda data: bz2.compress(data[: len(data) // 2]) + bz2.compress(data[len(data) // 2 :]),
    ".xz": lambda data: lzma.compress(data[: len(data) // 2]) + lzma.compress(data[len(data) // 2 :]),
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),
}


def write_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_json(rows):
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def write_csv(rows, delimiter=","):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def write_parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=2)
    return out.getvalue()


def write_warc(rows):
    """Texts as warcio writes them, between records of the other types; the fields are headers."""
    from warcio.warcwriter import WARCWriter

    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    writer.write_record(writer.create_warcinfo_record("a.warc", {"software": "a crawler"}))
    for row in rows:
        uri, headers = f"http://a.org/{row['key']}", {name: str(value) for name, value in row.items() if name != "body"}
        body, content = io.BytesIO(row["body"].encode()), {"warc_content_type": "text/plain"}
        writer.write_record(writer.create_warc_record(uri, "metadata", payload=io.BytesIO(b"fetchTimeMs: 5")))
        writer.write_record(
            writer.create_warc_record(uri, "conversion", payload=body, warc_headers_dict=headers, **content)
        )
    return out.getvalue()


def write_tfrecord(rows, folder, compression=""):
    import tensorflow as tf

    def feature(value):
        if isinstance(value, str):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

    path = folder / "plain"
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for row in rows:
            features = tf.train.Features(feature={name: feature(value) for name, value in row.items()})
            writer.write(tf.train.Example(features=features).SerializeToString())
    return path.read_bytes()


def infer(plan, config):
    return infer_kept_fields(sample_input(plan, config).fields, config)


def read_outcomes(config, kept_fields=None):
    plan = plan_input(config)
    kept_fields = infer(plan, config) if kept_fields is None else kept_fields
    return [i.outcome for split in plan.splits for r in split for i in read_range(r, config, kept_fields)]


KINDS = ("jsonl", "json", "csv", "tsv", "tfrecord", "warc")
FORMATS = [(kind, suffix) for kind in KINDS for suffix in COMPRESS]


@pytest.mark.parametrize(("kind", "suffix"), [*FORMATS, ("parquet", "")])  # Parquet is compressed inside
def test_every_format_and_compression_gives_the_same_documents(tmp_path, kind, suffix):
    rows = DOCUMENTS
    if kind == "tfrecord":
        rows = [{**row, "score": row["score"] if row["score"] != 1e-30 else 2.0**-100} for row in rows]
    data = {
        "jsonl": lambda: write_jsonl(rows),
        "json": lambda: write_json(rows),
        "warc": lambda: write_warc(rows),
        "csv": lambda: write_csv(rows),
        "tsv": lambda: write_csv(rows, "\t"),
        "parquet": lambda: write_parquet(rows),
        "tfrecord": lambda: write_tfrecord(rows, tmp_path),
    }[kind]()
    path = tmp_path / f"corpus.{kind}{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    config = ReadConfig(
        input=(str(path),),
        id_field="key",
        text_field=("text" if kind == "warc" else "body",),
        pair_field="other",
        keep_fields=TYPED if kind == "tfrecord" else KEPT,  # a tf.Example has no booleans to infer
    )
    plan = plan_input(config)
    assert infer(plan, config) == [KeptField.parse(text) for text in TYPED]
    documents = read_outcomes(config)
    assert [(d.id, d.text, d.pair) for d in documents] == [(r["key"], r["body"], r["other"]) for r in rows]
    assert [json.loads(d.kept) for d in documents] == [[r[name] for name in KEPT] for r in rows]
    unit = "byte" if kind == "jsonl" and not suffix else "row"
    assert {(d.origin.path, d.origin.unit) for d in documents} == {(str(path), unit)}
    if unit == "row":
        assert [d.origin.position for d in documents] == ([2, 4, 6, 8, 10] if kind == "warc" else [0, 1, 2, 3, 4])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_gives_the_same_documents(tmp_path, suffix):
    texts = [row["body"] for row in DOCUMENTS]
    data = "\n".join(texts).encode()  # no line end behind the last one
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    documents = read_outcomes(ReadConfig(input=(str(tmp_path / "*.txt*"),)))
    assert [d.text for d in documents] == texts
    positions = [0, 1, 2, 3, 4] if suffix else [data.index(text.encode()) for text in texts]
    assert [d.origin.position for d in documents] == positions
    assert [d.id for d in documents] == [f"a.txt{suffix}@{position}" for position in positions]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", *KINDS])
def test_compression_goes_by_the_first_bytes(tmp_path, kind, suffix):
    rows = [{"text": f"text {i}", "key": str(i), "body": f"text {i}"} for i in range(5)]
    writers = {"txt": lambda _: "".join(row["text"] + "\n" for row in rows).encode(), "json": write_json}
    writers |= {"jsonl": write_jsonl, "csv": write_csv, "tsv": lambda _: write_csv(rows, "\t"), "warc": write_warc}
    data = write_tfrecord(rows, tmp_path) if kind == "tfrecord" else writers[kind](rows)
    for i, name in enumerate(COMPRESS):
        (tmp_path / f"{i}.{kind}{name}").write_bytes(COMPRESS[suffix](data))
    documents = read_outcomes(ReadConfig(input=(str(tmp_path / f"?.{kind}*"),)), ())
    assert [d.text for d in documents] == [row["text"] for row in rows] * len(COMPRESS)


@pytest.mark.parametrize("compression", ["", "GZIP", "ZLIB"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_tfrecords_as_tensorflow_compresses_them(tmp_path, compression, suffix):
    rows = [{"text": f"text {i}"} for i in range(300)]
    (tmp_path / f"a.tfrecord{suffix}").write_bytes(write_tfrecord(rows, tmp_path, compression))
    documents = read_outcomes(ReadConfig(input=(str(tmp_path / "a.*"),)), ())
    assert [d.text for d in documents] == [row["text"] for row in rows]


def test_all_sources_are_under_contract():
    elsewhere = {"bigquery", "dead_letters"}  # tests/tables/test_stores.py: no files of the user's own
    assert sorted(set(SOURCES) - elsewhere) == sorted([*KINDS, "parquet", "text"])


def test_importing_the_sources_does_not_import_tensorflow():
    code = "import sys, pipeline.sources.read; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LINE_BYTES = st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"\r", b"\xff", b"\0", b"bcd", b" "])).map(b"".join)


@settings(max_examples=300)
@given(data=LINE_BYTES, split_bytes=st.integers(1, 20), limit=st.integers(1, 12))
def test_any_split_gives_the_same_lines(data, split_bytes, limit):
    expected, offset = [], 0
    for raw in data.split(b"\n") if data else []:
        stripped = raw[:-1] if raw.endswith(b"\r") and offset + len(raw) < len(data) else raw
        if offset < len(data):
            expected.append((offset, stripped if len(stripped) <= limit else None))
        offset += len(raw) + 1
    n = -(-len(data) // split_bytes)
    found = []
    for i in range(n):
        start, end = i * split_bytes, min((i + 1) * split_bytes, len(data))
        stream = io.BytesIO(data)
        stream.seek(max(start - 1, 0))
        found += iterate_lines(stream, start, end, limit)
    assert [(line.position, None if line.too_large else line.data) for line in found] == expected


@settings(max_examples=40)
@given(data=LINE_BYTES.filter(bool), split_bytes=st.integers(1, 20))
def test_any_split_bytes_gives_the_same_outcomes(tmp_path_factory, data, split_bytes):
    folder = tmp_path_factory.mktemp("split")
    (folder / "a.txt").write_bytes(data)
    whole = read_outcomes(ReadConfig(input=(str(folder / "a.txt"),)))
    assert read_outcomes(ReadConfig(input=(str(folder / "a.txt"),), split_bytes=split_bytes)) == whole


def test_a_parquet_file_is_cut_at_row_groups(tmp_path):
    rows = [{"text": f"text number {i} " + "x" * 500} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10, compression="none")
    config = ReadConfig(input=(str(tmp_path / "a.parquet"),), split_bytes=2000)
    plan = plan_input(config)
    assert len(plan.splits) > 3
    assert sum(r.n_bytes for split in plan.splits for r in split) == plan.total_bytes
    assert [(d.text, d.id) for d in read_outcomes(config)] == [
        (r["text"], f"a.parquet@{i}") for i, r in enumerate(rows)
    ]


def test_byte_order_marks_and_windows_line_ends_are_stripped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n\r\n{"text": "four"}')
    (tmp_path / "c.csv").write_bytes(b'\xef\xbb\xbftext,n\r\nfive,1\r\n\r\n"six\r\nlines",2\r\n')
    documents = read_outcomes(ReadConfig(input=(str(tmp_path / "*"),)))
    assert [d.text for d in documents] == ["one", "two", "three", "four", "five", "six\nlines"]
    assert [d.id for d in documents] == ["a.txt@0", "a.txt@8", "b.jsonl@0", "b.jsonl@24", "c.csv@0", "c.csv@1"]


def test_paragraphs_and_whole_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n\none\ntwo\n \nthree\n\n\nfour")
    paragraphs = read_outcomes(ReadConfig(input=(str(tmp_path / "a.txt"),), text_mode="paragraph", split_bytes=3))
    assert [(d.origin.position, d.text) for d in paragraphs] == [(2, "one\ntwo"), (12, "three"), (20, "four")]
    (whole,) = read_outcomes(ReadConfig(input=(str(tmp_path / "a.txt"),), text_mode="file", split_bytes=3))
    assert (whole.id, whole.text) == ("a.txt@0", "\n\none\ntwo\n \nthree\n\n\nfour")


def test_large_paragraphs_and_files_are_marked_and_not_held():
    lines = iterate_lines(io.BytesIO(b"aaaa\nbbbb\n\ncc\n\ndddddddddddd\nee\n"), 0, None, 8)
    found = list(join_paragraphs(lines, 8))
    assert [(p.position, p.too_large) for p in found] == [(0, True), (11, False), (15, True)]
    assert found[0].size == 9
    assert read_whole(io.BytesIO(b"x" * 5000), 4999)[1:4] == (b"x" * 1000, 5000, True)
    assert read_whole(io.BytesIO(b"\xef\xbb\xbf" + b"x" * 5), 5)[1:4] == (b"x" * 5, 5, False)


def test_text_fields_are_joined_and_absent_ones_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": "Title", "b": "Body"}\n{"b": "Body"}\n{"t": null, "b": "x"}\n')
    config = ReadConfig(input=(str(tmp_path / "a.jsonl"),), text_field=("t", "b"))
    assert [d.text for d in read_outcomes(config)] == ["Title Body", "Body", "x"]


@pytest.mark.parametrize("on_empty", ["reject", "skip", "embed"])
def test_blank_texts(tmp_path, on_empty):
    (tmp_path / "a.txt").write_bytes(b"one\n  \ntwo\n")
    outcomes = read_outcomes(ReadConfig(input=(str(tmp_path / "a.txt"),), on_empty=on_empty))
    blank = outcomes[1]
    if on_empty == "skip":
        assert blank is None
    elif on_empty == "embed":
        assert (blank.id, blank.text) == ("a.txt@4", "  ")
    else:
        assert (blank.reason, blank.origin.position, blank.id) == ("empty_text", 4, "a.txt@4")


def test_a_split_reports_what_it_read_and_stops_at_the_limit(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\n" * 1000 + b"\xff\n\n")
    calls = []
    config = ReadConfig(input=(str(tmp_path / "*"),), split_bytes=700, on_empty="skip")
    found = []
    for split in plan_input(config).splits:
        found += ReadSplit(config, progress=lambda *more: calls.append(more)).process(split)
    bundle_counts = [json.loads(item.value.counts) for item in found if getattr(item, "tag", "") == "bundle_counts"]
    total = {name: sum(counted[name] for counted in bundle_counts) for name in bundle_counts[0]}
    assert total.pop("read_seconds") > 0
    assert total == {"records": 1002, "bytes": 2003, "documents": 1000, "dead_letters": 1, "skipped_empty": 1}
    assert len(bundle_counts) == 3 and [sum(column) for column in zip(*calls, strict=True)] == [1000, 2003]
    limited = ReadConfig(input=(str(tmp_path / "*"),), split_bytes=700, limit=600)
    (split,) = plan_input(limited).splits
    assert sum(isinstance(item, Document) for item in ReadSplit(limited).process(split)) == 600
