"""Every kind of bad input becomes a dead letter with its exact reason and place, and what is good still comes out."""

import bz2
import gzip
import io
import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import InputError
from pipeline.read_config import KeptField, ReadConfig
from pipeline.sources.compression import DamagedFile, TruncatedFile, open_stream
from pipeline.sources.planning import plan_input
from pipeline.sources.read import read_range
from tests.support.sources import read_file, summarize

LINES = b"".join(b"line number %d of this file, %x\n" % (i, i**7) for i in range(5000))
COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


def test_text_that_is_not_utf8(tmp_path):
    outcomes = read_file(tmp_path / "a.txt", b"good\nbad \xff\xfe here\nnul\0kept\n")
    assert summarize(outcomes) == ["good", ("invalid_utf8", 5), "nul\0kept"]
    assert outcomes[1].text == "bad \\xff\\xfe here" and outcomes[1].id == "a.txt@5"
    assert outcomes[1].origin == (str(tmp_path / "a.txt"), 5, "byte")


def test_lines_that_are_too_large(tmp_path):
    data = b"ok\n" + b"x" * 3_000_000 + b"\r\nafter\n" + b"y" * 2001
    outcomes = read_file(tmp_path / "a.txt", data, max_document_bytes=2000)
    assert summarize(outcomes) == ["ok", ("too_large", 3), "after", ("too_large", 3_000_011)]
    assert outcomes[1].text == "x" * 1000 and "3000002" in outcomes[1].message
    exact = read_file(tmp_path / "b.txt", b"\xef\xbb\xbf" + b"x" * 10 + b"\r\n" + b"y" * 10, max_document_bytes=10)
    assert summarize(exact) == ["x" * 10, "y" * 10]


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1, 2]", b'"text"', b"null", b'{"text": "a"} x', b'{"a":' * 100_000, b"[" * 100_000],
    ids=["open", "list", "string", "null", "trailing", "deep object", "deep list"],
)
def test_jsonl_lines_that_are_no_object(tmp_path, line):
    outcomes = read_file(tmp_path / "a.jsonl", b'{"text": "1"}\n' + line + b'\n\n  \n{"text": "2"}\n')
    assert summarize(outcomes) == ["1", ("malformed_json", 14), "2"]
    assert outcomes[1].text == line.decode()


def test_jsonl_that_is_odd_but_fine(tmp_path):
    lines = [
        '{"text": "nan", "x": NaN, "y": -Infinity}',
        '{"text": "huge", "x": ' + "9" * 6000 + "}",
        '{"text": "twice", "text": "last wins"}',
        '{"text": "\\ud83d\\ude00"}',
    ]
    outcomes = read_file(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert summarize(outcomes) == ["nan", "huge", "last wins", "😀"]


def test_jsonl_with_broken_unicode(tmp_path):
    outcomes = read_file(tmp_path / "a.jsonl", b'{"text": "\xff"}\n{"text": "\\ud83d"}\n')
    assert summarize(outcomes) == [("invalid_utf8", 0), ("invalid_utf8", 14)]
    assert outcomes[0].text == '{"text": "\\xff"}'


def test_jsonl_with_half_of_a_surrogate_pair_in_its_id(tmp_path):
    outcomes = read_file(tmp_path / "a.jsonl", b'{"id": "\\ude00", "text": "half an id"}\n', id_field="id")
    assert summarize(outcomes) == [("invalid_utf8", 0)]


def test_jsonl_numbers_of_any_size(tmp_path):
    numbers = [str(2**63 - 1), str(-(2**63)), str(2**63), str(-(2**63) - 1), "9" * 6000]
    data = "".join(f'{{"text": "{i}", "n": {number}}}\n' for i, number in enumerate(numbers)).encode()
    outcomes = read_file(tmp_path / "a.jsonl", data, [KeptField("n", "int")], on_kept_mismatch="dead_letter")
    assert [outcome.kept for outcome in outcomes[:2]] == [f"[{number}]".encode() for number in numbers[:2]]
    assert [reason for reason, _ in summarize(outcomes[2:])] == ["wrong_type"] * 3


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "t"}, "missing_field"),
        ({"id": "", "text": "t"}, "missing_field"),
        ({"id": None, "text": "t"}, "missing_field"),
        ({"id": 1.5, "text": "t"}, "wrong_type"),
        ({"id": True, "text": "t"}, "wrong_type"),
        ({"id": ["a"], "text": "t"}, "wrong_type"),
        ({"id": "a"}, "missing_field"),
        ({"id": "a", "text": None}, "missing_field"),
        ({"id": "a", "text": 5}, "wrong_type"),
        ({"id": "a", "text": ["t"]}, "wrong_type"),
        ({"id": "a", "text": "t", "pair": 5}, "wrong_type"),
        ({"id": "a", "text": "t", "n": "5"}, "wrong_type"),
        ({"id": "a", "text": "t", "n": True}, "wrong_type"),
        ({"id": "a", "text": "t", "n": 2**63}, "wrong_type"),
        ({"id": "a", "text": "t", "x": "0.5"}, "wrong_type"),
        ({"id": "a", "text": "t", "b": 2}, "wrong_type"),
        ({"id": "a", "text": "t", "s": "\ud83d"}, "wrong_type"),
        ({"id": "a", "text": " "}, "empty_text"),
    ],
)
def test_fields_that_are_missing_or_of_the_wrong_type(tmp_path, row, reason):
    kept = [KeptField("n", "int"), KeptField("x", "float"), KeptField("b", "bool"), KeptField("s", "string")]
    data = b'{"id": 7, "text": "good", "x": 1}\n' + json.dumps(row).encode()
    strict = {"on_kept_mismatch": "dead_letter"}
    good, bad = read_file(tmp_path / "a.jsonl", data, kept, id_field="id", pair_field="pair", **strict)
    assert (good.id, good.kept, good.pair) == ("7", b"[null,1.0,null,null]", None)
    assert (bad.reason, bad.origin.position) == (reason, 34)
    assert bad.id == ("a" if row.get("id") == "a" else None)


