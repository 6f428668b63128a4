"""Records in parts: all of them, equal digests together, in memory that does not grow with them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pipeline import partitions
from pipeline.partitions import Partitions

RECORD = np.dtype([("key", "<u8"), ("value", "<u4")])


def take_parts(n: int, folder: str) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    parts = Partitions(RECORD, n, folder)
    for start in range(0, n, 1000):
        block = np.empty(min(1000, n - start), RECORD)
        block["key"] = random.integers(0, n // 2 or 1, len(block), np.uint64)
        block["value"] = np.arange(start, start + len(block))
        parts.add(block, block["key"])
    return list(parts.take())


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_every_record_is_in_one_part_and_equal_digests_are_together(n, tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "PART_BYTES", 12 * 1000)
    parts = take_parts(n, str(tmp_path))
    assert len(parts) == 1 + n // 1000
    assert sorted(np.concatenate(parts)["value"].tolist()) == list(range(n))
    keys = [set(part["key"].tolist()) for part in parts]
    assert len(set().union(*keys)) == sum(map(len, keys))
    assert not list(tmp_path.iterdir())


def test_there_are_never_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "PART_BYTES", 1)
    assert len(take_parts(5000, str(tmp_path))) == partitions.MAX_PARTS


def test_adding_and_taking_needs_the_memory_of_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "PART_BYTES", 1 << 16)

    def peak(n: int) -> int:
        tracemalloc.start()
        parts = Partitions(RECORD, n, str(tmp_path))
        for start in range(0, n, 4096):
            block = np.zeros(4096, RECORD)
            block["key"] = np.arange(start, start + 4096)
            parts.add(block, block["key"])
        assert sum(map(len, parts.take())) == n
        measured = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return measured

    few = peak(1 << 15)
    assert peak(1 << 18) < few + (1 << 18)  # of 3 MB of records
