"""Validates a finished snapshot before it may become the live one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.errors import ValidationError
from pipeline.partitions import Partitions
from pipeline.records import Row
from pipeline.reuse.index import VectorIndex
from pipeline.sinks.index import iterate_records, whole_digest
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.readers import VectorFile, VectorReader
from pipeline.sinks.writing import Shard

SAMPLED_FILES, SAMPLED_ROWS = 8, 1000
MAX_FLAT_FRACTION = 0.01  # of vectors with equal numbers throughout, such as zeros
MIN_TEXTS = 20  # of this many texts, not all may have the same vector
MIN_COSINE = 0.999
MAX_OTHER_BITS, MAX_OTHER_SHARE = 2, 0.02  # numbers near zero may round to the other sign
_KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("chunk", "<u4")])  # a digest of an id, and a chunk


class Expected(NamedTuple):
    """How many documents a snapshot should have: exactly, if each has one row, else at least and at most.

    Attributes:
      least: documents that were encoded, reused or kept, without dead letters.
      most: the same, with documents that have dead letters for some of their chunks.
    """

    least: int
    most: int


def check_rows(
    shards: Sequence[Shard],
    staying: Iterable[np.ndarray],
    n_staying: int,
    expected: Expected,
    scratch: str | None = None,
) -> None:
    """Checks that no document is missing, surplus or duplicate.

    Takes the same memory for any number of rows up to a few hundred million, and 20 bytes of disk for each.

    Args:
      shards: files that are written.
      staying: entries `[n]` of rows that stay in a database, some at a time.
      n_staying: how many those are.
      expected: how many documents there should be.
      scratch: a local folder for files without names; None for the system's own.

    Raises:
      ValidationError: naming what is wrong.
    """
    keys = Partitions(_KEY, sum(shard.rows for shard in shards) + n_staying, scratch)
    for entries in staying:
        _add_keys(keys, entries)
    for shard in shards:
        n_entries = sum(_add_keys(keys, entries) for entries in iterate_records(shard.index_path))
        if n_entries != shard.rows:
            raise ValidationError(f"{shard.path} has {shard.rows:,} rows and an index of {n_entries:,}")
    n_documents, n_twice = 0, 0
    for part in keys.take():
        part = part[np.lexsort((part["chunk"], part["low"], part["high"]))]
        same_id = (part["high"][1:] == part["high"][:-1]) & (part["low"][1:] == part["low"][:-1])
        n_twice += int(np.count_nonzero(same_id & (part["chunk"][1:] == part["chunk"][:-1])))
        n_documents += len(part) - int(np.count_nonzero(same_id))
    if n_twice:
        raise ValidationError(f"{n_twice:,} rows have an id and chunk that another row has too")
    check_count(n_documents, expected)


def _add_keys(keys: Partitions, entries: np.ndarray) -> int:
    """Adds the ids and chunks of entries `[n]`, and returns n."""
    digests = np.ascontiguousarray(entries["id"]).view("<u8").reshape(-1, 2)  # [n, 2]
    some = np.empty(len(entries), _KEY)
    some["high"], some["low"], some["chunk"] = digests[:, 0], digests[:, 1], entries["chunk"]
    keys.add(some, digests[:, 0])
    return len(entries)


def check_count(n: int, expected: Expected) -> None:
    """Raises ValidationError if there are rows of more or fewer documents than there should be."""
    if not expected.least <= n <= expected.most:
        wanted = f"{expected.least:,}" + (f" to {expected.most:,}" if expected.most != expected.least else "")
        raise ValidationError(f"rows of {n:,} documents were written instead of {wanted}")


def check_vectors(files: Iterable[VectorFile], reader: VectorReader) -> None:
    """Checks the first rows of some files: right sizes, finite, not constant, not all the same.

    Raises:
      ValidationError: naming what is wrong.
    """
    layout = reader.layout
    n_rows, n_flat, seen, contents = 0, 0, set(), set()
    for file in files:
        stored = next(reader.read(file, np.arange(file.first, file.first + SAMPLED_ROWS)), None)
        if stored is None:
            continue
        columns = reader.columns(stored, np.arange(len(stored.numbers)))
        for i, data in enumerate(columns["embedding"]):
            vector = restore_row(columns, i, layout)
            if vector.size == 0 or vector.shape[-1] != layout.dimension:
                raise ValidationError(
                    f"{file.path} holds a vector of {len(data)} bytes, not of {layout.dimension} numbers"
                )
            if not np.isfinite(vector).all():
                raise ValidationError(f"{file.path} holds NaN or infinity")
            n_flat += layout.dtype != "binary" and layout.dimension > 1 and bool((vector == vector.flat[0]).all())
            seen.add(hash(data))
            contents.add(columns["content_hash"][i])
        n_rows += len(stored.numbers)
    if n_flat > MAX_FLAT_FRACTION * n_rows:
        raise ValidationError(f"{n_flat:,} of {n_rows:,} vectors are one number throughout, such as 0")
    if len(seen) == 1 and len(contents) >= MIN_TEXTS and layout.dtype != "binary":
        raise ValidationError(f"all {n_rows:,} vectors that were looked at are the same, for {len(contents):,} texts")


def restore_row(columns: Columns, i: int, layout: TableLayout) -> np.ndarray:
    """One vector as float32 `[D]`, or `[n_tokens, D]` for token matrices."""
    scales = [columns["scale"][i]] if "scale" in columns else None
    data = columns["embedding"][i]
    if layout.tokens:
        return layout.restore_tokens(data, columns["n_tokens"][i], scales)
    return layout.restore(data, 1, scales)[0]


def compare_spot_checks(
    spot_checks: Sequence[Row],
    index: VectorIndex,
    fresh: Sequence[tuple[VectorFile, Shard]],
    readers: dict[str, VectorReader],
    layout: TableLayout,
) -> int:
    """Compares rows that were encoded once more with those in the table.

    Returns:
      How many were compared.

    Raises:
      ValidationError: if one differs by more than the encoder's rounding.
    """
    found = index.find_contents(np.array([bytes.fromhex(row.content_hash) for row in spot_checks], "S16"))
    by_file: dict[VectorFile, list[tuple[int, Row]]] = {}
    fresh_rows = _find_fresh([row for row, rows in zip(spot_checks, found, strict=True) if not len(rows)], fresh)
    for spot_check, rows in zip(spot_checks, found, strict=True):
        place = (
            rows[spot_check.chunk]
            if spot_check.chunk < len(rows)
            else fresh_rows.get((spot_check.content_hash, spot_check.chunk))
        )
        if place is None:  # its document became a dead letter
            continue
        file = next(f for f in [*index.files, *(f for f, _ in fresh)] if f.first <= place < f.first + f.rows)
        by_file.setdefault(file, []).append((int(place), spot_check))
    n = 0
    for file, pairs in by_file.items():
        waiting = sorted(pairs, key=lambda pair: pair[0])
        for stored in readers[file.kind].read(file, np.unique([number for number, _ in waiting])):
            while waiting and waiting[0][0] <= stored.numbers[-1]:
                number, spot_check = waiting.pop(0)
                columns = readers[file.kind].columns(stored, np.searchsorted(stored.numbers, [number]))
                compare_row(spot_check, columns, layout, file.path)
                n += 1
            if not waiting:
                break
    return n


def compare_samples(spot_checks: Sequence[Row], samples: Sequence[Row], layout: TableLayout) -> int:
    """As `compare_spot_checks`, for reused rows that are in memory."""
    again = {(row.content_hash, row.chunk): row for row in spot_checks}
    pairs = [(again[key], row) for row in samples if (key := (row.content_hash, row.chunk)) in again]
    for spot_check, row in pairs:
        columns: Columns = {"embedding": [row.vector], "scale": [row.scale], "n_tokens": [row.n_tokens]}
        compare_row(spot_check, columns, layout, row.source or "the journal")
    return len(pairs)


def _find_fresh(spot_checks: Sequence[Row], fresh: Sequence[tuple[VectorFile, Shard]]) -> dict[tuple[str, int], int]:
    """Where the rows of this run with the spot_checks' contents are: (content hash, chunk) to number."""
    places: dict[tuple[str, int], int] = {}
    if not spot_checks:
        return places
    wanted = np.array([bytes.fromhex(row.content_hash) for row in spot_checks], "S16")
    for file, shard in fresh:
        first = file.first
        for entries in iterate_records(shard.index_path):
            for i in np.flatnonzero(np.isin(entries["content"], wanted)).tolist():
                key = whole_digest(entries["content"][i]).hex(), int(entries["chunk"][i])
                places[key] = first + i
            first += len(entries)
    return places


def compare_row(spot_check: Row, columns: Columns, layout: TableLayout, path: str) -> None:
    """Compares a row that was encoded once more with the first one in some columns.

    Raises:
      ValidationError: if they differ by more than the encoder's rounding.
    """
    again: Columns = {"embedding": [spot_check.vector], "scale": [spot_check.scale], "n_tokens": [spot_check.n_tokens]}
    ours = restore_row(columns, 0, layout)
    theirs = restore_row(again, 0, layout)
    if ours.shape != theirs.shape:
        raise ValidationError(f"a text of {path}, encoded again, gives {theirs.shape} numbers instead of {ours.shape}")
    if layout.dtype == "binary":
        n_other = int(np.count_nonzero(ours != theirs))
        if n_other > max(MAX_OTHER_BITS, MAX_OTHER_SHARE * ours.size):
            raise ValidationError(f"a text of {path}, encoded again, has {n_other:,} of {ours.size:,} bits otherwise")
        return
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(np.array_equal(a, b))
    if not cosine >= MIN_COSINE:  # NaN is not
        raise ValidationError(f"a text of {path}, encoded again, gives another vector (cosine {cosine:.4f})")
