"""Digests of documents, and sets of 16-byte digests in arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.records import Document
from pipeline.reuse.decide import ReusePolicy
from pipeline.sinks.index import digest_kept


class DigestSet:
    """A set of digests in sorted arrays, each at least twice as long as the next: 16 bytes a digest."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Adds digests `[m]` of S16; returns which of them were not there before, the first of equal ones."""
        values, first = np.unique(digests, return_index=True)
        unseen = np.ones(len(values), bool)
        for level in self._levels:
            unseen &= ~is_in(values, level)
        is_new = np.zeros(len(digests), bool)
        is_new[first[unseen]] = True
        if unseen.any():
            self._levels.append(values[unseen])
        while len(self._levels) > 1 and len(self._levels[-2]) < 2 * len(self._levels[-1]):
            merged = np.concatenate(self._levels[-2:])
            del self._levels[-2:]
            merged.sort(kind="stable")  # in place: of two ascending parts it needs no more memory than half of them
            self._levels.append(merged)
        return is_new

    def sorted(self) -> np.ndarray:
        """All digests, ascending."""
        digests = np.concatenate([np.empty(0, "S16"), *self._levels])
        digests.sort(kind="stable")
        return digests


def digest_documents(documents: Sequence[Document], policy: ReusePolicy) -> np.ndarray:
    """Digests `[m]` uint64 of what rows hold of documents besides the text, as `compare_documents` takes them."""
    return np.array([digest_kept(d.kept, d.origin.path if policy.by_source else "") for d in documents], "<u8")


def is_in(digests: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which digests `[m]` occur in an ascending array `[n]`."""
    if not len(ascending):
        return np.zeros(len(digests), bool)
    at = np.minimum(np.searchsorted(ascending, digests), len(ascending) - 1)
    return ascending[at] == digests
