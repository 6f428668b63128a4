"""The vector index and what it reads: digests, the rows of an id or a text, and the segments of the journal."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import Document, Origin, Row, digest_id
from pipeline.reuse import journal_writer, local
from pipeline.reuse.digests import DigestSet
from pipeline.reuse.index import SEGMENT, VectorIndex, build_index
from pipeline.reuse.journal import RECORD, list_folder, pack_segment, read_segment, write_segment
from pipeline.reuse.journal_writer import JournalWriter, flush_journals
from pipeline.reuse.live_table import list_segment
from pipeline.reuse.merge import bare_rows
from pipeline.reuse.requests import ReuseRequest
from pipeline.reuse.spot_checks import SpotCheckPicker
from pipeline.reuse.wire import unpack_known
from pipeline.sinks.index import Index, SourceNumbers, index_rows
from pipeline.sinks.readers import ROWS
from tests.support.steps import SteppedTable, make_document


def make_row(name: str, text: int, chunk: int = 0, n_chunks: int = 1, source: str = "a") -> Row:
    vector = np.array([text, chunk], "<f4").tobytes()
    return Row(name, chunk, vector, 0.5, 3, None, f"{text:032x}", b"[1]", None, n_chunks, source)


# Looking up


@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=12))
def test_a_set_of_digests_is_a_set(batches):
    ours, theirs = DigestSet(), set()
    for batch in batches:
        digests = np.array([hashlib.md5(bytes([number])).digest() for number in batch], "S16")
        expected = []
        for digest in digests.tolist():
            expected.append(digest not in theirs)
            theirs.add(digest)
        assert ours.add(digests).tolist() == expected
    sizes = [len(level) for level in ours._levels]
    assert sum(sizes) == len(theirs)
    assert all(first >= 2 * second for first, second in itertools.pairwise(sizes))


def test_equal_texts_are_found_however_far_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "BUFFERED_DOCUMENTS", 2)
    table = SteppedTable(str(tmp_path / "table"))
    outcome = table.run([make_document(str(i), f"text {i % 3}") for i in range(11)])
    assert outcome.encoded == ["text 0", "text 1", "text 2"] and len(outcome.rows) == 11
    monkeypatch.setattr(local, "BUFFERED_CHARACTERS", 1)
    again = table.run([make_document(str(i), f"text {i % 4}") for i in range(11)])
    assert again.encoded == ["text 3"] and len(again.rows) == 11


def test_spot_checks_become_ever_fewer():
    picker = SpotCheckPicker()
    assert [i for i in range(1, 300) if picker.picks("known")] == [1, 4, 16, 64, 256]
    assert picker.picks("encoded"), "every kind is counted by itself"


@given(st.text(st.characters()), st.none() | st.text(st.characters()))
def test_a_request_is_one_line(text, pair):
    document = Document("an id", text, pair, '["é\n"]'.encode(), Origin("a\nfile", 7, "byte"))
    line = ReuseRequest(document, "00" * 16).to_line()
    assert line.count(b"\n") == 1 and ReuseRequest.from_line(line) == (document, "00" * 16)


# The index


@pytest.fixture
def index(tmp_path) -> VectorIndex:
    """Rows of two files, segments with more rows, and an incomplete one."""
    files = {
        "first": [make_row("a", 1), make_row("b", 2, 0, 2, "b"), make_row("b", 2, 1, 2, "b")],
        "second": [make_row("c", 1, source="b"), make_row("d", 3, 1, 3)],
    }
    segments = [
        write_segment(str(tmp_path), rows)
        for rows in ([make_row("", 3, 0, 3), make_row("", 4)], [make_row("", 3, 2, 3), make_row("", 5, 1, 2)])
    ]
    torn = tmp_path / ("0" * 40 + ".seg")
    torn.write_bytes(Path(segments[0]).read_bytes()[:-1])
    indexes = []
    for path, rows in files.items():
        sources = SourceNumbers()
        entries = index_rows(rows, sources)
        indexes.append((path, Index(entries, list(sources.paths))))
    (tmp_path / "index").mkdir()
    build_index(str(tmp_path / "index"), indexes, [*segments, str(torn)], True)
    return VectorIndex(str(tmp_path / "index"))


def find(index: VectorIndex, *texts: int) -> list[list[int]]:
    return [
        rows.tolist() for rows in index.find_contents(np.array([text.to_bytes(16, "big") for text in texts], "S16"))
    ]


def test_rows_are_found_by_id_and_by_text(index):
    ids = np.array([digest_id(name) for name in ("b", "x", "a", "d")], "S16")
    assert [rows.tolist() for rows in index.find_ids(ids)] == [[1, 2], [], [0], [4]]
    assert find(index, 1, 9) == [[0], []], "one row where a text has several"
    assert find(index, 2) == [[1, 2]]
    assert find(index, 4) == [[6]], "the journal's rows come after the table's"
    assert find(index, 3) == [[5, 4, 7]], "chunk by chunk, wherever they lie"
    assert find(index, 5) == [[]], "a chunk is missing"
    assert (index.n_live, len(np.unique(index.live_ids())), len(index.entries)) == (5, 4, 9)


def test_the_index_says_which_file_a_row_lies_in(index):
    assert [(file.kind, file.first, file.rows) for file in index.files] == [
        (ROWS, 0, 3),
        (ROWS, 3, 2),
        (SEGMENT, 5, 2),
        (SEGMENT, 7, 2),
    ]
    assert [index.sources[number] for number in index.entries["source"][:5]] == ["a", "b", "b", "b", "a"]


def test_vectors_of_another_fingerprint_are_found_by_id_alone(tmp_path):
    entries = index_rows([make_row("a", 1)], SourceNumbers())
    build_index(str(tmp_path), [("first", Index(entries, ["a"]))], [], False)
    index = VectorIndex(str(tmp_path))
    assert find(index, 1) == [[]] and len(index.find_ids(np.array([digest_id("a")], "S16"))[0]) == 1


def test_nothing_is_known_of_a_new_table(tmp_path):
    build_index(str(tmp_path), [], [], False)
    index = VectorIndex(str(tmp_path))
    assert find(index, 1) == [[]] and len(np.unique(index.live_ids())) == 0


# The journal


def test_a_segment_gives_back_its_rows(tmp_path):
    rows = [
        make_row("", 1),
        make_row("", 2, 1, 3)._replace(
            n_tokens=None, n_truncated=7, vector=b"longer than the first", char_start=0, char_end=9, n_unknown=2
        ),
    ]
    path = write_segment(str(tmp_path), rows)
    assert write_segment(str(tmp_path), rows) == path and list_folder(str(tmp_path)) == [path]
    segment = read_segment(path)
    assert segment is not None
    assert segment.columns([1, 0]) == {
        "chunk": [1, 0],
        "n_chunks": [3, 1],
        "n_tokens": [None, 3],
        "n_truncated": [7, None],
        "char_start": [0, None],
        "char_end": [9, None],
        "n_unknown": [2, None],
        "scale": [0.5, 0.5],
        "embedding": [b"longer than the first", rows[0].vector],
    }
    assert bare_rows(segment, np.arange(2)) == [row._replace(kept=b"", source="") for row in rows]
    assert [unpack_known(place)[1:] for _, place in list_segment(path)] == [(0, 0, 1), (1, 1, 3)]


def test_a_segment_of_an_earlier_version_has_no_places(tmp_path):
    """Such a segment lacks three numbers of each record, and says so in its first bytes."""
    data = pack_segment([make_row("", 1), make_row("", 2)])
    n_old = RECORD.fields["char_start"][1] if RECORD.fields else 0
    records = b"".join(data[i : i + n_old] for i in range(16, 16 + 2 * RECORD.itemsize, RECORD.itemsize))
    data = b"embeam1\n" + data[8:16] + records + data[16 + 2 * RECORD.itemsize :]
    path = tmp_path / (hashlib.blake2b(data, digest_size=20).hexdigest() + ".seg")
    path.write_bytes(data)
    segment = read_segment(str(path))
    assert segment is not None
    assert bare_rows(segment, np.arange(2)) == [make_row("", i)._replace(kept=b"", source="") for i in (1, 2)]


def test_a_segment_that_is_incomplete_or_damaged_is_none(tmp_path):
    path = Path(write_segment(str(tmp_path), [make_row("", 1), make_row("", 2)]))
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert read_segment(str(path)) is None
    for place in range(0, len(data), 7):
        path.write_bytes(bytes([*data[:place], data[place] ^ 1, *data[place + 1 :]]))
        assert read_segment(str(path)) is None and list(list_segment(str(path))) == []
    path.write_bytes(data)
    assert read_segment(str(path)) is not None
    path.unlink()
    assert read_segment(str(path)) is None


def test_a_journal_is_written_once_there_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_writer, "FLUSH_BYTES", 30)  # 11 are held of each
    writer = JournalWriter(str(tmp_path), seconds=1e9)
    writer.add(make_row("a", 1))
    writer.add(make_row("b", 2))
    assert list_folder(str(tmp_path)) == []
    writer.add(make_row("c", 3))
    (path,) = list_folder(str(tmp_path))
    segment = read_segment(path)
    assert segment is not None and [content[-1] for content in segment.records["content"].tolist()] == [1, 2, 3]
    writer.add(make_row("d", 4))
    flush_journals()  # as before the process ends
    assert len(list_folder(str(tmp_path))) == 2
    writer.close()
    assert len(list_folder(str(tmp_path))) == 2, "there was nothing left"
    impatient = JournalWriter(str(tmp_path), seconds=0)
    impatient.add(make_row("e", 5))
    assert len(list_folder(str(tmp_path))) == 3
    impatient.close()
