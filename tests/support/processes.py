"""The command line as a process of its own, and what it may say."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from tests.support.paths import ROOT


def start_cli(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """Starts the command line as a process of its own, in its own process group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    environment |= settings.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        stdout=settings.pop("stdout", subprocess.PIPE),
        stderr=settings.pop("stderr", subprocess.PIPE),
        text=True,
        env=environment,
        start_new_session=True,
        **settings,
    )


def assert_one_line(text: str) -> str:
    """An error as the contract has it: one line, from us, without a traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert "Traceback" not in text, text
    assert len(lines) == 1 and lines[0].startswith("embeam: "), text
    return lines[0]
