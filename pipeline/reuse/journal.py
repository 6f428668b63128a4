"""The journal: finished vectors, written as they are made, so that a crashed run loses seconds and not hours.

DIR/journal/FINGERPRINT/HASH.seg

A segment holds the vectors of some seconds of work. Its name is the hash of its bytes, so an incomplete one is
recognised, and one that is written twice is one file. Segments are keyed by content hash, never by document: a later
run reuses the vectors for every document with that text.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, Optional

import numpy as np

from pipeline.errors import TableError
from pipeline.files import create_file, delete_folder, join, list_files
from pipeline.records import Row
from pipeline.sinks.index import parse_hashes, read_bytes
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.readers import Stored, VectorFile
from pipeline.sinks.table_format import StoredRows
from pipeline.table_folders import JOURNAL

SUFFIX = ".seg"
_MAGIC = b"embeam2\n"
_LENGTH = struct.Struct("<Q")
_NONE = -1
_ADDED = ("char_start", "char_end", "n_unknown")
_OPTIONAL = ("n_tokens", "n_truncated", *_ADDED)
RECORD = np.dtype(
    [
        ("content", "S16"),
        ("chunk", "<u4"),
        ("n_chunks", "<u4"),
        ("n_tokens", "<i8"),  # -1 for none
        ("n_truncated", "<i8"),  # -1 for none
        ("scale", "<f4"),
        ("size", "<u4"),  # bytes of the vector
        *((name, "<i8") for name in _ADDED),  # -1 for none
    ]
)
# What each beginning of a segment says about its records; those of an earlier version lack some fields.
_RECORDS = {_MAGIC: RECORD, b"embeam1\n": np.dtype([field for field in RECORD.descr if field[0] not in _ADDED])}


class Segment(NamedTuple):
    """A segment in memory: records `[n]` of RECORD, and where each vector begins in `data`, `[n + 1]`."""

    records: np.ndarray
    data: bytes
    starts: np.ndarray

    def columns(self, positions: Sequence[int]) -> Columns:
        """Some rows as a table's files give them: column name to values, `embedding` as stored bytes."""
        some = self.records[list(positions)]
        return {
            "chunk": some["chunk"].tolist(),
            "n_chunks": some["n_chunks"].tolist(),
            **{name: [None if n == _NONE else n for n in some[name].tolist()] for name in _OPTIONAL},
            "scale": some["scale"].tolist(),
            "embedding": [self.data[self.starts[i] : self.starts[i + 1]] for i in positions],
        }


def journal_folder(work: str, fingerprint: str = "") -> str:
    """The folder of all journals of a table, or of the one for a fingerprint."""
    return join(work, JOURNAL, *([fingerprint[:32]] if fingerprint else []))


def pack_segment(rows: Sequence[Row]) -> bytes:
    """Rows as the bytes of a segment."""
    records = np.empty(len(rows), RECORD)
    records["content"] = parse_hashes([row.content_hash for row in rows])
    records["chunk"] = [row.chunk for row in rows]
    records["n_chunks"] = [row.n_chunks for row in rows]
    for name in _OPTIONAL:
        records[name] = [_NONE if value is None else value for value in map(attrgetter(name), rows)]
    records["scale"] = [row.scale for row in rows]
    records["size"] = [len(row.vector) for row in rows]
    return _MAGIC + _LENGTH.pack(len(rows)) + records.tobytes() + b"".join(row.vector for row in rows)


def write_segment(folder: str, rows: Sequence[Row]) -> str:
    """Writes a segment, durably on a local disk, and returns its path."""
    data = pack_segment(rows)
    path = join(folder, hashlib.blake2b(data, digest_size=20).hexdigest() + SUFFIX)
    create_file(path, data)
    return path


def read_segment(path: str) -> Optional[Segment]:
    """Reads a segment; None if it is incomplete, damaged or missing."""
    try:
        data = read_bytes(path)
    except Exception:  # each file system raises its own exceptions
        return None
    name = path.replace("\\", "/").rpartition("/")[2].removesuffix(SUFFIX)
    stored = _RECORDS.get(data[: len(_MAGIC)])
    if hashlib.blake2b(data, digest_size=20).hexdigest() != name or stored is None:
        return None
    begin = len(_MAGIC) + _LENGTH.size
    (n,) = _LENGTH.unpack_from(data, len(_MAGIC))
    found = np.frombuffer(data, stored, n, begin)
    records = np.full(n, _NONE, RECORD) if stored != RECORD else found
    if stored != RECORD:
        for field in found.dtype.names or ():
            records[field] = found[field]
    starts = begin + n * stored.itemsize + np.concatenate([[0], np.cumsum(records["size"], dtype=np.int64)])
    return Segment(records, data, starts)


def list_segments(work: str, fingerprint: str) -> list[str]:
    """Paths of the segments for a fingerprint, incomplete ones too."""
    return list_folder(journal_folder(work, fingerprint))


def list_folder(folder: str) -> list[str]:
    """As `list_segments`, of a folder that `journal_folder` names."""
    return sorted(path for path in list_files(folder) if path.endswith(SUFFIX))


def delete_journal(work: str, fingerprint: str) -> None:
    delete_folder(journal_folder(work, fingerprint))


@dataclass(frozen=True)
class SegmentReader:
    """Reads segments of the journal.

    Attributes:
      layout: of the rows that are made from them.
    """

    layout: TableLayout

    def read(self, file: VectorFile, wanted: np.ndarray) -> Iterator[Stored]:
        segment = read_segment(file.path)
        if segment is None:
            raise TableError(f"{file.path} is missing or damaged; run the same command again")
        yield Stored(np.arange(file.first, file.first + file.rows), segment)

    def select(self, stored: Stored, positions: np.ndarray) -> StoredRows:
        raise NotImplementedError("the journal has no rows to copy, only vectors")

    def columns(self, stored: Stored, positions: np.ndarray) -> Columns:
        columns: Columns = stored.rows.columns(positions.tolist())
        return columns
