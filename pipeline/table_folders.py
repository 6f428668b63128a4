"""The names in a table's folder, and which of some files belong to a table, which their paths tell."""

from __future__ import annotations

import re
from collections.abc import Iterable

POINTER = "CURRENT"
MANIFEST = "manifest.json"
SNAPSHOTS = "snapshots"
ATTEMPTS = "attempts"
REJECTED = "rejected"
JOURNAL = "journal"
# The names that runs, fingerprints and finished files have.
_RUN, _FINGERPRINT = r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{6}", r"[0-9a-f]{32}"
_PART = re.compile(rf"(.*)/(?:(?:{SNAPSHOTS}|{ATTEMPTS}|{REJECTED})/{_RUN}|{JOURNAL}/{_FINGERPRINT})/.*", re.DOTALL)
_FILE = re.compile(r"(?:embeddings|index|dead_letters)-\d{5}-of-\d{5}\..*")


class TableFolders:
    """Tables, and snapshots that were copied from one, as the paths of some files show them.

    Args:
      paths: of files, as they were listed; asking the file system would take a request for each folder.
      others: folders that are known to be tables.
    """

    def __init__(self, paths: Iterable[str], others: Iterable[str] = ()) -> None:
        self._folders = set(others)
        pointers, manifests, finished, parents = set(), set(), set(), set()
        for path in paths:
            if part := _PART.fullmatch(path):
                self._folders.add(part[1])
                continue
            folder, _, name = path.rpartition("/")
            parents.add(folder)
            if name == POINTER:
                pointers.add(folder)
            elif name == MANIFEST:
                manifests.add(folder)
            elif _FILE.fullmatch(name):
                finished.add(folder)
        for folder in manifests & finished:
            above, _, kind = folder.rpartition("/")[0].rpartition("/")
            self._folders.add(above if kind in (SNAPSHOTS, REJECTED) else folder)
        self._folders |= {folder for folder in pointers if any(_is_below(path, folder, SNAPSHOTS) for path in parents)}

    def find(self, path: str) -> str:
        """The table that a file belongs to, or ""."""
        folder = path
        while folder := folder.rpartition("/")[0]:
            if folder in self._folders:
                return folder
        return ""


def _is_below(path: str, *folders: str) -> bool:
    return f"{path}/".startswith("/".join(folders) + "/")
