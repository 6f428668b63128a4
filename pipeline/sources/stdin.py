"""`--input=-`: standard input, which is copied to a file once, so that it can be read as often as any other input."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Optional

from pipeline.errors import InputError
from pipeline.signals import on_stop
from pipeline.sources.globs import FoundFile

STDIN = "-"
NAME = "stdin"  # in ids and tables; where the copy is changes with every run
_COPY_BYTES = 1 << 20
_copy: Optional[str] = None  # its path, once it is made: a process has one standard input


def find_stdin(input_format: str) -> FoundFile:
    """The copy of standard input, which is made when it is first asked for.

    Raises:
      InputError: if its format is not given, or it is a terminal.
      OSError: if the copy cannot be written.
    """
    global _copy
    if input_format == "auto":
        raise InputError("--input=- has no name that tells its format; add --input_format, as in --input_format=jsonl")
    if _copy is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("--input=- reads standard input, and nothing is piped into it; use a pipe or a file")
        number, _copy = tempfile.mkstemp(prefix="embeam-stdin-")
        with open(number, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, _COPY_BYTES)
    return FoundFile(_copy, NAME, os.path.getsize(_copy), source=NAME)


@contextmanager
def removing_copy() -> Iterator[None]:
    """Removes the copy of standard input at the end, also of what fails or is stopped."""
    forget = on_stop(_remove_copy)
    try:
        yield
    finally:
        forget()
        _remove_copy()


def _remove_copy() -> None:
    global _copy
    if _copy is not None:
        with suppress(FileNotFoundError):
            os.remove(_copy)
    _copy = None
