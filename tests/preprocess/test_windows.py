"""Windows of long texts: a window's slice of its text, encoded as a text of its own, has the window's token ids."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipeline.preprocess import pieces
from pipeline.preprocess.chunking import WordpieceRule
from pipeline.preprocess.pieces import is_one_word, is_separable
from pipeline.preprocess.sentences import ends_sentence
from pipeline.preprocess.windows import Window, choose_windows, cut_texts
from pipeline.preprocess.wordpiece import Vocabulary
from pipeline.records import Chunk, DeadLetter, Document
from tests.preprocess.test_tokenizer import TEXTS, both_cases, tokenizer
from tests.support.official import tokenize_together, vocabulary

SPACES = " \t\n\r"


def tokenize(text: str) -> list[int]:
    return tokenizer().tokenize([text])[0].tolist()


def cut_together(
    texts: Sequence[str], size: int, overlap: int = 0, by_sentence: bool = False, lower_case: bool = True
) -> list[list[Window]]:
    kernel = tokenizer(lower_case)
    ids, splits = kernel.tokenize(texts)
    return list(cut_texts(texts, ids, splits, kernel, size, overlap, by_sentence))


def cut(text: str, *rule: int, lower_case: bool = True) -> list[Window]:
    (found,) = (
        cut_together([text], *rule, lower_case=lower_case) if len(tokenizer(lower_case).tokenize([text])[0]) else [[]]
    )
    return found


def list_sentence_ends(text: str) -> list[int]:
    return [at for at in range(len(text) + 1) if ends_sentence(text, at)]


# --- which pieces a window has ---------------------------------------------------------------------------------------

SIZES = st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))


def choose(counts: Sequence[int], size: int, overlap: int, ends: Sequence[bool] = ()) -> list[tuple[int, int]]:
    splits = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))

    def find_last_end(first: int, end: int) -> int | None:
        return max((i for i in range(end - first) if ends[first + i]), default=None)

    alone = np.array(counts) > size
    return list(choose_windows(splits, alone, size, overlap, find_last_end if len(ends) else None))


@given(st.lists(st.integers(1, 45), min_size=1, max_size=120), SIZES, st.data())
def test_windows_cover_all_pieces_fit_share_what_is_asked_and_bring_something_new(counts, size_and_overlap, data):
    size, overlap = size_and_overlap
    ends = data.draw(st.just([]) | st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    found = choose(counts, size, overlap, ends)
    n = lambda first, end: sum(counts[first:end])  # noqa: E731
    assert sorted(set(itertools.chain(*(range(*window) for window in found)))) == list(range(len(counts)))
    for first, end in found:
        assert n(first, end) <= size or end == first + 1
    for (first, end), (following, last) in itertools.pairwise(found):
        assert first < following <= end < last
        alone = counts[end - 1] > size or counts[end] > size
        assert n(following, end) <= (0 if alone else overlap)
        if not alone:  # one piece more would be too much to share, or would leave no room for a new one
            assert n(following - 1, end) > overlap or n(following - 1, end + 1) > size
        if not ends and not alone:
            assert n(first, end + 1) > size  # as long as it can be


@given(st.integers(1, 300), SIZES)
def test_words_of_one_token_share_exactly_the_overlap(n, size_and_overlap):
    size, overlap = size_and_overlap
    found = choose([1] * n, size, overlap)
    starts = [0, *range(size - overlap, n - overlap, size - overlap)] if n > size else [0]
    assert found == [(start, min(start + size, n)) for start in starts]


def test_a_window_ends_at_the_last_sentence_end_of_its_second_half():
    ends = [i in (2, 5, 8) for i in range(20)]
    assert choose([1] * 20, 10, 0, ends) == [(0, 9), (9, 19), (19, 20)]
    ends = [i == 3 for i in range(20)]  # in the first half
    assert choose([1] * 20, 10, 0, ends) == [(0, 10), (10, 20)]
    ends = [i in (5, 11) for i in range(20)]
    assert choose([1] * 20, 10, 8, ends)[:2] == [(0, 10), (2, 12)]  # 6 tokens would all be shared


# --- which slices of a text they are ---------------------------------------------------------------------------------

MARKS = st.text(st.characters(categories=["Mn", "Mc", "Me", "Cf", "Cc", "Zs", "Sk", "Lm"]), max_size=3)
SCRIPTS = st.text(
    st.one_of(
        st.characters(min_codepoint=0x1100, max_codepoint=0x11FF),  # parts of Hangul syllables
        st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3),
        st.characters(min_codepoint=0x3040, max_codepoint=0x30FF),
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
        st.characters(min_codepoint=0xF900, max_codepoint=0xFFEF),  # compatibility forms
        st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF),
        st.sampled_from("\ufdfa\u0338=<>½…ﬁ\u1680\u2028\u1b4e。！।\u3000\u00a0"),
    ),
    max_size=8,
)
LONG = st.lists(st.one_of(TEXTS, MARKS, SCRIPTS, st.just(" the ")), min_size=1, max_size=12).map("".join)


def assert_slices(text: str, size: int, overlap: int, by_sentence: bool, lower_case: bool) -> None:
    kernel = tokenizer(lower_case)
    found = cut(text, size, overlap, by_sentence, lower_case=lower_case)
    slices = [text[window.start : window.end] for window in found]
    ids, splits = kernel.tokenize(slices)
    is_one = lambda window: window.end - window.start == 1  # noqa: E731
    for i, window in enumerate(found):
        assert 0 < len(window.ids) <= size
        if not (is_one(window) and splits[i + 1] - splits[i] > size):  # else a character of more tokens than fit
            assert ids[splits[i] : splits[i + 1]].tolist() == window.ids.tolist()
        assert slices[i] == slices[i].strip(SPACES)
    places = [(window.start, window.end) for window in found]
    assert places == sorted(places)
    covered, gaps = 0, []
    for start, end in places:
        gaps.append(text[covered:start])
        covered = max(covered, end)
    gaps.append(text[covered:])
    assert not len(kernel.tokenize(gaps)[0])  # what is in no window has no tokens


@both_cases
@settings(max_examples=150)
@given(LONG, SIZES, st.booleans())
@example("\ufdfa" * 3, (2, 0), False)
@example("antidisestablishmentarianism " * 2, (2, 1), False)
@example("a=\u0338b" * 9, (3, 2), True)
def test_the_slice_of_a_window_has_its_tokens(lower_case, text, size_and_overlap, by_sentence):
    assert_slices(text, *size_and_overlap, by_sentence, lower_case)


@pytest.mark.exhaustive
@both_cases
@settings(max_examples=1500)
@given(LONG, SIZES, st.booleans())
def test_the_slice_of_a_window_has_its_tokens_in_many_texts(lower_case, text, size_and_overlap, by_sentence):
    assert_slices(text, *size_and_overlap, by_sentence, lower_case)


@settings(max_examples=50)
@given(LONG.filter(len), st.integers(1, 30), st.integers(1, 9))
def test_windows_do_not_depend_on_blocks(text, size, block):
    """A text is read block by block; pieces are the same wherever a block ends."""
    whole = [tuple(map(str, window)) for window in cut(text, size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_BLOCK", block)
        parts = [tuple(map(str, window)) for window in cut(text, size)]
    assert parts == whole


@both_cases
def test_every_character_that_separates_does_so_beside_any_other(lower_case):
    separators = [c for c in map(chr, itertools.chain(range(0xD800), range(0xE000, 0x30000))) if is_separable(c)]
    assert len(separators) > 80_000
    kernel = tokenizer(lower_case)
    for beside in ("a{}b", "é{}\u0301b", "1{}1"):
        left, right = beside.split("{}")
        texts = [beside.format(c) for c in separators]
        parts = [part for c in separators for part in (left, c, right)]
        together, apart = kernel.tokenize(texts), kernel.tokenize(parts)
        assert np.array_equal(together[0], apart[0]) and np.array_equal(together[1], apart[1][::3])


@both_cases
def test_every_character_of_known_words_is_one_word_alone_and_among_others(lower_case):
    known = [c for c in map(chr, itertools.chain(range(0xD800), range(0xE000, 0x30000))) if is_one_word(c)]
    letters = [c for c in known if not is_separable(c)]
    assert len(letters) > 12_000 and len(known) > 90_000
    kernel = tokenizer(lower_case)
    for form in ("{}", "a{}", "{}a", "{}{}", "é{}1", "カ{}가"):
        ids, splits = kernel.tokenize([form.replace("{}", c) for c in (known if form == "{}" else letters)])
        begun = np.concatenate(([0], np.cumsum(~kernel.is_continuation[ids])))
        assert (np.diff(begun[splits]) == 1).all()


def split_plainly(text: str) -> list[str]:
    """The pieces of a text, character by character."""
    pieces: list[str] = []
    for i, character in enumerate(text):
        is_break = is_separable(character) and character not in SPACES
        if i and (character in SPACES or not (is_break or is_separable(text[i - 1]))):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def cut_plainly(text: str, size: int, overlap: int, by_sentence: bool, lower_case: bool) -> list[tuple]:
    """The windows of a text whose pieces have at most `size` tokens: every piece tokenised, every sum counted anew."""
    parts = []
    at = 0
    for piece in split_plainly(text):
        ids = tokenizer(lower_case).tokenize([piece])[0].tolist()
        if ids:
            parts.append((at, at + len(piece), ids))
        at += len(piece)
    assume(all(len(ids) <= size for _, _, ids in parts))
    ends = set(scan_sentence_ends(text))
    n = lambda first, end: sum(len(ids) for _, _, ids in parts[first:end])  # noqa: E731
    found = []
    first = stop = 0
    while stop < len(parts):
        fitting = [end for end in range(first + 1, len(parts) + 1) if n(first, end) <= size]
        sentences = [end for end in fitting if end > stop and parts[end - 1][1] in ends]
        sentences = [end for end in sentences if n(first, end) * 2 >= size and n(first, end) > overlap]
        stop = sentences[-1] if by_sentence and sentences and fitting[-1] < len(parts) else fitting[-1]
        begin, end = parts[first][0], parts[stop - 1][1]
        end = begin + len(text[begin:end].rstrip(SPACES))
        found.append((begin, end, [one for _, _, ids in parts[first:stop] for one in ids]))
        shared = [at for at in range(first + 1, stop + 1) if n(at, stop) <= overlap and n(at, stop + 1) <= size]
        first = shared[0]
    return found


PROSE = st.lists(
    st.sampled_from(
        [*"aé1.?!…\"')’”,-。！‼\u2017\u2029 \n\r\t", "the ", "e.g. ", "Mr. ", "end. ", "\n\n", "e\u0301", "\x00"]
    ),
    max_size=40,
).map("".join)


@both_cases
@settings(max_examples=100)
@given(LONG | PROSE, SIZES, st.booleans())
def test_windows_are_those_of_a_plain_loop_that_tokenises_every_piece(lower_case, text, size_and_overlap, by_sentence):
    expected = cut_plainly(text, *size_and_overlap, by_sentence, lower_case)
    found = cut(text, *size_and_overlap, by_sentence, lower_case=lower_case)
    assert [(start, end, ids.tolist()) for start, end, ids in found] == expected


@settings(max_examples=25)
@given(st.lists((LONG | PROSE).filter(lambda text: len(tokenize(text)) > 0), min_size=1, max_size=5), SIZES)
def test_texts_that_are_cut_together_are_cut_as_each_alone(texts, size_and_overlap):
    for text, found in zip(texts, cut_together(texts, *size_and_overlap, True), strict=True):
        assert list(map(str, found)) == list(map(str, cut(text, *size_and_overlap, True)))


@pytest.mark.parametrize("texts", [["one two three"], ["one", "two"]])
def test_tokens_of_other_texts_are_an_error(texts):
    ids, splits = tokenizer().tokenize(["one two", "three"][: len(texts)])
    with pytest.raises(ValueError, match="words"):
        list(cut_texts(texts, ids, splits, tokenizer(), 5, 0, False))


def test_a_text_that_cannot_be_cut_is_one_dead_letter(monkeypatch):
    splitter, own = WordpieceRule(Vocabulary(tuple(vocabulary())), 8, "chunk").load(), tokenizer()

    class OddTokenizer:
        is_continuation = own.is_continuation

        def tokenize(self, texts):
            return own.tokenize([text.replace("odd", "o d d") for text in texts])

    texts = ["one two three four five six seven " * 2, "odd words " * 9, "a dog and a cat and a bird and a cow"]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    whole = [chunk for document in (documents[0], documents[2]) for chunk in splitter.split([document])]
    monkeypatch.setattr(splitter, "_tokenizer", OddTokenizer())
    found = list(splitter.split(documents))
    (dead,) = (one for one in found if isinstance(one, DeadLetter))
    assert (dead.id, dead.reason, dead.text) == ("1", "other_words", texts[1])
    assert [one for one in found if isinstance(one, Chunk)] == whole and len(whole) > 3


def test_windows_begin_and_end_at_words():
    text = "unaffable words, antidisestablishmentarianism and 3.14 more. " * 8
    for window in cut(text, 40, 7):
        assert re.match(r"(\w+|[.,])\b", text[window.start :]) and not re.search(
            r"\w\w$", text[window.start - 1 : window.start + 1] if window.start else ""
        )
        assert window.end == len(text) or not (text[window.end - 1].isalnum() and text[window.end].isalnum())


# --- documents -------------------------------------------------------------------------------------------------------


def split(text: str, **rule: object) -> list[Chunk]:
    chunks = list(WordpieceRule(Vocabulary(tuple(vocabulary())), **rule).load().split([Document("a", text)]))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    return chunks


def test_the_official_preprocessor_gives_the_ids_of_each_chunks_text():
    text = "  Straße naïve 漢字 unaffable, e\u0301\u0323! 👩‍👩‍👧 “quoted” words\u2028and\u00a0more.\n\n" * 20
    chunks = split(text, max_tokens=24, on_long="chunk", overlap=5)
    assert len(chunks) > 10
    slices = [text[chunk.char_start : chunk.char_end] for chunk in chunks]
    for own, chunk in zip(tokenize_together(slices), chunks, strict=True):
        assert np.frombuffer(chunk.ids, "<i4").tolist()[1:-1] == own


def test_every_chunk_has_the_prefix_and_places_without_it():
    text, prefix = "one two three four five six seven eight nine ten", "query: "
    chunks = split(text, max_tokens=len(tokenize(prefix)) + 7, on_long="chunk", prefix=prefix)
    assert len(chunks) > 2
    for chunk in chunks:
        assert chunk.n_tokens <= len(tokenize(prefix)) + 7 and chunk.n_content == chunk.n_tokens - 2
        own = text[chunk.char_start : chunk.char_end]
        assert np.frombuffer(chunk.ids, "<i4").tolist()[1:-1] == tokenize(prefix + own)
    assert " ".join(text[chunk.char_start : chunk.char_end] for chunk in chunks) == text


def test_a_document_of_one_chunk_has_all_of_its_text():
    (chunk,) = split("  short\n", max_tokens=9, on_long="chunk", prefix="query: ")
    assert (chunk.char_start, chunk.char_end, chunk.n_chunks) == (0, 8, 1)


@pytest.mark.parametrize("on_long", ["truncate", "chunk"])
def test_unknown_tokens_are_counted_in_what_is_encoded(on_long):
    text = "the ☃ the ☃☃ 🎈 the the the the ☃"
    unknown = vocabulary().index("[UNK]")
    expected = tokenize(text).count(unknown)
    assert expected == 4
    chunks = split(text, max_tokens=6, on_long=on_long)
    assert [chunk.n_unknown for chunk in chunks] == [
        np.frombuffer(chunk.ids, "<i4").tolist().count(unknown) for chunk in chunks
    ]
    assert sum(chunk.n_unknown or 0 for chunk in chunks) == (expected if on_long == "chunk" else 2)


# --- sentences -------------------------------------------------------------------------------------------------------

SENTENCES = [
    ["Mr. Smith paid 3.14 dollars. ", 'He left at 5 p.m. on Monday. "Really?!" ', "Dr. No came."],
    ["Wait?! ", "What... no. ", "OK! ", "The U.S. Government said e.g. this, i.e. that."],
    ["今天天气很好。", "我们去公园吧！", "你来吗？", "第一「你好。」", "好的"],
    ["मैं घर जा रहा हूँ। ", "तुम कहाँ हो? ", "ठीक है।"],
    ["السلام عليكم. ", "كيف حالك؟ ", "أنا بخير."],
    ["no punctuation at all"],
    ["A heading\n\n", "a paragraph\nof two lines. ", "Visit www.example.com. ", "(It is good.) ", "[1] Yes."],
]


@pytest.mark.parametrize("sentences", SENTENCES, ids=[" ".join(one)[:12] for one in SENTENCES])
def test_sentences_end_where_a_reader_expects_it(sentences):
    ends = list_sentence_ends("".join(sentences))
    expected = list(itertools.accumulate(map(len, sentences)))[:-1]
    if sentences[0].startswith("Mr."):
        expected.insert(1, len(sentences[0]) + sentences[1].index('"'))
        expected.insert(2, expected.pop(1)) if expected[1] > expected[2] else None
    assert ends == sorted(expected)


MARKS_OF_SENTENCES = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u166e\u1803\u1809"
    "\u203c\u203d\u2047-\u2049\u3002\ua4ff\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)
CLOSING = "\"')\\]}*_\u00bb\u2019\u201d\u203a\u300d\u300f\u3011\u3009\u300b\uff09\uff3d\uff5d\uff63"
SENTENCE_END = re.compile(
    rf"(?P<mark>[{MARKS_OF_SENTENCES}.!?\u2026]+)[{CLOSING}]*(?P<space>[ \t\n\r]*)"
    r"|\r?\n[ \t]*\r?\n[ \t\n\r]*|\u2029[ \t\n\r]*"
)


def scan_sentence_ends(text: str) -> Iterator[int]:
    """Sentence ends, found by one scan from the begin of a text to its end."""
    for found in SENTENCE_END.finditer(text):
        mark, following = found["mark"], text[found.end() : found.end() + 1]
        if not mark:
            is_end = True
        elif following in tuple(",;:-–—、，") or (mark[-1] in ".!?…" and not found["space"]):
            is_end = False
        elif mark[0] in ".…":
            title = re.search(r"(?<!\w)([A-Z]\w*|vs|\w)$", text[max(0, found.start() - 5) : found.start()])
            titles = ("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Sr", "Jr", "Gen", "Rep", "Sen", "Rev", "vs")
            is_title = title and (title[0] in titles or (len(title[0]) == 1 and title[0].isupper()))
            is_end = not (following.islower() or (mark == "." and is_title))
        else:
            is_end = True
        if is_end and following:
            yield found.end()


@settings(max_examples=300)
@given(st.text("a.?!…\"') \n\r\t‼。\u0700\u2029»,-MrsvP\u0964", max_size=30) | LONG | PROSE)
@example("\u2029)")
@example(".).\n\n a")
def test_sentence_ends_are_those_of_a_scan_of_the_whole_text(text):
    assert list_sentence_ends(text) == list(scan_sentence_ends(text))


@pytest.mark.parametrize("text", ["." * 50_000, '"a. ' * 20_000, "\n" + " " * 50_000, ".)" * 30_000, "\n \t" * 30_000])
def test_sentence_ends_are_found_in_linear_time(text):
    assert len(list_sentence_ends(text)) <= len(text)


def test_chunks_end_at_sentences_where_they_can():
    sentences = [f"The number {i} is one of the many, and it is good. " for i in range(30)]
    text = "".join(sentences)
    ends = set(itertools.accumulate(map(len, sentences)))
    by_sentence = split(text, max_tokens=60, on_long="chunk", by_sentence=True)
    assert all((chunk.char_end or 0) + 1 in ends for chunk in by_sentence)
    assert all(chunk.n_tokens <= 60 for chunk in by_sentence)
    by_tokens = split(text, max_tokens=60, on_long="chunk")
    assert not all((chunk.char_end or 0) + 1 in ends for chunk in by_tokens)
