"""Documents that changed meet known vectors of their texts, on a distributed engine.

A text that a million documents share is one group of a million elements. A group is read twice instead of being held:
once to see what is known, once to decide about each document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import TaggedOutput

from pipeline.bundles import end_bundle
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, Document
from pipeline.reuse.compare_by_id import PackDocuments
from pipeline.reuse.decide import DocumentAction, count_actions, decide_documents
from pipeline.reuse.journal import list_folder
from pipeline.reuse.live_table import KEYED, PLACED, DistributedReuse, list_known, list_segment
from pipeline.reuse.requests import ReuseRequest
from pipeline.reuse.spot_checks import SpotCheckPicker
from pipeline.reuse.wire import CHECK, DOCUMENT, JOURNAL, LIVE, MOVED, REQUEST, UNSEEN, DocumentPacker, unpack_known

BLOCK_DOCUMENTS = 1024
BLOCK_BYTES = 4_000_000


class Waiting(NamedTuple):
    """A document whose action is not decided yet.

    Attributes:
      document: the document.
      content: its content hash.
      known: whether there are vectors of its text.
      first: whether it is the first with its text, which is encoded.
      shared: whether others have its text.
    """

    document: Document
    content: bytes
    known: bool
    first: bool
    shared: bool


class DecideTexts(beam.DoFn):
    """(content hash, documents and places of vectors) -> documents to encode, and under tags everything else.

    Outputs:
      main: documents to encode, those of spot checks among them.
      requests: (content hash, packed request).
      wanted: (file or path of a journal's segment, row), the vectors that requests need.
      moved: (digest of an id, MOVED) of documents that were not seen and whose text is reused.
      bundle_counts: BundleCounts.

    Args:
      inputs: paths of the input files.
      keep_text: rows have their document's text.
    """

    def __init__(self, inputs: Sequence[str], keep_text: bool) -> None:
        self._inputs = inputs
        self._keep_text = keep_text

    def setup(self) -> None:
        self._packer = DocumentPacker(self._inputs)

    def start_bundle(self) -> None:
        self._waiting: list[Waiting] = []
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        self._spot_checks = SpotCheckPicker()

    def process(self, group: tuple[bytes, Iterable[bytes]]) -> Iterator[Any]:
        content, values = group
        known: dict[int, tuple[int | str, int]] = {}  # by chunk
        n_chunks, n_documents, first = 0, 0, None
        for value in values:
            if value[:1] == DOCUMENT:
                n_documents += 1
                place = self._packer.order(value)
                first = place if first is None else min(first, place)
            elif value[:1] in (LIVE, JOURNAL):
                where, row, chunk, n_chunks = unpack_known(value)
                if chunk not in known or _order(where, row) < _order(*known[chunk]):
                    known[chunk] = where, row
        if not n_documents:
            return
        is_known = bool(known) and len(known) == n_chunks
        if is_known:
            for known_place in known.values():
                yield TaggedOutput("wanted", known_place)
        for value in values:
            if value[:1] == DOCUMENT:
                is_first = self._packer.order(value) == first
                first = None if is_first else first  # several documents may have one place: retried dead letters
                document = self._packer.unpack(value)
                self._waiting.append(Waiting(document, content, is_known, is_first, n_documents > 1))
                self._bytes += len(value)
                if len(self._waiting) >= BLOCK_DOCUMENTS or self._bytes >= BLOCK_BYTES:
                    yield from self._flush()
            elif value[:1] == UNSEEN and is_known:
                yield TaggedOutput("moved", (value[1:], MOVED))

    def finish_bundle(self) -> Iterator[Any]:
        yield from end_bundle(self._flush())
        counts = {name: n for name, n in self._counts.items() if n}
        yield from end_bundle([TaggedOutput("bundle_counts", BundleCounts.of("reuse", counts))])

    def _flush(self) -> Iterator[Any]:
        block, self._waiting, self._bytes = self._waiting, [], 0
        known, first = (np.array([getattr(one, name) for one in block], bool) for name in ("known", "first"))
        actions = decide_documents(np.zeros(len(block), bool), known, first)
        self._counts += count_actions(actions)
        for waiting, action in zip(block, actions.tolist(), strict=True):
            document, content = waiting.document, waiting.content
            is_checked = self._spot_checks.picks("encoded" if action == DocumentAction.ENCODE else "known")
            if action == DocumentAction.ENCODE:
                yield document._replace(shared=waiting.shared or is_checked)
            else:
                spare = document
                if action == DocumentAction.REUSE:  # else a dead letter may need the text
                    spare = document._replace(text=document.text if self._keep_text else "", pair=None)
                request = ReuseRequest(spare, content.hex()).to_line()
                yield TaggedOutput("requests", (content, REQUEST + request))
            if is_checked:
                yield document._replace(is_spot_check=True)
                yield TaggedOutput("requests", (content, CHECK))


def _order(where: int | str, row: int) -> tuple[str, int]:
    """Sort key of places, so that the choice does not depend on their order."""
    return str(where), row


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
        pack = PackDocuments(reuse.inputs, partial(key_by_content, prefix=reuse.prefix))
        packed = documents | "PackChanged" >> beam.ParDo(pack).with_output_types(KEYED)
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


def key_by_content(document: Document, prefix: str) -> bytes:
    """The content hash of a document."""
    return bytes.fromhex(hash_content(prefix + document.text, document.pair))


def mark_unseen(content: bytes, digest: bytes) -> tuple[bytes, bytes]:
    """A live row whose document was not seen, as `DecideTexts` takes it."""
    return content, UNSEEN + digest
