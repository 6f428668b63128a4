"""Reuse requests on a local disk: rows that need a vector which need not be encoded for them.

Three files hold the requests of a bundle: the requests themselves, one JSON line each, and unsorted fixed-size records
of those that reuse rows of the index (`REUSED`) and of those that wait for a document with the same text (`WAITING`).
The commit reads the records first, and each line when it reads the vector for it.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.records import Document, Origin, digest_id

REUSED = np.dtype([("id", "S16"), ("row", "<u8"), ("offset", "<u8")])  # one for each row
WAITING = np.dtype([("id", "S16"), ("content", "S16"), ("offset", "<u8")])
WANTED = np.dtype([("row", "<u8"), ("file", "<u4"), ("offset", "<u8")])  # a row, and the request that it is for
_BLOCK = 1 << 15
_BUCKETS = 64
MAX_OPEN_FILES = 64


class ReuseRequest(NamedTuple):
    """A row that is wanted for a document.

    Attributes:
      document: the document of the row; without its texts if they are no longer needed.
      content_hash: of its text.
    """

    document: Document
    content_hash: str

    def to_line(self) -> bytes:
        d = self.document
        values = [d.id, d.text, d.pair, d.kept.decode(), list(d.origin), self.content_hash]
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> ReuseRequest:
        name, text, pair, kept, origin, content_hash = json.loads(line)
        return cls(Document(name, text, pair, kept.encode(), Origin(*origin)), content_hash)


class RequestFiles(NamedTuple):
    """The files of a bundle's requests."""

    lines: str
    reused: str
    waiting: str

    @classmethod
    def of(cls, note: str) -> RequestFiles:
        """Their paths, by the path of the bundle's notes."""
        return cls(f"{note}.requests", f"{note}.reused", f"{note}.waiting")


class RequestWriter:
    """Writes the requests of a bundle."""

    def __init__(self, note: str, keep_text: bool) -> None:
        self._keep_text = keep_text
        files = RequestFiles.of(note)
        self._lines = open(files.lines, "wb")  # noqa: SIM115  until `close`, as the others
        self._reused = open(files.reused, "wb")  # noqa: SIM115
        self._waiting = open(files.waiting, "wb")  # noqa: SIM115

    def write(self, document: Document, content_hash: str, known: np.ndarray) -> None:
        """Writes a request for rows `[n]` of the index; if empty, one that waits for a document with the same text."""
        offset, digest = self._lines.tell(), digest_id(document.id)
        if len(known):
            self._reused.write(np.array([(digest, row, offset) for row in known.tolist()], REUSED).tobytes())
            document = document._replace(text=document.text if self._keep_text else "", pair=None)
        else:  # a dead letter may need the text
            self._waiting.write(np.array([(digest, bytes.fromhex(content_hash), offset)], WAITING).tobytes())
        self._lines.write(ReuseRequest(document, content_hash).to_line())

    def close(self) -> None:
        for file in (self._lines, self._reused, self._waiting):
            file.close()


class RequestLines:
    """Reads requests by file and place; a few of their files are open at a time.

    Args:
      paths: of the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __enter__(self) -> RequestLines:
        return self

    def __exit__(self, *exception: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def read(self, file: int, offset: int) -> ReuseRequest:
        if file not in self._open:
            if len(self._open) == MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[file] = open(self._paths[file], "rb")  # noqa: SIM115  closed at the end
        self._open.move_to_end(file)
        self._open[file].seek(offset)
        return ReuseRequest.from_line(self._open[file].readline())


def read_blocks(path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The records of a file, some thousands at a time."""
    with open(path, "rb") as file:
        while data := file.read(_BLOCK * dtype.itemsize):
            yield np.frombuffer(data, dtype)


class WantedRows:
    """Records of WANTED, spread over files by their row, so that they can be read in order with bounded memory.

    Args:
      folder: a local folder.
      n_rows: how many rows there are.
    """

    def __init__(self, folder: str, n_rows: int) -> None:
        self._width = max(1 << 16, -(-n_rows // _BUCKETS))  # rows of a bucket
        self._paths = [os.path.join(folder, f"wanted-{i}") for i in range(-(-n_rows // self._width))]
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115  until `read`
        self._opened = (-1, np.empty(0, WANTED))

    def add(self, wanted: np.ndarray) -> None:
        """Adds records `[n]` of WANTED."""
        buckets = (wanted["row"] // self._width).astype(np.int64)
        for bucket in np.unique(buckets).tolist():
            self._files[bucket].write(wanted[buckets == bucket].tobytes())

    def finish(self) -> None:
        """Ends the writing."""
        for file in self._files:
            file.close()

    def read(self, first: int, end: int) -> np.ndarray:
        """The records of rows from `first` to `end`, sorted by row. Fastest if calls ascend."""
        if end <= first:
            return np.empty(0, WANTED)
        found = []
        for bucket in range(first // self._width, (end - 1) // self._width + 1):
            records = self._open(bucket)
            low, high = np.searchsorted(records["row"], [first, end])
            found.append(records[low:high])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _open(self, bucket: int) -> np.ndarray:
        if self._opened[0] != bucket:
            self._opened = (-1, np.empty(0, WANTED))  # frees the last one first
            records = np.fromfile(self._paths[bucket], WANTED)
            self._opened = (bucket, records[np.argsort(records["row"], kind="stable")])
        return self._opened[1]
