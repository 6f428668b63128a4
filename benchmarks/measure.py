"""Runs sides in their own processes, in turns, and combines their numbers."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Run = dict[str, Any]  # what one process of one side did: JSON, all but always numbers


class BenchmarkError(Exception):
    """A side that failed, or arguments that do not go together."""


class Side(NamedTuple):
    """One side of a benchmark.

    Attributes:
      function: MODULE:FUNCTION.
      arguments: of the function, by name; JSON.
      python: the interpreter that runs it, where it needs another environment.
    """

    function: str
    arguments: dict[str, Any]
    python: str = sys.executable


class Ratio(NamedTuple):
    """One claim: a number and its bound.

    Attributes:
      name: what is divided by what.
      value: the result.
      at_least: the floor, or None.
      at_most: the ceiling, or None.
      unit: what follows the value.
    """

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "times"

    @property
    def holds(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


class Report(NamedTuple):
    """The results of a benchmark.

    Attributes:
      title: one line on what was measured.
      unit: what the rates count per second.
      sides: every run of every side.
      ratios: the claims.
      facts: other numbers and settings that a reader needs.
    """

    title: str
    unit: str
    sides: dict[str, list[Run]]
    ratios: list[Ratio]
    facts: dict[str, Any]


def run_side(side: Side, folder: str) -> Run:
    """Runs one side once.

    Returns:
      What its function returned, with `whole_seconds` from the start of the process to its end and `peak_bytes` of its
      memory; where the side names its first batch, also `start_up_seconds`, from the process's start to that batch.

    Raises:
      BenchmarkError: if the process fails.
    """
    function, arguments, python = side
    result, log = os.path.join(folder, "result.json"), os.path.join(folder, "log.txt")
    command = [python, "-m", "benchmarks.child", function, json.dumps(arguments), result]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    with open(log, "wb") as stream:
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        # Only wait4 tells the peak of this one child. Linux starts it at the size of the process that forked, which is
        # why nothing in this process may import TensorFlow or Beam.
        _, status, usage = os.wait4(process.pid, 0)
        whole_seconds = time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        with open(log, encoding="utf-8", errors="replace") as stream:
            tail = "".join(stream.readlines()[-20:])
        raise BenchmarkError(f"{function} failed with exit status {process.returncode}; the end of {log}:\n{tail}")
    with open(result) as stream:
        run: Run = json.load(stream)
    if "first_batch_at" in run:
        run["start_up_seconds"] = run.pop("first_batch_at") - begun
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return run | {"whole_seconds": whole_seconds, "peak_bytes": peak_bytes}


def alternate(
    sides: Mapping[str, Side], repetitions: int, folder: str, before: Callable[[str], None] = lambda name: None
) -> dict[str, list[Run]]:
    """Runs all sides in turns, every other turn in reverse, so that a machine that slows down favours no side.

    Args:
      sides: name to side.
      repetitions: runs of each.
      folder: for logs.
      before: called with a side's name ahead of each of its runs, to clear what the last one left.
    """
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for turn in range(repetitions):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            before(name)
            run = run_side(sides[name], folder)
            runs[name].append(run)
            print(f"  run {turn + 1}, {name}: {run['whole_seconds']:.1f} s", file=sys.stderr, flush=True)
    return runs


def median(runs: list[Run], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def whole_rate(runs: list[Run]) -> float:
    """Items per second of whole processes, start-up and all."""
    return statistics.median(run["items"] / run["whole_seconds"] for run in runs)


def steady_rate(runs: list[Run]) -> float:
    """Items per second after start-up.

    Raises:
      BenchmarkError: if a run was all start-up, as a run over few items is.
    """
    if any(run["steady_items"] <= 0 or run["steady_seconds"] <= 0 for run in runs):
        raise BenchmarkError("the run ended during its start-up and has no steady rate; use a larger --count")
    return statistics.median(run["steady_items"] / run["steady_seconds"] for run in runs)
