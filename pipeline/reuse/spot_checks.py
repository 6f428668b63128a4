"""Spot checks: picks documents that are encoded once more and compared with their row in the table."""

from __future__ import annotations

from collections import Counter


class SpotCheckPicker:
    """Picks documents of each kind at growing distances: the 1st, the 4th, the 16th, the 64th and so on."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def picks(self, kind: str) -> bool:
        self._seen[kind] += 1
        n = self._seen[kind]
        return n & (n - 1) == 0 and n.bit_length() % 2 == 1
