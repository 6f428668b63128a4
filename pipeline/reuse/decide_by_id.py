"""What a run has made of every id meets its live rows, on a distributed engine, after everything is encoded.

No step holds a group: what has one id is read once, and decided about together with some hundred other ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import TaggedOutput

from pipeline.bundles import end_bundle
from pipeline.records import BundleCounts, DeadLetter, Row, digest_id
from pipeline.reuse.decide import ReusePolicy, RowFacts, decide_rows, stays
from pipeline.reuse.live_table import KEYED, DistributedReuse
from pipeline.reuse.wire import DEAD, MOVED, NEW, OPEN, UNREAD, OpenRow, unpack_open_row
from pipeline.sinks.index import digest_source

BLOCK_IDS = 1024


class Results(NamedTuple):
    """What a run has found out about one id that is not unchanged.

    Attributes:
      rows: its live rows.
      new: numbers of the chunks of its new rows.
      dead: whether there is a dead letter with the id.
      was_read: whether that is of a document that was read.
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
      inputs: the input files that there are.
    """

    def __init__(self, policy: ReusePolicy, inputs: Sequence[str]) -> None:
        self._policy = policy
        self._inputs = inputs

    def setup(self) -> None:
        self._there = {digest_source(path) for path in self._inputs}

    def start_bundle(self) -> None:
        self._block: list[Results] = []
        self._counts: Counter[str] = Counter()
        self._incomplete: set[int] | None = None

    def process(self, group: tuple[bytes, Iterable[bytes]], incomplete: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Takes an id; `incomplete` are input files that have records which could not be told."""
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
        if len(self._block) >= BLOCK_IDS:
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
            gone=np.array([row.source not in self._there for _, row in rows], bool),
        )
        decisions = decide_rows(facts, self._policy)
        self._counts.update(decisions.counts)
        self._counts["documents_with_rows"] += sum(bool(results.new) for results in block)
        self._counts["documents_with_rows"] += decisions.counts["stale"] + decisions.counts["kept"]
        dropped = np.flatnonzero(~stays(decisions.actions)).tolist()
        self._counts["dropped_rows"] += len(dropped)
        for i in dropped:
            yield rows[i][1].file, rows[i][1].row


def mark_new(row: Row) -> tuple[bytes, bytes]:
    """A new row, as `DecideRows` takes it."""
    return digest_id(row.id), NEW + row.chunk.to_bytes(4, "little")


def mark_dead(dead_letter: DeadLetter) -> list[tuple[bytes, bytes]]:
    """A dead letter, as `DecideRows` takes it; a duplicate says nothing about the document that has the id."""
    if dead_letter.id is None or dead_letter.reason == "duplicate_id":
        return []
    return [(digest_id(dead_letter.id), DEAD if dead_letter.content_hash is not None else UNREAD)]


def find_incomplete(dead_letter: DeadLetter) -> list[str]:
    """The input file of a record that could not be told."""
    return [dead_letter.origin.path] if dead_letter.id is None else []


class Dropped(NamedTuple):
    """What `DecideById` gives."""

    rows: beam.PCollection  # of (file, row), live rows that do not stay
    bundle_counts: beam.PCollection  # of BundleCounts


@dataclass
class DecideById(beam.PTransform):
    """PCollection[Row], all new rows of a run -> Dropped.

    Attributes:
      reuse: what may be reused.
      open_rows: from `CompareById`.
      moved: from `DecideByContent`.
      dead_letters: PCollections of all dead letters of the run.
      bad_files: PCollection[SkippedFile], the input files that could not be read to their ends.
    """

    reuse: DistributedReuse
    open_rows: beam.PCollection
    moved: beam.PCollection
    dead_letters: Sequence[beam.PCollection]
    bad_files: beam.PCollection

    def expand(self, rows: beam.PCollection) -> Dropped:
        dead_letters = tuple(self.dead_letters) | "DeadLetters" >> beam.Flatten()
        new = rows | "MarkNew" >> beam.Map(mark_new).with_output_types(KEYED)
        dead = dead_letters | "MarkDead" >> beam.FlatMap(mark_dead).with_output_types(KEYED)
        unnamed = dead_letters | "FindIncomplete" >> beam.FlatMap(find_incomplete).with_output_types(str)
        skipped = self.bad_files | "NameBadFiles" >> beam.Map(lambda bad: bad.file).with_output_types(str)
        incomplete = (unnamed, skipped) | "Incomplete" >> beam.Flatten()
        outputs = (
            (self.open_rows, self.moved, new, dead)
            | "RowsAndResults" >> beam.Flatten()
            | "GroupById" >> beam.GroupByKey()
            | "DecideRows"
            >> beam.ParDo(
                DecideRows(self.reuse.policy, self.reuse.inputs),
                beam.pvalue.AsList(incomplete | "Distinct" >> beam.Distinct()),
            )
            .with_output_types(tuple[int, int], bundle_counts=BundleCounts)
            .with_outputs("bundle_counts", main="rows")
        )
        return Dropped(outputs.rows, outputs.bundle_counts)
