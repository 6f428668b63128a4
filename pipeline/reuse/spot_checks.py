"""Which documents are encoded once more, to compare the vector with the row that the table has."""

from __future__ import annotations

from collections import Counter


class SpotCheckPicker:
    """Picks the first of a kind of document and then ever fewer: the 4th, the 16th, the 64th."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def picks(self, kind: str) -> bool:
        self._seen[kind] += 1
        n = self._seen[kind]
        return n & (n - 1) == 0 and n.bit_length() % 2 == 1
