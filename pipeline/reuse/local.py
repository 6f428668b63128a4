"""Decides which documents are encoded: the back end of the local engine, with a vector index on a local disk.

Documents that are not encoded become notes on the disk: marks on the live rows of documents that were seen, and
requests for rows whose vector is in the index or will be encoded for a document with the same text. `complete.py` and
`merge.py` turn both into rows once everything is encoded.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from pipeline.bundles import end_bundle
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, Document, digest_id
from pipeline.reuse.decide import (
    Change,
    DocumentAction,
    ReusePolicy,
    compare_documents,
    count_actions,
    count_changes,
    decide_documents,
)
from pipeline.reuse.digests import DigestSet, digest_documents
from pipeline.reuse.index import VectorIndex, open_index
from pipeline.reuse.requests import RequestWriter
from pipeline.reuse.spot_checks import SpotCheckPicker
from pipeline.sinks.index import SourceNumbers, pack_records, parse_hashes

MARK = np.dtype([("row", "<u8"), ("source", "<u4"), ("unchanged", "?")])
BUFFERED_DOCUMENTS = 1024
BUFFERED_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class LocalReuse:
    """What a run on the local engine may reuse, and where the vector index is.

    Attributes:
      folder: local folder of the vector index; notes are written beside it.
      prefix: of every text.
      policy: what may be reused.
      keep_text: rows have their document's text.
      inputs: the input files that there are.
    """

    folder: str
    prefix: str
    policy: ReusePolicy
    keep_text: bool
    inputs: frozenset[str]


class LookedUp(NamedTuple):
    """The decisions about some documents.

    Attributes:
      hashes: their content hashes.
      live: the live rows of each one's id.
      changes: `[m]` of `Change`.
      actions: `[m]` of `DocumentAction`.
      known: rows with vectors of the text, by the number of the document, for documents that do not keep their rows.
    """

    hashes: list[str]
    live: list[np.ndarray]
    changes: np.ndarray
    actions: np.ndarray
    known: dict[int, np.ndarray]


class DocumentLookUp:
    """Looks documents up in the index. Of equal texts among those that it is given, only the first is encoded.

    Attributes:
      counts: documents by change and action.
    """

    def __init__(self, index: VectorIndex, reuse: LocalReuse) -> None:
        self.counts: Counter[str] = Counter()
        self._index = index
        self._reuse = reuse
        self._encoded = DigestSet()

    def look_up(self, documents: Sequence[Document]) -> LookedUp:
        """Decides about documents; call it for all documents of a bundle, in order."""
        hashes = [hash_content(self._reuse.prefix + document.text, document.pair) for document in documents]
        content = parse_hashes(hashes)
        kept = digest_documents(documents, self._reuse.policy)
        live = self._index.find_ids(np.array([digest_id(document.id) for document in documents], "S16"))
        owner = np.repeat(np.arange(len(documents)), [len(rows) for rows in live])
        rows = self._index.entries[np.concatenate([np.empty(0, np.int64), *live]).astype(np.int64)]
        changes = compare_documents(content, kept, owner, rows, self._reuse.policy)
        to_find = np.flatnonzero(changes != Change.UNCHANGED)
        known = dict(zip(to_find.tolist(), self._index.find_contents(content[to_find]), strict=True))
        is_known, is_first = np.zeros(len(documents), bool), np.zeros(len(documents), bool)
        is_known[to_find] = [len(found) > 0 for found in known.values()]
        unknown = to_find[~is_known[to_find]]
        is_first[unknown] = self._encoded.add(content[unknown])
        actions = decide_documents(changes == Change.UNCHANGED, is_known, is_first)
        self.counts += count_changes(changes) + count_actions(actions)
        return LookedUp(hashes, live, changes, actions, known)


class MarkWriter:
    """Writes marks on the live rows of the documents that were seen to a file."""

    def __init__(self, path: str) -> None:
        self._sources = SourceNumbers()
        self._file = open(path, "wb")  # noqa: SIM115  open during a bundle

    def write(self, documents: Sequence[Document], found: LookedUp) -> None:
        marks = []
        for i, rows in enumerate(found.live):
            if len(rows):
                source = self._sources.number(documents[i].origin.path)
                marks += [(row, source, found.changes[i] == Change.UNCHANGED) for row in rows.tolist()]
        if marks:
            np.array(marks, MARK).tofile(self._file)

    def close(self) -> None:
        self._file.write(pack_records(np.empty(0, MARK), list(self._sources.paths)))
        self._file.close()


class NoteWriter:
    """Writes the notes of one bundle.

    Attributes:
      path: the prefix of its files' names.
    """

    def __init__(self, reuse: LocalReuse) -> None:
        self.path = os.path.join(reuse.folder, f"notes-{uuid.uuid4().hex}")
        self._marks = MarkWriter(marks_file(self.path))
        self._requests = RequestWriter(self.path, reuse.keep_text)

    def write(self, documents: Sequence[Document], found: LookedUp) -> None:
        self._marks.write(documents, found)
        for i in np.flatnonzero(np.isin(found.actions, (DocumentAction.REUSE, DocumentAction.SHARE))).tolist():
            self._requests.write(documents[i], found.hashes[i], found.known[i])

    def close(self) -> None:
        self._marks.close()
        self._requests.close()


def marks_file(note: str) -> str:
    """The file with the marks of a bundle, by the path of its notes."""
    return f"{note}.marks"


class LookUpDocuments(beam.DoFn):
    """Yields the documents that must be encoded, and a few spot checks; writes notes of the others."""

    def __init__(self, reuse: LocalReuse) -> None:
        self.reuse = reuse

    def setup(self) -> None:
        self._index: VectorIndex = open_index(self.reuse.folder)

    def start_bundle(self) -> None:
        self._buffer: list[Document] = []
        self._characters = 0
        self._look_up = DocumentLookUp(self._index, self.reuse)
        self._spot_checks = SpotCheckPicker()
        self._notes = NoteWriter(self.reuse)

    def process(self, document: Document) -> Iterator[Document]:
        self._buffer.append(document)
        self._characters += len(document.text) + len(document.pair or "")
        if len(self._buffer) >= BUFFERED_DOCUMENTS or self._characters >= BUFFERED_CHARACTERS:
            yield from self._flush()

    def finish_bundle(self) -> Iterator[Any]:
        yield from end_bundle(self._flush())
        self._notes.close()
        counts = {name: n for name, n in self._look_up.counts.items() if n}
        del self._look_up  # its digests of all texts, which would stay in memory until the run ends
        outputs = (("notes", self._notes.path), ("bundle_counts", BundleCounts.of("reuse", counts)))
        yield from end_bundle(beam.pvalue.TaggedOutput(*output) for output in outputs)

    def _flush(self) -> Iterator[Document]:
        documents, self._buffer, self._characters = self._buffer, [], 0
        if not documents:
            return
        found = self._look_up.look_up(documents)
        self._notes.write(documents, found)
        for document, action in zip(documents, found.actions.tolist(), strict=True):
            if action == DocumentAction.ENCODE:
                yield document
            if self._spot_checks.picks("encoded" if action == DocumentAction.ENCODE else "known"):
                yield document._replace(is_spot_check=True)


class LookedUpDocuments(NamedTuple):
    """What `LookUp` gives."""

    documents: beam.PCollection  # of Document, to encode
    notes: beam.PCollection  # of str, paths of a bundle's notes
    bundle_counts: beam.PCollection  # of BundleCounts


@dataclass
class LookUp(beam.PTransform):
    """PCollection[Document] -> LookedUpDocuments."""

    reuse: LocalReuse

    def expand(self, documents: beam.PCollection) -> LookedUpDocuments:
        look_up = beam.ParDo(LookUpDocuments(self.reuse))
        typed = look_up.with_output_types(Document, notes=str, bundle_counts=BundleCounts)
        outputs = documents | "LookUpDocuments" >> typed.with_outputs("notes", "bundle_counts", main="documents")
        return LookedUpDocuments(outputs.documents, outputs.notes, outputs.bundle_counts)
