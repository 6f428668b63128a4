"""Writes records to files of bounded size, in a folder that readers do not use until they are published."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Optional

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems

from pipeline import metrics
from pipeline.bundles import end_bundle
from pipeline.errors import RunError
from pipeline.progress import Progress
from pipeline.records import BundleCounts, DeadLetter, Row
from pipeline.sinks import SINKS
from pipeline.sinks.index import ENTRY, Index, SourceNumbers, index_rows, pack_records
from pipeline.sinks.index import SUFFIX as INDEX_SUFFIX
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.table_format import ByteWriter, RowWriter, StoredRows

# What a shard holds. It is given by name, as Beam may pass records as another type with the same fields.
ROWS, DEAD_LETTERS = "embeddings", "dead_letters"
BUFFERED_RECORDS = 256
BUFFERED_BYTES = 4_000_000


class Shard(NamedTuple):
    """A finished file that is not published yet."""

    path: str
    kind: str  # embeddings or dead_letters
    suffix: str
    rows: int
    n_bytes: int
    sha256: str
    first: str  # sorts shards
    index_path: str = ""  # of the file with the index of its rows
    index_size: tuple[int, str] = (0, "")  # that file's bytes and sha256
    linked: bool = False  # the file belongs to the previous snapshot and stays there


@dataclass(frozen=True)
class RowFormat:
    """How a table's rows become files."""

    name: str
    layout: TableLayout
    compression: str = "none"
    kind = ROWS

    @property
    def suffix(self) -> str:
        return SINKS[self.name].suffix + (".gz" if self.compression == "gzip" else "")

    def open(self, stream: ByteWriter) -> RowWriter:
        return SINKS[self.name].writer(stream, self.layout)

    def order(self, row: Row) -> str:
        return row.id


@dataclass(frozen=True)
class DeadLetterFormat:
    """How dead letters become JSON lines, and how much of a text they may hold: full, hash or none."""

    text: str
    compression: str = "none"
    kind = DEAD_LETTERS
    suffix = ".jsonl"

    def open(self, stream: ByteWriter) -> DeadLetterWriter:
        return DeadLetterWriter(stream, self.text)

    def order(self, dead_letter: DeadLetter) -> str:
        return dead_letter.origin.path


class DeadLetterWriter:
    def __init__(self, stream: ByteWriter, text: str) -> None:
        self._stream = stream
        self._text = text

    def write(self, dead_letters: list[DeadLetter]) -> None:
        for dead_letter in dead_letters:
            self._stream.write(json.dumps(describe_dead_letter(dead_letter, self._text)).encode() + b"\n")

    def close(self) -> None:
        pass


def describe_dead_letter(dead_letter: DeadLetter, text: str) -> dict[str, Any]:
    """A dead letter as a JSON object; its text in full, as a hash, or not at all."""
    values = {
        "id": dead_letter.id,
        "stage": dead_letter.stage,
        "reason": dead_letter.reason,
        "message": dead_letter.message,
        "file": dead_letter.origin.path,
        dead_letter.origin.unit: dead_letter.origin.position,
    }
    if dead_letter.content_hash is not None:
        values["content_hash"] = dead_letter.content_hash
    if dead_letter.text is not None and text == "full":
        values["text"] = dead_letter.text
        if dead_letter.pair is not None:
            values["pair"] = dead_letter.pair
        if dead_letter.kept:
            values["kept"] = json.loads(dead_letter.kept)
    if dead_letter.text is not None and text == "hash":
        values["text_sha256"] = hashlib.sha256(dead_letter.text.encode("utf-8", "surrogatepass")).hexdigest()
    return values


class HashingStream:
    """A write-only stream that counts and hashes its bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.n_bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self._digest.update(data)
        self.n_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.n_bytes

    def flush(self) -> None:
        pass

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def finish(self) -> str:
        """Makes the file durable, closes it and returns the sha256 of its content."""
        self._stream.flush()
        try:
            number = self._stream.fileno()
        except (AttributeError, OSError):  # not a local file
            number = None
        if number is not None:
            os.fsync(number)
        self._stream.close()
        self.closed = True
        return self._digest.hexdigest()

    def close(self) -> None:
        """Does nothing: a format's writer must not close the stream, which it does not own."""


