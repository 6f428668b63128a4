"""Decides what happens to documents and to live rows. Only this module decides; it is pure and works on arrays.

A run decides twice. Before it encodes, it compares each document with the live rows of its id (`compare_documents`) and
decides which are encoded and which reuse a vector (`decide_documents`). After it has encoded, it decides what happens
to each live row (`decide_rows`), from the documents that have new rows and those that became dead letters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Change(IntEnum):
    """How a document differs from the live rows of its id."""

    NEW = 0  # there are none
    CHANGED = 1  # they were made from another text
    UPDATED = 2  # they were made from its text; kept fields, columns, the file format or the stored path differ
    REMADE = 3  # they were made from its text, by another encoder or with other settings
    UNCHANGED = 4


class DocumentAction(IntEnum):
    """What happens to a document."""

    KEEP = 0  # its rows stay
    REUSE = 1  # it gets rows from vectors of the vector index
    ENCODE = 2
    SHARE = 3  # it gets the rows, or the dead letter, of a document with the same text that is encoded


class RowAction(IntEnum):
    """What happens to a live row."""

    KEEP = 0
    REPLACE = 1  # its document has new rows
    DELETE = 2  # its document is gone from the input
    KEEP_STALE = 3  # its document is in the input, or may be, and cannot be embedded now: its old vector stays
    KEEP_UNSEEN = 4  # its document is gone from the input, and rows of such documents are kept on request


KEPT_ACTIONS = (RowAction.KEEP, RowAction.KEEP_STALE, RowAction.KEEP_UNSEEN)


@dataclass(frozen=True)
class ReusePolicy:
    """What a run may reuse.

    Attributes:
      same_fingerprint: the live vectors have the fingerprint of the run.
      same_layout: the live rows have the columns and the file format that the run writes.
      keeps_unseen: rows of documents that are gone from the input are kept.
      by_source: rows name the input file of their document, so a document that has moved to another file is updated.
    """

    same_fingerprint: bool
    same_layout: bool
    keeps_unseen: bool = False
    by_source: bool = False

    @property
    def rows_stay(self) -> bool:
        """Whether rows of unchanged documents can stay as they are stored."""
        return self.same_fingerprint and self.same_layout


def compare_documents(
    content: np.ndarray, kept: np.ndarray, owner: np.ndarray, live: np.ndarray, policy: ReusePolicy
) -> np.ndarray:
    """Compares documents with the live rows of their ids.

    Args:
      content: `[m]` S16, the documents' content hashes.
      kept: `[m]` uint64, digests of their kept fields, and of their files if the policy is `by_source`.
      owner: `[k]` ascending int, the document that each live row belongs to.
      live: `[k]` with the fields content, kept and n_chunks: those rows.
      policy: what may be reused.

    Returns:
      `[m]` uint8 of `Change`.
    """
    m = len(content)
    n_rows = np.bincount(owner, minlength=m)
    same_text = (
        np.bincount(owner, (live["content"] == content[owner]) & (live["n_chunks"] == n_rows[owner]), m) == n_rows
    )
    same_kept = np.bincount(owner, live["kept"] == kept[owner], m) == n_rows
    return np.select(
        [n_rows == 0, ~same_text, same_kept & policy.rows_stay],
        [Change.NEW, Change.CHANGED, Change.UNCHANGED],
        Change.UPDATED if policy.same_fingerprint else Change.REMADE,
    ).astype(np.uint8)


def decide_documents(unchanged: np.ndarray, known: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Decides what happens to documents.

    Args:
      unchanged: `[m]` bool, whether the document is unchanged.
      known: `[m]` bool, whether there are vectors of the document's text, from the live table or the journal.
      first: `[m]` bool, whether the document is the first with its text, which is encoded.

    Returns:
      `[m]` uint8 of `DocumentAction`.
    """
    return np.select(
        [unchanged, known, first],
        [DocumentAction.KEEP, DocumentAction.REUSE, DocumentAction.ENCODE],
        DocumentAction.SHARE,
    ).astype(np.uint8)


def count_changes(changes: np.ndarray) -> Counter[str]:
    """Counts documents by `Change`, under their names in the manifest."""
    counts = Counter({change.name.lower(): int((changes == change).sum()) for change in Change})
    counts["documents"] = len(changes)
    return counts


def count_actions(actions: np.ndarray) -> Counter[str]:
    """Counts documents by `DocumentAction`, under their names in the manifest."""
    names = {DocumentAction.REUSE: "reused", DocumentAction.ENCODE: "encoded", DocumentAction.SHARE: "same_text"}
    return Counter({name: int((actions == action).sum()) for action, name in names.items()})


def stays(actions: np.ndarray) -> np.ndarray:
    """Which rows `[n]` stay in the table, from their `RowAction`."""
    return np.isin(actions, KEPT_ACTIONS)


class RowFacts(NamedTuple):
    """What a run has found out about the documents of live rows.

    Attributes:
      id: `[n]` S16, digests of the documents' ids; rows of one document stand together.
      unchanged: `[n]` bool, whether the document is unchanged.
      seen: `[n]` bool, whether the document was read.
      dead: `[n]` bool, whether there is a dead letter with its id, and no new row.
      incomplete: `[n]` bool, whether the row's input file has records whose ids could not be read.
      moved: `[n]` bool, whether another document has taken the row's vector in this run.
      gone: `[n]` bool, whether the row's input file is no longer among the input.
    """

    id: np.ndarray
    unchanged: np.ndarray
    seen: np.ndarray
    dead: np.ndarray
    incomplete: np.ndarray
    moved: np.ndarray
    gone: np.ndarray


ROW_COUNTS = ("live", "deleted", "moved", "gone", "stale", "kept", "lost")


class RowDecisions(NamedTuple):
    """What happens to live rows: `[n]` uint8 of `RowAction`, and documents counted by it.

    The counts are `live`, `deleted`, `moved` (deleted, but its vector is reused for another id), `gone` (deleted and
    not moved, because its file is no longer among the input), `stale`, `kept` and `lost` (would be stale or kept, but
    the vectors are of another encoder or other settings).
    """

    actions: np.ndarray
    counts: Counter[str]


def decide_rows(facts: RowFacts, policy: ReusePolicy) -> RowDecisions:
    """Decides what happens to live rows.

    A row is deleted if its document was not seen and its input file was read completely.
    """
    stale = facts.dead | (~facts.seen & facts.incomplete)
    actions = np.select(
        [facts.unchanged, stale, facts.seen],
        [RowAction.KEEP, RowAction.KEEP_STALE, RowAction.REPLACE],
        RowAction.KEEP_UNSEEN if policy.keeps_unseen else RowAction.DELETE,
    ).astype(np.uint8)
    begins = np.ones(len(facts.id), bool)
    begins[1:] = facts.id[1:] != facts.id[:-1]
    deleted, n_stale, n_unseen = (
        int((begins & (actions == action)).sum())
        for action in (RowAction.DELETE, RowAction.KEEP_STALE, RowAction.KEEP_UNSEEN)
    )
    moved = int((begins & (actions == RowAction.DELETE) & facts.moved).sum())
    gone = int((begins & (actions == RowAction.DELETE) & facts.gone & ~facts.moved).sum())
    counts = Counter(dict.fromkeys(ROW_COUNTS, 0))
    counts.update(live=int(begins.sum()), deleted=deleted, moved=moved, gone=gone)
    if policy.same_fingerprint:
        counts.update(stale=n_stale, kept=n_unseen)
    else:
        counts["lost"] = n_stale + n_unseen
        actions[stays(actions)] = RowAction.DELETE
    return RowDecisions(actions, counts)
