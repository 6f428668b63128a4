"""Documents meet the live rows of their ids, on a distributed engine, before anything is encoded.

No step holds a group: what has one id is read once, and compared together with some hundred other ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import TaggedOutput

from pipeline.bundles import end_bundle
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, DeadLetter, Document, digest_id
from pipeline.reuse.decide import Change, ReusePolicy, compare_documents, count_changes
from pipeline.reuse.digests import digest_documents
from pipeline.reuse.live_table import KEYED, PLACED, DistributedReuse, list_live
from pipeline.reuse.spot_checks import SpotCheckPicker
from pipeline.reuse.wire import CHECK, LIVE, DocumentPacker, LiveRow, pack_open_row, unpack_live_row
from pipeline.sinks.index import digest_source, parse_hashes
from pipeline.sources.duplicates import reject_duplicate

BLOCK_DOCUMENTS = 1024
BLOCK_BYTES = 4_000_000
_LIVE_FIELDS = np.dtype([("content", "S16"), ("kept", "<u8"), ("n_chunks", "<u4")])


class Met(NamedTuple):
    """A document, if there is one, and the live rows of its id."""

    digest: bytes
    document: Optional[Document]
    live: list[LiveRow]


class CompareDocuments(beam.DoFn):
    """(digest of an id, documents and live rows) -> changed documents, and under tags everything else.

    Outputs:
      main: documents that are not unchanged.
      spot_checks: documents that are encoded once more, to compare the vector with their rows.
      open_rows: (digest, packed `OpenRow`), live rows of changed documents and of those that were not seen.
      unseen: (content hash, digest of the id) of live rows whose documents were not seen.
      sources: (file, (row, number of the input file)) of live rows whose documents have moved to another file.
      wanted: (file, row) of unchanged rows that a spot check is compared with.
      requests: (content hash, CHECK) for such a comparison.
      dead_letters: of documents whose id an earlier one has.
      bundle_counts: BundleCounts.

    Args:
      policy: what may be reused.
      inputs: paths of the input files.
      prefix: of every text.
    """

    def __init__(self, policy: ReusePolicy, inputs: Sequence[str], prefix: str) -> None:
        self._policy = policy
        self._inputs = inputs
        self._prefix = prefix

    def setup(self) -> None:
        self._packer = DocumentPacker(self._inputs)
        self._sources = {path: digest_source(path) for path in self._inputs}

    def start_bundle(self) -> None:
        self._block: list[Met] = []
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        self._merge_counts: Counter[str] = Counter()
        self._n_duplicates = 0
        self._spot_checks = SpotCheckPicker()

    def process(self, group: tuple[bytes, Iterable[bytes]]) -> Iterator[Any]:
        live: list[LiveRow] = []
        first: bytes | None = None
        for value in group[1]:
            if value[:1] == LIVE:
                live.append(unpack_live_row(value))
                continue
            if first is not None:
                value, first = sorted((value, first), key=self._packer.order, reverse=True)
                self._n_duplicates += 1
                yield TaggedOutput("dead_letters", reject_duplicate(self._packer.unpack(value)))
            else:
                first = value
        self._block.append(Met(group[0], self._packer.unpack(first) if first is not None else None, live))
        self._bytes += len(first or b"")
        if len(self._block) >= BLOCK_DOCUMENTS or self._bytes >= BLOCK_BYTES:
            yield from self._flush()

    def finish_bundle(self) -> Iterator[Any]:
        yield from end_bundle(self._flush())
        n = self._n_duplicates
        counts = [
            BundleCounts.of("reuse", {name: n for name, n in self._counts.items() if n}),
            BundleCounts.of("merge", dict(self._merge_counts)),
            BundleCounts.of("read", {"documents": -n, "dead_letters": n} if n else {}),
        ]
        yield from end_bundle(TaggedOutput("bundle_counts", one) for one in counts)

    def _flush(self) -> Iterator[Any]:
        block, self._block, self._bytes = self._block, [], 0
        seen = [met for met in block if met.document is not None]
        yield from self._open([met for met in block if met.document is None], seen=False)
        if not seen:
            return
        documents = [met.document for met in seen if met.document is not None]
        content = parse_hashes([hash_content(self._prefix + d.text, d.pair) for d in documents])
        kept = digest_documents(documents, self._policy)
        owner = np.repeat(np.arange(len(seen)), [len(met.live) for met in seen])
        rows = np.array([(r.content, r.kept, r.n_chunks) for met in seen for r in met.live], _LIVE_FIELDS)
        changes = compare_documents(content, kept, owner, rows, self._policy)
        self._counts += count_changes(changes)
        unchanged = changes == Change.UNCHANGED
        self._merge_counts.update(documents_with_rows=int(unchanged.sum()), live=int(unchanged.sum()))
        yield from self._open([met for met, stays in zip(seen, unchanged, strict=True) if not stays], seen=True)
        for met, document, stays in zip(seen, documents, unchanged.tolist(), strict=True):
            yield from self._move(met.live, document)
            if not stays:
                yield document
            elif self._spot_checks.picks("known"):
                yield TaggedOutput("spot_checks", document._replace(is_spot_check=True))
                yield TaggedOutput("requests", (met.live[0].content, CHECK))
                for row in met.live:
                    yield TaggedOutput("wanted", (row.file, row.row))

    def _open(self, block: list[Met], seen: bool) -> Iterator[Any]:
        for met in block:
            for row in met.live:
                yield TaggedOutput("open_rows", (met.digest, pack_open_row(row, seen)))
                if not seen:
                    yield TaggedOutput("unseen", (row.content, met.digest))

    def _move(self, live: list[LiveRow], document: Document) -> Iterator[Any]:
        """Yields live rows whose document is now in another file of the input: they may stay, if only as stale ones."""
        path = document.origin.path
        for row in live if path in self._sources else ():
            if row.source != self._sources[path]:
                yield TaggedOutput("sources", (row.file, (row.row, self._packer.numbers[path])))


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
        packed = documents | "PackDocuments" >> beam.ParDo(PackDocuments(reuse.inputs, key_by_id)).with_output_types(
            KEYED
        )
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


class PackDocuments(beam.DoFn):
    """Document -> (its key, packed document).

    Args:
      inputs: paths of the input files.
      key: gives the digest under which a document meets others.
    """

    def __init__(self, inputs: Sequence[str], key: Callable[[Document], bytes]) -> None:
        self._inputs = inputs
        self._key = key

    def setup(self) -> None:
        self._packer = DocumentPacker(self._inputs)

    def process(self, document: Document) -> Iterator[tuple[bytes, bytes]]:
        yield self._key(document), self._packer.pack(document)


def key_by_id(document: Document) -> bytes:
    """The digest of a document's id."""
    return digest_id(document.id)
