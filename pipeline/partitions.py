"""Partitions records that do not fit into memory by their digests; equal digests are in one part."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np

PART_BYTES = 32 << 20
MAX_PARTS = 256  # each is an open file


class Partitions:
    """Records on a local disk: add them all, then take them part by part.

    Args:
      dtype: of the records.
      n_records: about how many there will be.
      folder: local; the files in it have no names, so nothing stays there. None for the system's own.
    """

    def __init__(self, dtype: np.dtype, n_records: int, folder: str | None = None) -> None:
        self._dtype = dtype
        n_parts = min(MAX_PARTS, 1 + n_records * dtype.itemsize // PART_BYTES)
        self._files = [tempfile.TemporaryFile(dir=folder) for _ in range(n_parts)]  # noqa: SIM115  closed by take

    def add(self, records: np.ndarray, digests: np.ndarray) -> None:
        """Adds records `[n]`, each to the part that its digest `[n]`, evenly distributed `<u8`, belongs to."""
        parts = (digests % np.uint64(len(self._files))).astype(np.uint8)
        ends = np.cumsum(np.bincount(parts, minlength=len(self._files)))
        ordered = records[np.argsort(parts, kind="stable")]
        for file, part in zip(self._files, np.split(ordered, ends[:-1]), strict=True):
            file.write(part.tobytes())

    def take(self) -> Iterator[np.ndarray]:
        """Yields the parts, once; records in a part are unordered."""
        for file in self._files:
            with file:
                file.flush()
                file.seek(0)
                yield np.fromfile(file, self._dtype)