def test_csv_with_quotes_commas_and_line_breaks(tmp_path):
    data = b'id,text\n1,"say ""hi"", then\nleave"\n2,5\'10" tall\n3,"a\n\nb"\n'
    assert summarize(read_file(tmp_path / "a.csv", data)) == ['say "hi", then\nleave', "5'10\" tall", "a\n\nb"]


def test_a_csv_quote_that_is_never_closed_costs_one_row(tmp_path):
    rows = b"".join(b"%d,row %d\n" % (i, i) for i in range(3, 500))
    data = b'id,text\n1,fine\n2,"open\n' + rows
    for limit in (10_000, 100):  # found at the end of the file, and at the limit
        outcomes = read_file(tmp_path / "a.csv", data, max_document_bytes=limit)
        assert summarize(outcomes) == ["fine", ("malformed_csv", 1), *(f"row {i}" for i in range(3, 500))]
        assert outcomes[1].text == '2,"open' and "row 1" in outcomes[1].message


def test_csv_rows_that_do_not_fit(tmp_path):
    data = b'id,text\n1\n2,a,b\n3,"a"b\n4,\xff\n5,' + b"x" * 200 + b"\n6,fine\n"
    outcomes = read_file(tmp_path / "a.csv", data, max_document_bytes=100)
    bad = [("malformed_csv", 0), ("malformed_csv", 1), ("malformed_csv", 2), ("invalid_utf8", 3), ("too_large", 4)]
    assert summarize(outcomes) == [*bad, "fine"]
    assert [o.text for o in outcomes[:4]] == ["1", "2,a,b", '3,"a"b', "4,\\xff"]


def test_csv_values_of_kept_fields(tmp_path):
    kept = [KeptField("n", "int"), KeptField("x", "float"), KeptField("b", "bool"), KeptField("s", "string")]
    data = b"text,n,x,b,s\nt,1,2.5,TRUE,\nt,,,,007\nt,one,1,1,s\nt,1,x,1,s\nt,1,1,maybe,s\n"
    outcomes = read_file(tmp_path / "a.csv", data, kept, on_kept_mismatch="dead_letter")
    assert [json.loads(o.kept) for o in outcomes[:2]] == [[1, 2.5, True, ""], [None, None, None, "007"]]
    assert summarize(outcomes[2:]) == [("wrong_type", 2), ("wrong_type", 3), ("wrong_type", 4)]


def test_a_csv_file_without_the_text_column(tmp_path):
    outcomes = read_file(tmp_path / "a.csv", b"id,body\n1,a\n2,b\n")
    assert summarize(outcomes) == [("missing_field",)]
    assert "'text' is missing" in outcomes[0].message and "id, body" in outcomes[0].message


