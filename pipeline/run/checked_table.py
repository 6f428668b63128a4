"""State of the verification of a table: its manifest, counts, and findings."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.reuse.index import VectorIndex
from pipeline.run.read_input import Accounts
from pipeline.sinks.index import whole_digest
from pipeline.sinks.readers import FileReader
from pipeline.tables.manifest import open_table

KINDS = {
    "missing_file": "the manifest lists a file that is not there",
    "surplus_file": "the snapshot's folder holds something that the manifest does not list",
    "wrong_size": "a file does not have the size in the manifest",
    "wrong_checksum": "a file does not have the sha256 in the manifest",
    "damaged_file": "a file, or rows of it, cannot be read",
    "wrong_count": "the manifest's own numbers do not add up",
    "wrong_index": "the index of a file does not agree with its rows",
    "wrong_row": "a row contradicts itself",
    "duplicate_row": "two rows have one id and chunk",
    "missing_chunk": "a document lacks some of its chunks",
    "wrong_dimension": "a vector does not have the table's dimension",
    "not_finite": "a vector holds NaN or infinity",
    "unreadable_input": "an input file cannot be read to its end, and the table's run had not skipped it",
    "missing_document": "a document of the input has no row",
    "stale_row": "a document has changed since its row was made",
    "surplus_row": "a row belongs to no document of the input",
    "wrong_vector": "a text, encoded again, gives another vector",
}


class Finding(NamedTuple):
    """One inconsistency: a key of KINDS, the file, row or document, and a message."""

    kind: str
    what: str
    message: str


class CheckedTable:
    """A table that is verified.

    Args:
      name: the table's folder.
      report: called with each finding as it comes.

    Attributes:
      manifest: of the live snapshot.
      folder: of the live snapshot.
      layout: the columns.
      reader: of its files.
      counts: of files, rows and documents that were checked, and of those that dead letters explain.
      dead_letters: the documents and files that the dead letters belong to.
      redigests: whether the digest of the kept fields can be made from the rows.
      compares_kept: whether the digest of the kept fields is known.
      required: the columns that may not be null.
    """

    def __init__(self, name: str, report: Callable[[Finding], object]) -> None:
        self.name = name
        self.manifest, self.folder = open_table(name)
        self.layout = self.manifest.layout
        self.reader = FileReader(self.manifest.file_format, self.layout, self.manifest.compression)
        self.counts: Counter[str] = Counter()
        self.dead_letters = Accounts(set(), {bad.file for bad in self.manifest.bad_files})
        # tf.Example has no numbers of 64 bits: what went into the digest is not what comes out of the table.
        rounds = self.manifest.file_format == "tfrecord" and any(f.type == "float" for f in self.layout.kept)
        self.redigests = bool(self.layout.kept or self.layout.sourced) and not rounds
        self.compares_kept = True
        may_be_null = {
            "n_truncated",
            "n_unknown",
            "char_start",
            "char_end",
            *(field.name for field in self.layout.kept),
        }
        self.required = [column for column in self.layout.columns() if column not in may_be_null]
        self._report = report

    def find(self, kind: str, what: str, message: str) -> None:
        """Reports a finding."""
        self._report(Finding(kind, what, message))

    def read_rows(self, index: VectorIndex, numbers: np.ndarray) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yields number, place and columns of some rows; an unreadable row has only the digest of its id, as its id.

        Args:
          index: the index of the rows.
          numbers: which rows, ascending.
        """
        for file in index.files:
            low, high = np.searchsorted(numbers, [file.first, file.first + file.rows])
            left = numbers[low:high]
            name = os.path.basename(file.path)
            try:
                for stored in self.reader.read(file, left) if len(left) else ():
                    here, left = np.split(left, np.searchsorted(left, [stored.numbers[-1] + 1]))
                    if len(here):
                        try:
                            columns = self.reader.columns(stored, np.searchsorted(stored.numbers, here))
                        except Exception:
                            left = np.concatenate([here, left])
                            raise
                        for i, number in enumerate(here.tolist()):
                            row = {column: values[i] for column, values in columns.items()}
                            yield number, f"{name} row {number - file.first}", row
                    if not len(left):
                        break
            except Exception:  # it was reported when all rows were read
                pass
            for number in left.tolist():
                digest = whole_digest(index.entries["id"][number]).hex()
                row = {"id": f"digest {digest}", "chunk": int(index.entries["chunk"][number])}
                yield number, f"{name} row {number - file.first}", row
