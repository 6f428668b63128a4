"""The files that `--input` names: a file, a glob or a folder, on a local disk or on any file system of Beam.

`*`, `?` and `[...]` match within a name, `**` also across folders, and `{a,b}` is either; a name that holds such signs
is found if nothing else is. Local disks are listed here, because Beam leaves out what it cannot open.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from pipeline.errors import InputError
from pipeline.files import absolute_path, check_scheme, file_systems, is_local
from pipeline.sources.names import name_as_text, show_name
from pipeline.table_folders import TableFolders

_FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(/.*)", re.DOTALL)
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")  # innermost braces
_SET = re.compile(r"\[(!?)(\]?[^\]]*)\]", re.DOTALL)
_WITHIN, _ACROSS = "[^/]", ".*"
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_LOGGER = logging.getLogger(__name__)

Skip = Callable[[str], bool]  # whether a file or folder, and what is in it, is left out


class FoundFile(NamedTuple):
    """A file that a glob matches.

    Attributes:
      path: where it is.
      name: its path below the fixed part of the glob.
      size: in bytes.
      error: why it cannot be read, if that is known; its size is then 0.
      source: its name in tables.
    """

    path: str
    name: str
    size: int
    error: str = ""
    source: str = ""


class Listing(NamedTuple):
    """What was listed for a glob.

    Attributes:
      found: the files that it matches, without names.
      paths: of all files that were seen on the way.
      is_glob: whether the files are matched; one that is named as it is counts even if it is part of a table.
      base: the folder below which their names begin.
    """

    found: list[FoundFile]
    paths: list[str]
    is_glob: bool
    base: str


class Exclusions:
    """What `--exclude` leaves out: a glob without a slash names files and folders, another one paths.

    Attributes:
      globs: as they were given.
      unused: those that have left out nothing so far.
    """

    def __init__(self, globs: Sequence[str]) -> None:
        self.globs, self.unused = tuple(globs), list(globs)
        self._names = [(glob, compile_glob(glob.rstrip("/"))) for glob in globs if "/" not in glob.rstrip("/")]
        paths = [(glob, glob.rstrip("/")) for glob in globs if "/" in glob.rstrip("/")]
        # Below the input's folder, or as --input would be read.
        self._paths = [(glob, compile_glob(path), compile_glob(resolve_path(path))) for glob, path in paths]

    def leave_out(self, path: str, base: str) -> bool:
        """Whether a file or folder is left out; `base` is the folder of its input."""
        name, below = path.rpartition("/")[2], path[len(base) + 1 :]
        glob = next((glob for glob, own in self._names if own.fullmatch(name)), "")
        glob = glob or next((g for g, own, whole in self._paths if own.fullmatch(below) or whole.fullmatch(path)), "")
        if glob in self.unused:
            self.unused.remove(glob)
        return bool(glob)


def find_files(given: str, exclusions: Exclusions, own_table: str = "") -> list[FoundFile]:
    """The files that one `--input` names; local paths become absolute.

    Args:
      given: a file, folder or glob.
      exclusions: what is left out.
      own_table: the folder of the run's own table, which is no input either.

    Raises:
      InputError: if there are none, or the file system refuses.
    """
    path = resolve_path(given)
    check_scheme(path)
    try:
        found, paths, is_glob, base = (list_local if is_local(path) else list_remote)(path, exclusions)
    except InputError:
        raise
    except Exception as error:  # each file system raises its own exceptions
        raise InputError(f"--input={show_name(given)} cannot be listed: {error}") from error
    left_out: dict[str, int] = {}
    if is_glob:
        tables = TableFolders(paths, [own_table] if own_table else [])
        owners = [tables.find(file.path) for file in found]
        found = [file for file, owner in zip(found, owners, strict=True) if not owner]
        left_out = {owner: owners.count(owner) for owner in dict.fromkeys(owners) if owner}
    for table, n in left_out.items():
        _LOGGER.warning(
            "%s is a table of embeam: its %d files that match --input=%s are left out; name a file itself to read it",
            show_name(table),
            n,
            show_name(given),
        )
    if not found:
        excluded = " and --exclude" if exclusions.globs else ""
        why = f"matches no file; check the path{excluded}, and quote globs in the shell"
        if left_out:
            why = "matches only files of tables of embeam; name the files of a corpus"
        elif is_local(path) and os.path.isdir(path):
            why = f"is a folder without files to read; hidden ones are not read, check it{excluded}"
        raise InputError(f"--input={show_name(given)} {why}")
    return [
        file._replace(name=name_as_text(file.path[len(base) + 1 :]), source=name_as_text(file.path)) for file in found
    ]


def resolve_path(given: str) -> str:
    """A path or glob in full: `~` and `file://` are replaced, local paths are absolute; a slash at the end stays."""
    if url := _FILE_URL.fullmatch(given):
        given = unquote(url[1], errors="surrogateescape")
    if not is_local(given):
        return given
    return absolute_path(given).rstrip("/") + ("/" if given.endswith("/") else "")


def list_local(path: str, exclusions: Exclusions) -> Listing:
    """Lists a local file, folder or glob; a link, pipe or device that matches is a file that cannot be read."""
    if os.path.isdir(path):
        base = path.rstrip("/")
        found, paths = _walk(base, "**", lambda one: is_hidden(one) or exclusions.leave_out(one, base))
        return Listing(found, paths, True, base)
    if path.endswith("/"):
        path += "*"
    base = _fixed_part(path).rpartition("/")[0]
    found, paths = [], []
    if _fixed_part(path) != path:
        for glob in expand_braces(path):
            root = _fixed_part(glob).rpartition("/")[0]
            some, seen = _walk(root, glob[len(root) + 1 :], lambda one: exclusions.leave_out(one, base))
            found += some
            paths += seen
    if found:
        return Listing(list(dict.fromkeys(found)), paths, True, base)
    base = path.rpartition("/")[0]
    if os.path.lexists(path) and not os.path.isdir(path) and not exclusions.leave_out(path, base):
        return Listing([_look_at(path)], [path], False, base)
    return Listing([], paths, True, base)


def _walk(root: str, glob: str, skip: Skip) -> tuple[list[FoundFile], list[str]]:
    """Lists the files below a folder that a glob matches, and the paths of all files in the folders on the way.

    Raises:
      InputError: if a folder on the way cannot be listed: its files would seem to be gone.
    """
    levels = glob.split("/")
    n_fixed = next((i for i, level in enumerate(levels) if "**" in level), len(levels))
    is_recursive = n_fixed < len(levels)
    names = [compile_glob(level) for level in levels[:n_fixed]]
    whole = re.compile(re.escape(f"{root}/") + translate_glob(glob), re.DOTALL)
    found: list[FoundFile] = []
    paths: list[str] = []
    links: list[str] = []
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            entries = list(os.scandir(folder or "/"))
        except OSError as error:
            if folder == root and not os.path.isdir(root):
                break
            raise InputError(
                f"the folder {show_name(folder)} cannot be listed: {error.strerror}; change its permissions, or leave "
                "it out with --exclude"
            ) from error
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if skip(path):
                continue
            if not _is_folder(entry):
                paths.append(path)
                if whole.fullmatch(path):
                    found.append(_look_at(path))
            elif depth >= n_fixed and entry.is_symlink():
                links.append(path)
            elif depth >= n_fixed or (depth < len(levels) - 1 and names[depth].fullmatch(entry.name)):
                waiting.append((path, depth + 1))
    if links and is_recursive:
        _LOGGER.warning(
            "%d linked folders are not searched, such as %s; name them with --input too if they are part of the input",
            len(links),
            show_name(min(links)),
        )
    return found, paths


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link in a circle
        return False


def _look_at(path: str) -> FoundFile:
    """A local file; what cannot be opened, or is no file, has an error."""
    try:
        status = os.stat(path)
    except OSError as error:
        why = (
            f"is a link to {os.readlink(path)!r}, which cannot be opened" if os.path.islink(path) else "cannot be read"
        )
        return FoundFile(path, "", 0, f"{why}: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        return FoundFile(path, "", 0, f"is {kind}, not a file; --input=- reads standard input")
    return FoundFile(path, "", status.st_size)


def list_remote(path: str, exclusions: Exclusions) -> Listing:
    """Lists an object, folder or glob of another file system, in one request or one listing."""
    systems = file_systems()
    fixed = _fixed_part(path)
    if fixed == path and not path.endswith("/"):
        base = path.rpartition("/")[0]
        named = systems.match([path])[0].metadata_list
        below = systems.match([f"{path}/**"])[0].metadata_list if not (named and named[0].size_in_bytes) else []
        if not below:  # else it is a folder, which some file systems list as an empty file
            found = [FoundFile(m.path, "", m.size_in_bytes) for m in named if not exclusions.leave_out(m.path, base)]
            return Listing(found, [], False, base)
        path = fixed = f"{path}/"
    is_folder = fixed == path
    base = fixed.rpartition("/")[0]
    # Beam's own globs neither match a backslash nor know braces: it lists, and the glob is applied here.
    prefix = fixed.partition("\\")[0]
    metadata = [m for m in systems.match([f"{prefix}**"])[0].metadata_list if not m.path.endswith("/")]
    whole = re.compile(re.escape(path) + _ACROSS if is_folder else compile_glob(path).pattern, re.DOTALL)
    skip = _remember_folders(lambda one: (is_folder and is_hidden(one)) or exclusions.leave_out(one, base), base)
    found = [FoundFile(m.path, "", m.size_in_bytes) for m in metadata if whole.fullmatch(m.path) and not skip(m.path)]
    if not found and not is_folder and systems.exists(path):  # an object whose name holds * ? [ or braces
        one = systems.get_filesystem(path).metadata(path)
        return Listing([FoundFile(path, "", one.size_in_bytes)], [path], False, path.rpartition("/")[0])
    return Listing(found, [m.path for m in metadata], True, base)


def _remember_folders(skip: Skip, base: str) -> Skip:
    """As `skip`, for a path whose folders have not been looked at."""
    folders = {base: False}

    def skip_below(path: str) -> bool:
        folder = path.rpartition("/")[0]
        if len(folder) > len(base) and folder not in folders:
            folders[folder] = skip_below(folder)
        return folders.get(folder, False) or skip(path)

    return skip_below


def is_hidden(path: str) -> bool:
    """Whether a folder's reader leaves a file or folder out: as Spark and Hive do, `_lang=en` is not hidden."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("._COPYING_")


