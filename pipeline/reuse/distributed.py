"""Decides which documents are encoded and which rows stay: the back end for distributed engines, by joins.

All decisions use digests. Documents are joined with the live rows of their id (`CompareById`); changed ones are joined
with existing vectors of their text (`DecideByContent`). After encoding, requests are joined with the vectors that they
need (`AnswerByContent`), and the results of each id with its live rows (`DecideById`). Live rows that stay are
copied file by file (`CopyLiveRows`). So a text crosses a shuffle once if nothing has changed, and a vector only if
another document asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np

from pipeline.records import BundleCounts, DeadLetter, Document, Row
from pipeline.reuse.by_content import (
    UNSEEN,
    AnswerRequests,
    DecideTexts,
    key_dead_letter,
    key_document,
    key_vector,
    pack_journal_place,
)
from pipeline.reuse.by_id import CompareDocuments, DecideRows, find_incomplete, mark_dead, mark_new
from pipeline.reuse.copy import CollectMoves, CollectRows, CopyRows, LiveFile, group_files, read_wanted
from pipeline.reuse.decide import ReusePolicy
from pipeline.reuse.journal import list_folder, read_segment
from pipeline.reuse.wire import DocumentPacker, list_live_rows, pack_place
from pipeline.sinks.index import read_index, whole_digest
from pipeline.sinks.readers import VectorReader
from pipeline.sinks.writing import RowFormat, Shard

KEYED = tuple[bytes, bytes]
PLACED = tuple[Any, int]  # a file of the live table by number, or a segment by path; a row


@dataclass(frozen=True)
class DistributedReuse:
    """What a run on a distributed engine may reuse.

    Attributes:
      files: of the live table.
      journal: folder of the journal. Workers list it when they begin: an engine that restarts a job, as Flink does
        when a machine is lost, then finds the vectors that the job had made before.
      reader: of the live table's files.
      policy: what may be reused.
      form: how rows are written.
      folder: where files are written.
      shard_bytes: size at which a new file is started.
      inputs: paths of the input files.
      prefix: of every text.
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


class Compared(NamedTuple):
    """What `CompareById` gives; see `CompareDocuments`."""

    documents: beam.PCollection
    spot_checks: beam.PCollection
    open_rows: beam.PCollection
    unseen: beam.PCollection
    sources: beam.PCollection
    wanted: beam.PCollection
    requests: beam.PCollection
    dead_letters: beam.PCollection
    bundle_counts: beam.PCollection


@dataclass
class CompareById(beam.PTransform):
    """PCollection[Document] -> Compared."""

    reuse: DistributedReuse

    def expand(self, documents: beam.PCollection) -> Compared:
        reuse = self.reuse
        live = (
            documents.pipeline
            | "LiveFiles" >> beam.Create(range(len(reuse.files)), reshuffle=True).with_output_types(int)
            | "ListLiveRows" >> beam.FlatMap(list_live, reuse).with_output_types(KEYED)
        )
        packed = documents | "PackDocuments" >> beam.ParDo(PackDocuments(reuse.inputs)).with_output_types(KEYED)
        compare = beam.ParDo(CompareDocuments(reuse.policy, reuse.inputs, reuse.prefix)).with_output_types(
            Document,
            spot_checks=Document,
            open_rows=KEYED,
            unseen=KEYED,
            sources=tuple[int, tuple[int, int]],
            wanted=PLACED,
            requests=KEYED,
            dead_letters=DeadLetter,
            bundle_counts=BundleCounts,
        )
        outputs = (
            (packed, live)
            | "DocumentsAndLiveRows" >> beam.Flatten()
            | "GroupById" >> beam.GroupByKey()
            | "CompareDocuments" >> compare.with_outputs(*Compared._fields[1:], main="documents")
        )
        return Compared(*(outputs[name] for name in Compared._fields))


class Decided(NamedTuple):
    """What `DecideByContent` gives; see `DecideTexts`."""

    documents: beam.PCollection
    requests: beam.PCollection
    wanted: beam.PCollection
    moved: beam.PCollection
    bundle_counts: beam.PCollection


