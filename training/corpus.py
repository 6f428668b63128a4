"""The training texts, and the passages that are held out for evaluation."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator

HELD_OUT = 2000  # passages
KINDS = ("sentences", "passages")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def read_lines(path: str) -> Iterator[str]:
    """The lines of a text or gzip file, without their ends."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


def split_sentences(passage: str) -> list[str]:
    """Cuts a passage after each full stop, question mark or exclamation mark that a capital letter follows."""
    return _SENTENCE_END.split(passage)


def normal_form(text: str) -> str:
    """Normalises a text: texts that differ only in case, spaces and punctuation become equal."""
    return "".join(character for character in text.lower() if character.isalnum())


def split_passages(path: str) -> tuple[list[str], list[str]]:
    """The training passages, and the held-out ones: the last of the file, which is in random order."""
    passages = list(read_lines(path))
    return passages[:-HELD_OUT], passages[-HELD_OUT:]


def write_texts(path: str, texts: Iterable[tuple[str, str]]) -> None:
    """Writes pairs of `id` and `text` as JSON lines, for the pipeline."""
    with open(path, "w", encoding="utf-8") as file:
        for key, text in texts:
            file.write(json.dumps({"id": key, "text": text}, ensure_ascii=False) + "\n")


def write_corpus(sentences: str, passages: str, n_sentences: int, n_passages: int, folder: str) -> None:
    """Writes the first sentences and passages, a file of each.

    What is held out is not among them, and none of its sentences is.
    """
    learned, held_out = split_passages(passages)
    known = {normal_form(sentence) for passage in held_out for sentence in split_sentences(passage)}
    known |= {normal_form(passage) for passage in held_out}

    def unknown(texts: Iterable[str]) -> Iterator[str]:
        return (text for text in texts if normal_form(text) not in known)

    os.makedirs(folder)
    for kind, texts, count in zip(KINDS, (read_lines(sentences), learned), (n_sentences, n_passages), strict=True):
        numbered = zip(range(count), unknown(texts), strict=False)
        write_texts(os.path.join(folder, f"{kind}.jsonl"), ((f"{kind}/{number}", text) for number, text in numbered))
