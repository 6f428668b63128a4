"""Which documents have to be encoded: new and changed texts, each once. The local back end.

What is known already leaves the stream here, as notes on a local disk: marks on the rows that stay as they are, and
wishes for rows whose vector is known under another id, other kept fields, or from an equal text earlier in the run.
`carry` turns both into rows once everything is encoded.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np

from pipeline.bundles import end_bundle
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, Document, Origin, digest_id
from pipeline.reuse.index import KnownVectors, open_known
from pipeline.sinks.index import SourceNumbers, digest_kept, pack_records

STAYS, SUPERSEDED = 1, 2
MARK = np.dtype([("row", "<u8"), ("source", "<u4"), ("fate", "u1")])
BUFFERED_DOCUMENTS = 1024
BUFFERED_CHARACTERS = 4_000_000


class Note(NamedTuple):
    """A file of marks or wishes."""

    path: str
    kind: str


class Wish(NamedTuple):
    """A row that is wanted for a document whose text need not be encoded for it.

    Attributes:
      document: whose row it is; without its texts where they are not needed any more.
      content_hash: what to look for.
      rows: the numbers of known rows with its vectors, or None where an equal text is being encoded in this run.
    """

    document: Document
    content_hash: str
    rows: Optional[list[int]]

    def to_line(self) -> bytes:
        d = self.document
        values = [d.id, d.text, d.pair, d.kept.decode(), list(d.origin), self.content_hash, self.rows]
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Wish:
        name, text, pair, kept, origin, content_hash, rows = json.loads(line)
        return cls(Document(name, text, pair, kept.encode(), Origin(*origin)), content_hash, rows)


class DigestSet:
    """A set of 16-byte digests in sorted arrays, each at least twice as long as the next: 16 bytes a digest."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Adds digests `[m]` of S16; returns which of them were not there before, the first of equal ones."""
        values, first = np.unique(digests, return_index=True)
        unseen = np.ones(len(values), bool)
        for level in self._levels:
            at = np.minimum(np.searchsorted(level, values), len(level) - 1)
            unseen &= level[at] != values
        is_new = np.zeros(len(digests), bool)
        is_new[first[unseen]] = True
        if unseen.any():
            self._levels.append(values[unseen])
        while len(self._levels) > 1 and len(self._levels[-2]) < 2 * len(self._levels[-1]):
            last = self._levels.pop()
            self._levels[-1] = np.sort(np.concatenate([self._levels[-1], last]))
        return is_new


@dataclass(frozen=True)
class RecallRule:
    """What a run may take over.

    Attributes:
      folder: local folder of the index of known vectors; notes are written beside it.
      prefix: what is put before every text.
      reusable: whether the live table's vectors have the wanted fingerprint.
      rows_stay: whether unchanged rows can stay as they are stored: reusable, and same columns and file format.
      keep_text: rows carry their document's text.
    """

    folder: str
    prefix: str
    reusable: bool
    rows_stay: bool
    keep_text: bool


