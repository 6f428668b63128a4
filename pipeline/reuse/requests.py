"""Wishes of a run, and where the vectors for them are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import RunError
from pipeline.records import DeadLetter, digest_id
from pipeline.reuse.look_up import Note, Wish
from pipeline.sinks.index import read_index, whole_digest
from pipeline.sinks.readers import VectorFile
from pipeline.sinks.writing import Shard

WANT = np.dtype([("row", "<u8"), ("file", "<u4"), ("offset", "<u8")])
FRESH = "fresh"  # the kind of this run's own files
_EQUAL = np.dtype([("content", "S16"), ("file", "<u4"), ("offset", "<u8"), ("id", "S16")])
_PLACE = np.dtype([("content", "S16"), ("chunk", "<u4"), ("row", "<u8")])
_BLOCK = 1 << 16


class Letters(NamedTuple):
    """What the dead letters of a run say of documents.

    Attributes:
      ids: digests of the documents' ids, sorted, `[n]` of S16.
      blind: files of which not every record could be told: they prove of no document that it is gone.
      by_content: content hash to the dead letters of documents that were read.
    """

    ids: np.ndarray
    blind: set[str]
    by_content: dict[str, list[dict[str, Any]]]


class Wishes(NamedTuple):
    """What is wanted of known rows, and of those that this run has encoded.

    Attributes:
      paths: the files of wishes.
      wants: `[n]` of WANT, sorted by row: number of the row, file of the wish by number, and its place there.
      ids: digests of the documents that get rows, `[m]` of S16.
      fresh: this run's own files, numbered on from the known ones.
      dead: dead letters of documents whose text is equal to one that could not be encoded.
    """

    paths: list[str]
    wants: np.ndarray
    ids: np.ndarray
    fresh: list[VectorFile]
    dead: list[DeadLetter]


def plan_wishes(notes: Iterable[Note], dead_letters: Letters, fresh: Sequence[Shard], n_known: int) -> Wishes:
    """Finds the rows for all wishes of a run. Takes 36 bytes of memory a wish.

    Args:
      notes: of the run.
      dead_letters: its dead letters.
      fresh: its files of new rows.
      n_known: how many rows are known from before.

    Raises:
      RunError: if a text was neither encoded nor rejected.
    """
    paths = [note.path for note in notes if note.kind == "wishes"]
    files = number_files(fresh, n_known)
    wants, equal, ids, dead = [np.empty(0, WANT)], [np.empty(0, _EQUAL)], [np.empty(0, "S16")], []
    for number, path in enumerate(paths):
        known_block: list[tuple[int, int, int]] = []
        equal_block: list[tuple[bytes, int, int, bytes]] = []
        id_block: list[bytes] = []
        for offset, wish in read_wishes(path):
            digest = digest_id(wish.document.id)
            if wish.rows is None:
                equal_block.append((bytes.fromhex(wish.content_hash), number, offset, digest))
                dead += follow_dead_letters(wish, dead_letters)
            else:
                known_block += [(row, number, offset) for row in wish.rows]
                id_block.append(digest)
            if len(known_block) + len(equal_block) >= _BLOCK:
                wants.append(np.array(known_block, WANT))
                equal.append(np.array(equal_block, _EQUAL))
                ids.append(np.array(id_block, "S16"))
                known_block, equal_block, id_block = [], [], []
        wants.append(np.array(known_block, WANT))
        equal.append(np.array(equal_block, _EQUAL))
        ids.append(np.array(id_block, "S16"))
    found, found_ids = find_equal(np.concatenate(equal), dead_letters, files, fresh)
    joined = np.concatenate([*wants, found])
    all_ids = np.concatenate([*ids, found_ids])
    return Wishes(paths, joined[np.argsort(joined["row"], kind="stable")], all_ids, files, dead)


def read_wishes(path: str) -> Iterator[tuple[int, Wish]]:
    """Yields the wishes of a file and where each begins."""
    with open(path, "rb") as lines:
        offset = 0
        for line in lines:
            yield offset, Wish.from_line(line)
            offset += len(line)


def follow_dead_letters(wish: Wish, dead_letters: Letters) -> list[DeadLetter]:
    """The dead letters of a document whose text others have that could not be encoded; each of theirs once."""
    facts = {(x["stage"], x["reason"], x["message"]): None for x in dead_letters.by_content.get(wish.content_hash, ())}
    return [DeadLetter.of(*fact, wish.document, wish.content_hash) for fact in facts]


def find_equal(
    waiting: np.ndarray, dead_letters: Letters, files: Sequence[VectorFile], fresh: Sequence[Shard]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of this run for texts that are equal to one that was encoded.

    Args:
      waiting: `[n]` of content, file and place of the wish, and digest of its document's id.

    Returns:
      `[m]` of WANT: a row for each chunk; and the digests of the documents that get any.
    """
    if not len(waiting):
        return np.empty(0, WANT), np.empty(0, "S16")
    wanted = np.unique(waiting["content"])
    found = [np.empty(0, _PLACE)]
    for file, shard in zip(files, fresh, strict=True):
        entries = read_index(shard.index_path).entries
        hits = np.flatnonzero(np.isin(entries["content"], wanted))
        block = np.empty(len(hits), _PLACE)
        block["content"], block["chunk"] = entries["content"][hits], entries["chunk"][hits]
        block["row"] = hits + file.first
        found.append(block)
    rows = np.concatenate(found)
    _, first = np.unique(rows[["content", "chunk"]], return_index=True)
    rows = rows[first]
    low, high = (np.searchsorted(rows["content"], waiting["content"], side) for side in ("left", "right"))
    for content in np.unique(waiting["content"][low == high]):
        if whole_digest(content).hex() not in dead_letters.by_content:
            raise RunError("a vector was lost between encoding and publishing; run the same command again")
    n = high - low
    wants = np.empty(int(n.sum()), WANT)
    wants["file"], wants["offset"] = np.repeat(waiting["file"], n), np.repeat(waiting["offset"], n)
    begins = np.repeat(low - np.concatenate([[0], np.cumsum(n)[:-1]]), n)
    wants["row"] = rows["row"][np.arange(len(wants)) + begins]
    return wants, waiting["id"][n > 0]


def number_files(fresh: Sequence[Shard], first: int) -> list[VectorFile]:
    """The files of new rows, numbered on from the known ones."""
    files = []
    for shard in fresh:
        files.append(VectorFile(shard.path, FRESH, first, shard.rows))
        first += shard.rows
    return files
