"""Copies live rows that stay, file by file, on the workers of a distributed engine: their vectors cross no shuffle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import TaggedOutput

from pipeline.records import BundleCounts
from pipeline.reuse.live_table import DistributedReuse, LiveFile
from pipeline.reuse.merge import MAX_SMALL_FILES, KeptRows
from pipeline.reuse.wire import unpack_rows
from pipeline.sinks.index import Index, read_index
from pipeline.sinks.writing import Shard, ShardWriter

MOVE = np.dtype([("row", "<u4"), ("source", "<u4")])


class CollectRows(beam.CombineFn):
    """Numbers of rows -> their bitmap: an eighth of a byte for each row of a file."""

    def create_accumulator(self) -> bytearray:
        return bytearray()

    def add_input(self, bitmap: bytearray, row: int) -> bytearray:
        if len(bitmap) <= row >> 3:
            bitmap.extend(bytes((row >> 3) + 1 - len(bitmap)))
        bitmap[row >> 3] |= 1 << (row & 7)
        return bitmap

    def merge_accumulators(self, bitmaps: Iterable[bytearray]) -> bytearray:
        merged = np.zeros(0, np.uint8)
        for bitmap in bitmaps:
            other = np.frombuffer(bytes(bitmap), np.uint8)
            short, long = sorted((merged, other), key=len)
            merged = long.copy()
            merged[: len(short)] |= short
        return bytearray(merged.tobytes())

    def extract_output(self, bitmap: bytearray) -> bytes:
        return bytes(bitmap)


class CollectMoves(beam.CombineFn):
    """(row, number of an input file) -> records of MOVE as bytes."""

    def create_accumulator(self) -> bytearray:
        return bytearray()

    def add_input(self, moves: bytearray, move: tuple[int, int]) -> bytearray:
        moves += np.array([move], MOVE).tobytes()
        return moves

    def merge_accumulators(self, moves: Iterable[bytearray]) -> bytearray:
        return bytearray(b"".join(moves))

    def extract_output(self, moves: bytearray) -> bytes:
        return bytes(moves)


def group_files(files: Sequence[LiveFile], shard_bytes: int) -> list[tuple[int, ...]]:
    """Groups of files, by number, that one worker copies at once. Small files share a group if there are too many."""
    small = [i for i, file in enumerate(files) if file.n_bytes < shard_bytes // 4]
    if len(small) <= MAX_SMALL_FILES:
        return [(i,) for i in range(len(files))]
    groups: list[tuple[int, ...]] = [(i,) for i in sorted(set(range(len(files))) - set(small))]
    together: list[int] = []
    n_bytes = 0
    for i in small:
        if together and n_bytes + files[i].n_bytes > shard_bytes:
            groups.append(tuple(together))
            together, n_bytes = [], 0
        together.append(i)
        n_bytes += files[i].n_bytes
    return [*groups, tuple(together)]


class CopyRows(beam.DoFn):
    """Numbers of files of the live table -> files with the rows that stay; a whole file that stays is linked.

    Args:
      reuse: what may be reused.
    """

    def __init__(self, reuse: DistributedReuse) -> None:
        self._reuse = reuse

    def process(
        self,
        numbers: tuple[int, ...],
        dropped: Mapping[int, Iterable[bytes]],
        moves: Mapping[int, Iterable[bytes]],
    ) -> Iterator[Any]:
        """Takes some files, for each file the bitmap of the rows that do not stay, and records of MOVE."""
        reuse, reader, copies = self._reuse, self._reuse.reader, self._reuse.policy.rows_stay
        assert reader is not None
        counts: Counter[str] = Counter()
        writer = ShardWriter(reuse.folder, reuse.form, reuse.shard_bytes)
        kept = KeptRows(reader, writer, reuse.form.layout, counts, copies)
        for number in numbers:
            file = reuse.files[number]
            keeps = np.ones(file.rows, bool)
            for bitmap in dropped[number]:
                keeps[unpack_rows(bitmap)] = False
            index = self._read_index(file, moves[number])
            if copies and keeps.all() and len(numbers) == 1:
                yield kept.link(file.vectors, index, file.n_bytes, file.sha256)
            elif keeps.any():
                for stored in reader.read(file.vectors, np.flatnonzero(keeps)):
                    positions = np.flatnonzero(keeps[stored.numbers])
                    kept.write(stored, positions, Index(index.entries[stored.numbers[positions]], index.sources))
        yield from writer.finish()
        yield TaggedOutput("bundle_counts", BundleCounts.of("merge", dict(counts)))

    def _read_index(self, file: LiveFile, moves: Iterable[bytes]) -> Index:
        index = read_index(file.index_path)
        entries, sources = index.entries.copy(), list(index.sources)
        for data in moves:
            some = np.frombuffer(data, MOVE)
            entries["source"][some["row"]] = some["source"] + len(sources)
        return Index(entries, [*sources, *self._reuse.inputs])


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
        outputs = (
            dropped.pipeline
            | "FilesToCopy" >> beam.Create(groups, reshuffle=True).with_output_types(Any)
            | "CopyRows"
            >> beam.ParDo(CopyRows(reuse), beam.pvalue.AsMultiMap(bitmaps), beam.pvalue.AsMultiMap(moves))
            .with_output_types(Shard, bundle_counts=BundleCounts)
            .with_outputs("bundle_counts", main="shards")
        )
        return Copied(outputs.shards, outputs.bundle_counts)
