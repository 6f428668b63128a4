"""Which documents have to be encoded, and what is taken over: the back end for distributed engines, by joins.

Documents and known vectors meet under their content hash: a text whose vectors are known becomes rows at once, of equal
texts the first is encoded and the others follow it. Live rows and new rows meet under their ids: what the input no
longer has is gone, stale or kept. Both joins spread over all workers; what the local back end notes on a disk crosses
shuffles here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np

from pipeline.bundles import end_bundle
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, DeadLetter, Document, Row, digest_id, pack_followers
from pipeline.reuse.journal import list_folder, read_segment
from pipeline.reuse.look_up import SpotCheckPicker
from pipeline.reuse.merge import convert_rows
from pipeline.sinks.index import read_index, whole_digest
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.readers import VectorFile, VectorReader


class KnownFile(NamedTuple):
    """A file of the live table, and that of its index."""

    file: VectorFile
    index_path: str


@dataclass(frozen=True)
class JoinRule:
    """What a run on a distributed engine may take over.

    Attributes:
      files: of the live table.
      journal: folder of the journal. Workers list it when they begin: an engine that starts a job again, as Flink does
        when a machine is lost, then finds there what the job had made before.
      reader: of the live table's files.
      reusable: whether the live table's vectors have the wanted fingerprint.
      layout: of the rows that are written.
      prefix: what is put before every text.
      keeps_deleted: whether rows of documents that are gone are kept.
    """

    files: tuple[KnownFile, ...]
    journal: str
    reader: Optional[VectorReader]
    reusable: bool
    layout: TableLayout
    prefix: str
    keeps_deleted: bool


class Joined(NamedTuple):
    """What `JoinByContent` gives."""

    documents: beam.PCollection  # of Document, to encode
    rows: beam.PCollection  # of Row, recalled
    samples: beam.PCollection  # of Row, recalled, for comparison with spot checks
    moved: beam.PCollection  # of (digest, 0): ids of live rows whose vectors go on under another id
    bundle_counts: beam.PCollection


def read_known(known: KnownFile, rule: JoinRule) -> Iterator[Row]:
    """Rows of a file of the live table."""
    assert rule.reader is not None
    index = read_index(known.index_path)
    for stored in rule.reader.read(known.file, np.arange(known.file.rows)):
        entries = index.entries[stored.numbers - known.file.first]
        columns = rule.reader.columns(stored, np.arange(len(entries))) | {"n_chunks": entries["n_chunks"].tolist()}
        sources = [index.sources[number] for number in entries["source"]]
        yield from convert_rows(columns, sources, rule.reader.layout, rule.layout)


def read_journal(path: str) -> Iterator[Row]:
    """Rows of a segment of the journal, which have no id; none of a torn one."""
    segment = read_segment(path)
    if segment is None:
        return
    columns = segment.columns(range(len(segment.records)))
    for i, content in enumerate(segment.records["content"]):
        yield _bare_row(columns, i, whole_digest(content).hex())


def _bare_row(columns: Columns, i: int, content_hash: str) -> Row:
    names = ("chunk", "scale", "n_tokens", "n_truncated", "n_chunks")
    values = {name: columns[name][i] for name in names}
    return Row(id="", vector=columns["embedding"][i], content_hash=content_hash, kept=b"", text=None, **values)


def select_whole_rows(rows: Iterable[Row]) -> list[Row]:
    """Of rows with one content, one for each chunk, in order; none if a chunk is missing."""
    by_chunk: dict[int, Row] = {}
    for row in rows:
        by_chunk.setdefault(row.chunk, row)
    n_chunks = next(iter(by_chunk.values())).n_chunks if by_chunk else 0
    return [by_chunk[i] for i in sorted(by_chunk)] if len(by_chunk) == n_chunks else []


def give_row(row: Row, document: Document, layout: TableLayout) -> Row:
    """A document's row from the vector of an equal text."""
    return row._replace(
        id=document.id,
        kept=document.kept,
        text=document.text if layout.keep_text else None,
        source=document.origin.path,
    )


def read_known_by_content(known: KnownFile, rule: JoinRule) -> Iterator[tuple[str, Row]]:
    return ((row.content_hash, row) for row in read_known(known, rule))