@dataclass
class DecideByContent(beam.PTransform):
    """PCollection[Document] that are not unchanged -> Decided.

    Attributes:
      reuse: what may be reused.
      unseen: from `CompareById`.
    """

    reuse: DistributedReuse
    unseen: beam.PCollection

    def expand(self, documents: beam.PCollection) -> Decided:
        reuse = self.reuse
        files = range(len(reuse.files)) if reuse.policy.same_fingerprint else ()
        known = (
            documents.pipeline
            | "KnownFiles" >> beam.Create(files, reshuffle=True).with_output_types(int)
            | "ListKnownRows" >> beam.FlatMap(list_known, reuse).with_output_types(KEYED)
        )
        journal = (
            documents.pipeline
            | "Journal" >> beam.Create([reuse.journal], reshuffle=False)
            | "ListJournal" >> beam.FlatMap(list_folder).with_output_types(str)
            | "Segments" >> beam.Reshuffle()
            | "ListSegmentRows" >> beam.FlatMap(list_segment).with_output_types(KEYED)
        )
        unseen = self.unseen | "MarkUnseen" >> beam.MapTuple(mark_unseen).with_output_types(KEYED)
        packed = documents | "PackChanged" >> beam.ParDo(PackByContent(reuse.inputs, reuse.prefix)).with_output_types(
            KEYED
        )
        decide = beam.ParDo(DecideTexts(reuse.inputs, reuse.keep_text)).with_output_types(
            Document, requests=KEYED, wanted=PLACED, moved=KEYED, bundle_counts=BundleCounts
        )
        outputs = (
            (packed, known, journal, unseen)
            | "DocumentsAndVectors" >> beam.Flatten()
            | "GroupByContent" >> beam.GroupByKey()
            | "DecideTexts" >> decide.with_outputs(*Decided._fields[1:], main="documents")
        )
        return Decided(*(outputs[name] for name in Decided._fields))


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


class Answered(NamedTuple):
    """What `AnswerByContent` gives."""

    rows: beam.PCollection  # of Row
    samples: beam.PCollection  # of Row, to compare spot checks with
    dead_letters: beam.PCollection  # of DeadLetter


@dataclass
class AnswerByContent(beam.PTransform):
    """PCollection[Row] that were encoded -> Answered.

    Attributes:
      reuse: what may be reused.
      looked_up: from `LookUpVectors`.
      dead_letters: of documents that could not be encoded.
    """

    reuse: DistributedReuse
    looked_up: LookedUp
    dead_letters: beam.PCollection

    def expand(self, rows: beam.PCollection) -> Answered:
        reuse, compared, decided = self.reuse, self.looked_up.compared, self.looked_up.decided
        reused = (
            (compared.wanted, decided.wanted)
            | "Wanted" >> beam.Flatten()
            | "CollectWanted" >> beam.CombinePerKey(CollectRows())
            | "SpreadWanted" >> beam.Reshuffle()
            | "ReadWanted" >> beam.FlatMap(read_wanted, reuse.files, reuse.reader, reuse.form.layout)
            | "KeyReused" >> beam.Map(key_vector).with_output_types(KEYED)
        )
        fresh = rows | "Shared" >> beam.Filter(is_shared) | "KeyShared" >> beam.Map(key_vector).with_output_types(KEYED)
        dead_letters = (
            self.dead_letters
            | "SharedDead" >> beam.Filter(is_shared)
            | "KeyDead" >> beam.Map(key_dead_letter).with_output_types(KEYED)
        )
        answer = beam.ParDo(AnswerRequests(reuse.keep_text)).with_output_types(
            Row, samples=Row, dead_letters=DeadLetter
        )
        outputs = (
            (reused, fresh, dead_letters, compared.requests, decided.requests)
            | "VectorsAndRequests" >> beam.Flatten()
            | "GroupByContent" >> beam.GroupByKey()
            | "AnswerRequests" >> answer.with_outputs("samples", "dead_letters", main="rows")
        )
        return Answered(outputs.rows, outputs.samples, outputs.dead_letters)


class Dropped(NamedTuple):
    """What `DecideById` gives."""

    rows: beam.PCollection  # of (file, row), live rows that do not stay
    bundle_counts: beam.PCollection  # of BundleCounts


@dataclass
class DecideById(beam.PTransform):
    """PCollection[Row], all new rows of a run -> Dropped.

    Attributes:
      reuse: what may be reused.
      looked_up: from `LookUpVectors`.
      dead_letters: PCollections of all dead letters of the run.
    """

    reuse: DistributedReuse
    looked_up: LookedUp
    dead_letters: Sequence[beam.PCollection]

    def expand(self, rows: beam.PCollection) -> Dropped:
        dead_letters = tuple(self.dead_letters) | "DeadLetters" >> beam.Flatten()
        new = rows | "MarkNew" >> beam.Map(mark_new).with_output_types(KEYED)
        dead = dead_letters | "MarkDead" >> beam.FlatMap(mark_dead).with_output_types(KEYED)
        incomplete = dead_letters | "FindIncomplete" >> beam.FlatMap(find_incomplete).with_output_types(str)
        outputs = (
            (self.looked_up.compared.open_rows, self.looked_up.decided.moved, new, dead)
            | "RowsAndResults" >> beam.Flatten()
            | "GroupById" >> beam.GroupByKey()
            | "DecideRows"
            >> beam.ParDo(DecideRows(self.reuse.policy), beam.pvalue.AsList(incomplete | "Distinct" >> beam.Distinct()))
            .with_output_types(tuple[int, int], bundle_counts=BundleCounts)
            .with_outputs("bundle_counts", main="rows")
        )
        return Dropped(outputs.rows, outputs.bundle_counts)