def test_parquet_with_nulls_and_broken_strings(tmp_path):
    broken = pa.array([b"fine", b"\xff", None, b"also fine"]).view(pa.string())
    out = io.BytesIO()
    pq.write_table(pa.table({"text": broken, "unused": [[1], [2], [3], [4]]}), out)
    outcomes = read_file(tmp_path / "a.parquet", out.getvalue())
    assert summarize(outcomes) == ["fine", ("invalid_utf8", 1), ("missing_field", 2), "also fine"]


def test_parquet_records_that_are_too_large(tmp_path):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "ü" * 600, "c"]}), out)
    outcomes = read_file(tmp_path / "a.parquet", out.getvalue(), max_document_bytes=1199)
    assert summarize(outcomes) == ["a", ("too_large", 1), "c"]


@pytest.mark.parametrize("split_bytes", [1, 1 << 20])
def test_a_parquet_file_that_is_damaged(tmp_path, split_bytes):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), out)
    outcomes = read_file(tmp_path / "a.parquet", out.getvalue()[:-20], split_bytes=split_bytes)
    assert set(summarize(outcomes)) == {("unreadable_file",)}


@pytest.fixture(scope="module")
def tfrecords(tmp_path_factory):
    """Bytes of a file with the texts 0 to 4, and the offsets of its records and end."""
    import tensorflow as tf

    path = str(tmp_path_factory.mktemp("tfrecords") / "plain")
    offsets = [0]
    with tf.io.TFRecordWriter(path) as writer:
        for i in range(5):
            value = tf.train.BytesList(value=[b"text %d" % i])
            features = tf.train.Features(feature={"text": tf.train.Feature(bytes_list=value)})
            data = tf.train.Example(features=features).SerializeToString()
            writer.write(data)
            offsets.append(offsets[-1] + len(data) + 16)
    with open(path, "rb") as stream:
        return stream.read(), offsets


def test_a_tfrecord_with_a_wrong_checksum(tmp_path, tfrecords):
    data, offsets = bytearray(tfrecords[0]), tfrecords[1]
    data[offsets[1] + 14] ^= 1  # within the data of record 1
    expected = ["text 0", ("bad_checksum", 1), "text 2", "text 3", "text 4"]
    assert summarize(read_file(tmp_path / "a.tfrecord", bytes(data))) == expected
    assert summarize(read_file(tmp_path / "b.tfrecord.gz", gzip.compress(bytes(data)))) == expected


def test_a_tfrecord_whose_length_is_wrong(tmp_path, tfrecords):
    data, offsets = bytearray(tfrecords[0]), tfrecords[1]
    data[offsets[2]] ^= 1
    outcomes = read_file(tmp_path / "a.tfrecord", bytes(data))
    assert summarize(outcomes) == ["text 0", "text 1", ("bad_checksum",)]


@pytest.mark.parametrize("cut", [3, 11, 12, 20, -1])
def test_a_tfrecord_file_that_is_cut_off(tmp_path, tfrecords, cut):
    data, offsets = tfrecords
    cut = offsets[3] + cut if cut > 0 else offsets[4] - 1
    outcomes = read_file(tmp_path / "a.tfrecord", data[:cut])
    assert summarize(outcomes) == ["text 0", "text 1", "text 2", ("truncated_file",)]


def test_a_tfrecord_that_is_too_large_is_skipped(tmp_path, tfrecords):
    import tensorflow as tf

    path = tmp_path / "big.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"x" * 3_000_000)
    big = path.read_bytes()
    data, offsets = tfrecords
    outcomes = read_file(tmp_path / "a.tfrecord", data[: offsets[1]] + big + data[offsets[1] :], max_document_bytes=999)
    assert summarize(outcomes) == ["text 0", ("too_large", 1), "text 1", "text 2", "text 3", "text 4"]
    outcomes = read_file(tmp_path / "a.tfrecord", data[: offsets[1]] + big[:-9], max_document_bytes=999)
    assert summarize(outcomes) == ["text 0", ("truncated_file",)]


