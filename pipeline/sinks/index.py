"""The index of a table's file: digests of each row's id, text and kept fields, without the vector.

Every file with rows has an index file with 52 bytes for each row, in the same order. A later run finds new, changed and
deleted documents by reading it, a few percent of the table.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.files import open_file
from pipeline.records import Row, digest_id

SUFFIX = ".bin"
ENTRY = np.dtype(
    [
        ("id", "S16"),  # digest of the document's id
        ("content", "S16"),  # content hash
        ("kept", "<u8"),  # digest of the kept fields
        ("chunk", "<u4"),
        ("n_chunks", "<u4"),  # rows of the document when it is whole
        ("source", "<u4"),  # which of `sources` the document came from
    ]
)
_LENGTH = struct.Struct("<Q")
_READ_RECORDS = 1 << 16


class Index(NamedTuple):
    """Entries `[n]` of ENTRY, in the order of the rows, and the input files that they name by number."""

    entries: np.ndarray
    sources: list[str]


class SourceNumbers:
    """Numbers for paths, in the order in which they are first seen."""

    def __init__(self) -> None:
        self.paths: dict[str, int] = {}

    def number(self, path: str) -> int:
        return self.paths.setdefault(path, len(self.paths))


def digest_kept(kept: bytes, source: str = "") -> int:
    """64 bits that change with the kept fields' values, and with the path of the input file where rows name it."""
    facts = kept + b"\0" + source.encode() if source else kept
    return int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little") if facts else 0


def digest_source(path: str) -> int:
    """64 bits that change with the path of an input file."""
    return int.from_bytes(hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def parse_hashes(names: Sequence[str]) -> np.ndarray:
    """Content hashes as digests `[len(names)]` of S16."""
    return np.array([bytes.fromhex(name) for name in names], "S16")


def whole_digest(stored: bytes) -> bytes:
    """A 16-byte digest in full: NumPy strips zeros from the end of strings."""
    return stored.ljust(16, b"\0")


def index_rows(rows: Sequence[Row], sources: SourceNumbers, sourced: bool = False) -> np.ndarray:
    """Entries `[len(rows)]` of ENTRY; `sourced` says whether the rows name their input files."""
    entries = np.empty(len(rows), ENTRY)
    entries["id"] = [digest_id(row.id) for row in rows]
    entries["content"] = parse_hashes([row.content_hash for row in rows])
    entries["kept"] = [digest_kept(row.kept, row.source if sourced else "") for row in rows]
    entries["chunk"] = [row.chunk for row in rows]
    entries["n_chunks"] = [row.n_chunks for row in rows]
    entries["source"] = [sources.number(row.source) for row in rows]
    return entries


def pack_records(records: np.ndarray, sources: Sequence[str]) -> bytes:
    """The bytes of fixed-size records, then the paths that they name by number as JSON, then the JSON's length."""
    names = json.dumps(list(sources)).encode()
    return records.tobytes() + names + _LENGTH.pack(len(names))


def unpack_records(data: bytes, dtype: np.dtype) -> tuple[np.ndarray, list[str]]:
    """The inverse of `pack_records`.

    Raises:
      ValueError: if the bytes have another format.
    """
    n = _count_records(len(data), data[-_LENGTH.size :], dtype)
    sources: list[str] = json.loads(data[n * dtype.itemsize : -_LENGTH.size])
    return np.frombuffer(data, dtype, n), sources


def iterate_records(path: str, dtype: np.dtype = ENTRY) -> Iterator[np.ndarray]:
    """Yields the records of a file that `pack_records` has filled, `[n]` at a time, without holding the file in memory.

    Raises:
      ValueError: if it is damaged.
    """
    with open_file(path) as stream:
        n_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, n_bytes - _LENGTH.size))
        n = _count_records(n_bytes, stream.read(), dtype)
        stream.seek(0)
        for start in range(0, n, _READ_RECORDS):
            yield np.frombuffer(stream.read(min(_READ_RECORDS, n - start) * dtype.itemsize), dtype)


def read_sources(path: str, dtype: np.dtype = ENTRY) -> list[str]:
    """The paths that the records of a file name by number, read without the records.

    Raises:
      ValueError: if the file is damaged.
    """
    with open_file(path) as stream:
        n_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, n_bytes - _LENGTH.size))
        n = _count_records(n_bytes, stream.read(), dtype)
        stream.seek(n * dtype.itemsize)
        sources: list[str] = json.loads(stream.read()[: -_LENGTH.size])
    return sources


def _count_records(n_bytes: int, length: bytes, dtype: np.dtype) -> int:
    """Number of records in a file, from its size and the length of its JSON, which its last bytes hold."""
    if len(length) < _LENGTH.size:
        raise ValueError("it is too short")
    size = n_bytes - _LENGTH.size - _LENGTH.unpack(length)[0]
    if size < 0 or size % dtype.itemsize:
        raise ValueError("its length does not fit")
    return int(size // dtype.itemsize)


def read_index(path: str) -> Index:
    """Reads the index of one file.

    Raises:
      ValueError: if it is damaged.
    """
    return Index(*unpack_records(read_bytes(path), ENTRY))


def read_bytes(path: str) -> bytes:
    with open_file(path) as stream:
        data: Any = stream.read()
    return bytes(data)
