r"""Cuts a long text into windows, so that each is encoded as a text of its own.

A text is first split into pieces: words, single punctuation marks and single ideographs. The tokens of a text are the
tokens of its pieces one after the other, whatever pieces it has, so a slice of the text between two pieces has exactly
the tokens that these pieces have in it. Windows begin and end between pieces, and never at a `##` continuation.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np

from pipeline.preprocess.sentences import find_sentence_ends

WINDOW_RULE = 2  # part of the fingerprint of tables with windows: raise it whenever windows move
SPACES = " \t\n\r"
# Punctuation and ideographs that both kernels of the tokeniser, cased and uncased, take as words of their own. (Other
# characters may be joined to what is beside them, or are decomposed; the tests compare all of these.)
_BREAKS = (
    r"!-/:-@\[-`{-~¡§«¶·»¿"
    "\u0589\u060c\u061b\u061f\u06d4\u0964\u0965\u104a\u104b\u1362\u1367"
    "\u2010-\u2027\u2030-\u2043\u2045-\u2051\u2053-\u205e"
    "\u3001-\u3003\u3008-\u3011\u3014-\u301f\u3030\u303d\ufe10-\ufe19\ufe30-\ufe52\ufe54-\ufe61"
    "\uff01-\uff03\uff05-\uff0a\uff0c-\uff0f\uff1a\uff1b\uff1f\uff20\uff3b-\uff3d\uff3f\uff5b\uff5d\uff5f-\uff65"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"
)
_BREAK = re.compile(f"[{_BREAKS}{SPACES}]")
_PIECE = re.compile(f"(?:[{_BREAKS}]|[^{_BREAKS}{SPACES}]+)[{SPACES}]*|[{SPACES}]+")
_BLOCK = 1 << 18  # characters whose pieces are in memory as strings

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]  # as `Tokenizer.tokenize`


class Window(NamedTuple):
    """A slice of a text and its token ids `[n]`."""

    start: int
    end: int
    ids: np.ndarray


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


def is_separable(prefix: str) -> bool:
    """Whether a prefix has the same tokens before any text."""
    return not prefix or _BREAK.match(prefix[-1]) is not None


def cut_text(text: str, tokenize: Tokenize, size: int, overlap: int, by_sentence: bool) -> Iterator[Window]:
    """Cuts a text into windows; each window's slice of the text, tokenised alone, has its ids.

    White space and other characters without tokens that lie between two windows are in none of them.

    Args:
      text: the text.
      tokenize: gives the token ids of texts.
      size: the most tokens of a window. Only if a single character has more, several windows have its slice.
      overlap: tokens that neighbours share, at most: less where a word would be cut, or nothing new would fit.
      by_sentence: windows end at the last sentence end of their second half, if there is one.
    """
    pieces = _find_pieces(text, tokenize, size)
    last_end = _last_sentence_ends(text, pieces) if by_sentence else None
    for first, end in choose_windows(pieces.splits, pieces.alone, size, overlap, last_end):
        begin = int(pieces.starts[first])
        stop = begin + len(text[begin : int(pieces.ends[end - 1])].rstrip(SPACES))
        ids = pieces.ids[pieces.splits[first] : pieces.splits[end]]
        for at in range(0, len(ids), size):
            yield Window(begin, stop, ids[at : at + size])


def choose_windows(
    splits: np.ndarray, alone: np.ndarray, size: int, overlap: int, last_end: Optional[np.ndarray] = None
) -> Iterator[tuple[int, int]]:
    """Yields the first piece of each window and the piece after its last.

    Args:
      splits: `[n + 1]` ascending numbers of the pieces' first tokens; pieces that are not alone have at most `size`.
      alone: `[n]` which pieces are windows of their own.
      size: the most tokens of a window.
      overlap: the most tokens that neighbours share.
      last_end: `[n]` how many pieces there are up to the last sentence end that is not after piece i.
    """
    borders = np.flatnonzero(np.diff(alone, prepend=True, append=True) | np.append(alone, True))
    for first, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if alone[first]:
            yield first, end
        else:
            yield from _slide(splits, first, end, size, overlap, last_end)


def _slide(
    splits: np.ndarray, begin: int, end: int, size: int, overlap: int, last_end: Optional[np.ndarray]
) -> Iterator[tuple[int, int]]:
    first = stop = begin
    while True:
        longest = min(end, int(np.searchsorted(splits, splits[first] + size, "right")) - 1)
        if last_end is not None and longest < end:
            at = int(last_end[longest - 1])
            n = int(splits[at] - splits[first])
            if at > stop and 2 * n >= size and n > overlap:
                longest = at
        stop = longest
        yield first, stop
        if stop == end:
            return
        shared = min(overlap, size - int(splits[stop + 1] - splits[stop]))  # the next piece must fit
        first = int(np.searchsorted(splits, splits[stop] - shared, "left"))


def _find_pieces(text: str, tokenize: Tokenize, size: int) -> Pieces:
    starts, ends, ids, counts, alone = [], [], [], [], []
    begin = 0
    while begin < len(text):
        found = _BREAK.search(text, begin + _BLOCK)
        stop = found.start() if found else len(text)
        names = _PIECE.findall(text, begin, stop)
        block_ids, splits = tokenize(names)
        block_ends = begin + np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
        block = _Block(np.concatenate(([begin], block_ends[:-1])), block_ends, block_ids, np.diff(splits))
        for part in _break_long(text, block, tokenize, size):
            starts.append(part.starts)
            ends.append(part.ends)
            ids.append(part.ids)
            counts.append(part.counts)
            alone.append(np.full(len(part.starts), part.alone))
        begin = stop
    joined = [np.concatenate(arrays) for arrays in (starts, ends, counts, alone)]
    some = joined[2] > 0
    splits = np.concatenate(([0], np.cumsum(joined[2][some])))
    return Pieces(joined[0][some], joined[1][some], np.concatenate(ids), splits, joined[3][some])


class _Block(NamedTuple):
    starts: np.ndarray
    ends: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    alone: bool = False


def _break_long(text: str, block: _Block, tokenize: Tokenize, size: int) -> Iterator[_Block]:
    """The pieces of a block; those of more than `size` tokens are broken at characters into parts that fit."""
    splits = np.concatenate(([0], np.cumsum(block.counts)))
    done = 0
    for i in [*np.flatnonzero(block.counts > size).tolist(), len(block.counts)]:
        fit = slice(done, i)
        yield _Block(block.starts[fit], block.ends[fit], block.ids[splits[done] : splits[i]], block.counts[fit])
        if i < len(block.counts):
            begin, end = int(block.starts[i]), int(block.ends[i])
            while begin < end:
                stop = begin + _longest_prefix(text[begin:end], tokenize, size)
                ids, _ = tokenize([text[begin:stop]])
                yield _Block(np.array([begin]), np.array([stop]), ids, np.array([len(ids)]), alone=True)
                begin = stop
        done = i + 1


def _longest_prefix(word: str, tokenize: Tokenize, size: int) -> int:
    """Characters of a prefix that has at most `size` tokens, about as many as possible; at least one."""

    def is_long(n: int) -> bool:
        return len(tokenize([word[:n]])[0]) > size

    bound = 2
    while bound < len(word) and not is_long(bound):
        bound *= 2
    low, high = bound // 2, min(bound, len(word) + 1)
    return low + bisect_right(range(low + 1, high), False, key=is_long)


def _last_sentence_ends(text: str, pieces: Pieces) -> np.ndarray:
    """`last_end` of `choose_windows`. A sentence end inside a piece does not count."""
    ends = np.fromiter(find_sentence_ends(text), np.int64)
    numbers = np.arange(1, len(pieces.ends) + 1)
    is_end = np.isin(pieces.ends, ends)
    return np.maximum.accumulate(np.where(is_end, numbers, 0))
