"""Old snapshots: deletes expired ones, and makes one of them live again."""

from __future__ import annotations

import datetime
import time
import uuid

from pipeline.errors import TableError
from pipeline.files import delete_folder, exists, join, list_folders
from pipeline.table_folders import MANIFEST, POINTER, SNAPSHOTS
from pipeline.tables.lock import TableLock
from pipeline.tables.manifest import Manifest, attempts_folder, open_table, read_manifest, read_pointer, snapshot_folder
from pipeline.tables.pointer import read_versioned, replace_if


def list_snapshots(table: str) -> list[str]:
    """Names of the finished snapshots of a table, oldest first."""
    names = list_folders(join(table, SNAPSHOTS))
    return [name for name in names if exists(join(snapshot_folder(table, name), MANIFEST))]


def expire_snapshots(table: str, keep: int, grace_seconds: float) -> list[str]:
    """Removes old snapshots; call it only while holding the table's lock.

    Args:
      table: the table's folder.
      keep: how many are kept, including the live one.
      grace_seconds: how long ago the next one must have been published, so that readers of the old one are done.

    Returns:
      The names of the removed ones.
    """
    live = read_manifest(table, read_pointer(table))
    # The snapshot that was live until now is kept first: after a rollback it is not the newest one.
    older = sorted((n for n in list_snapshots(table) if n != live.snapshot), reverse=True)
    older.sort(key=lambda name: name != live.previous)
    expired = []
    manifests = [read_manifest(table, name) for name in list_snapshots(table)]
    for name in older[keep - 1 :]:
        retired = max((_published_at(m) for m in manifests if m.previous == name), default=0.0)
        # A snapshot that was rolled back from has no successor: it retired when the next run published.
        retired = retired or min((_published_at(m) for m in manifests if m.snapshot > name), default=time.time())
        if time.time() - retired >= grace_seconds:
            delete_folder(snapshot_folder(table, name))
            expired.append(name)
    return expired


def roll_back(table: str, to: str = "") -> Manifest:
    """Makes an older snapshot the live one again.

    Args:
      table: the table's folder.
      to: its name; "" takes the one that was live before.

    Returns:
      The manifest of the snapshot that is live now.

    Raises:
      TableError: if there is no such snapshot, or a run holds the table.
    """
    with TableLock(table, f"rollback-{uuid.uuid4().hex[:6]}"):
        _, version = read_versioned(join(table, POINTER))
        manifest, _ = open_table(table)
        there = list_snapshots(table)
        name = to or manifest.previous
        if name not in there or name == manifest.snapshot:
            wanted = f"no other snapshot {name}" if name else "no snapshot before the live one"
            others = ", ".join(other for other in there if other != manifest.snapshot)
            fix = f"there are: {others}; name one with --to=NAME" if others else "the live one is the only one"
            raise TableError(f"{table} has {wanted}; {fix}")
        older = read_manifest(table, name)
        # If the run was killed after it published, the next run would delete its snapshot as one that was never live.
        delete_folder(attempts_folder(table, manifest.snapshot))
        if not replace_if(join(table, POINTER), name + "\n", version):
            raise TableError(f"{table} was changed at the same time; run embeam rollback again")
        return older


def _published_at(manifest: Manifest) -> float:
    return datetime.datetime.fromisoformat(manifest.created_at).timestamp()
