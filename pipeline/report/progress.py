"""What a run has done so far, shared by all its processes through small files, and shown while it runs.

Beam's local engine reports metrics only at the end, and a bundle may last as long as the run, so the stages report to
this from inside `process()`. Every process rewrites one file of its own about once a second.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from pipeline.errors import RunError
from pipeline.records import DeadLetter

TESTED_FROM_DOCUMENTS = 1000
_WRITE_SECONDS = 1.0
_counts: dict[str, Counter] = {}  # folder -> this process's counts
_reasons: dict[str, Counter] = {}
_written: dict[str, float] = {}
_lock = threading.Lock()


class Progress:
    """The stages' end: `add` counts, and stops a run in which too many documents are lost.

    Args:
      folder: a local folder that the run's processes share; "" counts without telling anybody.
      run: the run's name.
      max_dead_fraction: the share of dead letters that stops the run, tested in each process from 1000 documents on.
    """

    def __init__(self, folder: str, run: str, max_dead_fraction: float) -> None:
        self.folder = folder
        self.run = run
        self.max_dead_fraction = max_dead_fraction

    def __call__(self, documents: int, n_bytes: int) -> None:
        self.add(documents=documents, bytes=n_bytes)

    def add(self, **counts: int) -> None:
        """Adds to this process's counts."""
        with _lock:
            total = _counts.setdefault(self.run, Counter())
            total.update(counts)
            now = time.monotonic()
            if self.folder and now - _written.get(self.run, 0) >= _WRITE_SECONDS:
                _written[self.run] = now
                self._write(total)

    def add_dead_letter(self, letter: DeadLetter) -> None:
        """Counts a dead letter.

        Raises:
          RunError: if more than `max_dead_fraction` of the documents that this process has seen are dead letters.
        """
        self.add(dead_letters=1)
        with _lock:
            total = _counts[self.run]
            reasons = _reasons.setdefault(self.run, Counter())
            reasons[letter.reason] += 1
            seen = total["documents"] + total["dead_letters"]
        if seen >= TESTED_FROM_DOCUMENTS:
            last = f"; the last: {letter.origin.path} {letter.origin.unit} {letter.origin.position}: {letter.message}"
            check_dead_fraction(reasons, seen, self.max_dead_fraction, last)

    def _write(self, total: Counter) -> None:
        path = Path(self.folder, f"{os.getpid()}.json")
        path.with_suffix(".new").write_text(json.dumps(total))
        path.with_suffix(".new").replace(path)


def check_dead_fraction(dead: Mapping[str, int], documents: int, max_fraction: float, example: str = "") -> None:
    """Raises RunError if too large a share of the documents could not be embedded.

    Args:
      dead: dead letters by reason.
      documents: all documents, those included.
      max_fraction: the share that is tolerated.
      example: appended to the list of reasons.
    """
    n_dead = sum(dead.values())
    if documents and n_dead / documents > max_fraction:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dead.items(), key=lambda item: -item[1]))
        raise RunError(
            f"{n_dead:,} of {documents:,} documents cannot be embedded, more than --max_dead_fraction={max_fraction} "
            f"allows ({reasons}{example}); mend the input or the flags, or raise --max_dead_fraction"
        )


def read_progress(folder: str) -> Counter:
    """Sums the counts of all processes of a run."""
    total: Counter = Counter()
    for path in Path(folder).glob("*.json"):
        try:
            total.update(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return total


class ProgressReporter:
    """The launcher's end: a bar on a terminal, elsewhere a line every few seconds, from a thread of its own."""

    def __init__(self, folder: str, total_bytes: int, stream: TextIO = sys.stderr, line_seconds: float = 10) -> None:
        self._folder = folder
        self._total_bytes = total_bytes
        self._stream = stream
        self._is_terminal = stream.isatty()
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
        while not self._stopped.wait(self._seconds):
            line = format_progress(read_progress(self._folder), self._total_bytes, time.monotonic() - self._begun)
            self._stream.write(f"\r{line}\x1b[K" if self._is_terminal else line + "\n")
            self._stream.flush()


def format_progress(counts: Counter, total_bytes: int, seconds: float) -> str:
    """One line: bar, documents, rows a second and the time left, judged by the share of bytes read."""
    share = min(1.0, counts["bytes"] / total_bytes) if total_bytes else 0.0
    bar = "#" * round(share * 20)
    rate = counts["rows"] / seconds if seconds else 0
    left = (
        format_seconds(seconds / share - seconds) + " left" if 0 < share < 1 else "finishing" if share else "starting"
    )
    dead = f"  {counts['dead_letters']:,} dead letters" if counts["dead_letters"] else ""
    return f"[{bar:<20}] {share:4.0%}  {counts['documents']:,} documents  {rate:,.0f} rows/s  {left}{dead}"


def format_seconds(seconds: float) -> str:
    """Such as 45s, 12m05s, 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
