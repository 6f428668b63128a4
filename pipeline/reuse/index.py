"""The vector index: the live rows of a table and the journal, looked up by id and by content, on a local disk.

One index is used to resume, to retry, to reindex, for equal texts and for renamed ids: it maps an id to the document's
live rows, and a content hash to a vector of the text. It is in a scratch folder and is read through the page cache, so
memory use is constant; building it takes 24 bytes per row.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import numpy as np

from pipeline.reuse.journal import read_segment
from pipeline.sinks.index import ENTRY, Index
from pipeline.sinks.readers import ROWS, VectorFile

SEGMENT = "segment"  # a file of the journal, beside `ROWS`


class VectorIndex:
    """The opened index.

    Attributes:
      folder: of the index.
      files: where the vectors are; the live table's come first.
      n_live: rows of the live table.
      entries: `[n]` of ENTRY, those of the journal without an id.
      sources: the input files that entries name.
    """

    def __init__(self, folder: str) -> None:
        with open(os.path.join(folder, "index.json"), encoding="utf-8") as file:
            facts = json.load(file)
        self.folder = folder
        self.files = [VectorFile(**values) for values in facts["files"]]
        self.n_live: int = facts["n_live"]
        self.sources: list[str] = facts["sources"]
        self.entries: np.ndarray = _open(folder, "entries", ENTRY, facts["n"])
        self._ids = _open(folder, "ids", "S16", facts["n_live"])
        self._id_rows = _open(folder, "id_rows", "<u8", facts["n_live"])
        self._contents = _open(folder, "contents", "S16", facts["n_contents"])
        self._content_rows = _open(folder, "content_rows", "<u8", facts["n_contents"])

    def find_ids(self, digests: np.ndarray) -> list[np.ndarray]:
        """The live rows of each id, by digests `[m]` of S16."""
        return _find(self._ids, self._id_rows, digests)

    def blocks_by_id(self, size: int) -> Iterator[np.ndarray]:
        """Numbers of the live rows in the order of their ids, some thousands at a time; no id is in two blocks."""
        start = 0
        while start < self.n_live:
            end = min(start + size, self.n_live)
            end = int(np.searchsorted(self._ids, self._ids[end - 1], "right"))
            yield self._id_rows[start:end].astype(np.int64)
            start = end

    def live_ids(self) -> np.ndarray:
        """Digests of the live rows' ids, sorted, `[n_live]`."""
        return self._ids

    def find_contents(self, hashes: np.ndarray) -> list[np.ndarray]:
        """The rows with the vectors of each content, chunk by chunk; none if a chunk is missing.

        Args:
          hashes: `[m]` of S16.
        """
        found = _find(self._contents, self._content_rows, hashes)
        return [rows if len(rows) == 0 else select_whole(rows, self.entries) for rows in found]


def select_whole(rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Of rows with one content, one for each chunk, in order; none if a chunk is missing."""
    some = entries[rows]
    n_chunks = int(some["n_chunks"][0])
    if n_chunks == 1:
        return rows[:1]
    chunks, first = np.unique(some["chunk"], return_index=True)
    return rows[first] if len(chunks) == n_chunks else rows[:0]


def build_index(folder: str, live: Iterable[tuple[str, Index]], segments: Sequence[str], reusable: bool) -> None:
    """Writes the index; `VectorIndex(folder)` opens it.

    Args:
      folder: an empty local folder.
      live: path and index of each file of the live table.
      segments: paths of the journal of the wanted fingerprint; incomplete ones are ignored.
      reusable: whether the live table's vectors have the wanted fingerprint.
    """
    files: list[VectorFile] = []
    sources: dict[str, int] = {}
    n, n_live = 0, 0
    with open(os.path.join(folder, "entries"), "wb") as out:
        for path, kind, index in _all_indexes(live, segments):
            numbers = np.array([sources.setdefault(name, len(sources)) for name in index.sources], "<u4")
            entries = index.entries.copy()
            entries["source"] = numbers[entries["source"]] if len(numbers) else 0
            entries.tofile(out)
            files.append(VectorFile(path, kind, n, len(entries)))
            n += len(entries)
            n_live = n if kind == ROWS else n_live
    entries = _open(folder, "entries", ENTRY, n)
    _write_sorted(folder, "ids", "id_rows", entries["id"], 0, n_live)
    first = 0 if reusable else n_live
    _write_sorted(folder, "contents", "content_rows", entries["content"], first, n)
    facts = {
        "files": [asdict(file) for file in files],
        "n": n,
        "n_live": n_live,
        "n_contents": n - first,
        "sources": list(sources),
    }
    with open(os.path.join(folder, "index.json"), "w", encoding="utf-8") as file:
        json.dump(facts, file)


@functools.lru_cache(maxsize=1)
def open_index(folder: str) -> VectorIndex:
    """Opens an index once per process."""
    return VectorIndex(folder)


def _all_indexes(live: Iterable[tuple[str, Index]], segments: Sequence[str]) -> Iterator[tuple[str, str, Index]]:
    for path, index in live:
        yield path, ROWS, index
    for path in segments:
        segment = read_segment(path)
        if segment is not None:
            entries = np.zeros(len(segment.records), ENTRY)
            for name in ("content", "chunk", "n_chunks"):
                entries[name] = segment.records[name]
            yield path, SEGMENT, Index(entries, [])


def _write_sorted(folder: str, keys_name: str, rows_name: str, keys: np.ndarray, first: int, end: int) -> None:
    some = np.array(keys[first:end])
    order = np.argsort(some, kind="stable")
    some[order].tofile(os.path.join(folder, keys_name))
    (order + first).astype("<u8").tofile(os.path.join(folder, rows_name))


def _open(folder: str, name: str, dtype: np.typing.DTypeLike, n: int) -> np.ndarray:
    if not n:  # an empty file cannot be memory-mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(os.path.join(folder, name), dtype, "r", shape=(n,)))


def _find(keys: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    low, high = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    return [rows[start:end] for start, end in zip(low.tolist(), high.tolist(), strict=True)]
