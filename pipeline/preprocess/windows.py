"""Cuts long texts into windows, so that each is encoded as a text of its own.

A text is first split into pieces: words, single punctuation marks and single ideographs. The tokens of a text are the
tokens of its pieces one after the other, whatever pieces it has, so a slice of the text between two pieces has exactly
the tokens that these pieces have in it. Windows begin and end between pieces, and never at a `##` continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np

from pipeline.preprocess.pieces import SPACES, Pieces, find_pieces
from pipeline.preprocess.sentences import find_last_sentence_end
from pipeline.preprocess.wordpiece import Tokenizer

WINDOW_RULE = 2  # part of the fingerprint of tables with windows: raise it whenever windows move

FindLastEnd = Callable[[int, int], Optional[int]]


class Window(NamedTuple):
    """A slice of a text and its token ids `[n]`."""

    start: int
    end: int
    ids: np.ndarray


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
    for text, pieces in zip(texts, find_pieces(texts, ids, splits, tokenizer, size), strict=True):
        yield list(_cut_text(text, pieces, size, overlap, by_sentence))


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
