"""Encoded batches to rows: chunks of a document averaged, vectors shaped, checked and stored."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import apache_beam as beam
import numpy as np

from pipeline import metrics
from pipeline.bundles import end_bundle
from pipeline.config import VectorConfig
from pipeline.records import BundleCounts, Chunk, DeadLetter, Encoded, Encoding, Origin, Row, cut_own_text
from pipeline.vectors.storing import quantize_vectors, shape_vectors

BATCHES_AHEAD = 2  # in the encoder or waiting for it: batches come in bursts, as many documents are tokenised at once


@dataclass(frozen=True)
class VectorRule:
    """How encoded chunks become rows.

    Attributes:
      vectors: dimensions, normalisation and dtype.
      average: one row per document instead of one per chunk.
      chunked: a document may have several rows.
      tokens: every chunk has a matrix `[n_tokens, D]`.
      counts_tokens: False for text encoders, whose rows have null token counts.
      keep_text: rows have their text.
      keep_unknown: rows say how many of their tokens are [UNK].
    """

    vectors: VectorConfig = VectorConfig()
    average: bool = False
    chunked: bool = False
    tokens: bool = False
    counts_tokens: bool = True
    keep_text: bool = False
    keep_unknown: bool = False


Result = tuple[Chunk, Optional[np.ndarray], str]  # a chunk, its vector or None, its error or ""


class ChunkAverager:
    """Averages the vectors of each document's chunks, weighted by content tokens, as they arrive in any order."""

    def __init__(self) -> None:
        # Two documents with one key have the same text and therefore the same vectors: either may take a chunk.
        self._parts: dict[tuple[str, Origin, str, bool], list[dict[int, Result]]] = {}

    def add(self, result: Result) -> Result | None:
        """Takes one chunk's result; returns the document's once its last chunk has come."""
        chunk = result[0]
        if chunk.n_chunks == 1:
            return result
        key = (chunk.document.id, chunk.document.origin, chunk.content_hash, chunk.document.is_spot_check)
        waiting = self._parts.setdefault(key, [])
        parts = next((parts for parts in waiting if chunk.number not in parts), None)
        if parts is None:
            waiting.append(parts := {})
        parts[chunk.number] = result
        if len(parts) < chunk.n_chunks:
            return None
        waiting.remove(parts)
        if not waiting:
            del self._parts[key]
        return average_chunks([parts[index] for index in range(chunk.n_chunks)])

    def unfinished(self) -> list[Chunk]:
        return [chunk for waiting in self._parts.values() for parts in waiting for chunk, _, _ in parts.values()]


def average_chunks(parts: list[Result]) -> Result:
    """Averages all chunks of one document in their own order, so that sums do not depend on the order of batches."""
    first = parts[0][0]
    counts = [chunk.n_unknown for chunk, _, _ in parts]
    n_unknown = None if None in counts else sum(filter(None, counts))
    n_content = sum(chunk.n_content for chunk, _, _ in parts)
    whole = first._replace(n_content=n_content, n_unknown=n_unknown, char_start=None, char_end=None)
    errors = [f"chunk {chunk.number}: {error}" for chunk, _, error in parts if error]
    if errors:
        return whole, None, errors[0]
    weights = [chunk.n_content for chunk, _, _ in parts]
    return whole, np.average([vector for _, vector, _ in parts], 0, weights).astype(np.float32), ""


def finish_chunks(results: list[Result], rule: VectorRule) -> Iterator[Row | DeadLetter]:
    """Turns encoded chunks into rows; one whose vector is missing or not finite becomes a dead letter.

    Args:
      results: chunks with their float32 vectors, `[D]` or `[n_tokens, D]` each.
    """
    encoded = []
    for chunk, vector, error in results:
        if vector is None:
            yield _reject(chunk, "encoder_error", error)
        else:
            encoded.append((chunk, vector))
    good = []
    for (chunk, vector), is_finite in zip(encoded, _are_finite([v for _, v in encoded], rule), strict=True):
        if is_finite:
            good.append((chunk, vector))
        else:
            yield _reject(chunk, "not_finite", f"the vector holds {'NaN' if np.isnan(vector).any() else 'infinity'}")
    if not good:
        return
    if rule.tokens:  # a row holds a matrix with one scale
        matrices = [shape_vectors(vector, rule.vectors).reshape(1, -1) for _, vector in good]
    else:
        matrices = [shape_vectors(_stack([vector for _, vector in good]), rule.vectors)]
    stored = (vector for matrix in matrices for vector in _store_vectors(matrix, rule.vectors.dtype))
    for (chunk, _), (data, scale, fits) in zip(good, stored, strict=True):
        if not fits:
            yield _reject(chunk, "not_finite", "a number exceeds float16's 65504; use --dtype=float32 or --normalize")
            continue
        document = chunk.document
        yield Row(  # keyword arguments would double the cost
            document.id,
            chunk.number,
            data,
            scale,
            _count_tokens(chunk, rule),
            chunk.n_truncated,
            chunk.content_hash,
            document.kept,
            cut_own_text(document.text, chunk.char_start, chunk.char_end) if rule.keep_text else None,
            chunk.n_chunks if rule.chunked else 1,
            document.origin.path,
            document.shared,
            chunk.char_start,
            chunk.char_end,
            chunk.n_unknown,
        )