def expand_braces(glob: str) -> list[str]:
    """The globs without braces that a glob with braces stands for: `{a,b}.txt` gives `a.txt` and `b.txt`."""
    return list(dict.fromkeys(_expand(glob)))


def _expand(glob: str) -> Iterator[str]:
    found = _CHOICE.search(glob)
    if not found:
        yield glob
        return
    for choice in found[1].split(","):
        yield from _expand(glob[: found.start()] + choice + glob[found.end() :])


def compile_glob(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression over whole paths, braces included.

    Raises:
      InputError: if it is none, such as [z-a].
    """
    try:
        return re.compile("|".join(f"(?:{translate_glob(one)})" for one in expand_braces(glob)), re.DOTALL)
    except re.error as error:
        raise InputError(f"{show_name(glob)} is not a glob: {error}; correct it") from error


def translate_glob(glob: str) -> str:
    """A glob without braces as a regular expression, by the rules of Beam's file systems."""
    expression, i = "", 0
    while i < len(glob):
        if glob.startswith("**", i):
            expression, i = expression + _ACROSS, i + 2
        elif glob[i] == "*":
            expression, i = f"{expression}{_WITHIN}*", i + 1
        elif glob[i] == "?":
            expression, i = expression + _WITHIN, i + 1
        elif found := _SET.match(glob, i):
            inside = found[2].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            expression, i = f"{expression}(?!/)[{'^' if found[1] else ''}{inside}]", found.end()
        else:
            expression, i = expression + re.escape(glob[i]), i + 1
    return expression


def _fixed_part(glob: str) -> str:
    """What comes before the first sign of a glob."""
    signs = r"[*?\[{]" if _CHOICE.search(glob) else r"[*?\[]"
    return re.split(signs, glob, maxsplit=1)[0]
