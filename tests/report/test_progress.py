"""What is shown while a run lasts, and when it is stopped for its dead letters."""

import io
import json
import os
import time
from collections import Counter

import pytest

from pipeline import progress as shared
from pipeline.errors import RunError
from pipeline.progress import Progress, read_progress
from pipeline.records import DeadLetter, Origin
from pipeline.report.progress_bar import ProgressReporter, Start, format_progress, format_seconds

DEAD_LETTER = DeadLetter("read", "malformed_json", "no object", Origin("a.jsonl", 7, "byte"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_line_tells_share_documents_rate_and_time_left():
    counts = Counter(documents=12_000, bytes=250, rows=10_000, dead_letters=3)
    line = format_progress(counts, 1000, 50, Start(0, 0))
    assert line == "[#####               ]  25%  12,000 documents  200 rows/s  2m30s left  3 dead letters"
    assert "starting" in format_progress(Counter(), 1000, 1)
    assert "finishing" in format_progress(Counter(bytes=1000, documents=1), 1000, 1)


def test_time_left_is_told_once_it_is_known():
    total = 10**6

    def left(seconds, documents, n_bytes):  # 20 seconds to load the model, then 70 for the input
        line = format_progress(Counter(documents=documents, bytes=n_bytes), total, seconds, Start(20, 40))
        return line.split(" rows/s  ")[1]

    assert format_progress(Counter(documents=1, bytes=40), total, 20).endswith("estimating")
    assert left(21, 1, 40) == "estimating", "one document took all of the model's loading"
    assert left(22, 2000, 28_000) == "estimating", "a burst of documents that wait for the encoder"
    assert left(55, 2000, 500_000) == "35s left"
    assert left(50, 6000, 10) == "estimating", "nothing was read since"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (11_220, "3h07m")]
)
def test_time_is_shown_in_two_units(seconds, shown):
    assert format_seconds(seconds) == shown


def test_the_counts_of_all_processes_are_summed(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps({"documents": 2, "bytes": 10}))
    (tmp_path / "2.json").write_text(json.dumps({"documents": 3, "rows": 1}))
    (tmp_path / "3.json").write_text("{half")
    assert read_progress(str(tmp_path)) == Counter(documents=5, bytes=10, rows=1)


def test_a_process_tells_its_counts_in_one_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "_WRITE_SECONDS", 0)
    progress = Progress(str(tmp_path), "told", 0.5)
    progress(documents=4, n_bytes=100)
    progress.add(rows=3)
    assert [path.name for path in tmp_path.iterdir()] == [f"{os.getpid()}.json"]
    assert read_progress(str(tmp_path)) == Counter(documents=4, bytes=100, rows=3)


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "log"])
def test_the_reporter_rewrites_a_terminals_line_and_adds_to_a_log(tmp_path, stream):
    (tmp_path / "1.json").write_text(json.dumps({"documents": 5, "bytes": 10, "rows": 5}))
    with ProgressReporter(str(tmp_path), 20, stream, line_seconds=0.01):
        wait_for(lambda: stream.getvalue().count("5 documents") >= 2)
    if stream.isatty():
        assert "\n" not in stream.getvalue() and stream.getvalue().endswith("\r\x1b[K")
    else:
        assert all(line.startswith("[##########") for line in stream.getvalue().splitlines())


def test_too_large_a_share_of_dead_letters_stops_the_run_from_a_thousand_documents_on():
    progress = Progress("", "stopped", 0.1)
    progress.add(documents=800)
    for _ in range(199):
        progress.add_dead_letter(DEAD_LETTER)  # 20%, but of too few to judge
    with pytest.raises(
        RunError, match=r"200 of 1,000 documents .* --max_dead_fraction=0.1 allows: 200 malformed_json \("
    ):
        progress.add_dead_letter(DEAD_LETTER)


def test_the_message_names_the_first_dead_letter_of_each_reason():
    progress = Progress("", "named", 0.004)
    progress.add(documents=1000)
    other = DeadLetter("read", "empty_text", "blank", Origin("b.txt", 3, "row"))
    for letter in (DEAD_LETTER, other, other._replace(message="later"), DEAD_LETTER._replace(message="later")):
        progress.add_dead_letter(letter)
    told = r"3 malformed_json \(first: a.jsonl byte 7: no object\), 2 empty_text \(first: b.txt row 3: blank\); fix"
    with pytest.raises(RunError, match=told):
        progress.add_dead_letter(DEAD_LETTER)
