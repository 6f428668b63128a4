"""A text and an id that very many documents have: no step of either back end holds them all.

On a distributed engine a group is an iterable that may be read again, and never is in memory as a whole. So are these.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from apache_beam.pvalue import TaggedOutput

from pipeline.preprocess.chunking import hash_content
from pipeline.records import Document, Origin, Row
from pipeline.reuse.answer_requests import AnswerRequests, key_vector
from pipeline.reuse.compare_by_id import CompareDocuments
from pipeline.reuse.copy import CollectRows
from pipeline.reuse.decide import ReusePolicy
from pipeline.reuse.decide_by_content import DecideTexts
from pipeline.reuse.requests import ReuseRequest, WantedRows
from pipeline.reuse.wire import CHECK, REQUEST, DocumentPacker, pack_place, unpack_rows

FEW, MANY = 1_000, 10_000
MOST_BYTES = 500_000  # beyond what a tenth of the elements takes: less than 60 bytes for each of the others
INPUT = "corpus.jsonl"
TEXT = "a text that is not rare"
CONTENT = bytes.fromhex(hash_content(TEXT, None))
PACKER = DocumentPacker([INPUT])


class Values:
    """The values of a group: made whenever it is read, and not kept."""

    def __init__(self, n: int, make: Callable[[int], bytes], *others: bytes) -> None:
        self.n, self.make, self.others = n, make, others

    def __iter__(self) -> Iterator[bytes]:
        yield from map(self.make, range(self.n))
        yield from self.others


def make_document(i: int, name: str = "") -> Document:
    return Document(name or f"document {i}", TEXT, origin=Origin(INPUT, i, "byte"))


def drain(step: Any, key: bytes, values: Iterable[bytes]) -> tuple[Counter[str], int]:
    """How many outputs a step gives of a group by tag, and the most memory that it takes for it."""
    outputs: Counter[str] = Counter()
    step.setup()
    step.start_bundle()
    tracemalloc.start()
    for part in (step.process((key, values)), step.finish_bundle() or ()):
        for output in part:
            outputs[output.tag if isinstance(output, TaggedOutput) else "main"] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return outputs, peak


def compare_ids(n: int) -> tuple[Counter[str], int]:
    step = CompareDocuments(ReusePolicy(True, True), [INPUT], "")
    return drain(step, b"i" * 16, Values(n, lambda i: PACKER.pack(make_document(n - i, "one"))))


def decide_new_texts(n: int) -> tuple[Counter[str], int]:
    values = Values(n, lambda i: PACKER.pack(make_document(i)))
    return drain(DecideTexts([INPUT], False), CONTENT, values)


def decide_known_texts(n: int) -> tuple[Counter[str], int]:
    values = Values(n, lambda i: PACKER.pack(make_document(i)), pack_place(0, 7), pack_place(0, 3))
    return drain(DecideTexts([INPUT], False), CONTENT, values)


def answer(n: int) -> tuple[Counter[str], int]:
    row = Row("", 0, bytes(4096), 0.0, 3, 0, CONTENT.hex(), b"", None)
    values = Values(n, lambda i: REQUEST + ReuseRequest(make_document(i), CONTENT.hex()).to_line(), key_vector(row)[1])
    return drain(AnswerRequests(False), CONTENT, values)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (compare_ids, lambda n: {"main": 1, "dead_letters": n - 1}),
        (decide_new_texts, lambda n: {"requests": n - 1}),
        (decide_known_texts, lambda n: {"requests": n, "wanted": 1}),
        (answer, lambda n: {"main": n}),
    ],
    ids=["ids", "new texts", "known texts", "requests"],
)
def test_a_group_is_streamed(step, expected):
    peaks = {}
    for n in (FEW, MANY):
        outputs, peaks[n] = step(n)
        for tag, wanted in expected(n).items():
            checks = {"requests": 10, "main": 10}.get(tag, 0)  # spot checks, log N of N documents
            assert wanted <= outputs[tag] <= wanted + checks, (tag, outputs)
    assert peaks[MANY] - peaks[FEW] < MOST_BYTES, peaks


def test_the_first_document_of_an_id_wins_in_whatever_order_they_come():
    rng = np.random.default_rng(4)
    documents = [make_document(i, "one") for i in rng.permutation(50).tolist()]
    step = CompareDocuments(ReusePolicy(False, False), [INPUT], "")
    step.setup()
    step.start_bundle()
    outputs = [*step.process((b"i" * 16, [PACKER.pack(document) for document in documents]))]
    dead = [output.value.origin.position for output in outputs]
    (document,) = (output.value for output in step.finish_bundle() if not isinstance(output, TaggedOutput))
    assert document.origin.position == 0 and sorted(dead) == list(range(1, 50))


def test_a_check_is_answered_with_samples_alone():
    row = Row("", 0, bytes(16), 0.0, 3, 0, CONTENT.hex(), b"", None)
    outputs, _ = drain(AnswerRequests(False), CONTENT, [CHECK, key_vector(row)[1]])
    assert outputs == {"samples": 1}


def test_rows_of_a_file_are_collected_in_an_eighth_of_a_byte_each():
    combiner, bitmap = CollectRows(), bytearray()
    numbers = np.random.default_rng(1).permutation(100_000)[:60_000]
    for number in numbers.tolist():
        bitmap = combiner.add_input(bitmap, number)
    parts = combiner.merge_accumulators([bitmap, bytearray(), combiner.add_input(bytearray(), 7)])
    found = combiner.extract_output(parts)
    assert len(found) <= 100_000 // 8 and unpack_rows(found).tolist() == sorted({*numbers.tolist(), 7})


def test_a_row_that_very_many_want_is_read_in_order(tmp_path):
    wanted, dtype = WantedRows(str(tmp_path), 300_000), [("row", "<u8"), ("file", "<u4"), ("offset", "<u8")]
    rng = np.random.default_rng(2)
    rows = np.concatenate([rng.integers(0, 300_000, 5_000), np.full(5_000, 123_456)])
    for block in np.array_split(rng.permutation(rows), 7):
        records = np.zeros(len(block), dtype)
        records["row"], records["offset"] = block, np.arange(len(block))
        wanted.add(records)
    wanted.finish()
    edges = [0, 1, 65_536, 123_456, 123_457, 200_000, 299_999, 300_000]
    for first, end in itertools.pairwise(edges):
        assert wanted.read(first, end)["row"].tolist() == sorted(rows[(rows >= first) & (rows < end)].tolist())
    assert len(wanted.read(5, 5)) == 0
