"""Removes what runs leave behind: attempts and journals.

A run that fails removes its attempt; the attempt of a killed run is removed by the next run. A journal stays until a
run with its fingerprint publishes, because only such a run can use its vectors. If none does, it is removed a month
after its last segment was written.

The run that holds the table's lock may remove all attempts, because no other run is active. On file systems without
locks, attempts of killed and of active runs cannot be distinguished, and none are removed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import first_line
from pipeline.files import (
    delete_empty_folder,
    delete_file,
    delete_folder,
    exists,
    join,
    last_written,
    list_files,
    list_folders,
)
from pipeline.reuse.journal import delete_journal, journal_folder
from pipeline.table_folders import ATTEMPTS, MANIFEST, REJECTED
from pipeline.tables.lock import can_lock
from pipeline.tables.manifest import attempts_folder, read_pointer, snapshot_folder

JOURNAL_DAYS = 30
_DAY_SECONDS = 86400
_LOGGER = logging.getLogger(__name__)


def sweep_dead_attempts(table: str) -> None:
    """Removes what killed runs left: unfinished files, and snapshots that never became live."""
    if not can_lock(table):
        return
    live = read_pointer(table)
    for name in list_folders(join(table, ATTEMPTS)):
        folder = snapshot_folder(table, name)
        # Names sort by time: a finished snapshot of a killed run that never became live is newer than the live one.
        if name > live or not exists(join(folder, MANIFEST)):
            delete_folder(folder)
        delete_folder(attempts_folder(table, name))


def abandon_attempt(table: str, name: str, previous: str) -> str:
    """Removes what a failed run wrote, except its dead letters, which may show why it failed.

    A finished snapshot that could not become live is removed too, unless another run has published meanwhile: then it
    is complete, and the user may want it.

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


@contextmanager
def cleaning_up(work: str) -> Iterator[None]:
    """Turns errors into warnings: a run that has published has succeeded, and the next run cleans up as well."""
    try:
        yield
    except Exception as error:  # each file system raises its own exceptions
        _LOGGER.warning(
            "the run is published, but files in %s that it no longer needs could not be removed: %s",
            work,
            first_line(error),
        )


def clean_up(work: str, name: str, fingerprint: str) -> None:
    """Removes what a published run no longer needs: its attempt and its journal; also journals that are too old."""
    with cleaning_up(work):
        delete_folder(attempts_folder(work, name))
    with cleaning_up(work):
        delete_journal(work, fingerprint)
        expire_journals(work)


def expire_journals(work: str) -> None:
    """Removes the journals whose last segment is older than JOURNAL_DAYS, if the file system has times."""
    for name in list_folders(journal_folder(work)):
        folder = journal_folder(work, name)
        written = last_written(folder)
        days = (time.time() - written) / _DAY_SECONDS
        if written and days > JOURNAL_DAYS:
            _LOGGER.warning(
                "%s is removed: it holds vectors of a run that never published, the last of them %d days old",
                folder,
                days,
            )
            delete_folder(folder)
    delete_empty_folder(journal_folder(work))
