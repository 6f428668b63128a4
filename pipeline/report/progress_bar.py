"""Progress shown while a run lasts: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from typing import NamedTuple, TextIO

from pipeline.progress import read_progress
from pipeline.report.logs import is_json, report_progress

# The time left is told after so many seconds of reading, and so much of the input or so many documents.
KNOWN_SECONDS = 10.0
KNOWN_SHARE = 0.05
KNOWN_DOCUMENTS = 5000


class Start(NamedTuple):
    """When the first documents had been read, in seconds since the run began, and how many bytes they had."""

    seconds: float
    n_bytes: int


class ProgressReporter:
    """Shows progress in the launcher from its own thread: a bar on a terminal, else a line every few seconds."""

    def __init__(self, folder: str, total_bytes: int, stream: TextIO | None = None, line_seconds: float = 10) -> None:
        self._folder = folder
        self._total_bytes = total_bytes
        self._stream = stream or sys.stderr  # as it is now: notebooks and tests replace it
        self._is_terminal = self._stream.isatty() and not is_json()
        self._seconds = 0.5 if self._is_terminal else line_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._report, name="embeam-progress", daemon=True)

    def __enter__(self) -> ProgressReporter:
        self._begun = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _report(self) -> None:
        since = None
        while not self._stopped.wait(self._seconds):
            counts, seconds = read_progress(self._folder), time.monotonic() - self._begun
            if since is None and counts["bytes"]:
                since = Start(seconds, counts["bytes"])
            line = format_progress(counts, self._total_bytes, seconds, since)
            if is_json():
                report_progress(line, dict(counts))
                continue
            self._stream.write(f"\r{line}\x1b[K" if self._is_terminal else line + "\n")
            self._stream.flush()


def format_progress(counts: Counter[str], total_bytes: int, seconds: float, since: Start | None = None) -> str:
    """One line: bar, documents, rows per second, and the time left, estimated from the share of bytes read.

    Args:
      counts: from `read_progress`.
      total_bytes: of the input.
      seconds: since the run began.
      since: when reading began; without it the time left is not known.
    """
    share = min(1.0, counts["bytes"] / total_bytes) if total_bytes else 0.0
    bar = "#" * round(share * 20)
    rate = counts["rows"] / seconds if seconds else 0
    if not counts["bytes"]:
        left = "starting"
    elif share == 1:
        left = "finishing"
    else:
        left = estimate_left(counts, total_bytes, seconds, since)
    dead = f"  {counts['dead_letters']:,} dead letters" if counts["dead_letters"] else ""
    return f"[{bar:<20}] {share:4.0%}  {counts['documents']:,} documents  {rate:,.0f} rows/s  {left}{dead}"


def estimate_left(counts: Counter[str], total_bytes: int, seconds: float, since: Start | None) -> str:
    """The time left, or that it is not known yet: loading a model and filling the first batches take their own time."""
    if since is None:
        return "estimating"
    passed, read = seconds - since.seconds, counts["bytes"] - since.n_bytes
    is_known = read >= KNOWN_SHARE * total_bytes or counts["documents"] >= KNOWN_DOCUMENTS
    if passed < KNOWN_SECONDS or read <= 0 or not is_known:
        return "estimating"
    return format_seconds((total_bytes - counts["bytes"]) * passed / read) + " left"


def format_seconds(seconds: float) -> str:
    """Such as 45s, 12m05s, 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
