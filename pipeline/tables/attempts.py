"""What runs leave behind: an attempt is claimed while its run lives, abandoned when it fails, swept when it is dead."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Any, BinaryIO

from pipeline.tables.manifest import (
    ATTEMPTS,
    MANIFEST,
    attempts_folder,
    delete_file,
    delete_folder,
    list_files,
    make_folder,
    read_pointer,
    snapshot_folder,
)

LOCK = "lock"
FORGOTTEN_SECONDS = 3600


def claim_attempt(table: str, name: str) -> BinaryIO | None:
    """Makes a run's folder and, on a local disk, locks it for as long as the returned file stays open."""
    folder = attempts_folder(table, name)
    make_folder(folder)
    if "://" in table:
        return None
    path = os.path.join(folder, LOCK)
    while True:  # a sweep may take the new folder for a dead one
        lock = _lock(path, "wb")
        if lock is not None and os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            return lock
        make_folder(folder)


def sweep_dead_attempts(table: str) -> None:
    """Removes what runs left behind that are no longer alive: their lock is free, however they ended.

    On remote file systems nothing tells the dead from the living, so nothing is removed there.
    """
    attempts = os.path.join(table, ATTEMPTS)
    if "://" in table or not os.path.isdir(attempts):
        return
    for name in sorted(os.listdir(attempts)):
        folder = os.path.join(attempts, name)
        try:
            lock = _lock(os.path.join(folder, LOCK), "rb")
        except FileNotFoundError:  # being made, or left by somebody who was killed while making it
            if time.time() - os.stat(folder).st_mtime > FORGOTTEN_SECONDS:
                delete_folder(folder)
            continue
        except OSError:
            continue  # not ours
        if lock is not None:
            with lock:
                _delete_unfinished_snapshot(table, name)
                delete_folder(folder)


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
    paths = list_files(folder)
    letters = [path for path in paths if os.path.basename(path).startswith("dead_letters-")]
    if not letters:
        delete_folder(folder)
        return ""
    for path in set(paths) - set(letters):
        if os.path.basename(path) != LOCK:
            delete_file(path)
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
