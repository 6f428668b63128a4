r"""Splits texts into pieces, and finds the tokens of each piece among the tokens of the text.

Pieces are words, single punctuation marks and single ideographs, each with the white space after it. The tokens of a
text are the tokens of its pieces one after the other, whatever pieces it has.

The tokens of a text are known already. A token that is no `##` continuation begins a word of the tokeniser, and a piece
of common characters is one such word, so words are counted to find the tokens of each piece. Only pieces with other
characters, which may be no word or several, are tokenised to count theirs.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.preprocess.wordpiece import Tokenizer

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
)
# Those of them that are no word or several in one of the kernels, which decomposes or removes them.
_COUNTED_BREAKS = (
    "\u2017\u2017 \u2025\u2026 \u2033\u2034 \u2036\u2037 \u203c\u203c \u203e\u203e \u2047\u2049 \u2057\u2057 "
    "\ufe19\ufe19 \ufe30\ufe30 \ufe49\ufe4c"
)
# Ranges of letters and digits of which a word of any length is one word of the tokeniser.
_LETTERS = (
    "09 AZ az \u00c0\u00d6 \u00d8\u00f6 \u00f8\u013e \u0141\u017f \u0388\u038a \u038e\u03a1 \u03a3\u03ce "
    "\u0400\u0481 \u048a\u052f \u05d0\u05ea \u0621\u063a \u0641\u064a \u3041\u3096 \u30a1\u30fa \uac00\ud7a3"
)
_OTHER, _LETTER, _COUNTED_BREAK, _BREAK, _SPACE = range(5)  # from the breaks on they separate pieces
_BLOCK = 1 << 18  # characters that are classified at once


class Pieces(NamedTuple):
    """The pieces of a text that have tokens, in order.

    Attributes:
      starts: `[n]` where each begins in the text.
      ends: `[n]` where it ends, its white space included.
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
    for ranges, kind in ((_LETTERS, _LETTER), (_BREAKS, _BREAK), (_COUNTED_BREAKS, _COUNTED_BREAK)):
        for ends in ranges.split(" "):
            classes[ord(ends[0]) : ord(ends[1]) + 1] = kind
    classes[[ord(space) for space in SPACES]] = _SPACE
    return classes


def is_one_word(character: str) -> bool:
    """Whether a piece of only such characters is one word of the tokeniser."""
    return bool(_classes()[ord(character)] in (_LETTER, _BREAK))


def is_separable(prefix: str) -> bool:
    """Whether a prefix has the same tokens before any text."""
    return not prefix or bool(_classes()[ord(prefix[-1])] >= _COUNTED_BREAK)


def find_pieces(
    texts: Sequence[str], ids: np.ndarray, splits: np.ndarray, tokenizer: Tokenizer, size: int
) -> Iterator[Pieces]:
    """Yields the pieces of each text.

    Args:
      texts: texts that have tokens.
      ids: token ids of all texts one after the other.
      splits: `[len(texts) + 1]`; text i has `ids[splits[i]:splits[i + 1]]`.
      tokenizer: of the ids.
      size: pieces with more tokens are broken at characters into parts that have at most as many.

    Raises:
      ValueError: if the texts have other words than the ids.
    """
    joined = "\n".join(texts)  # all at once, because many texts are only a little longer than a window
    begins = np.concatenate(([0], np.cumsum([len(text) + 1 for text in texts])))
    pieces = _break_long(joined, _find_joined(joined, begins, ids, splits, tokenizer), tokenizer, size)
    borders = np.searchsorted(pieces.starts, begins).tolist()
    for begin, first, end in zip(begins[:-1].tolist(), borders[:-1], borders[1:], strict=True):
        starts, ends = pieces.starts[first:end] - begin, pieces.ends[first:end] - begin
        yield Pieces(starts, ends, pieces.ids, pieces.splits[first : end + 1], pieces.alone[first:end])


def _find_joined(joined: str, begins: np.ndarray, ids: np.ndarray, splits: np.ndarray, tokenizer: Tokenizer) -> Pieces:
    """The pieces of the texts that begin at places of one long text."""
    starts, counted = _split(joined)
    ends = np.append(starts[1:], len(joined))
    borders = np.searchsorted(starts, begins)
    ends[borders[1:] - 1] = begins[1:] - 1
    n_words = np.ones(len(starts), np.int64)
    n_words[counted] = _count_words([joined[starts[i] : ends[i]] for i in counted.tolist()], tokenizer)
    words = np.concatenate(([0], np.cumsum(n_words)))
    word_starts = np.append(np.flatnonzero(~tokenizer.is_continuation[ids]), len(ids))
    piece_splits = word_starts[np.minimum(words, len(word_starts) - 1)]
    if words[-1] != len(word_starts) - 1 or not np.array_equal(piece_splits[borders], splits):
        raise ValueError(f"the tokeniser made other words of texts than of their parts: {joined[:80]!r}...")
    if not n_words.all():
        some = n_words > 0
        starts, ends, piece_splits = starts[some], ends[some], piece_splits[np.append(some, True)]
    return Pieces(starts, ends, ids, piece_splits, np.zeros(len(starts), bool))


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