def _store_vectors(vectors: np.ndarray, dtype: str) -> Iterator[tuple[bytes, float, bool]]:
    """The stored bytes and the scale of each vector `[B, D]`, and whether the dtype could hold it."""
    stored, scales = quantize_vectors(vectors, dtype)
    fits = np.isfinite(stored).all(1) if dtype == "float16" else np.ones(len(stored), bool)
    data, size = stored.tobytes(), stored.nbytes // len(stored)
    parts = (data[size * i : size * (i + 1)] for i in range(len(stored)))
    return zip(parts, scales.tolist(), fits.tolist(), strict=True)


def _stack(vectors: list[np.ndarray]) -> np.ndarray:
    """As np.stack, which is slower because it inspects each array several times."""
    return np.concatenate(vectors).reshape(len(vectors), -1)


def _are_finite(vectors: list[np.ndarray], rule: VectorRule) -> list[bool]:
    if rule.tokens or not vectors:  # matrices of different sizes
        return [bool(np.isfinite(vector).all()) for vector in vectors]
    return np.isfinite(_stack(vectors)).all(1).tolist()


def _count_tokens(chunk: Chunk, rule: VectorRule) -> int | None:
    if not rule.counts_tokens:
        return None
    return chunk.n_content + 2 * chunk.n_chunks if rule.average else chunk.n_tokens


def _reject(chunk: Chunk, reason: str, message: str) -> DeadLetter:
    where = f"chunk {chunk.number} of {chunk.n_chunks}: " if chunk.n_chunks > 1 else ""
    return DeadLetter.of("encode", reason, where + message, chunk.document, chunk.content_hash)


class FinishVectors(beam.DoFn):
    """Makes rows of a batch while the next batches are in the encoder."""

    def __init__(self, rule: VectorRule) -> None:
        self.rule = rule

    def start_bundle(self) -> None:
        self._encodings: deque[Encoding] = deque()
        self._averager = ChunkAverager()
        self._counts: defaultdict[str, float] = defaultdict(int)

    def process(self, encoding: Encoding) -> Iterator[Any]:
        self._encodings.append(encoding)
        if len(self._encodings) > BATCHES_AHEAD:
            yield from self._finish(self._encodings.popleft().future.result())

    def finish_bundle(self) -> Iterator[Any]:
        for encoding in self._encodings:
            yield from end_bundle(self._finish(encoding.future.result()))
        if lost := self._averager.unfinished():
            raise RuntimeError(f"the chunks of {lost[0].document.id!r} were split between two bundles")
        counted = BundleCounts.of("encode", dict(self._counts))
        yield from end_bundle([beam.pvalue.TaggedOutput("bundle_counts", counted)])

    def _finish(self, encoded: Encoded) -> Iterator[Any]:
        self._counts["encode_seconds"] += encoded.seconds
        metrics.ENCODE_MILLISECONDS.update(round(encoded.seconds * 1000))
        self._counts["chunks"] += sum(not chunk.document.is_spot_check for chunk in encoded.batch)
        results: Iterable[Result] = zip(encoded.batch, encoded.vectors, encoded.errors, strict=True)
        if self.rule.average:
            results = filter(None, map(self._averager.add, results))
        wanted: list[Result] = []
        spot_checks: list[Result] = []
        for result in results:
            (spot_checks if result[0].document.is_spot_check else wanted).append(result)
        n_rows = 0
        for output in finish_chunks(wanted, self.rule):
            if isinstance(output, DeadLetter):
                self._counts["dead_letters"] += 1
                yield beam.pvalue.TaggedOutput("dead_letters", output)
            else:
                n_rows += 1
                yield output
        self._counts["rows"] += n_rows
        metrics.ROWS.inc(n_rows)  # once per batch, because it costs as much as a row
        for output in finish_chunks(spot_checks, self.rule):
            if isinstance(output, Row):
                self._counts["spot_checks"] += 1
                yield beam.pvalue.TaggedOutput("spot_checks", output)


@dataclass
class Finish(beam.PTransform):
    """PCollection[Encoding] -> (rows, rows of spot checks, dead letters, counts)."""

    rule: VectorRule

    def expand(
        self, encoded: beam.PCollection
    ) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection, beam.PCollection]:
        outputs = encoded | "FinishVectors" >> beam.ParDo(FinishVectors(self.rule)).with_outputs(
            "spot_checks", "dead_letters", "bundle_counts", main="rows"
        )
        return outputs.rows, outputs.spot_checks, outputs.dead_letters, outputs.bundle_counts
