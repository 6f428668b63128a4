"""Facts about documents from the dead letters of a run, which are read one by one and not held."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from pipeline.files import open_file
from pipeline.records import DeadLetter, Document, digest_id
from pipeline.reuse.digests import is_in
from pipeline.sinks.index import parse_hashes
from pipeline.sinks.writing import Shard
from pipeline.sources.dead_letters import read_origin

_BLOCK = 1 << 14


class DeadLetterFacts:
    """The documents that a run's dead letters belong to. Takes 17 bytes per dead letter.

    Args:
      shards: the run's files of dead letters.
      shared: ascending content hashes `[n]` of S16, whose reasons are needed for documents with the same text.

    Attributes:
      incomplete: input files with records whose ids could not be read: their missing documents may not be gone.
      n_documents: documents that were read and have a dead letter.
    """

    def __init__(self, shards: Iterable[Shard], shared: np.ndarray) -> None:
        self.incomplete: set[str] = set()
        self._reasons: defaultdict[bytes, dict[tuple[str, str, str], None]] = defaultdict(dict)
        ids, read_ids = [np.empty(0, "S16")], [np.empty(0, "S16")]
        for shard in shards:
            for block in _read_blocks(shard.path):
                self.incomplete.update(letter["file"] for letter in block if letter["id"] is None)
                # A duplicate is skipped, because the first document with the id counts.
                named = [letter for letter in block if letter["id"] is not None and letter["reason"] != "duplicate_id"]
                ids.append(_digest_ids(named))
                was_read = [letter for letter in block if "content_hash" in letter]
                read_ids.append(_digest_ids(was_read))
                content = parse_hashes([letter["content_hash"] for letter in was_read])
                for i in np.flatnonzero(is_in(content, shared)).tolist():
                    letter = was_read[i]
                    self._reasons[content[i]][letter["stage"], letter["reason"], letter["message"]] = None
        self._ids = np.unique(np.concatenate(ids))
        self._embedded = np.zeros(len(self._ids), bool)
        self.n_documents = len(np.unique(np.concatenate(read_ids)))

    def has(self, content: np.ndarray) -> np.ndarray:
        """Which of some shared content hashes `[n]` have dead letters."""
        return np.array([one in self._reasons for one in content.tolist()], bool)

    def repeat(self, document: Document, content_hash: str) -> list[DeadLetter]:
        """The dead letters of a document with the same text as one that could not be embedded."""
        reasons = self._reasons.get(parse_hashes([content_hash])[0], {})
        return [DeadLetter.of(*reason, document, content_hash) for reason in reasons]

    def mark_embedded(self, ids: np.ndarray) -> None:
        """Records documents that have new rows, by digests `[n]` of their ids: they do not count as dead."""
        if len(self._ids):
            at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
            self._embedded[at[self._ids[at] == ids]] = True

    def dead_ids(self) -> np.ndarray:
        """Ascending digests of the ids of documents with a dead letter and without a new row."""
        return self._ids[~self._embedded]


def find_examples(shards: Iterable[Shard]) -> Collection[DeadLetter]:
    """The first dead letter of each reason, by file and position."""
    found: dict[str, DeadLetter] = {}
    for shard in shards:
        for letter in _read_letters(shard.path):
            origin = read_origin(letter)
            first = found.get(letter["reason"])
            if first is None or origin < first.origin:
                found[letter["reason"]] = DeadLetter(letter["stage"], letter["reason"], letter["message"], origin)
    return found.values()


def _read_blocks(path: str) -> Iterator[list[dict[str, Any]]]:
    names = ("id", "file", "stage", "reason", "message", "content_hash")
    letters = ({name: letter[name] for name in names if name in letter} for letter in _read_letters(path))
    return iter(lambda: list(islice(letters, _BLOCK)), [])


def _read_letters(path: str) -> Iterator[dict[str, Any]]:
    with open_file(path) as stream:
        yield from map(json.loads, stream)


def _digest_ids(letters: list[dict[str, Any]]) -> np.ndarray:
    return np.array([digest_id(letter["id"]) for letter in letters], "S16")
