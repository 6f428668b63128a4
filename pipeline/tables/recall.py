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
from apache_beam.transforms.window import GlobalWindows

from pipeline.preprocess.chunking import hash_content
from pipeline.records import Document, Origin, Tally, digest_id
from pipeline.sinks.index import SourceNumbers, digest_kept, pack_records
from pipeline.tables.known import KnownVectors, open_known

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
      rows_stay: whether unchanged rows can stay as they are stored: same fingerprint, columns and file format.
      keep_text: rows carry their document's text.
    """

    folder: str
    prefix: str
    rows_stay: bool
    keep_text: bool


class ProbePicker:
    """Picks the first of a kind of document and then ever fewer: the 4th, the 16th, the 64th."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def picks(self, kind: str) -> bool:
        self._seen[kind] += 1
        n = self._seen[kind]
        return n & (n - 1) == 0 and n.bit_length() % 2 == 1


class RecallDocuments(beam.DoFn):
    """Passes on the documents that have to be encoded, and a few probes; notes the others."""

    def __init__(self, rule: RecallRule) -> None:
        self.rule = rule

    def setup(self) -> None:
        self._known: KnownVectors = open_known(self.rule.folder)

    def start_bundle(self) -> None:
        self._buffer: list[Document] = []
        self._characters = 0
        self._counts: Counter = Counter()
        self._marks: list[np.ndarray] = []
        self._sources = SourceNumbers()
        self._encoded = DigestSet()
        self._probes = ProbePicker()
        name = uuid.uuid4().hex
        self._marks_path = os.path.join(self.rule.folder, f"marks-{name}.bin")
        self._wishes_path = os.path.join(self.rule.folder, f"wishes-{name}.jsonl")
        self._marks_file = open(self._marks_path, "wb")  # noqa: SIM115  for the length of the bundle
        self._wishes_file = open(self._wishes_path, "wb")  # noqa: SIM115

    def process(self, document: Document) -> Iterator[Document]:
        self._buffer.append(document)
        self._characters += len(document.text) + len(document.pair or "")
        if len(self._buffer) >= BUFFERED_DOCUMENTS or self._characters >= BUFFERED_CHARACTERS:
            yield from self._flush()

    def finish_bundle(self) -> Iterator[Any]:
        for document in self._flush():
            yield GlobalWindows.windowed_value(document)
        self._marks_file.write(pack_records(np.empty(0, MARK), list(self._sources.paths)))
        for file, path, kind in (
            (self._marks_file, self._marks_path, "marks"),
            (self._wishes_file, self._wishes_path, "wishes"),
        ):
            file.close()
            yield beam.pvalue.TaggedOutput("notes", GlobalWindows.windowed_value(Note(path, kind)))
        tally = Tally.of("recall", dict(self._counts))
        yield beam.pvalue.TaggedOutput("tallies", GlobalWindows.windowed_value(tally))

    def _flush(self) -> Iterator[Document]:
        documents, self._buffer, self._characters = self._buffer, [], 0
        if not documents:
            return
        names = [hash_content(self.rule.prefix + document.text, document.pair) for document in documents]
        hashes = np.array([bytes.fromhex(name) for name in names], "S16")
        stays = self._mark(documents, hashes)
        self._counts["documents"] += len(documents)
        self._counts["unchanged"] += int(stays.sum())
        open_ends = np.flatnonzero(~stays)
        known = dict(zip(open_ends.tolist(), self._known.find_contents(hashes[open_ends]), strict=True))
        unknown = np.array([i for i, rows in known.items() if not len(rows)], int)
        to_encode = set(unknown[self._encoded.add(hashes[unknown])].tolist())
        for i, document in enumerate(documents):
            if i in to_encode:
                self._counts["encoded"] += 1
                yield document
            elif not stays[i]:
                self._wish(document, names[i], known[i])
            if self._probes.picks("encoded" if i in to_encode else "known"):
                yield document._replace(is_probe=True)

    def _mark(self, documents: Sequence[Document], hashes: np.ndarray) -> np.ndarray:
        """Marks the live rows of the documents' ids; returns which documents `[m]` stay as they are."""
        entries = self._known.entries
        kept = np.array([digest_kept(document.kept) for document in documents], "<u8")
        found = self._known.find_ids(np.array([digest_id(document.id) for document in documents], "S16"))
        stays = np.zeros(len(documents), bool)
        marks = []
        for i, rows in enumerate(found):
            if not len(rows):
                self._counts["new"] += 1
                continue
            some = entries[rows]
            same_text = len(rows) == some["n_chunks"][0] and bool((some["content"] == hashes[i]).all())
            stays[i] = self.rule.rows_stay and same_text and bool((some["kept"] == kept[i]).all())
            if not stays[i]:
                self._counts["updated" if same_text else "changed"] += 1
            source = self._sources.number(documents[i].origin.path)
            marks += [(row, source, STAYS if stays[i] else SUPERSEDED) for row in rows.tolist()]
        if marks:
            np.array(marks, MARK).tofile(self._marks_file)
        return stays

    def _wish(self, document: Document, content_hash: str, rows: np.ndarray) -> None:
        if len(rows):
            self._counts["recalled"] += 1
            spare = document._replace(text=document.text if self.rule.keep_text else "", pair=None)
            wish = Wish(spare, content_hash, rows.tolist())
        else:  # the text may still be needed, for the dead letter
            self._counts["equal_texts"] += 1
            wish = Wish(document, content_hash, None)
        self._wishes_file.write(wish.to_line())


@dataclass
class Recall(beam.PTransform):
    """PCollection[Document] -> (those to encode, PCollection[Note], PCollection[Tally])."""

    rule: RecallRule

    def expand(self, documents: beam.PCollection) -> tuple:
        recall = beam.ParDo(RecallDocuments(self.rule)).with_output_types(Document, notes=Note, tallies=Tally)
        outputs = documents | "RecallDocuments" >> recall.with_outputs("notes", "tallies", main="documents")
        return outputs.documents, outputs.notes, outputs.tallies
