"""Chunks to batches: buckets of fixed lengths under a budget on padded tokens, inside the bundle.

A batch holds chunks of one bucket, padded to the bucket's length, and as many as fit `rows * length <= budget`. Only
full batches leave early; the last, partial ones leave with the bundle, padded to a power of two of rows, where chunks
of shorter buckets take the place of padding rows. So there is a fixed grid of shapes, and a graph is traced or compiled
a bounded number of times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from pipeline import metrics
from pipeline.bundles import end_bundle
from pipeline.records import Batch, BundleCounts, Chunk

# (up to this length, steps of): a finer grid wastes less on padding, a coarser one compiles fewer shapes.
LENGTH_STEPS = ((64, 4), (128, 8), (256, 16), (512, 32))
COMPILED_STEPS = ((128, 16), (512, 64))  # where every shape takes seconds to compile


def bucket_lengths(max_tokens: int, steps: tuple[tuple[int, int], ...] = LENGTH_STEPS) -> list[int]:
    """The padded lengths in use, ascending; the last one is `max_tokens`."""
    lengths, length = [], 0
    for limit, step in steps:
        while length < limit:
            length += step
            lengths.append(length)
    while lengths[-1] < max_tokens:
        lengths.append(lengths[-1] * 2)
    return [length for length in lengths if length < max_tokens] + [max_tokens]


@dataclass(frozen=True)
class Buckets:
    """The grid of batch shapes.

    Attributes:
      lengths: padded lengths, ascending: tokens, or bytes for text encoders.
      budget: bound on rows x length of a batch of more than one row.
    """

    lengths: tuple[int, ...]
    budget: int

    def length_for(self, size: int) -> int:
        return self.lengths[bisect_left(self.lengths, size)]

    def full_rows(self, length: int) -> int:
        return max(1, self.budget // length)

    def full_shapes(self) -> list[tuple[int, int]]:
        """Rows and length of full batches, for every length."""
        return [(self.full_rows(length), length) for length in self.lengths]

    def padded_rows(self, rows: int, length: int) -> int:
        """The smallest row count of the grid that is at least `rows`: a power of two, or a full batch."""
        return min(self.full_rows(length), 1 << (rows - 1).bit_length())


class Batcher:
    """Collects chunks into batches; `add` returns a batch when one is full, `drain` returns the rest."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self._waiting: dict[int, list[Chunk]] = {}

    def add(self, chunk: Chunk, size: int) -> Batch | None:
        length = self.buckets.length_for(size)
        waiting = self._waiting.setdefault(length, [])
        waiting.append(chunk)
        if len(waiting) < self.buckets.full_rows(length):
            return None
        return Batch(self._waiting.pop(length), length)

    def drain(self) -> Iterator[Batch]:
        by_length = sorted(self._waiting.items(), reverse=True)
        self._waiting = {}
        for i, (length, chunks) in enumerate(by_length):
            if not chunks:
                continue
            rows = self.buckets.padded_rows(len(chunks), length)
            for _, shorter in by_length[i + 1 :]:
                while shorter and len(chunks) < rows:
                    chunks.append(shorter.pop())
            yield Batch(chunks, length, rows)


class CollectBatches(beam.DoFn):
    def __init__(self, buckets: Buckets, counts_tokens: bool, max_waiting: int = 0) -> None:
        self.buckets = buckets
        self.counts_tokens = counts_tokens
        self.max_waiting = max_waiting

    def start_bundle(self) -> None:
        self._batcher = Batcher(self.buckets)
        self._counts: Counter[str] = Counter()
        self._document = ""
        self._documents = 0

    def process(self, chunk: Chunk) -> list[Batch]:
        batches: list[Batch] = []
        if self.max_waiting and chunk.document.id != self._document:
            self._document = chunk.document.id
            self._documents += 1
            if self._documents % self.max_waiting == 0:
                batches += self._batcher.drain()
        if batch := self._batcher.add(chunk, chunk.n_tokens if self.counts_tokens else len(chunk.ids)):
            batches.append(batch)
        return [self._count(batch) for batch in batches]

    def finish_bundle(self) -> Iterator[Any]:
        yield from end_bundle(map(self._count, self._batcher.drain()))
        counted = BundleCounts.of("batch", dict(self._counts))
        yield from end_bundle([beam.pvalue.TaggedOutput("bundle_counts", counted)])

    def _count(self, batch: Batch) -> Batch:
        padded = batch.rows * batch.length
        used = sum(chunk.n_tokens if self.counts_tokens else len(chunk.ids) for chunk in batch)
        self._counts.update(batches=1, padded_tokens=padded, used_tokens=used)
        metrics.BATCHES.inc()
        metrics.PADDING_TOKENS.inc(padded - used)
        return batch


@dataclass
class BatchByTokens(beam.PTransform):
    """PCollection[Chunk] -> (PCollection[Batch], PCollection[BundleCounts]), without a shuffle.

    Attributes:
      buckets: the grid of shapes.
      counts_tokens: sizes are tokens; False for text encoders, whose sizes are bytes.
      max_waiting: after this many documents, partial batches are sent too; 0 waits for the end of the bundle.
        A document of several chunks is finished, and in the journal, only with its last chunk.
    """

    buckets: Buckets
    counts_tokens: bool = True
    max_waiting: int = 0

    def expand(self, chunks: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
        outputs = chunks | "CollectBatches" >> beam.ParDo(
            CollectBatches(self.buckets, self.counts_tokens, self.max_waiting)
        ).with_outputs("bundle_counts", main="batches")
        return outputs.batches, outputs.bundle_counts
