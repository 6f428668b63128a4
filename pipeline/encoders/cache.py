"""The cache: folders and values that are made once per machine and kept, with checks for damaged ones."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.errors import EncoderError

Found = TypeVar("Found")

CHECKSUMS = "checksums.json"  # beside the files it lists: relative path to sha256


def cache_dir() -> str:
    """Returns $EMBEAM_CACHE_DIR, else $XDG_CACHE_HOME/embeam, else ~/.cache/embeam, as an absolute path."""
    own = os.environ.get("EMBEAM_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.abspath(os.path.expanduser(own or os.path.join(shared, "embeam")))


def cached_folder(name: str, make: Callable[[str], None]) -> str:
    """Returns a folder of the cache; makes it if there is no undamaged one.

    Processes may ask for the same folder at once: each makes its own, the first to finish renames its own to the final
    name, and the others use that one. A damaged folder is not touched, because a process may be reading it: the next
    free name is used instead.

    Args:
      name: identifies the content of the folder; other content must have another name.
      make: creates the folder whose path it is given.

    Raises:
      EncoderError: if the cache cannot be written to.
    """
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    try:
        return next(filter(None, (_whole_folder(os.path.join(cache_dir(), n), make) for n in names)))
    except OSError as error:
        raise EncoderError(
            f"the cache folder {cache_dir()} cannot be used ({error}); set EMBEAM_CACHE_DIR to a writable folder"
        ) from error


def remembered(name: str, find_out: Callable[[], Found], is_valid: Callable[[Any], bool]) -> Found:
    """Returns a cached JSON value; computes it if there is none or its file is damaged.

    Args:
      name: contains everything that the value depends on.
      find_out: is called if no valid value is remembered.
      is_valid: whether a JSON value is one that `find_out` may return.
    """
    known = look_up(name, is_valid)
    if known is None:
        known = find_out()
        remember(name, known)
    return known


def look_up(name: str, is_valid: Callable[[Any], bool]) -> Any:
    """Returns the JSON value that is remembered under a name, or None if there is no valid one."""
    try:
        with open(_remembered_path(name), encoding="utf-8") as file:
            known = json.load(file)
    except (OSError, ValueError):
        return None
    return known if is_valid(known) else None


def remember(name: str, value: Any) -> None:
    """Caches a JSON value for later processes; ignores a cache that cannot be written to."""
    path = _remembered_path(name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file)
        os.replace(partial, path)
    except OSError:
        return


def _remembered_path(name: str) -> str:
    return os.path.join(cache_dir(), "remembered", name)


def _whole_folder(folder: str, make: Callable[[str], None]) -> str | None:
    """Returns the folder, made if it is not there; None if it is damaged."""
    if not os.path.lexists(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=os.path.dirname(folder)) as temporary:
            fresh = os.path.join(temporary, os.path.basename(folder))
            make(fresh)
            checksums = _checksums(fresh)
            with open(os.path.join(fresh, CHECKSUMS), "w", encoding="utf-8") as file:
                json.dump(checksums, file, indent=1)
            try:
                os.rename(fresh, folder)
            except OSError:
                if not os.path.lexists(folder):  # else another process was faster
                    raise
    return folder if _is_whole(folder) else None


def _is_whole(folder: str) -> bool:
    try:
        with open(os.path.join(folder, CHECKSUMS), encoding="utf-8") as file:
            return all(hash_file(os.path.join(folder, path)) == value for path, value in json.load(file).items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksums(folder: str) -> dict[str, str]:
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(path, folder): hash_file(path) for path in sorted(paths)}


def hash_file(path: str) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
