"""Compressed files as they are found: skipped frames, padding, large windows, names that are wrong."""

import gzip
import lzma
import os
import zlib

import pytest
import zstandard

from pipeline.read_config import ReadConfig
from pipeline.sources.compression import FileError, UnreadableFile, open_stream
from pipeline.sources.decoders import find_compression
from pipeline.sources.detection import inspect_file
from pipeline.sources.source import InputFile
from tests.support.sources import read_file, summarize

MIB = 1 << 20


def make_frame(data, window_log):
    """A zstd frame of one stored block with a window, after RFC 8878."""
    block = (len(data) << 3 | 1).to_bytes(3, "little") + data
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block


@pytest.mark.parametrize("window_log, max_window", [(27, 128), (28, 256), (31, 2048)])
def test_zstd_windows(tmp_path, window_log, max_window):
    frame = make_frame(b"one\ntwo\n", window_log)
    assert zstandard.get_frame_parameters(frame).window_size == 1 << window_log == max_window * MIB
    assert summarize(read_file(tmp_path / "a.txt.zst", frame, max_window=max_window)) == ["one", "two"]
    (bad,) = read_file(tmp_path / "b.txt.zst", frame, max_window=max_window // 2)
    assert bad.reason == "unreadable_file"
    assert f"window of more than --max_window={max_window // 2} MiB; raise it" in bad.message
    with pytest.raises(UnreadableFile, match=r"b\.txt\.zst has a zstd frame with a window"):
        open_stream(str(tmp_path / "b.txt.zst"), "zstd", max_window=max_window // 2).read()


def test_xz_dictionaries(tmp_path):
    data = lzma.compress(b"one\n", preset=6)  # 8 MiB
    assert summarize(read_file(tmp_path / "a.txt.xz", data)) == ["one"]
    (bad,) = read_file(tmp_path / "a.txt.xz", data, max_window=4)
    assert bad.reason == "unreadable_file" and "an xz dictionary of more than --max_window=4" in bad.message


def test_skipped_frames_and_padding(tmp_path):
    skipped = b"\x5a\x2a\x4d\x18\x05\0\0\0vwxyz"
    data = skipped + zstandard.compress(b"one\n") + skipped + zstandard.compress(b"two\n")
    assert summarize(read_file(tmp_path / "a.txt.zst", data)) == ["one", "two"]
    data = lzma.compress(b"one\n") + b"\0" * 8 + lzma.compress(b"two\n") + b"\0" * 70_000
    assert summarize(read_file(tmp_path / "a.txt.xz", data)) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ""])
def test_a_name_promises_what_is_not_there(tmp_path, suffix):
    """What can be read as it is stored is read; what cannot is damaged, not text."""
    assert summarize(read_file(tmp_path / f"a.jsonl{suffix}", b'{"text": "plain"}\n')) == ["plain"]
    latin = read_file(tmp_path / f"a.txt{suffix}", "Größe\n".encode("latin-1"), encoding="latin-1")
    assert summarize(latin) == ["Größe"]
    damaged = b"\x1f\x8c" + gzip.compress(os.urandom(500))[2:]
    outcomes = read_file(tmp_path / f"b.txt{suffix}", damaged)
    if suffix:
        assert summarize(outcomes) == [("unreadable_file",)]
        assert f"b.txt{suffix} is damaged" in outcomes[0].message
        assert summarize(read_file(tmp_path / f"b.txt{suffix}", damaged, encoding="latin-1")) == [("unreadable_file",)]


def test_magic_bytes():
    assert find_compression(b"\x1f\x8b\x08\0") == "gzip"
    assert find_compression(b"BZh9 is how a text may begin") == find_compression(zlib.compress(b"x")) == ""
    assert find_compression(b"") == find_compression(b"\x1f") == ""


def test_a_file_that_cannot_be_decoded_stays_what_its_name_says(tmp_path):
    file = InputFile(0, str(tmp_path / "gone.jsonl.gz"), "gone", 9, "jsonl", "gzip")
    with pytest.raises(FileError, match=r"gone\.jsonl\.gz"):
        inspect_file(file, ReadConfig())
    (tmp_path / "gone.jsonl.gz").write_bytes(gzip.compress(b"{}")[:12])
    assert inspect_file(file, ReadConfig()) == file
