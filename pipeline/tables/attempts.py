"""What runs leave behind: an attempt is claimed while its run lives, abandoned when it fails, swept when it is dead."""

from __future__ import annotations

import fcntl
import logging
import os
from typing import Any, BinaryIO

from apache_beam.io.filesystems import FileSystems

from pipeline.tables.manifest import (
    ATTEMPTS,
    MANIFEST,
    POINTER,
    attempts_folder,
    delete_folder,
    make_folder,
    read_pointer,
    snapshot_folder,
)

LOCK = "lock"
_LOGGER = logging.getLogger(__name__)


def claim_attempt(table: str, name: str) -> BinaryIO | None:
    """Makes a run's folder and, on a local disk, locks it for as long as the returned file stays open."""
    folder = attempts_folder(table, name)
    make_folder(folder)
    return _lock(os.path.join(folder, LOCK), "wb") if "://" not in table else None


def sweep_dead_attempts(table: str) -> None:
    """Removes what runs left behind that are no longer alive: their lock is free, however they ended.

    On remote file systems nothing tells the dead from the living, so nothing is removed there.
    """
    attempts = os.path.join(table, ATTEMPTS)
    if "://" in table or not os.path.isdir(attempts):
        return
    for name in sorted(os.listdir(attempts)):
        try:
            lock = _lock(os.path.join(attempts, name, LOCK), "rb")
        except FileNotFoundError:
            continue  # being made, or not ours
        if lock is not None:
            with lock:
                _delete_unfinished_snapshot(table, name)
                delete_folder(os.path.join(attempts, name))


def abandon_attempt(table: str, name: str, previous: str) -> str:
    """Removes what a failed run wrote, but for its dead letters, which may say why it failed.

    A finished snapshot that could not become live is removed too, unless another run has published meanwhile: then it
    is complete, and its owner may want it.

    Returns:
      The folder with the dead letters, or "".
    """
    live = read_pointer(table)
    if live == name:
        return ""
    if live == previous:
        delete_folder(snapshot_folder(table, name))
    folder = attempts_folder(table, name)
    if "://" in table:
        paths = [found.path for found in FileSystems.match([folder + "/*"])[0].metadata_list]
    else:
        _remove(os.path.join(table, f"{POINTER}.new"))
        paths = [os.path.join(folder, entry) for entry in os.listdir(folder)] if os.path.isdir(folder) else []
    letters = [path for path in paths if os.path.basename(path).startswith("dead_letters-")]
    if not letters:
        delete_folder(folder)
        return ""
    for path in set(paths) - set(letters):
        if "://" in path:
            FileSystems.delete([path])
        elif os.path.basename(path) != LOCK:
            os.remove(path)
    return folder


def _delete_unfinished_snapshot(table: str, name: str) -> None:
    folder = snapshot_folder(table, name)
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, MANIFEST)):
        delete_folder(folder)


def _lock(path: str, mode: str) -> Any:
    """Opens and locks a file; None if somebody else holds it."""
    file = open(path, mode)  # noqa: SIM115  the lock lasts as long as the file is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        _LOGGER.debug("%s was not there", path)