class ShardWriter:
    """Writes records of one kind to files in a folder and starts a new one when the last is large enough."""

    def __init__(self, folder: str, form: RowFormat | DeadLetterFormat, shard_bytes: int) -> None:
        self.folder = folder
        self.form = form
        self._shard_bytes = shard_bytes
        self._stream: Optional[HashingStream] = None
        self._shards: list[Shard] = []
        self._is_sourced = isinstance(form, RowFormat) and form.layout.sourced

    def write(self, records: list[Any]) -> None:
        self._begin(self.form.order(records[0]))
        self._writer.write(records)
        if self._index is not None:
            self._index.write(index_rows(records, self._index.sources, self._is_sourced))
        self._end(len(records))

    def write_stored(self, stored: StoredRows, index: Index) -> None:
        """Writes rows as their format stores them, with their index."""
        if not len(index.entries):
            return
        self._begin(index.entries["id"][0].hex())
        assert self._index is not None and not isinstance(self._writer, DeadLetterWriter)
        self._writer.write_stored(stored)
        self._index.write_index(index)
        self._end(len(index.entries))

    def finish(self) -> list[Shard]:
        """Closes the last file and returns all that were written."""
        if self._stream is not None:
            self._close()
        return self._shards

    def _begin(self, first: str) -> None:
        if self._stream is not None:
            return
        self._path = FileSystems.join(self.folder, f"{self.form.kind}-{uuid.uuid4().hex}{self.form.suffix}")
        self._first, self._rows = first, 0
        self._index = IndexWriter(self.folder) if self.form.kind == ROWS else None
        self._stream = HashingStream(FileSystems.create(self._path, compression_type="uncompressed"))
        self._gzip = gzip.GzipFile("", "wb", 6, self._stream, mtime=0) if self.form.compression == "gzip" else None
        self._writer: RowWriter | DeadLetterWriter = self.form.open(self._gzip or self._stream)

    def _end(self, n_rows: int) -> None:
        assert self._stream is not None
        self._rows += n_rows
        if self._stream.n_bytes >= self._shard_bytes:
            self._close()

    def _close(self) -> None:
        assert self._stream is not None
        self._writer.close()
        if self._gzip is not None:
            self._gzip.close()
        sha256 = self._stream.finish()
        n_bytes, self._stream = self._stream.n_bytes, None
        form = self.form
        index = self._index.finish() if self._index is not None else ("", (0, ""))
        self._shards.append(Shard(self._path, form.kind, form.suffix, self._rows, n_bytes, sha256, self._first, *index))


class IndexWriter:
    """Writes the index of one file as its rows come.

    Attributes:
      sources: numbers of the input files.
    """

    def __init__(self, folder: str) -> None:
        self.sources = SourceNumbers()
        self._path = FileSystems.join(folder, f"index-{uuid.uuid4().hex}{INDEX_SUFFIX}")
        self._stream = HashingStream(FileSystems.create(self._path, compression_type="uncompressed"))

    def write(self, entries: np.ndarray) -> None:
        """Writes entries `[n]` of ENTRY with this index's own numbers of sources."""
        self._stream.write(entries.tobytes())

    def write_index(self, index: Index) -> None:
        """Writes the entries of another index."""
        entries = index.entries.copy()
        used, which = np.unique(entries["source"], return_inverse=True)
        entries["source"] = np.array([self.sources.number(index.sources[i]) for i in used.tolist()], "<u4")[which]
        self.write(entries)

    def finish(self) -> tuple[str, tuple[int, str]]:
        """Closes the file; returns its path, and its size in bytes and sha256."""
        self._stream.write(pack_records(np.empty(0, ENTRY), list(self.sources.paths)))
        sha256 = self._stream.finish()
        return self._path, (self._stream.n_bytes, sha256)


def write_index(folder: str, index: Index) -> tuple[str, tuple[int, str]]:
    """Writes the index of one file; returns its path, and its size in bytes and sha256."""
    writer = IndexWriter(folder)
    writer.write_index(index)
    return writer.finish()


class WriteRecords(beam.DoFn):
    """Rows or dead letters to files; emits the finished files and the counts with the bundle."""

    def __init__(
        self, folder: str, form: RowFormat | DeadLetterFormat, shard_bytes: int, progress: Optional[Progress]
    ) -> None:
        self.folder = folder
        self.form = form
        self.shard_bytes = shard_bytes
        self.progress = progress

    def start_bundle(self) -> None:
        self._writer = ShardWriter(self.folder, self.form, self.shard_bytes)
        self._buffer: list[Any] = []
        self._bytes = 0
        self._counts: defaultdict[str, float] = defaultdict(int)

    def process(self, record: Any) -> None:
        self._buffer.append(record)
        self._bytes += len(record.vector) if self.form.kind == ROWS else len(record.text or "")
        if len(self._buffer) >= BUFFERED_RECORDS or self._bytes >= BUFFERED_BYTES:
            self._flush()
        if self.form.kind == DEAD_LETTERS and self.progress:
            try:
                self.progress.add_dead_letter(record)
            except RunError:  # the run stops; its dead letters must still be written, to show the reasons
                self._flush()
                self._writer.finish()
                raise

    def finish_bundle(self) -> Iterator[Any]:
        self._flush()
        for shard in self._writer.finish():
            self._counts["bytes"] += shard.n_bytes
            yield from end_bundle([shard])
        counted = BundleCounts.of("write_" + self.form.kind, dict(self._counts))
        yield from end_bundle([beam.pvalue.TaggedOutput("bundle_counts", counted)])

    def _flush(self) -> None:
        records, self._buffer, self._bytes = self._buffer, [], 0
        if not records:
            return
        begun = time.perf_counter()
        self._writer.write(records)
        self._counts["write_seconds"] += time.perf_counter() - begun
        self._counts["records"] += len(records)
        if self.form.kind == DEAD_LETTERS:
            metrics.DEAD_LETTERS.inc(len(records))
            for dead_letter in records:
                self._counts[dead_letter.reason] += 1
        elif self.progress:
            self.progress.add(rows=len(records))


@dataclass
class WriteTo(beam.PTransform):
    """PCollection of rows or dead letters -> (PCollection[Shard], PCollection[BundleCounts])."""

    folder: str
    form: RowFormat | DeadLetterFormat
    shard_bytes: int
    progress: Optional[Progress] = None

    def expand(self, records: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
        write = WriteRecords(self.folder, self.form, self.shard_bytes, self.progress)
        outputs = records | "WriteRecords" >> beam.ParDo(write).with_outputs("bundle_counts", main="shards")
        return outputs.shards, outputs.bundle_counts
