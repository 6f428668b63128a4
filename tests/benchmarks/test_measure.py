"""What the benchmarks count, and what they say of runs that are too short."""

from __future__ import annotations

import sys

import pytest

from benchmarks import child
from benchmarks.measure import BenchmarkError, Report, Side, run_side, steady_rate
from benchmarks.report import format_report
from pipeline.records import Batch, Chunk, Document

ONE_BATCH = {
    "items": 50.0,
    "steady_items": 0.0,
    "steady_seconds": 0.1,
    "whole_seconds": 9.0,
    "start_up_seconds": 8.0,
    "peak_bytes": 1e9,
}


def test_spot_checks_are_no_items():
    """The product encodes a few documents once more, to compare them with their rows; the bare loop does not."""

    class Handler:
        def run_inference(self, batch, model):
            return list(batch)

    clock = child.time_batches(Handler, "run_inference", child.is_spot_check)
    documents = [Document("a", ""), Document("a", "", is_spot_check=True), Document("b", "")]
    batch = Batch([Chunk(document, "", 0, 1, b"", 0, 0, 0) for document in documents], length=8)
    Handler().run_inference(batch, None)
    assert (clock.items, clock.spot_checks) == (2, 1)


def test_a_run_of_one_batch_has_no_steady_rate():
    with pytest.raises(BenchmarkError, match="use a larger --count"):
        steady_rate([ONE_BATCH])


def test_a_report_shows_a_run_of_one_batch_without_a_steady_rate():
    line = format_report(Report("title", "texts", {"side": [ONE_BATCH]}, [], {})).splitlines()[2]
    assert line.split() == ["side", "9.0", "5.6", "8.0", "-", "1,000"]


def test_a_side_runs_in_the_environment_that_it_names(tmp_path):
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\ntouch {called}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run = run_side(Side("builtins:dict", {"items": 3}, str(python)), str(tmp_path))
    assert run["items"] == 3
    assert called.exists()