def read_journal_by_content(path: str) -> Iterator[tuple[str, Row]]:
    return ((row.content_hash, row) for row in read_journal(path))


class MeetByContent(beam.DoFn):
    """(content hash, known rows and documents) -> documents to encode, recalled rows, samples."""

    def __init__(self, rule: JoinRule) -> None:
        self.rule = rule

    def start_bundle(self) -> None:
        self._counts: Counter[str] = Counter()
        self._probes = SpotCheckPicker()

    def process(self, group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[Any]:
        live_rows = list(group[1]["known"])
        known = select_whole_rows([*live_rows, *group[1]["journal"]])
        live = {(row.id, row.kept) for row in live_rows}
        documents = sorted(group[1]["documents"], key=lambda document: document.id)
        if not documents:
            return
        self._counts["documents"] += len(documents)
        first = documents[0]
        if known:
            for document in documents:
                self._counts["unchanged" if (document.id, document.kept) in live else "reused"] += 1
                for row in known:
                    yield beam.pvalue.TaggedOutput("rows", give_row(row, document, self.rule.layout))
            for name in {row.id for row in live_rows} - {document.id for document in documents}:
                yield beam.pvalue.TaggedOutput("moved", (digest_id(name), 0))
        else:
            self._counts["encoded"] += 1
            self._counts["same_text"] += len(documents) - 1
            yield first._replace(followers=pack_followers(documents[1:]))
        if self._probes.picks("known" if known else "encoded"):
            yield first._replace(is_spot_check=True)
            for row in known:
                yield beam.pvalue.TaggedOutput("samples", row)

    def finish_bundle(self) -> Iterator[Any]:
        counted = BundleCounts.of("reuse", dict(self._counts))
        yield from end_bundle([beam.pvalue.TaggedOutput("bundle_counts", counted)])


@dataclass
class JoinByContent(beam.PTransform):
    """PCollection[Document] -> Joined."""

    rule: JoinRule

    def expand(self, documents: beam.PCollection) -> Joined:
        rule = self.rule
        keyed_row = tuple[str, Row]
        known = (
            documents.pipeline
            | "KnownFiles" >> beam.Create(rule.files if rule.reusable else (), reshuffle=True).with_output_types(Any)
            | "ReadKnown" >> beam.FlatMap(read_known_by_content, rule).with_output_types(keyed_row)
        )
        journal = (
            documents.pipeline
            | "Journal" >> beam.Create([rule.journal], reshuffle=False)
            | "ListJournal" >> beam.FlatMap(list_folder).with_output_types(str)
            | "Segments" >> beam.Reshuffle()
            | "ReadJournal" >> beam.FlatMap(read_journal_by_content).with_output_types(keyed_row)
        )
        keyed = documents | "KeyByContent" >> beam.Map(_key_by_content, rule.prefix).with_output_types(
            tuple[str, Document]
        )
        outputs = (
            {"known": known, "journal": journal, "documents": keyed}
            | "GroupByContent" >> beam.CoGroupByKey()
            | "MeetByContent"
            >> beam.ParDo(MeetByContent(rule))
            .with_output_types(Document, rows=Row, samples=Row, moved=tuple[bytes, int], bundle_counts=BundleCounts)
            .with_outputs("rows", "samples", "moved", "bundle_counts", main="documents")
        )
        return Joined(outputs.documents, outputs.rows, outputs.samples, outputs.moved, outputs.bundle_counts)


def _key_by_content(document: Document, prefix: str) -> tuple[str, Document]:
    return hash_content(prefix + document.text, document.pair), document


class LiveEntry(NamedTuple):
    """A live row: its place, and the file that its document came from."""

    file: int  # position in the rule's files
    row: int
    source: str


class ListLive(beam.DoFn):
    """Files of the live table -> (digest of the id, LiveEntry)."""

    def __init__(self, rule: JoinRule) -> None:
        self.rule = rule

    def process(self, number: int) -> Iterator[tuple[bytes, LiveEntry]]:
        index = read_index(self.rule.files[number].index_path)
        for i, entry in enumerate(index.entries):
            yield whole_digest(entry["id"]), LiveEntry(number, i, index.sources[entry["source"]])


class MeetById(beam.DoFn):
    """(digest of an id, live, fresh and dead) -> (file, row) of live rows that are carried."""

    def __init__(self, keeps_deleted: bool, reusable: bool) -> None:
        self.keeps_deleted = keeps_deleted
        self.reusable = reusable

    def start_bundle(self) -> None:
        self._counts: Counter[str] = Counter()

    def process(self, group: tuple[bytes, dict[str, Iterable[Any]]], blind: Sequence[str]) -> Iterator[Any]:
        live, fresh = list(group[1]["live"]), list(group[1]["fresh"])
        self._counts["duplicate_rows"] += len(fresh) - len(set(fresh))
        self._counts["documents"] += bool(fresh)
        self._counts["live"] += bool(live)
        if not live or fresh:
            return
        is_stale = any(True for _ in group[1]["dead"]) or any(entry.source in set(blind) for entry in live)
        fate = "stale" if is_stale else "kept" if self.keeps_deleted else "deleted"
        self._counts[fate if self.reusable or fate == "deleted" else "lost"] += 1
        self._counts["moved"] += fate == "deleted" and any(True for _ in group[1]["moved"])
        if self.reusable and fate != "deleted":
            for entry in live:
                yield entry.file, entry.row

    def finish_bundle(self) -> Iterator[Any]:
        counted = BundleCounts.of("merge", dict(self._counts))
        yield from end_bundle([beam.pvalue.TaggedOutput("bundle_counts", counted)])


class ReadCarried(beam.DoFn):
    """(file, numbers of rows) -> rows."""

    def __init__(self, rule: JoinRule) -> None:
        self.rule = rule

    def process(self, group: tuple[int, Iterable[int]]) -> Iterator[Row]:
        wanted = set(group[1])
        for i, row in enumerate(read_known(self.rule.files[group[0]], self.rule)):
            if i in wanted:
                yield row


class Carried(NamedTuple):
    """What `JoinById` gives."""

    rows: beam.PCollection  # of Row, stale or kept
    bundle_counts: beam.PCollection


@dataclass
class JoinById(beam.PTransform):
    """PCollection[Row] of the run's documents -> Carried.

    Attributes:
      rule: what may be taken over.
      moved: from `JoinByContent`.
      dead_letters: PCollections of the run's dead letters.
    """

    rule: JoinRule
    moved: beam.PCollection
    dead_letters: Sequence[beam.PCollection]

    def expand(self, rows: beam.PCollection) -> Carried:
        rule = self.rule
        live = (
            rows.pipeline
            | "LiveFiles" >> beam.Create(range(len(rule.files)), reshuffle=True).with_output_types(int)
            | "ListLive" >> beam.ParDo(ListLive(rule)).with_output_types(tuple[bytes, LiveEntry])
        )
        fresh = rows | "FreshIds" >> beam.Map(_key_row).with_output_types(tuple[bytes, int])
        dead_letters = tuple(self.dead_letters) | "Letters" >> beam.Flatten()
        dead = dead_letters | "DeadIds" >> beam.FlatMap(_key_dead_letter).with_output_types(tuple[bytes, int])
        blind = dead_letters | "BlindFiles" >> beam.FlatMap(_blind_file).with_output_types(str) | beam.Distinct()
        outputs = (
            {"live": live, "fresh": fresh, "dead": dead, "moved": self.moved}
            | "GroupById" >> beam.CoGroupByKey()
            | "MeetById"
            >> beam.ParDo(MeetById(rule.keeps_deleted, rule.reusable), beam.pvalue.AsList(blind))
            .with_output_types(tuple[int, int], bundle_counts=BundleCounts)
            .with_outputs("bundle_counts", main="carried")
        )
        carried = (
            outputs.carried
            | "GroupByFile" >> beam.GroupByKey()
            | "ReadCarried" >> beam.ParDo(ReadCarried(rule)).with_output_types(Row)
        )
        return Carried(carried, outputs.bundle_counts)


def _key_row(row: Row) -> tuple[bytes, int]:
    return digest_id(row.id), row.chunk


def _key_dead_letter(dead_letter: DeadLetter) -> list[tuple[bytes, int]]:
    if dead_letter.id is None or dead_letter.reason == "duplicate_id":
        return []
    return [(digest_id(dead_letter.id), 0)]


def _blind_file(dead_letter: DeadLetter) -> list[str]:
    return [dead_letter.origin.path] if dead_letter.id is None else []
