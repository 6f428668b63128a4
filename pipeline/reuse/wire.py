"""Encodes documents and live rows compactly for shuffles on a distributed engine.

The cost of a shuffle grows with bytes and elements, so elements are (16-byte digest, bytes). The first byte of the
value is its type.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.records import Document, Origin
from pipeline.sinks.index import Index, digest_source, whole_digest

LIVE, DOCUMENT, UNREAD, DEAD, NEW, OPEN, MOVED, CHECK = b"L", b"D", b"U", b"X", b"N", b"O", b"M", b"C"
JOURNAL, UNSEEN = b"J", b"S"
VECTOR, REQUEST = b"V", b"R"
_OUTSIDE = 0xFFFFFFFF  # for the number of an input file: the path follows instead
_BYTE_UNIT, _PAIR = 1, 2
_HEAD = struct.Struct("<BIQIII")
_LIVE = struct.Struct("<II16sQQ")
_CHUNKS = struct.Struct("<I")
_OPEN = struct.Struct("<II16sQ?")
_PLACE = struct.Struct("<II")


class LiveRow(NamedTuple):
    """An index entry of a live row.

    Attributes:
      file: number of the live table's file.
      row: number of the row in the file.
      content: content hash.
      kept: digest of the kept fields.
      source: digest of the path that the document came from.
      n_chunks: rows of the document when it is whole.
    """

    file: int
    row: int
    content: bytes
    kept: int
    source: int
    n_chunks: int


class OpenRow(NamedTuple):
    """A live row whose document is not unchanged.

    Attributes:
      file: number of the live table's file.
      row: number of the row in the file.
      content: content hash.
      source: digest of the path that the document came from.
      seen: whether the document was read.
    """

    file: int
    row: int
    content: bytes
    source: int
    seen: bool


def list_live_rows(number: int, index: Index) -> list[tuple[bytes, bytes]]:
    """(digest of the id, packed `LiveRow`) for each row of a file."""
    sources = [digest_source(path) for path in index.sources]
    packed = []
    for row, (name, content, kept, _, n_chunks, source) in enumerate(index.entries.tolist()):
        own = LIVE + _LIVE.pack(number, row, content, kept, sources[source])
        packed.append((whole_digest(name), own if n_chunks == 1 else own + _CHUNKS.pack(n_chunks)))
    return packed


def unpack_live_row(data: bytes) -> LiveRow:
    file, row, content, kept, source = _LIVE.unpack_from(data, 1)
    end = 1 + _LIVE.size
    return LiveRow(file, row, content, kept, source, _CHUNKS.unpack_from(data, end)[0] if len(data) > end else 1)


def pack_open_row(row: LiveRow, seen: bool) -> bytes:
    return OPEN + _OPEN.pack(row.file, row.row, row.content, row.source, seen)


def unpack_open_row(data: bytes) -> OpenRow:
    return OpenRow(*_OPEN.unpack_from(data, 1))


class DocumentPacker:
    """Packs documents; paths of input files are stored as their numbers.

    Args:
      inputs: paths of the input files.

    Attributes:
      numbers: of the input files, by path.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._inputs = inputs
        self.numbers = {path: i for i, path in enumerate(inputs)}

    def pack(self, document: Document) -> bytes:
        d = document
        number = self.numbers.get(d.origin.path, _OUTSIDE)
        flags = _BYTE_UNIT * (d.origin.unit == "byte") + _PAIR * (d.pair is not None)
        name, text, pair = (part.encode("utf-8", "surrogatepass") for part in (d.id, d.text, d.pair or ""))
        path = d.origin.path.encode("utf-8", "surrogatepass") if number == _OUTSIDE else b""
        position = d.origin.position & 0xFFFFFFFFFFFFFFFF
        head = _HEAD.pack(flags, number, position, len(name), len(text), len(pair))
        rest = struct.pack("<I", len(path)) + path if number == _OUTSIDE else b""
        return b"".join((DOCUMENT, head, name, text, pair, rest, d.kept))

    def unpack(self, data: bytes) -> Document:
        flags, number, position, *sizes = _HEAD.unpack_from(data, 1)
        at = 1 + _HEAD.size
        parts = []
        if number == _OUTSIDE:
            sizes.append(0)
        for i, size in enumerate(sizes):
            if i == 3:
                (size,) = struct.unpack_from("<I", data, at)
                at += 4
            parts.append(data[at : at + size].decode("utf-8", "surrogatepass"))
            at += size
        path = self._inputs[number] if number != _OUTSIDE else parts[3]
        if position == 0xFFFFFFFFFFFFFFFF:
            position = -1
        origin = Origin(path, position, "byte" if flags & _BYTE_UNIT else "row")
        return Document(parts[0], parts[1], parts[2] if flags & _PAIR else None, data[at:], origin)

    def order(self, data: bytes) -> tuple[int, int]:
        """Sort key of packed documents: number of the input file, position."""
        _, number, position, *_ = _HEAD.unpack_from(data, 1)
        return number, position


def pack_place(file: int, row: int, n_chunks: int = 1, chunk: int = 0) -> bytes:
    """A live row as a place where a vector is."""
    own = LIVE + _PLACE.pack(file, row)
    return own if n_chunks == 1 else own + struct.pack("<II", chunk, n_chunks)


def unpack_place(data: bytes) -> tuple[int, int, int, int]:
    """File, row, number of the chunk, number of chunks."""
    file, row = _PLACE.unpack_from(data, 1)
    chunk, n_chunks = struct.unpack_from("<II", data, 1 + _PLACE.size) if len(data) > 1 + _PLACE.size else (0, 1)
    return file, row, chunk, n_chunks


def unpack_rows(bitmap: bytes) -> np.ndarray:
    """Ascending numbers of the rows in a bitmap."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little"))


def pack_journal_place(path: str, row: int, chunk: int, n_chunks: int) -> bytes:
    """A record of the journal as a place where a vector is."""
    return JOURNAL + b"".join(n.to_bytes(4, "little") for n in (row, chunk, n_chunks)) + path.encode()


def unpack_known(value: bytes) -> tuple[int | str, int, int, int]:
    """File of the live table or path of a segment, row, number of the chunk, number of chunks."""
    if value[:1] == LIVE:
        return unpack_place(value)
    row, chunk, n_chunks = (int.from_bytes(value[i : i + 4], "little") for i in (1, 5, 9))
    return value[13:].decode(), row, chunk, n_chunks
