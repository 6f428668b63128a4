"""Describes why a command fails: our own errors, errors of the system, and exceptions that crossed Beam."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import EmbeamError, RunError, first_line

# How to fix an error of the system.
_FIXES = {
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EROFS: "name a path that can be written",
    errno.EMFILE: "raise the limit with ulimit -n and run again",
    errno.ENFILE: "raise the system's limit, fs.file-max, and run again",
    errno.ENOENT: "check the path",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # NumPy's message for a full disk, which has no error number


def describe_failure(error: Exception) -> str:
    """One line for the error that ends a command: what is wrong, and how to fix it."""
    if isinstance(error, EmbeamError):
        return str(error)
    if isinstance(error, OSError):
        return describe_system_error(error)
    kind = type(error).__name__
    return f"internal error: {kind}: {first_line(error)}; run again with --debug to see where"


def describe_system_error(error: OSError) -> str:
    """One line for an error of the system, such as a full disk."""
    place = "" if error.filename is None else f"{error.filename}: "
    said = error.strerror or first_line(error)
    if error.errno in _FULL or _CUT_SHORT.search(said) or "No space left on device" in said:
        return f"{place}the disk is full; free some space and run again"
    fix = _FIXES.get(error.errno or 0, "check the path, or run again with --debug to see where")
    return f"{place}{said}; {fix}"


def explain_failure(error: BaseException, told: str = "") -> EmbeamError:
    """The error behind one that crossed Beam, which wraps the original and its traceback into the text of another.

    Args:
      error: what was raised.
      told: the engine's own explanation, for errors that are not ours.
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
    if "No space left on device" in text or _CUT_SHORT.search(text):
        return RunError("the disk is full: free some space and run again; the table is unchanged")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1].split(" [while running")[0] if lines else ""
    kind = "" if last.partition(":")[0].endswith(("Error", "Exception")) else f"{type(error).__name__}: "
    return RunError(f"the run failed: {kind}{last}; run again with --debug to see where")


@contextmanager
def watch_threads() -> Iterator[list[BaseException]]:
    """Collects the exceptions that end threads of the engine, which Python would print with a traceback.

    Yields:
      A list that grows by each exception; code that waits for such a thread does not see it.
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
