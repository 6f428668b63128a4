"""How documents become chunks: windows, trimmed pairs, counts, and the hash of what reaches the encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.encoders.inputs import pack_chunks
from pipeline.preprocess import chunking
from pipeline.preprocess.chunking import SplitDocuments, TextRule, WordpieceRule, hash_content, trim_pair
from pipeline.preprocess.wordpiece import Vocabulary
from pipeline.records import Chunk, DeadLetter, Document, Origin
from tests.support.official import vocabulary


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_a_pair_is_trimmed_by_giving_tokens_in_turn(n_first, n_second, room):
    kept = [0, 0]
    wanted = [n_first, n_second]
    turn = 0
    while sum(kept) < room and kept != wanted:
        if kept[turn] < wanted[turn]:
            kept[turn] += 1
        turn = 1 - turn
    assert trim_pair(n_first, n_second, room) == tuple(kept)


def split(documents: list[Document], **rule: Any) -> list[Chunk | DeadLetter]:
    return list(WordpieceRule(Vocabulary(tuple(vocabulary())), **rule).load().split(documents))


def test_chunks_say_which_part_of_their_document_they_are():
    text = " ".join(["the"] * 25)
    chunks = split([Document("a", text)], max_tokens=12, on_long="chunk", overlap=2)
    assert [(chunk.number, chunk.n_chunks, chunk.n_tokens, chunk.n_content) for chunk in chunks] == [
        (0, 3, 12, 10),
        (1, 3, 12, 10),
        (2, 3, 11, 9),  # tokens 16 to 24
    ]
    assert len({chunk.content_hash for chunk in chunks}) == 1


def test_a_truncated_chunk_says_how_much_is_missing():
    (chunk,) = split([Document("a", " ".join(["the"] * 25))], max_tokens=12)
    assert (chunk.n_tokens, chunk.n_truncated) == (12, 15)
    (pair,) = split([Document("a", "the " * 25, "the the")], max_tokens=12)
    assert (pair.n_tokens, pair.n_first, pair.n_truncated) == (12, 9, 18)


def test_chunks_come_in_the_order_of_their_documents_pairs_and_singles_mixed():
    documents = [Document(str(i), "one " * i, "two" if i % 3 else None) for i in range(20)]
    chunks = split(documents, max_tokens=16)
    assert [chunk.document.id for chunk in chunks] == [str(i) for i in range(20)]
    assert [chunk.n_first < chunk.n_tokens for chunk in chunks] == [bool(i % 3) for i in range(20)]


def test_a_rejected_document_says_why_and_where_it_came_from():
    origin = Origin("corpus.txt", 7, "byte")
    (dead_letter,) = split([Document("a", "the " * 25, origin=origin)], max_tokens=12, on_long="reject")
    assert isinstance(dead_letter, DeadLetter)
    assert (dead_letter.stage, dead_letter.reason, dead_letter.id, dead_letter.origin) == (
        "preprocess",
        "too_long",
        "a",
        origin,
    )
    assert "27 tokens" in dead_letter.message
    assert "--max_tokens=12" in dead_letter.message


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PAIRS = st.tuples(TEXTS, st.none() | TEXTS)


@given(PAIRS, PAIRS)
def test_equal_contents_and_only_those_have_equal_hashes(one, other):
    assert (hash_content(*one) == hash_content(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"), [(("ab", None), ("a", "b")), (("a", ""), ("a", None)), (("a", "b"), ("b", "a"))]
)
def test_a_pair_does_not_hash_as_its_segments_joined(one, other):
    assert hash_content(*one) != hash_content(*other)


def test_the_prefix_is_part_of_the_hash():
    (plain,) = split([Document("1", "text")], max_tokens=12)
    (prefixed,) = split([Document("1", "text")], max_tokens=12, prefix="query: ")
    (written,) = split([Document("2", "query: text")], max_tokens=12)
    assert plain.content_hash != prefixed.content_hash == written.content_hash


def run_do_fn(documents: list[Document]) -> tuple[list, list]:
    """All chunks and all dead letters of one bundle."""
    do_fn = SplitDocuments(TextRule())
    do_fn.setup()
    do_fn.start_bundle()
    outputs = [output for document in documents for output in do_fn.process(document)]
    outputs += [output.value if hasattr(output, "windows") else output for output in do_fn.finish_bundle()]
    chunks, dead_letters = [], []
    for output in outputs:
        value = getattr(output, "value", output)
        value = getattr(value, "value", value)
        if isinstance(value, Chunk):
            chunks.append(value)
        elif isinstance(value, DeadLetter):
            dead_letters.append(value)
    return chunks, dead_letters


@pytest.mark.parametrize(
    "broken", [Document("b", "half \ud83d"), Document("b", "text", "\udc00")], ids=["text", "pair"]
)
def test_half_of_a_surrogate_pair_costs_its_own_document_only(broken):
    chunks, dead_letters = run_do_fn([Document("a", "one"), broken, Document("c", "👩")])
    assert [chunk.document.id for chunk in chunks] == ["a", "c"]
    assert [(dead_letter.id, dead_letter.stage, dead_letter.reason) for dead_letter in dead_letters] == [
        ("b", "preprocess", "invalid_utf8")
    ]
    assert dead_letters[0].text is not None
    dead_letters[0].text.encode()  # it can be stored


def test_no_document_waits_in_the_buffer_for_ever(monkeypatch):
    monkeypatch.setattr(chunking, "BUFFERED_DOCUMENTS", 3)
    documents = [Document(str(i), "x") for i in range(11)]
    assert [chunk.document.id for chunk in run_do_fn(documents)[0]] == [str(i) for i in range(11)]


def test_the_buffer_is_bounded_by_characters_too(monkeypatch):
    monkeypatch.setattr(chunking, "BUFFERED_CHARACTERS", 10)
    do_fn = SplitDocuments(TextRule())
    do_fn.setup()
    do_fn.start_bundle()
    assert list(do_fn.process(Document("a", "x" * 6))) == []
    assert len(list(do_fn.process(Document("b", "x" * 4)))) == 2


ROWS = st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=9), min_size=1, max_size=5)


@given(ROWS, st.integers(0, 3), st.integers(9, 12), st.data())
def test_packing_puts_every_token_in_its_place_and_pads_the_rest(ids, n_padding, length, data):
    firsts = [data.draw(st.integers(1, len(row))) for row in ids]
    chunks = [
        Chunk(Document("", ""), "", 0, 1, np.array(row, "<i4").tobytes(), first, 1, 0)
        for row, first in zip(ids, firsts, strict=True)
    ]
    packed = pack_chunks(chunks, len(ids) + n_padding, length)
    for i, (row, first) in enumerate(zip(ids, firsts, strict=True)):
        rest = [0] * (length - len(row))
        assert packed["input_word_ids"][i].tolist() == row + rest
        assert packed["input_mask"][i].tolist() == [1] * len(row) + rest
        assert packed["input_type_ids"][i].tolist() == [0] * first + [1] * (len(row) - first) + rest
    for name, array in packed.items():
        assert array.dtype == np.int32
        assert array.shape == (len(ids) + n_padding, length)
        padding = array[len(ids) :]
        assert not padding[:, 1:].any()
        assert (padding[:, 0] == (name == "input_mask")).all()  # one token each, so that no row masks everything
