"""Progress of a run, shared by all its processes through small files.

Beam's local engine reports metrics only at the end, and a bundle may last as long as the run, so the stages report to
this module from inside `process()`. Every process rewrites one file of its own about once a second.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pipeline.errors import RunError
from pipeline.records import DeadLetter

TESTED_FROM_DOCUMENTS = 1000
_WRITE_SECONDS = 1.0
_counts: dict[str, Counter[str]] = {}  # run -> this process's counts
_reasons: dict[str, Counter[str]] = {}
_examples: dict[str, dict[str, DeadLetter]] = {}
_written: dict[str, float] = {}
_lock = threading.Lock()


class Progress:
    """What the stages report to: adds up counts, and stops a run in which too many documents fail.

    Args:
      folder: a local folder that the run's processes share; "" counts without writing files.
      run: the run's name.
      max_dead_fraction: the share of dead letters that stops the run, tested in each process from 1000 documents on.
      heartbeat: called whenever something is counted; picklable.
    """

    def __init__(
        self, folder: str, run: str, max_dead_fraction: float, heartbeat: Callable[[], None] | None = None
    ) -> None:
        self.folder = folder
        self.run = run
        self.max_dead_fraction = max_dead_fraction
        self.heartbeat = heartbeat

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
        if self.heartbeat:
            self.heartbeat()

    def add_dead_letter(self, dead_letter: DeadLetter) -> None:
        """Counts a dead letter.

        Raises:
          RunError: if more than `max_dead_fraction` of the documents that this process has seen are dead letters.
        """
        self.add(dead_letters=1)
        with _lock:
            total = _counts[self.run]
            reasons = _reasons.setdefault(self.run, Counter())
            reasons[dead_letter.reason] += 1
            examples = _examples.setdefault(self.run, {})
            examples.setdefault(dead_letter.reason, dead_letter)
            seen = total["documents"] + total["dead_letters"]
        if seen >= TESTED_FROM_DOCUMENTS:
            check_dead_fraction(reasons, seen, self.max_dead_fraction, examples.values)

    def _write(self, total: Counter[str]) -> None:
        path = Path(self.folder, f"{os.getpid()}.json")
        path.with_suffix(".new").write_text(json.dumps(total))
        path.with_suffix(".new").replace(path)


def check_dead_fraction(
    dead: Mapping[str, int], documents: int, max_fraction: float, find_examples: Callable[[], Iterable[DeadLetter]]
) -> None:
    """Raises RunError if too large a share of the documents could not be embedded.

    Args:
      dead: dead letters by reason.
      documents: all documents, those included.
      max_fraction: the share that is tolerated.
      find_examples: finds the first dead letter of each reason, for the message.
    """
    n_dead = sum(dead.values())
    if documents and n_dead / documents > max_fraction:
        raise RunError(
            f"{n_dead:,} of {documents:,} documents cannot be embedded, more than --max_dead_fraction={max_fraction} "
            f"allows: {describe_dead(dead, find_examples())}; fix the input or the flags, or raise --max_dead_fraction"
        )


def describe_dead(dead: Mapping[str, int], examples: Iterable[DeadLetter]) -> str:
    """Dead letters by reason, the most frequent first, each reason with the place and the message of its first one."""
    first = {example.reason: example for example in examples}
    parts = []
    for reason, n in sorted(dead.items(), key=lambda item: -item[1]):
        part = f"{n:,} {reason}"
        if example := first.get(reason):
            path, position, unit = example.origin
            part += f" (first: {path} {unit} {position}: {example.message})"
        parts.append(part)
    return ", ".join(parts)


def read_progress(folder: str) -> Counter[str]:
    """Sums the counts of all processes of a run."""
    total: Counter[str] = Counter()
    for path in Path(folder).glob("*.json"):
        try:
            total.update(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return total
