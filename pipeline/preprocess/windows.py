r"""Cuts long texts into windows, so that each is encoded as a text of its own.

A text is first split into pieces: words, single punctuation marks and single ideographs. The tokens of a text are the
tokens of its pieces one after the other, whatever pieces it has, so a slice of the text between two pieces has exactly
the tokens that these pieces have in it. Windows begin and end between pieces, and never at a `##` continuation.

The tokens of a text are known already. A token that is no continuation begins a word of the tokeniser, and a piece of
common characters is one such word, so words are counted to find the tokens of each piece. Only pieces with other
characters, which may be no word or several, are tokenised to count theirs.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np

from pipeline.preprocess.sentences import find_last_sentence_end
from pipeline.preprocess.wordpiece import Tokenizer

WINDOW_RULE = 2  # part of the fingerprint of tables with windows: raise it whenever windows move
SPACES = " \t\n\r"
# First and last of ranges of punctuation and ideographs that both kernels of the tokeniser, cased and uncased, take as
# words of their own. (Other characters may be joined to what is beside them, or are decomposed; the tests compare all.)
_BREAKS = (
    "!/ :@ [` {~ \u00a1\u00a1 \u00a7\u00a7 \u00ab\u00ab \u00b6\u00b7 \u00bb\u00bb \u00bf\u00bf "
    "\u0589\u0589 \u060c\u060c \u061b\u061b \u061f\u061f \u06d4\u06d4 \u0964\u0965 \u104a\u104b "
    "\u1362\u1362 \u1367\u1367 \u2010\u2027 \u2030\u2043 \u2045\u2051 \u2053\u205e \u3001\u3003 \u3008\u3011 "
    "\u3014\u301f \u3030\u3030 \u303d\u303d \ufe10\ufe19 \ufe30\ufe52 \ufe54\ufe61 \uff01\uff03 \uff05\uff0a "
    "\uff0c\uff0f \uff1a\uff1b \uff1f\uff20 \uff3b\uff3d \uff3f\uff3f \uff5b\uff5b \uff5d\uff5d \uff5f\uff65 "
    "\u3400\u4dbf \u4e00\u9fff \uf900\ufaff \U00020000\U0002a6df \U0002a700\U0002ceaf \U0002f800\U0002fa1f"
).split(" ")
# Those of them that are no word or several in one of the kernels, which decomposes or removes them.
_COUNTED_BREAKS = (
    "\u2017\u2017 \u2025\u2026 \u2033\u2034 \u2036\u2037 \u203c\u203c \u203e\u203e \u2047\u2049 \u2057\u2057 "
    "\ufe19\ufe19 \ufe30\ufe30 \ufe49\ufe4c"
).split(" ")
# Ranges of letters and digits of which a word of any length is one word of the tokeniser.
_LETTERS = (
    "09 AZ az \u00c0\u00d6 \u00d8\u00f6 \u00f8\u013e \u0141\u017f \u0388\u038a \u038e\u03a1 \u03a3\u03ce "
    "\u0400\u0481 \u048a\u052f \u05d0\u05ea \u0621\u063a \u0641\u064a \u3041\u3096 \u30a1\u30fa \uac00\ud7a3"
).split(" ")
_OTHER, _LETTER, _COUNTED_BREAK, _BREAK, _SPACE = range(5)  # the breaks and what follows them separate pieces
_BLOCK = 1 << 18  # characters that are classified at once

FindLastEnd = Callable[[int, int], Optional[int]]


class Window(NamedTuple):
    """A slice of a text and its token ids `[n]`."""

    start: int
    end: int
    ids: np.ndarray


class Pieces(NamedTuple):
    """The pieces of texts that have tokens, in order.

    Attributes:
      starts: `[n]` where each begins in the texts, joined by a space character.
      ends: `[n]` where it ends, the white space after it included.
      ids: token ids of all pieces.
      splits: `[n + 1]`; piece i has `ids[splits[i]:splits[i + 1]]`.
      alone: `[n]` whether it is a part of a word that is longer than a window, and is a window of its own.
    """

    starts: np.ndarray
    ends: np.ndarray
    ids: np.ndarray
    splits: np.ndarray
    alone: np.ndarray


@functools.cache
def _classes() -> np.ndarray:
    """The class of each code point."""
    classes = np.full(0x110000, _OTHER, np.uint8)
    spaces = [space * 2 for space in SPACES]
    kinds = (_LETTERS, _LETTER), (_BREAKS, _BREAK), (_COUNTED_BREAKS, _COUNTED_BREAK), (spaces, _SPACE)
    for ranges, kind in kinds:
        for first, last in ranges:
            classes[ord(first) : ord(last) + 1] = kind
    return classes


def is_one_word(character: str) -> bool:
    """Whether a piece of only such characters is one word of the tokeniser."""
    return bool(_classes()[ord(character)] in (_LETTER, _BREAK))


def is_separable(prefix: str) -> bool:
    """Whether a prefix has the same tokens before any text."""
    return not prefix or bool(_classes()[ord(prefix[-1])] >= _COUNTED_BREAK)


def cut_texts(
    texts: Sequence[str],
    ids: np.ndarray,
    splits: np.ndarray,
    tokenizer: Tokenizer,
    size: int,
    overlap: int,
    by_sentence: bool,
) -> Iterator[list[Window]]:
    """Cuts texts into windows; each window's slice of its text, tokenised alone, has its ids.

    White space and other characters without tokens that lie between two windows are in none of them.

    Args:
      texts: texts that have tokens.
      ids: token ids of all texts one after the other.
      splits: `[len(texts) + 1]`; text i has `ids[splits[i]:splits[i + 1]]`.
      tokenizer: of the ids.
      size: the most tokens of a window. Only if a single character has more, several windows have its slice.
      overlap: tokens that neighbours share, at most: less where a word would be cut, or nothing new would fit.
      by_sentence: windows end at the last sentence end of their second half, if there is one.

    Returns:
      The windows of each text.
    """
    joined = "\n".join(texts)
    begins = np.concatenate(([0], np.cumsum([len(text) + 1 for text in texts])))
    pieces = _find_pieces(joined, begins, ids, splits, tokenizer, size)
    borders = np.searchsorted(pieces.starts, begins).tolist()
    for text, begin, first, end in zip(texts, begins.tolist(), borders, borders[1:], strict=False):
        part = slice(first, end)
        own_starts, own_ends = pieces.starts[part] - begin, pieces.ends[part] - begin
        own_splits = pieces.splits[first : end + 1]
        own = Pieces(own_starts, own_ends, pieces.ids, own_splits, pieces.alone[part])
        yield list(_cut_text(text, own, size, overlap, by_sentence))


def _cut_text(text: str, pieces: Pieces, size: int, overlap: int, by_sentence: bool) -> Iterator[Window]:
    starts, ends, all_ids, splits, alone = pieces

    def find_last_end(first: int, end: int) -> Optional[int]:
        return find_last_sentence_end(text, ends[first:end].tolist())

    for first, end in choose_windows(splits, alone, size, overlap, find_last_end if by_sentence else None):
        begin, last = int(starts[first]), int(starts[end - 1])
        stop = last + len(text[last : int(ends[end - 1])].rstrip(SPACES))
        ids = all_ids[splits[first] : splits[end]]
        if len(ids) <= size:
            yield Window(begin, stop, ids)
        else:
            yield from (Window(begin, stop, ids[at : at + size]) for at in range(0, len(ids), size))


def choose_windows(
    splits: np.ndarray,
    alone: np.ndarray,
    size: int,
    overlap: int,
    find_last_end: Optional[FindLastEnd] = None,
) -> Iterator[tuple[int, int]]:
    """Yields the first piece of each window and the piece after its last.

    Args:
      splits: `[n + 1]` ascending numbers of the pieces' first tokens; pieces that are not alone have at most `size`.
      alone: `[n]` which pieces are windows of their own.
      size: the most tokens of a window.
      overlap: the most tokens that neighbours share.
      find_last_end: the last of the pieces from one up to another with which a sentence ends, counted from the first of
        them, or None; windows end there if they can.
    """
    borders = np.flatnonzero(np.diff(alone, prepend=True, append=True) | np.append(alone, True))
    for first, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if alone[first]:
            yield first, end
        else:
            yield from _slide(splits, first, end, size, overlap, find_last_end)


def _slide(
    splits: np.ndarray,
    begin: int,
    end: int,
    size: int,
    overlap: int,
    find_last_end: Optional[FindLastEnd],
) -> Iterator[tuple[int, int]]:
    first = stop = begin
    while True:
        tokens = splits[first : first + size + 1]  # a piece has a token at least
        longest = min(end, first + int(tokens.searchsorted(tokens[0] + size, "right")) - 1)
        if find_last_end is not None and longest < end:
            fewest = max((size + 1) // 2, overlap + 1)
            shortest = max(stop + 1, first + int(tokens.searchsorted(tokens[0] + fewest)))
            last = find_last_end(shortest - 1, longest)
            longest = longest if last is None else shortest + last
        stop = longest
        yield first, stop
        if stop == end:
            return
        shared = min(overlap, size - int(splits[stop + 1] - splits[stop]))  # the next piece must fit
        tokens = splits[stop - shared : stop + 1] if shared < stop else splits[: stop + 1]
        first = stop - (len(tokens) - 1) + int(tokens.searchsorted(tokens[-1] - shared))


def _find_pieces(
    joined: str, begins: np.ndarray, ids: np.ndarray, splits: np.ndarray, tokenizer: Tokenizer, size: int
) -> Pieces:
    starts, odd = _split(joined)
    ends = np.append(starts[1:], len(joined))
    borders = np.searchsorted(starts, begins)
    ends[borders[1:] - 1] = begins[1:] - 1
    n_words = np.ones(len(starts), np.int64)
    n_words[odd] = _count_words([joined[starts[i] : ends[i]] for i in odd.tolist()], tokenizer)
    word_starts = np.append(np.flatnonzero(~tokenizer.is_continuation[ids]), len(ids))
    words = np.concatenate(([0], np.cumsum(n_words)))
    if words[-1] != len(word_starts) - 1:
        raise ValueError(f"{words[-1]} words were found in a text that has {len(word_starts) - 1}")
    piece_splits = word_starts[words]
    if not np.array_equal(piece_splits[borders], splits):
        raise ValueError("the words of a text were found in another")
    if not n_words.all():
        some = n_words > 0
        starts, ends, piece_splits = starts[some], ends[some], piece_splits[np.append(some, True)]
    return _break_long(joined, Pieces(starts, ends, ids, piece_splits, np.zeros(len(starts), bool)), tokenizer, size)


def _split(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The begins of the pieces of a text, and the numbers of those whose words must be counted."""
    classes = _classes()
    starts, counted = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    before = _SPACE
    for begin in range(0, len(text), _BLOCK):
        kinds = classes[np.frombuffer(text[begin : begin + _BLOCK].encode("utf-32-le"), np.uint32)]
        separates = kinds >= _COUNTED_BREAK
        is_start = separates.copy()
        is_start[0] |= before >= _COUNTED_BREAK
        is_start[1:] |= separates[:-1]
        is_start &= kinds != _SPACE
        starts.append(begin + np.flatnonzero(is_start))
        counted.append(begin + np.flatnonzero((kinds == _OTHER) | (kinds == _COUNTED_BREAK)))
        before = kinds[-1]
    joined = np.concatenate(starts)
    return joined, np.unique(np.searchsorted(joined, np.concatenate(counted), "right") - 1)


