"""The command line, in this process or as one of its own, and what it may say."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from pipeline.cli import main as cli
from pipeline.report.logs import PROGRESS
from tests.support.paths import ROOT

_PROGRESS_LINE = re.compile(r"\[[# ]{20}\] ")  # a run that takes long says how far it is, and that is no message


class Ended(NamedTuple):
    """How a command ended, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]  # arguments -> how the command ended


def call_cli(capfd: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Runs the command line in this process, all but its handling of signals."""
    return call_program(capfd, lambda: cli.main([str(argument) for argument in arguments]))


def call_program(capfd: pytest.CaptureFixture[str], program: Callable[[], object]) -> Ended:
    """Runs what is otherwise a process of its own in this one."""
    capfd.readouterr()
    with _own_log():
        try:
            program()
            code = 0
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int), stop.code
            code = stop.code or 0
    return Ended(code, *capfd.readouterr())


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """The log is as it is when a process begins, and afterwards as it was: pytest has handlers of its own."""
    root, others = logging.getLogger(), [logging.getLogger(name) for name in ("apache_beam", PROGRESS)]
    handlers, filters, level, levels = root.handlers, root.filters, root.level, [other.level for other in others]
    root.handlers, root.filters = [], list(filters)
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers, root.filters = handlers, filters
        root.setLevel(level)
        for other, its_level in zip(others, levels, strict=True):
            other.setLevel(its_level)


def start_cli(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """Starts the command line as a process of its own; see `start_python`."""
    return start_python("-m", "pipeline.cli", *arguments, **settings)


def start_python(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """Starts Python in a process group of its own, with this checkout and without a GPU; settings are for `Popen`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    environment.pop("PYTHONUNBUFFERED", None)  # it would write at once what else is written at the end
    environment |= settings.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=settings.pop("stdout", subprocess.PIPE),
        stderr=settings.pop("stderr", subprocess.PIPE),
        text=True,
        env=environment,
        start_new_session=True,
        **settings,
    )


def assert_one_line(text: str) -> str:
    """An error as the contract has it: one line, from us, without a traceback."""
    lines = [line for line in text.splitlines() if line.strip() and not _PROGRESS_LINE.match(line)]
    assert "Traceback" not in text, text
    assert len(lines) == 1 and lines[0].startswith("embeam: "), text
    return lines[0]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits for what a process brings about, as long as the test may take; fails if the process ends before."""
    while not condition():
        assert process.poll() is None, f"the process ended before: {process.communicate()}"
        time.sleep(0.005)


def watches_signals(process: subprocess.Popen[str]) -> bool:
    """Whether a command has got so far that it handles Ctrl-C itself, as Linux tells."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (blocked,) = re.findall(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(blocked, 16) & 1 << signal.SIGINT - 1)


def list_group(process: subprocess.Popen[str]) -> list[int]:
    """The living processes of a command's process group, itself included."""
    found = []
    for other in psutil.process_iter(["status"]):
        try:
            if os.getpgid(other.pid) == process.pid and other.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(other.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 for a command and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
