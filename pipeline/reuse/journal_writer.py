"""Writes the journal while a run lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from pipeline.files import make_folder
from pipeline.records import Row
from pipeline.reuse.journal import write_segment

FLUSH_SECONDS = 10.0
FLUSH_BYTES = 8 << 20
_open_writers: set[Any] = set()


def flush_journals() -> None:
    """Writes the buffered rows of this process; call it before the process ends, from any thread."""
    for writer in list(_open_writers):
        writer.flush()


class JournalWriter:
    """Collects rows and writes a segment every few seconds."""

    def __init__(self, folder: str, seconds: float = FLUSH_SECONDS) -> None:
        self._folder = folder
        self._seconds = seconds
        self._lock = threading.Lock()
        self._rows: list[Row] = []
        self._bytes = 0
        self._since = time.monotonic()
        _open_writers.add(self)

    def add(self, row: Row) -> None:
        with self._lock:
            self._rows.append(row)
            self._bytes += len(row.vector) + len(row.kept) + len(row.text or "")  # of the buffer, not of the segment
        if self._bytes >= FLUSH_BYTES or time.monotonic() - self._since >= self._seconds:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            rows, self._rows, self._bytes = self._rows, [], 0
            self._since = time.monotonic()
            if rows:
                write_segment(self._folder, rows)

    def close(self) -> None:
        self.flush()
        _open_writers.discard(self)


class WriteJournal(beam.DoFn):
    """Passes rows on, and writes them to the journal."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def setup(self) -> None:
        make_folder(self._folder)

    def start_bundle(self) -> None:
        self._writer = JournalWriter(self._folder)

    def process(self, row: Row) -> Iterator[Row]:
        self._writer.add(row)
        yield row

    def finish_bundle(self) -> None:
        self._writer.close()


@dataclass
class Journal(beam.PTransform):
    """PCollection[Row] -> the same rows, each in the journal within seconds.

    Attributes:
      folder: from `journal_folder`.
    """

    folder: str

    def expand(self, rows: beam.PCollection) -> Any:
        return rows | "WriteJournal" >> beam.ParDo(WriteJournal(self.folder)).with_output_types(Row)
