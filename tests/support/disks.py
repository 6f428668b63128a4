"""A small file system of its own, for which nobody needs to be root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# The shell keeps the mount alive; each line that it reads is answered.
_SCRIPT = """
mount -t tmpfs -o size="$1" tmpfs "$0" && echo mounted && read line &&
mount -t tmpfs -o remount,ro,size="$1" tmpfs "$0" && echo protected && read line
"""


@dataclass(frozen=True)
class SmallDisk:
    """A mounted file system.

    Attributes:
      path: where all processes of the user see it.
      keeper: the process in whose namespace it is mounted, and with which it goes.
    """

    path: Path
    keeper: subprocess.Popen[str]

    def protect(self) -> None:
        """Makes it read-only."""
        assert self.keeper.stdin and self.keeper.stdout
        self.keeper.stdin.write("\n")
        self.keeper.stdin.flush()
        assert self.keeper.stdout.readline() == "protected\n"


@contextmanager
def mount_small_disk(folder: Path, size: str) -> Iterator[SmallDisk]:
    """Mounts a file system of a size such as 2m, in a namespace of users and mounts in which we are root."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _SCRIPT, str(folder), size]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as keeper:
        assert keeper.stdin and keeper.stdout and keeper.stderr
        if keeper.stdout.readline() != "mounted\n":
            pytest.fail(f"no small file system can be mounted here: {keeper.stderr.read().strip()}", pytrace=False)
        try:
            yield SmallDisk(Path(f"/proc/{keeper.pid}/root{folder}"), keeper)
        finally:
            keeper.kill()
