"""Opening files: those of a local disk by Python, all others by Beam, which takes a second to import."""

from __future__ import annotations

import os
from typing import Any, BinaryIO


def is_local(path: str) -> bool:
    return "://" not in path


def file_systems() -> Any:
    """Beam's file systems."""
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading as it is stored, seekable; every file system has exceptions of its own."""
    if is_local(path):
        return open(path, "rb")
    return file_systems().open(path, compression_type="uncompressed")


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    return os.path.exists(path) if is_local(path) else file_systems().exists(path)


def join(folder: str, *names: str) -> str:
    """The path of what is in a folder."""
    return os.path.join(folder, *names) if is_local(folder) else file_systems().join(folder, *names)