def test_tfrecords_that_are_no_examples(tmp_path):
    import tensorflow as tf

    path = tmp_path / "a.tfrecord"
    two = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"a", b"b"]))
    empty = tf.train.Feature(bytes_list=tf.train.BytesList(value=[]))
    latin = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"\xe9"]))
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"\xff\xff\xff\xff")
        for feature in (two, empty, latin):
            writer.write(tf.train.Example(features=tf.train.Features(feature={"text": feature})).SerializeToString())
    expected = [("malformed_example", 0), ("wrong_type", 1), ("missing_field", 2), ("invalid_utf8", 3)]
    assert summarize(read_file(path, path.read_bytes())) == expected


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_compressed_file_that_is_cut_off(tmp_path, suffix):
    data = COMPRESSORS[suffix](LINES)
    tail = COMPRESSORS[suffix](b"tail\n")
    for cut in (data + tail[:7], data[: len(data) // 2] if suffix != ".bz2" else data + tail[:9]):
        outcomes = read_file(tmp_path / f"a.txt{suffix}", cut)
        bad = outcomes.pop()
        texts = [o.text for o in outcomes]
        assert texts == LINES.decode().splitlines()[: len(texts)]
        assert len(texts) > 1000 if suffix != ".zst" else True  # a zstd block is 128 KiB
        assert (bad.file, bad.reason) == (str(tmp_path / f"a.txt{suffix}"), "truncated_file")


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_everything_decodable_comes_before_the_error(tmp_path, suffix):
    whole, kind = COMPRESSORS[suffix](LINES), {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}[suffix]
    path = tmp_path / "file"
    for rest, error in ((whole[: len(whole) - 3], TruncatedFile), (b"no such data", DamagedFile)):
        path.write_bytes(whole + rest)
        out = b""
        with open_stream(str(path), kind) as stream, pytest.raises(error):
            while piece := stream.read1(1000):
                out += piece
        assert out.startswith(LINES) and (error is DamagedFile or len(out) > len(LINES) or suffix == ".zst")


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_compressed_file_that_is_damaged(tmp_path, suffix):
    data = COMPRESSORS[suffix](LINES)
    outcomes = read_file(tmp_path / f"a.txt{suffix}", data + b"\x01garbage behind it")
    assert summarize(outcomes) == [*LINES.decode().splitlines(), ("unreadable_file",)]
    outcomes = read_file(tmp_path / f"b.txt{suffix}", b"\xfe\xfe" + data[2:])
    assert summarize(outcomes) == [("unreadable_file",)]


def test_padding_behind_gzip_and_empty_members(tmp_path):
    data = gzip.compress(b"") + gzip.compress(b"one\n") + gzip.compress(b"") + b"\0" * 70_000
    assert summarize(read_file(tmp_path / "a.txt.gz", data)) == ["one"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_bombs_are_read_in_bounded_pieces(tmp_path, suffix):
    data = COMPRESSORS[suffix](b"\0" * (1 << 25)) + COMPRESSORS[suffix](b"\nafter\n")
    path = tmp_path / f"a.txt{suffix}"
    assert len(data) < 1 << 16
    outcomes = read_file(path, data, max_document_bytes=1000)
    assert summarize(outcomes) == [("too_large", 0), "after"]
    assert str(1 << 25)[:5] in outcomes[0].message


@pytest.mark.parametrize(("kind", "compress"), zip(("gzip", "bzip2", "zstd"), COMPRESSORS.values(), strict=True))
def test_the_position_in_a_compressed_file_is_visible(tmp_path, kind, compress):
    data = b"".join(struct.pack("<Q", i * 0x9E3779B97F4A7C15 % 2**64) for i in range(200_000))
    path = tmp_path / "a"
    path.write_bytes(compress(data))
    positions, read = [], b""
    with open_stream(str(path), kind) as stream:
        while piece := stream.read(100_000):
            read += piece
            positions.append(stream.position)
    assert read == data
    assert positions == sorted(positions) and 0 < positions[0] < positions[-1] == path.stat().st_size


def test_files_that_vanish_or_shrink_after_planning(tmp_path):
    for name in ("a.txt", "b.txt", "c.parquet"):
        (tmp_path / name).write_bytes(b"one\ntwo\n")
    config = ReadConfig(input=(str(tmp_path / "*"),), on_bad_file="skip")
    plan = plan_input(config)
    (tmp_path / "a.txt").write_bytes(b"one\n")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.parquet").unlink()
    outcomes = [i.outcome for split in plan.splits for r in split for i in read_range(r, config, ())]
    expected = ["one", ("truncated_file",), ("unreadable_file",), ("unreadable_file",)]
    assert summarize(outcomes) == expected


def test_a_file_that_cannot_be_read_to_its_end_stops_the_run(tmp_path):
    data = gzip.compress(LINES)
    with pytest.raises(InputError, match=r"a\.txt\.gz is cut off.*--on_bad_file=skip") as caught:
        read_file(tmp_path / "a.txt.gz", data[: len(data) // 2], on_bad_file="fail")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError, match=r"b\.csv: column 'text' is missing"):
        read_file(tmp_path / "b.csv", b"id,body\n1,a\n", on_bad_file="fail")
