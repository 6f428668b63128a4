"""The live table and the journal, as workers of a distributed engine read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np

from pipeline.records import Row
from pipeline.reuse.decide import ReusePolicy
from pipeline.reuse.journal import read_segment
from pipeline.reuse.merge import bare_rows, convert_rows
from pipeline.reuse.wire import list_live_rows, pack_journal_place, pack_place, unpack_rows
from pipeline.sinks.index import read_index, whole_digest
from pipeline.sinks.readers import ROWS, VectorFile, VectorReader
from pipeline.sinks.writing import RowFormat

KEYED = tuple[bytes, bytes]  # how elements cross shuffles: a digest, and a packed value
PLACED = tuple[Any, int]  # a file of the live table by number, or a segment by path; a row


class LiveFile(NamedTuple):
    """A file of the live table.

    Attributes:
      path: of the file.
      rows: how many it has.
      n_bytes: its size.
      sha256: its checksum.
      index_path: of the file with the index of its rows.
    """

    path: str
    rows: int
    n_bytes: int
    sha256: str
    index_path: str

    @property
    def vectors(self) -> VectorFile:
        return VectorFile(self.path, ROWS, 0, self.rows)


@dataclass(frozen=True)
class DistributedReuse:
    """What a run on a distributed engine may reuse.

    Attributes:
      files: of the live table.
      journal: folder of the journal. Workers list it when they begin: an engine that starts a job again, as Flink does
        when a machine is lost, then finds there what the job had made before.
      reader: of the live table's files.
      policy: what may be reused.
      form: how rows are written.
      folder: where to.
      shard_bytes: size at which a new file is begun.
      inputs: paths of the input files.
      prefix: what is put before every text.
    """

    files: tuple[LiveFile, ...]
    journal: str
    reader: Optional[VectorReader]
    policy: ReusePolicy
    form: RowFormat
    folder: str
    shard_bytes: int
    inputs: tuple[str, ...]
    prefix: str

    @property
    def keep_text(self) -> bool:
        return self.form.layout.keep_text


def list_live(number: int, reuse: DistributedReuse) -> list[tuple[bytes, bytes]]:
    """The rows of a live file, as `CompareDocuments` takes them."""
    return list_live_rows(number, read_index(reuse.files[number].index_path))


def list_known(number: int, reuse: DistributedReuse) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a live file, as `DecideTexts` takes them."""
    entries = read_index(reuse.files[number].index_path).entries
    columns = (entries[name].tolist() for name in ("content", "chunk", "n_chunks"))
    for row, (content, chunk, n_chunks) in enumerate(zip(*columns, strict=True)):
        yield whole_digest(content), pack_place(number, row, n_chunks, chunk)


def list_segment(path: str) -> Iterator[tuple[bytes, bytes]]:
    """The records of a segment of the journal, as `DecideTexts` takes them; none of a torn one."""
    segment = read_segment(path)
    records = segment.records if segment is not None else np.empty(0, [("content", "S16")])
    for row, record in enumerate(records):
        place = pack_journal_place(path, row, int(record["chunk"]), int(record["n_chunks"]))
        yield whole_digest(record["content"]), place


def read_wanted(wanted: tuple[int | str, bytes], reuse: DistributedReuse) -> Iterator[Row]:
    """The rows of a file whose vectors are wanted: (number of a file or path of a segment, bitmap of its rows)."""
    where, numbers = wanted[0], unpack_rows(wanted[1])
    if isinstance(where, str):
        segment = read_segment(where)
        if segment is not None:  # else the requests for it fail, and the run with them
            yield from bare_rows(segment, numbers)
        return
    reader = reuse.reader
    assert reader is not None
    file = reuse.files[where]
    index = read_index(file.index_path)
    for stored in reader.read(file.vectors, numbers):
        positions = np.flatnonzero(np.isin(stored.numbers, numbers))
        entries = index.entries[stored.numbers[positions]]
        columns = reader.columns(stored, positions) | {"n_chunks": entries["n_chunks"].tolist()}
        yield from convert_rows(
            columns, [index.sources[i] for i in entries["source"]], reader.layout, reuse.form.layout
        )