class Copied(NamedTuple):
    """What `CopyLiveRows` gives."""

    shards: beam.PCollection  # of Shard
    bundle_counts: beam.PCollection  # of BundleCounts


@dataclass
class CopyLiveRows(beam.PTransform):
    """PCollection[(file, row)] that do not stay -> Copied, with all others.

    Attributes:
      reuse: what may be reused.
      sources: from `CompareById`.
    """

    reuse: DistributedReuse
    sources: beam.PCollection

    def expand(self, dropped: beam.PCollection) -> Copied:
        reuse = self.reuse
        groups = group_files(reuse.files, reuse.shard_bytes) if reuse.policy.same_fingerprint else []
        bitmaps = dropped | "CollectDropped" >> beam.CombinePerKey(CollectRows())
        moves = self.sources | "CollectMoves" >> beam.CombinePerKey(CollectMoves())
        own = (reuse.form, reuse.folder, reuse.shard_bytes)
        copy = CopyRows(reuse.files, reuse.reader, *own, reuse.inputs, reuse.policy.rows_stay)
        outputs = (
            dropped.pipeline
            | "FilesToCopy" >> beam.Create(groups, reshuffle=True).with_output_types(Any)
            | "CopyRows"
            >> beam.ParDo(copy, beam.pvalue.AsMultiMap(bitmaps), beam.pvalue.AsMultiMap(moves))
            .with_output_types(Shard, bundle_counts=BundleCounts)
            .with_outputs("bundle_counts", main="shards")
        )
        return Copied(outputs.shards, outputs.bundle_counts)


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
    """

    reuse: DistributedReuse
    looked_up: LookedUp
    dead_letters: Sequence[beam.PCollection]

    def expand(self, encoded: beam.PCollection) -> Reused:
        reuse, looked_up = self.reuse, self.looked_up
        dead_letters = tuple(self.dead_letters) | "DeadLetters" >> beam.Flatten()
        answered = encoded | "AnswerByContent" >> AnswerByContent(reuse, looked_up, dead_letters)
        rows = (encoded, answered.rows) | "Rows" >> beam.Flatten()
        dropped = rows | "DecideById" >> DecideById(reuse, looked_up, [dead_letters, answered.dead_letters])
        copied = dropped.rows | "CopyLiveRows" >> CopyLiveRows(reuse, looked_up.compared.sources)
        counts = (dropped.bundle_counts, copied.bundle_counts) | "Counts" >> beam.Flatten()
        return Reused(rows, answered.samples, answered.dead_letters, copied.shards, counts)


class PackDocuments(beam.DoFn):
    """Document -> (digest of the id, packed document)."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self._inputs = inputs

    def setup(self) -> None:
        self._packer = DocumentPacker(self._inputs)

    def process(self, document: Document) -> Iterator[tuple[bytes, bytes]]:
        yield self._packer.pack(document)


class PackByContent(beam.DoFn):
    """Document -> (content hash, packed document)."""

    def __init__(self, inputs: Sequence[str], prefix: str) -> None:
        self._inputs = inputs
        self._prefix = prefix

    def setup(self) -> None:
        self._packer = DocumentPacker(self._inputs)

    def process(self, document: Document) -> Iterator[tuple[bytes, bytes]]:
        yield key_document(document, self._prefix, self._packer)


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
    """The records of a segment of the journal, as `DecideTexts` takes them; none of an incomplete one."""
    segment = read_segment(path)
    records = segment.records if segment is not None else np.empty(0, [("content", "S16")])
    for row, record in enumerate(records):
        place = pack_journal_place(path, row, int(record["chunk"]), int(record["n_chunks"]))
        yield whole_digest(record["content"]), place


def mark_unseen(content: bytes, digest: bytes) -> tuple[bytes, bytes]:
    """A live row whose document was not seen, as `DecideTexts` takes it."""
    return content, UNSEEN + digest


def is_shared(output: Row | DeadLetter) -> bool:
    """Whether other documents with the same text need the row's vector or the dead letter."""
    return output.shared
