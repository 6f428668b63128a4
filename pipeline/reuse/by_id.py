"""Groups by id on a distributed engine: documents with live rows before encoding, results with live rows after it.

No step holds a group: the elements of an id are read once, and some hundred ids are decided together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import TaggedOutput

from pipeline.bundles import end_bundle
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, DeadLetter, Document, Row, digest_id
from pipeline.reuse.decide import (
    Change,
    ReusePolicy,
    RowAction,
    RowFacts,
    compare_documents,
    count_changes,
    decide_rows,
)
from pipeline.reuse.spot_checks import SpotCheckPicker
from pipeline.reuse.wire import (
    CHECK,
    DEAD,
    LIVE,
    MOVED,
    NEW,
    OPEN,
    UNREAD,
    DocumentPacker,
    LiveRow,
    OpenRow,
    pack_open_row,
    unpack_live_row,
    unpack_open_row,
)
from pipeline.sinks.index import digest_kept, digest_source, parse_hashes
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
      sources: (file, (row, number of the input file)) of unchanged rows whose documents have moved to another file.
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
        self._numbers = {path: i for i, path in enumerate(self._inputs)}

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
        kept = np.array([digest_kept(d.kept) for d in documents], "<u8")
        owner = np.repeat(np.arange(len(seen)), [len(met.live) for met in seen])
        rows = np.array([(r.content, r.kept, r.n_chunks) for met in seen for r in met.live], _LIVE_FIELDS)
        changes = compare_documents(content, kept, owner, rows, self._policy)
        self._counts += count_changes(changes)
        unchanged = changes == Change.UNCHANGED
        self._merge_counts.update(documents=int(unchanged.sum()), live=int(unchanged.sum()))
        yield from self._open([met for met, stays in zip(seen, unchanged, strict=True) if not stays], seen=True)
        for met, document, stays in zip(seen, documents, unchanged.tolist(), strict=True):
            if not stays:
                yield document
                continue
            yield from self._move(met.live, document)
            if self._spot_checks.picks("known"):
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
        """Yields unchanged rows whose document is now in another file of the input."""
        path = document.origin.path
        if path in self._numbers and live[0].source != digest_source(path):
            for row in live:
                yield TaggedOutput("sources", (row.file, (row.row, self._numbers[path])))


class Results(NamedTuple):
    """What a run has found out about one id that is not unchanged.

    Attributes:
      rows: its live rows.
      new: numbers of the chunks of its new rows.
      dead: whether there is a dead letter with the id.
      was_read: whether the dead letter is of a document that was read.
      moved: whether another document has taken its vector.
    """

    digest: bytes
    rows: list[OpenRow]
    new: list[int]
    dead: bool
    was_read: bool
    moved: bool


class DecideRows(beam.DoFn):
    """(digest of an id, its results) -> (file, row) of live rows that do not stay.

    Args:
      policy: what may be reused.
    """

    def __init__(self, policy: ReusePolicy) -> None:
        self._policy = policy

    def start_bundle(self) -> None:
        self._block: list[Results] = []
        self._counts: Counter[str] = Counter()
        self._incomplete: set[int] | None = None

    def process(self, group: tuple[bytes, Iterable[bytes]], incomplete: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Decides about an id; `incomplete` are input files with records whose ids could not be read."""
        results = Results(group[0], [], [], False, False, False)
        for value in group[1]:
            kind = value[:1]
            if kind == OPEN:
                results.rows.append(unpack_open_row(value))
            elif kind == NEW:
                results.new.append(int.from_bytes(value[1:], "little"))
            elif kind == MOVED:
                results = results._replace(moved=True)
            elif kind in (DEAD, UNREAD):
                results = results._replace(dead=True, was_read=results.was_read or kind == DEAD)
        self._block.append(results)
        if self._incomplete is None:
            self._incomplete = {digest_source(path) for path in incomplete}
        if len(self._block) >= BLOCK_DOCUMENTS:
            yield from self._flush()

    def finish_bundle(self) -> Iterator[Any]:
        yield from end_bundle(self._flush())
        counted = BundleCounts.of("merge", {name: n for name, n in self._counts.items() if n})
        yield from end_bundle([TaggedOutput("bundle_counts", counted)])

    def _flush(self) -> Iterator[tuple[int, int]]:
        block, self._block = self._block, []
        if not block:
            return
        incomplete = self._incomplete or set()
        for results in block:
            self._counts["new_rows"] += len(results.new)
            self._counts["duplicate_rows"] += len(results.new) - len(set(results.new))
            self._counts["dead"] += results.was_read
        rows = [(results, row) for results in block for row in results.rows]
        facts = RowFacts(
            id=np.array([results.digest for results, _ in rows], "S16"),
            unchanged=np.zeros(len(rows), bool),
            seen=np.array([row.seen for _, row in rows], bool),
            dead=np.array([results.dead and not results.new for results, _ in rows], bool),
            incomplete=np.array([row.source in incomplete for _, row in rows], bool),
            moved=np.array([results.moved for results, _ in rows], bool),
        )
        decisions = decide_rows(facts, self._policy)
        self._counts.update(decisions.counts)
        stays = ~np.isin(decisions.actions, (RowAction.REPLACE, RowAction.DELETE))
        self._counts["documents"] += sum(bool(results.new) for results in block)
        self._counts["documents"] += decisions.counts["stale"] + decisions.counts["kept"]
        for (_, row), kept in zip(rows, stays.tolist(), strict=True):
            if not kept:
                yield row.file, row.row
        self._counts["dropped_rows"] += int((~stays).sum())


def mark_new(row: Row) -> tuple[bytes, bytes]:
    """A new row, as `DecideRows` takes it."""
    return digest_id(row.id), NEW + row.chunk.to_bytes(4, "little")


def mark_dead(dead_letter: DeadLetter) -> list[tuple[bytes, bytes]]:
    """A dead letter, as `DecideRows` takes it; none for a duplicate, because the first document with the id counts."""
    if dead_letter.id is None or dead_letter.reason == "duplicate_id":
        return []
    return [(digest_id(dead_letter.id), DEAD if dead_letter.content_hash is not None else UNREAD)]


def find_incomplete(dead_letter: DeadLetter) -> list[str]:
    """The input file of a record whose id could not be read."""
    return [dead_letter.origin.path] if dead_letter.id is None else []