class SpotCheckPicker:
    """Picks the first of a kind of document and then ever fewer: the 4th, the 16th, the 64th."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def picks(self, kind: str) -> bool:
        self._seen[kind] += 1
        n = self._seen[kind]
        return n & (n - 1) == 0 and n.bit_length() % 2 == 1


class Verdicts(NamedTuple):
    """What is to be done about some documents.

    Attributes:
      names: their content hashes.
      rows: the live rows of each one's id.
      stays: which of them stay as they are stored, bool `[m]`.
      known: of those that do not stay, by number: the known rows with the vectors of their text.
      to_encode: numbers of those that have to be encoded.
    """

    names: list[str]
    rows: list[np.ndarray]
    stays: np.ndarray
    known: dict[int, np.ndarray]
    to_encode: set[int]


class Recaller:
    """Looks documents up in the index; of equal texts among those it is given, only the first has to be encoded.

    Attributes:
      counts: documents by what is to be done about them.
    """

    def __init__(self, known: KnownVectors, rule: RecallRule) -> None:
        self.counts: Counter[str] = Counter()
        self._known = known
        self._rule = rule
        self._encoded = DigestSet()

    def judge(self, documents: Sequence[Document]) -> Verdicts:
        """Decides about documents; call it for all of a bundle in their order."""
        names = [hash_content(self._rule.prefix + document.text, document.pair) for document in documents]
        hashes = np.array([bytes.fromhex(name) for name in names], "S16")
        rows = self._known.find_ids(np.array([digest_id(document.id) for document in documents], "S16"))
        stays = self._compare(documents, hashes, rows)
        open_ends = np.flatnonzero(~stays)
        known = dict(zip(open_ends.tolist(), self._known.find_contents(hashes[open_ends]), strict=True))
        unknown = np.array([i for i, found in known.items() if not len(found)], int)
        to_encode = set(unknown[self._encoded.add(hashes[unknown])].tolist())
        self.counts["documents"] += len(documents)
        self.counts["unchanged"] += int(stays.sum())
        self.counts["encoded"] += len(to_encode)
        self.counts["reused"] += len(known) - len(unknown)
        self.counts["same_text"] += len(unknown) - len(to_encode)
        return Verdicts(names, rows, stays, known, to_encode)

    def _compare(self, documents: Sequence[Document], hashes: np.ndarray, found: list[np.ndarray]) -> np.ndarray:
        """Compares documents with the live rows of their ids; returns which of them `[m]` stay as they are."""
        entries = self._known.entries
        kept = np.array([digest_kept(document.kept) for document in documents], "<u8")
        stays = np.zeros(len(documents), bool)
        for i, rows in enumerate(found):
            if not len(rows):
                self.counts["new"] += 1
                continue
            some = entries[rows]
            same_text = len(rows) == some["n_chunks"][0] and bool((some["content"] == hashes[i]).all())
            stays[i] = self._rule.rows_stay and same_text and bool((some["kept"] == kept[i]).all())
            if not stays[i]:
                self.counts["changed" if not same_text else "updated" if self._rule.reusable else "remade"] += 1
        return stays


class MarkWriter:
    """Writes marks on the live rows of the documents that were seen to a file."""

    def __init__(self, path: str) -> None:
        self.note = Note(path, "marks")
        self._sources = SourceNumbers()
        self._file = open(path, "wb")  # noqa: SIM115  for the length of a bundle

    def write(self, documents: Sequence[Document], verdicts: Verdicts) -> None:
        marks = []
        for i, rows in enumerate(verdicts.rows):
            if len(rows):
                source = self._sources.number(documents[i].origin.path)
                marks += [(row, source, STAYS if verdicts.stays[i] else SUPERSEDED) for row in rows.tolist()]
        if marks:
            np.array(marks, MARK).tofile(self._file)

    def close(self) -> None:
        self._file.write(pack_records(np.empty(0, MARK), list(self._sources.paths)))
        self._file.close()


class RecallDocuments(beam.DoFn):
    """Passes on the documents that have to be encoded, and a few spot checks; notes the others."""

    def __init__(self, rule: RecallRule) -> None:
        self.rule = rule

    def setup(self) -> None:
        self._known: KnownVectors = open_known(self.rule.folder)

    def start_bundle(self) -> None:
        self._buffer: list[Document] = []
        self._characters = 0
        self._recaller = Recaller(self._known, self.rule)
        self._probes = SpotCheckPicker()
        name = uuid.uuid4().hex
        self._marks = MarkWriter(os.path.join(self.rule.folder, f"marks-{name}.bin"))
        self._wishes_path = os.path.join(self.rule.folder, f"wishes-{name}.jsonl")
        self._wishes_file = open(self._wishes_path, "wb")  # noqa: SIM115  for the length of the bundle

    def process(self, document: Document) -> Iterator[Document]:
        self._buffer.append(document)
        self._characters += len(document.text) + len(document.pair or "")
        if len(self._buffer) >= BUFFERED_DOCUMENTS or self._characters >= BUFFERED_CHARACTERS:
            yield from self._flush()

    def finish_bundle(self) -> Iterator[Any]:
        yield from end_bundle(self._flush())
        self._marks.close()
        self._wishes_file.close()
        notes = (self._marks.note, Note(self._wishes_path, "wishes"))
        yield from end_bundle(beam.pvalue.TaggedOutput("notes", note) for note in notes)
        counted = BundleCounts.of("reuse", {name: n for name, n in self._recaller.counts.items() if n})
        yield from end_bundle([beam.pvalue.TaggedOutput("bundle_counts", counted)])

    def _flush(self) -> Iterator[Document]:
        documents, self._buffer, self._characters = self._buffer, [], 0
        if not documents:
            return
        verdicts = self._recaller.judge(documents)
        self._marks.write(documents, verdicts)
        for i, document in enumerate(documents):
            if i in verdicts.to_encode:
                yield document
            elif not verdicts.stays[i]:
                self._wish(document, verdicts.names[i], verdicts.known[i])
            if self._probes.picks("encoded" if i in verdicts.to_encode else "known"):
                yield document._replace(is_spot_check=True)

    def _wish(self, document: Document, content_hash: str, rows: np.ndarray) -> None:
        if len(rows):
            spare = document._replace(text=document.text if self.rule.keep_text else "", pair=None)
            wish = Wish(spare, content_hash, rows.tolist())
        else:  # the text may still be needed, for the dead letter
            wish = Wish(document, content_hash, None)
        self._wishes_file.write(wish.to_line())


class Recalled(NamedTuple):
    """What `Recall` gives."""

    documents: beam.PCollection  # of Document, to encode
    notes: beam.PCollection  # of Note
    bundle_counts: beam.PCollection  # of BundleCounts


@dataclass
class Recall(beam.PTransform):
    """PCollection[Document] -> Recalled."""

    rule: RecallRule

    def expand(self, documents: beam.PCollection) -> Recalled:
        recall = beam.ParDo(RecallDocuments(self.rule)).with_output_types(
            Document, notes=Note, bundle_counts=BundleCounts
        )
        outputs = documents | "RecallDocuments" >> recall.with_outputs("notes", "bundle_counts", main="documents")
        return Recalled(outputs.documents, outputs.notes, outputs.bundle_counts)
