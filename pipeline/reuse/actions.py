"""What becomes of the live rows: which stay, which go, and which are kept because nothing better is known."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import RunError
from pipeline.files import open_file
from pipeline.records import digest_id
from pipeline.reuse.index import KnownVectors
from pipeline.reuse.look_up import MARK, STAYS, Note
from pipeline.reuse.requests import Letters
from pipeline.sinks.index import read_bytes, unpack_records
from pipeline.sinks.writing import Shard

UNSEEN, STALE, KEPT, GONE = 0, 3, 4, 5  # besides STAYS and SUPERSEDED
CARRIED = (STAYS, STALE, KEPT)


def read_dead_letters(shards: Iterable[Shard]) -> Letters:
    """Reads the dead letters that a run has written."""
    ids: list[bytes] = []
    blind: set[str] = set()
    by_content: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for shard in shards:
        with open_file(shard.path) as stream:
            for line in stream:
                dead_letter = json.loads(line)
                if dead_letter["id"] is None:
                    blind.add(dead_letter["file"])
                elif dead_letter["reason"] != "duplicate_id":  # another document has the id, and counts
                    ids.append(digest_id(dead_letter["id"]))
                if "content_hash" in dead_letter:
                    by_content[dead_letter["content_hash"]].append(dead_letter)
    return Letters(np.unique(np.array(ids, "S16")), blind, dict(by_content))


class Fates(NamedTuple):
    """What becomes of the live rows.

    Attributes:
      fate: `[n_live]`: STAYS, SUPERSEDED, STALE, KEPT or GONE.
      source: `[n_live]` number of the file that each row's document comes from now.
      sources: the files.
      counts: documents by fate.
    """

    fate: np.ndarray
    source: np.ndarray
    sources: list[str]
    counts: dict[str, int]


def decide_fates(
    known: KnownVectors,
    notes: Iterable[Note],
    dead_letters: Letters,
    recalled: np.ndarray,
    new_ids: np.ndarray,
    keeps_deleted: bool,
) -> Fates:
    """Decides about every live row.

    A row is gone if nothing was seen of its document in an input that was read to the end. It is stale if that cannot
    be said, or if the document's new version is a dead letter: then the old vector is better than none.

    Args:
      known: the index of known vectors.
      notes: of the run.
      dead_letters: the run's dead letters.
      recalled: numbers of known rows whose vectors go on in other rows, `[n]`.
      new_ids: digests of the ids of all new rows, encoded or from known vectors, `[n]` of S16.
      keeps_deleted: whether rows of documents that are gone are kept.
    """
    n = known.n_live
    fate = np.zeros(n, "u1")
    source = known.entries["source"][:n].copy()
    sources = list(known.sources)
    for note in notes:
        if note.kind == "marks":
            marks, names = unpack_records(read_bytes(note.path), MARK)
            fate[marks["row"]] = marks["fate"]
            source[marks["row"]] = marks["source"] + len(sources)
            sources += names
    ids = known.entries["id"][:n]
    is_dead = np.isin(ids, dead_letters.ids[~np.isin(dead_letters.ids, new_ids)])
    blind = np.array([i for i, path in enumerate(sources) if path in dead_letters.blind])
    unseen = fate == UNSEEN
    fate[unseen] = KEPT if keeps_deleted else GONE
    fate[(unseen & np.isin(source, blind)) | (is_dead & (fate != STAYS))] = STALE
    counted = {STALE: "stale", KEPT: "kept", GONE: "deleted", STAYS: "unchanged"}
    counts = {name: len(np.unique(ids[fate == value])) for value, name in counted.items()}
    # A text that goes on under another id has moved: it does not speak for an input that has lost its documents.
    moved = np.isin(known.entries["content"][:n], np.unique(known.entries["content"][recalled[recalled < n]]))
    counts["moved"] = counts["deleted"] - len(np.unique(ids[(fate == GONE) & ~moved]))
    return Fates(fate, source, sources, counts)


def check_deletes(n_deleted: int, n_live: int, max_fraction: float) -> None:
    """Raises RunError if so many documents are gone, those that moved not counted, that the input must be wrong."""
    if n_live and n_deleted / n_live > max_fraction:
        raise RunError(
            f"{n_deleted:,} of the table's {n_live:,} documents are gone from the input, more than "
            f"--max_delete_fraction={max_fraction:g} allows; check --input, or raise it, or use --deletes=keep (what "
            "was encoded is kept for the next run)"
        )
