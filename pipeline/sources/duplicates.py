"""Duplicate ids: finds the documents whose id another document earlier in the input has.

The texts are read twice rather than kept: a first pass looks at ids only, as 16-byte digests, and finds the duplicates;
the reading pass then drops them. Locally the digests go through files, since the local engine keeps whatever crosses a
shuffle in memory as Python objects; on a distributed engine they go through a GroupByKey.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Optional

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from pipeline.files import is_local
from pipeline.partitions import Partitions
from pipeline.records import DeadLetter, Document, digest_id
from pipeline.sources.source import FileRange

# One id: 16 bytes of digest, file index, position.
_ENTRY = struct.Struct("<16sIQ")
ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("file", "<u4"), ("position", "<u8")])
DUPLICATE = np.dtype([("file", "<u4"), ("position", "<u8")])
_WRITE_BYTES = 1 << 20
_READ_BYTES = _ENTRY.size << 16
_NEVER = 1 << 63

# Yields the (id, position) of each document that a range holds.
ListIds = Callable[[tuple[FileRange, ...]], Iterator[tuple[FileRange, str, int]]]


def find_duplicates(blocks: Iterable[np.ndarray], n_ids: int, scratch: str | None = None) -> np.ndarray:
    """Finds all entries but the lowest (file, position) of each digest.

    Takes the same memory for any number of ids up to a few hundred million, 28 bytes of disk for each, and some 50
    bytes of memory for one that occurs more than once.

    Args:
      blocks: `[n]` of `ENTRY`, one after another.
      n_ids: how many entries there are in all.
      scratch: a local folder for files without names; None for the system's own.

    Returns:
      `[n]` of `DUPLICATE`, sorted by file and position.
    """
    entries = Partitions(ENTRY, n_ids, scratch)
    for block in blocks:
        entries.add(block, block["high"])
    duplicates = np.concatenate([_find_duplicates(part) for part in entries.take()])
    return duplicates[np.lexsort((duplicates["position"], duplicates["file"]))]


def _find_duplicates(entries: np.ndarray) -> np.ndarray:
    """The duplicates among entries that fit into memory, in no order."""
    highs = np.sort(entries["high"])
    repeated = highs[1:][highs[1:] == highs[:-1]]
    if not len(repeated):
        return np.empty(0, DUPLICATE)
    entries = entries[_is_in(entries["high"], repeated)]
    entries = entries[np.lexsort((entries["position"], entries["file"], entries["low"], entries["high"]))]
    is_duplicate = np.zeros(len(entries), bool)
    is_duplicate[1:] = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    duplicates = np.empty(int(is_duplicate.sum()), DUPLICATE)
    duplicates["file"], duplicates["position"] = entries["file"][is_duplicate], entries["position"][is_duplicate]
    return duplicates


class DuplicateCursor:
    """Tells for ascending positions in one file whether they are duplicates, in constant time each."""

    def __init__(self, positions: np.ndarray) -> None:
        # [n] ascending. A search copies what is a field of records, or of another type than what is looked for.
        self._positions = np.ascontiguousarray(positions, np.uint64)
        self._upcoming = -1

    def drops(self, position: int) -> bool:
        if self._upcoming < position:
            index = int(np.searchsorted(self._positions, np.uint64(position)))
            self._upcoming = int(self._positions[index]) if index < len(self._positions) else _NEVER
        return self._upcoming == position


class ScanToFile(beam.DoFn):
    """Writes the ids of a split to a scratch file; yields its path and how many there are."""

    def __init__(self, list_ids: ListIds, work_dir: str) -> None:
        self._list_ids = list_ids
        self._work_dir = work_dir

    def process(self, split: tuple[FileRange, ...]) -> Iterator[tuple[str, int]]:
        # A fresh name for every attempt, so that a replayed bundle never touches a file that is being merged.
        path = FileSystems.join(self._work_dir, f"ids-{uuid.uuid4().hex}.bin")
        n_ids = 0
        with create_scratch(path) as stream:
            buffer = bytearray()
            for file_range, document_id, position in self._list_ids(split):
                n_ids += 1
                buffer += _ENTRY.pack(digest_id(document_id), file_range.file.index, position)
                if len(buffer) >= _WRITE_BYTES:
                    stream.write(bytes(buffer))
                    buffer.clear()
            stream.write(bytes(buffer))
        yield path, n_ids


def merge_scans(_: Any, scans: Iterable[tuple[str, int]], work_dir: str) -> str:
    """Writes the duplicates among the ids of all scans, (file, number of ids), to one file; returns its path."""
    blocks = read_blocks(path for path, _ in scans)
    scratch = work_dir if is_local(work_dir) else None
    data = find_duplicates(blocks, sum(n_ids for _, n_ids in scans), scratch).tobytes()
    # The name is a hash of the content: readers cache it by path, and a replay gives the same file.
    path = FileSystems.join(work_dir, f"duplicates-{hashlib.blake2b(data, digest_size=16).hexdigest()}.bin")
    with create_scratch(path) as stream:
        stream.write(data)
    return path


def scan_through_files(splits: beam.PCollection, list_ids: ListIds, work_dir: str) -> beam.pvalue.AsSingleton:
    """The local back end: a side input with the path of the duplicates' file."""
    scans = splits | "ScanIds" >> beam.ParDo(ScanToFile(list_ids, work_dir))
    merged = (
        splits.pipeline
        | "OneMerge" >> beam.Create([None])
        | "FindDuplicates" >> beam.Map(merge_scans, beam.pvalue.AsList(scans), work_dir)
    )
    return beam.pvalue.AsSingleton(merged)


def select_duplicates(duplicates: Optional[str], file_range: FileRange) -> Optional[DuplicateCursor]:
    """The duplicates of a range, from the side input; None if the run has no side input."""
    if duplicates is None:
        return None
    table = load_duplicates(duplicates)
    low, high = np.searchsorted(table["file"], [file_range.file.index, file_range.file.index + 1])
    return DuplicateCursor(table["position"][low:high])


@functools.lru_cache(maxsize=1)
def load_duplicates(path: str) -> np.ndarray:
    """Reads a duplicates' file, once per process."""
    blocks = list(_read_file(path, DUPLICATE))
    return np.concatenate(blocks) if blocks else np.empty(0, DUPLICATE)


def reject_duplicate(document: Document) -> DeadLetter:
    """The dead letter of a document whose id another one has, earlier in the input."""
    message = f"the id {document.id!r} occurs earlier in the input; the first document with it is the one that counts"
    return DeadLetter("read", "duplicate_id", message, document.origin, document.id, document.text)


def create_scratch(path: str) -> BinaryIO:
    return FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read_blocks(paths: Iterable[str]) -> Iterator[np.ndarray]:
    """Blocks of `ENTRY` from the scans' files, about 2 MiB each."""
    for path in paths:
        yield from _read_file(path, ENTRY)


def _read_file(path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as stream:
        rest = b""
        while data := stream.read(_READ_BYTES):
            data = rest + data
            n = len(data) // dtype.itemsize
            yield np.frombuffer(data, dtype, n)
            rest = data[n * dtype.itemsize :]


def _is_in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which values `[n]` occur in the other array `[m]`, m > 0."""
    index = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[index] == values
