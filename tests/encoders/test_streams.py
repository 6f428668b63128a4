"""Parts of a batch side by side: the same rows in the same order, and the fastest number found, kept and used."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pipeline.encoders import streams
from pipeline.encoders.streams import LEAST_FLOPS, TRIALS, Streams


class Clock:
    """Seconds that pass only where an encoder says so, by how many parts of a batch it was given."""

    def __init__(self, seconds: dict[int, float], rows: int) -> None:
        self.now, self.seconds, self.rows, self.lock = 0.0, seconds, rows, threading.Lock()
        self.parts: list[int] = []  # rows of each

    def encode(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        n = len(inputs["input_mask"])
        with self.lock:
            self.parts.append(n)
            self.now += self.seconds[round(self.rows / n)] * n / self.rows
        return inputs["input_mask"][:, :1] * 10.0 + inputs["ids"][:, :1]


def make_batch(rows: int) -> dict[str, np.ndarray]:
    return {"input_mask": np.ones((rows, 4), np.int32), "ids": np.arange(rows * 4, dtype=np.int32).reshape(rows, 4)}


def count_parts(found: Streams, clock: Clock, rows: int) -> int:
    """Runs a batch, checks its rows, and tells in how many parts it was run."""
    clock.parts.clear()
    batch = make_batch(rows)
    assert np.array_equal(found.run(clock.encode, batch), 10.0 + batch["ids"][:, :1])
    assert sum(clock.parts) == rows and max(clock.parts) - min(clock.parts) <= 1
    return len(clock.parts)


@pytest.fixture
def four_cores(monkeypatch, own_cache):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)


def use_clock(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], rows: int = 8) -> Clock:
    clock = Clock(seconds, rows)
    monkeypatch.setattr(streams.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.parametrize(
    ("seconds", "best"), [({1: 3, 2: 2, 4: 5}, 2), ({1: 1, 2: 2, 4: 3}, 1), ({1: 3, 2: 2, 4: 1}, 4)]
)
def test_the_fastest_number_is_used_from_then_on_and_by_the_next_process(seconds, best, four_cores, monkeypatch):
    clock = use_clock(monkeypatch, seconds)
    found = Streams("encoder", LEAST_FLOPS)
    tried = [count_parts(found, clock, 8) for _ in range(3 * TRIALS)]
    assert sorted(tried) == [1] * TRIALS + [2] * TRIALS + [4] * TRIALS
    assert [count_parts(found, clock, 8) for _ in range(3)] == [best] * 3
    assert count_parts(Streams("encoder", LEAST_FLOPS), clock, 8) == best
    assert sorted(count_parts(Streams("another", LEAST_FLOPS), clock, 8) for _ in range(2)) == [1, 1], "another encoder"


def test_a_batch_with_little_work_stays_whole_and_tells_nothing(four_cores, monkeypatch):
    clock = use_clock(monkeypatch, {1: 1, 2: 9, 4: 9})
    found = Streams("encoder", LEAST_FLOPS / 1000)
    assert [count_parts(found, clock, 8) for _ in range(4 * TRIALS)] == [1] * 4 * TRIALS


def test_what_is_remembered_of_another_machine_is_not_used(four_cores, monkeypatch):
    clock = use_clock(monkeypatch, {1: 3, 2: 2, 4: 1})
    found = Streams("encoder", LEAST_FLOPS)
    for _ in range(3 * TRIALS):
        count_parts(found, clock, 8)
    monkeypatch.setattr(streams, "describe_processor", lambda: "another")
    assert count_parts(Streams("encoder", LEAST_FLOPS), clock, 8) == 1


def test_an_error_in_a_part_is_the_batch_s(four_cores, monkeypatch):
    monkeypatch.setattr(streams, "look_up", lambda name, is_valid: 4)

    def fail(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if inputs["ids"][0, 0] > 8:
            raise ValueError("a bad row")
        return inputs["ids"]

    with pytest.raises(ValueError, match="a bad row"):
        Streams("encoder", LEAST_FLOPS).run(fail, make_batch(8))