def _count_words(pieces: list[str], tokenizer: Tokenizer) -> list[int]:
    """How many words of the tokeniser each piece is."""
    distinct = list(dict.fromkeys(pieces))
    ids, splits = tokenizer.tokenize(distinct)
    begun = np.concatenate(([0], np.cumsum(~tokenizer.is_continuation[ids])))
    n_words = dict(zip(distinct, np.diff(begun[splits]).tolist(), strict=True))
    return [n_words[piece] for piece in pieces]


def _break_long(text: str, pieces: Pieces, tokenizer: Tokenizer, size: int) -> Pieces:
    """Breaks pieces of more than `size` tokens at characters into parts that fit."""
    counts = np.diff(pieces.splits)
    long = np.flatnonzero(counts > size).tolist()
    if not long:
        return pieces
    parts = []
    done = 0
    for i in [*long, len(counts)]:
        fit = slice(done, i)
        ids = pieces.ids[pieces.splits[done] : pieces.splits[i]]
        parts.append((pieces.starts[fit], pieces.ends[fit], ids, counts[fit], pieces.alone[fit]))
        if i < len(counts):
            begin, end = int(pieces.starts[i]), int(pieces.ends[i])
            while begin < end:
                stop = begin + _longest_prefix(text[begin:end], tokenizer, size)
                ids, _ = tokenizer.tokenize([text[begin:stop]])
                if len(ids):
                    parts.append((np.array([begin]), np.array([stop]), ids, np.array([len(ids)]), np.array([True])))
                begin = stop
        done = i + 1
    starts, ends, ids, counts, alone = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Pieces(starts, ends, ids, np.concatenate(([0], np.cumsum(counts))), alone)


def _longest_prefix(word: str, tokenizer: Tokenizer, size: int) -> int:
    """Characters of a prefix that has at most `size` tokens, about as many as possible; at least one."""

    def is_long(n: int) -> bool:
        return len(tokenizer.tokenize([word[:n]])[0]) > size

    bound = 2
    while bound < len(word) and not is_long(bound):
        bound *= 2
    low, high = bound // 2, min(bound, len(word) + 1)
    return low + bisect_right(range(low + 1, high), False, key=is_long)
