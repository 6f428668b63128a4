"""What is said of a run that ended badly: exceptions that crossed Beam, and signals."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import EmbeamError, RunError


def explain_failure(error: BaseException, told: str = "") -> EmbeamError:
    """The error behind one that crossed Beam, which wraps the original and its traceback into the text of another.

    Args:
      error: what was raised.
      told: what the engine has to say of it, where it is none of ours.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or current.__context__
    text = "\n".join(str(cause) for cause in seen)
    for cause in seen:
        if isinstance(cause, EmbeamError):
            return type(cause)(str(cause).split(" [while running")[0])
    for line in reversed(text.splitlines()):
        kind, colon, message = line.strip().partition(": ")
        if colon and kind.startswith("pipeline.errors."):
            return RunError(message.split(" [while running")[0])
    if told:
        return RunError(told)
    if "No space left on device" in text:
        return RunError("the disk is full: free some space and run again; the table is what it was")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1].split(" [while running")[0] if lines else ""
    kind = "" if last.partition(":")[0].endswith(("Error", "Exception")) else f"{type(error).__name__}: "
    return RunError(f"the run failed: {kind}{last}; run again with --debug to see where")


@contextmanager
def watch_threads() -> Iterator[list[BaseException]]:
    """Collects what ends threads of the engine, which Python would print with a traceback.

    Yields:
      A list that grows: the reasons, of which whoever waits for such a thread is told nothing.
    """
    reasons: list[BaseException] = []

    def collect(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None:
            reasons.append(ended.exc_value)

    told, threading.excepthook = threading.excepthook, collect
    try:
        yield reasons
    finally:
        threading.excepthook = told
