"""The index beside a file: written and read a little at a time."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.records import Row
from pipeline.sinks import index as indexes
from pipeline.sinks.index import iterate_records, read_index
from pipeline.sinks.writing import RowFormat, ShardWriter
from tests.support.steps import LAYOUT, draw_vector

FORM = RowFormat("tfrecord", LAYOUT)
ROWS = [
    Row(str(i), 0, draw_vector(str(i)).tobytes(), 0.0, 3, 0, f"{i:032x}", b"", None, 1, f"file {i % 3}")
    for i in range(256)
]


def write_rows(folder: Path, n: int) -> str:
    writer = ShardWriter(str(folder), FORM, 1 << 40)
    for _ in range(n // len(ROWS)):
        writer.write(ROWS)
    (shard,) = writer.finish()
    assert shard.rows == n and shard.index_size[0] == Path(shard.index_path).stat().st_size
    return shard.index_path


def test_an_index_is_read_in_parts_as_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(indexes, "_READ_RECORDS", 100)
    path = write_rows(tmp_path, 1024)
    parts = list(iterate_records(path))
    whole = read_index(path)
    assert len(parts) == 11 and np.array_equal(np.concatenate(parts), whole.entries)
    assert whole.sources == ["file 0", "file 1", "file 2"]


def test_parts_of_a_damaged_index_are_not_read(tmp_path):
    path = Path(write_rows(tmp_path, 256))
    data = path.read_bytes()
    for damaged, why in ((data[:5], "too short"), (data[1:], "length"), (data[:-1] + b"\1", "length")):
        path.write_bytes(damaged)
        for read in (read_index, lambda name: list(iterate_records(name))):
            with pytest.raises(ValueError, match=why):
                read(str(path))


def test_writing_holds_no_index_in_memory(tmp_path):
    def peak(n: int) -> int:
        tracemalloc.start()
        write_rows(tmp_path, n)
        measured = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return measured

    write_rows(tmp_path, 256)  # what is made once
    few = peak(1 << 13)
    assert peak(1 << 15) < few + 8 * (1 << 15)  # bytes; an entry has 52
