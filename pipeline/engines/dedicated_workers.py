"""Runs a part of the graph on dedicated workers, such as the encoder on workers with a GPU.

Its inputs and outputs cross to other machines in groups of a few hundred elements, because the cost of a shuffle grows
with the elements. A shuffle on either side prevents fusion, so that each part gets the workers that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from pipeline.bundles import end_bundle
from pipeline.records import Chunk, ElementGroup, Row

GROUP_ELEMENTS = 512
GROUP_BYTES = 4 << 20  # of texts, token ids and vectors


def size_chunk(chunk: Chunk) -> int:
    """Bytes of a chunk in a group; a document counts once, with its first chunk."""
    return len(chunk.ids) + (len(chunk.document.text.encode()) if chunk.number == 0 else 0)


def size_row(row: Row) -> int:
    """Bytes of a row in a group."""
    return len(row.vector) + len(row.text or "")


def ends_document(chunk: Chunk) -> bool:
    """Whether a group may end with this chunk: all chunks of a document must be in one group."""
    return chunk.number == chunk.n_chunks - 1


class GroupElements(beam.DoFn):
    """Collects elements of a bundle into groups."""

    def __init__(self, size: Callable[[Any], int], may_end: Callable[[Any], bool] | None = None) -> None:
        self.size = size
        self.may_end = may_end

    def start_bundle(self) -> None:
        self._group = ElementGroup()
        self._bytes = 0

    def process(self, element: Any) -> Iterator[ElementGroup]:
        self._group.append(element)
        self._bytes += self.size(element)
        is_full = len(self._group) >= GROUP_ELEMENTS or self._bytes >= GROUP_BYTES
        if is_full and (self.may_end is None or self.may_end(element)):
            yield self._take()

    def finish_bundle(self) -> Iterator[Any]:
        if self._group:
            yield from end_bundle([self._take()])

    def _take(self) -> ElementGroup:
        group, self._group, self._bytes = self._group, ElementGroup(), 0
        return group


def ungroup(groups: beam.PCollection, kind: type) -> beam.PCollection:
    return groups | "Unpack" >> beam.FlatMap(iter).with_output_types(kind)


@dataclass
class OnDedicatedWorkers(beam.PTransform):
    """Runs a transform on dedicated workers: PCollection[Chunk] -> the output of the transform.

    Attributes:
      inner: takes chunks and gives a named tuple of PCollections with `rows`.
      hints: requirements of its workers, as Beam's resource hints; if empty, any worker may run it.
    """

    inner: beam.PTransform
    hints: Mapping[str, Any]

    def expand(self, chunks: beam.PCollection) -> Any:
        groups = (
            chunks
            | "GroupChunks" >> beam.ParDo(GroupElements(size_chunk, ends_document)).with_output_types(ElementGroup)
            | "ToDedicatedWorkers" >> beam.Reshuffle()
        )
        outputs = groups | "Workers" >> _Grouped(self.inner).with_resource_hints(**self.hints)
        return outputs._replace(rows=ungroup(outputs.rows | "FromDedicatedWorkers" >> beam.Reshuffle(), Row))


class _Grouped(beam.PTransform):
    """Runs a transform of elements on groups of elements."""

    def __init__(self, inner: beam.PTransform) -> None:
        super().__init__()
        self.inner = inner

    def expand(self, groups: beam.PCollection) -> Any:
        outputs = ungroup(groups, Chunk) | self.inner
        rows = outputs.rows | "GroupRows" >> beam.ParDo(GroupElements(size_row)).with_output_types(ElementGroup)
        return outputs._replace(rows=rows)
