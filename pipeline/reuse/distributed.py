"""Decides which documents are encoded and which rows stay: the back end for distributed engines, by joins.

All decisions use digests. Documents are joined with the live rows of their id (`CompareById`); changed ones are joined
with existing vectors of their text (`DecideByContent`). After encoding, requests are joined with the vectors that they
need (`AnswerByContent`), and the results of each id with its live rows (`DecideById`). Live rows that stay are
copied file by file (`CopyLiveRows`). So a text crosses a shuffle once if nothing has changed, and a vector only if
another document asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam

from pipeline.reuse.answer_requests import AnswerByContent
from pipeline.reuse.compare_by_id import CompareById, Compared
from pipeline.reuse.copy import CopyLiveRows
from pipeline.reuse.decide_by_content import DecideByContent, Decided
from pipeline.reuse.decide_by_id import DecideById
from pipeline.reuse.live_table import DistributedReuse


class LookedUp(NamedTuple):
    """What `LookUpVectors` gives."""

    documents: beam.PCollection  # of Document, to encode
    dead_letters: beam.PCollection  # of DeadLetter, of duplicates
    bundle_counts: beam.PCollection  # of BundleCounts
    compared: Compared
    decided: Decided


@dataclass
class LookUpVectors(beam.PTransform):
    """PCollection[Document] -> LookedUp: all decisions before a run encodes."""

    reuse: DistributedReuse

    def expand(self, documents: beam.PCollection) -> LookedUp:
        compared = documents | "CompareById" >> CompareById(self.reuse)
        decided = compared.documents | "DecideByContent" >> DecideByContent(self.reuse, compared.unseen)
        to_encode = (decided.documents, compared.spot_checks) | "ToEncode" >> beam.Flatten()
        counts = (compared.bundle_counts, decided.bundle_counts) | "Counts" >> beam.Flatten()
        return LookedUp(to_encode, compared.dead_letters, counts, compared, decided)


class Reused(NamedTuple):
    """What `ReuseRows` gives.

    Attributes:
      rows: all new rows: encoded ones, and those from requests.
      samples: rows to compare spot checks with.
      dead_letters: of documents with the same text as one that could not be encoded.
      shards: files with the live rows that stay.
      bundle_counts: BundleCounts.
    """

    rows: beam.PCollection
    samples: beam.PCollection
    dead_letters: beam.PCollection
    shards: beam.PCollection
    bundle_counts: beam.PCollection


@dataclass
class ReuseRows(beam.PTransform):
    """PCollection[Row] that were encoded -> Reused: all decisions after a run has encoded.

    Attributes:
      reuse: what may be reused.
      looked_up: from `LookUpVectors`.
      dead_letters: PCollections of the run's dead letters so far.
      bad_files: PCollection[SkippedFile], the input files that could not be read to their ends.
    """

    reuse: DistributedReuse
    looked_up: LookedUp
    dead_letters: Sequence[beam.PCollection]
    bad_files: beam.PCollection

    def expand(self, encoded: beam.PCollection) -> Reused:
        reuse, compared, decided = self.reuse, self.looked_up.compared, self.looked_up.decided
        dead_letters = tuple(self.dead_letters) | "DeadLetters" >> beam.Flatten()
        answered = encoded | "AnswerByContent" >> AnswerByContent(
            reuse,
            wanted=(compared.wanted, decided.wanted),
            requests=(compared.requests, decided.requests),
            dead_letters=dead_letters,
        )
        rows = (encoded, answered.rows) | "Rows" >> beam.Flatten()
        dropped = rows | "DecideById" >> DecideById(
            reuse, compared.open_rows, decided.moved, [dead_letters, answered.dead_letters], self.bad_files
        )
        copied = dropped.rows | "CopyLiveRows" >> CopyLiveRows(reuse, compared.sources)
        counts = (dropped.bundle_counts, copied.bundle_counts) | "Counts" >> beam.Flatten()
        return Reused(rows, answered.samples, answered.dead_letters, copied.shards, counts)
