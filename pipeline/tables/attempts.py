"""What runs leave behind: an attempt is abandoned when its run fails, and swept by the next run if it died.

Whoever holds the table's lock may remove all attempts: no other run is alive. Where there are no locks nothing tells
the dead from the living, and nothing is swept.
"""

from __future__ import annotations

import os

from pipeline.files import delete_file, delete_folder, exists, join, list_files, list_folders
from pipeline.tables.lock import can_lock
from pipeline.tables.manifest import ATTEMPTS, MANIFEST, REJECTED, attempts_folder, read_pointer, snapshot_folder


def sweep_dead_attempts(table: str) -> None:
    """Removes what dead runs left: unfinished files, and snapshots that never went live."""
    if not can_lock(table):
        return
    live = read_pointer(table)
    for name in list_folders(join(table, ATTEMPTS)):
        folder = snapshot_folder(table, name)
        # Names sort by time: a finished snapshot of a dead run is newer than the live one if it never became that.
        if name > live or not exists(join(folder, MANIFEST)):
            delete_folder(folder)
        delete_folder(attempts_folder(table, name))


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
    dead_letters = [path for path in paths if os.path.basename(path).startswith("dead_letters-")]
    if not dead_letters or list_files(join(table, REJECTED, name)):  # a rejected snapshot has copies of them
        delete_folder(folder)
        return ""
    for path in set(paths) - set(dead_letters):
        delete_file(path)
    delete_folder(join(folder, "scratch"))
    return folder
