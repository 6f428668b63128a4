"""Made-up English: lengths and word frequencies like those of prose, the same for the same seed, streamed to files."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator

import numpy as np

_BLOCK = 1000  # texts drawn at once
_COMPOUNDS = 0.08  # share of words that no vocabulary holds as one piece
_MEDIAN, _SPREAD, _SHORTEST, _LONGEST = 39, 0.5, 10, 120  # of the word pieces in a sentence: about 45 on average


@functools.cache
def list_words() -> list[str]:
    """The built-in encoder's vocabulary without its fragments, most frequent first."""
    from pipeline.encoders.default import default_vocabulary

    words = (piece for piece in default_vocabulary() if piece.isascii() and piece.isalpha())
    return [word for word in words if len(word) > 1 or word in "ai"]


def make_sentences(count: int, seed: int = 1) -> Iterator[str]:
    """Sentences of 10 to 120 word pieces with a lognormal distribution."""
    rng = np.random.default_rng(seed)
    for block in _blocks(count):
        pieces = np.exp(rng.normal(np.log(_MEDIAN), _SPREAD, block)).clip(_SHORTEST, _LONGEST)
        yield from _draw_texts(rng, (pieces / (1 + 2 * _COMPOUNDS)).astype(int))


def join_texts(texts: Iterator[str], count: int) -> Iterator[str]:
    """Texts of so many texts each, joined by spaces."""
    while joined := " ".join(itertools.islice(texts, count)):
        yield joined


def make_phrases(count: int, seed: int = 1) -> Iterator[str]:
    """Short texts of two to six words."""
    rng = np.random.default_rng(seed)
    for block in _blocks(count):
        yield from _draw_texts(rng, rng.integers(2, 7, block))


def write_lines(path: str, texts: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(text + "\n" for text in texts)


def write_jsonl(path: str, texts: Iterable[str]) -> None:
    """Writes objects with the fields `id` and `text`."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": f"document-{i}", "text": text}) + "\n" for i, text in enumerate(texts))


def _blocks(count: int) -> Iterator[int]:
    for start in range(0, count, _BLOCK):
        yield min(_BLOCK, count - start)


def _draw_texts(rng: np.random.Generator, lengths: np.ndarray) -> Iterator[str]:
    """Texts of so many words each, drawn by Zipf's law; a comma here and there, a capital, a full stop."""
    words = list_words()
    shares = 1 / np.arange(1, len(words) + 1)
    total = int(lengths.sum())
    drawn = rng.choice(len(words), total, p=shares / shares.sum()).tolist()
    partners = rng.choice(len(words), total).tolist()
    rolls = rng.random(total).tolist()
    start = 0
    for length in lengths.tolist():
        text = " ".join(
            words[drawn[i]]
            + (words[partners[i]] if rolls[i] < _COMPOUNDS else "")
            + ("," if rolls[i] > 0.95 and i < start + length - 1 else "")
            for i in range(start, start + length)
        )
        start += length
        yield text.capitalize() + "."
