"""A table on disk: a folder with snapshots, the manifest of each, and the pointer to the live one.

DIR/CURRENT                          name of the live snapshot; replaced atomically
DIR/snapshots/NAME/manifest.json     written last: without it the folder is not a snapshot
DIR/snapshots/NAME/embeddings-*      the rows
DIR/snapshots/NAME/index-*           digests of the ids and texts of each file's rows
DIR/snapshots/NAME/dead_letters-*    what could not be embedded
DIR/rejected/NAME/                   the last snapshot that failed validation
DIR/attempts/NAME/                   files of a running (or killed) run
DIR/journal/                         vectors that are finished but not published
DIR/lock                             held by the one run that may write
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.errors import ConfigError, TableError, as_line
from pipeline.files import check_scheme, exists, is_local, join, read_text
from pipeline.records import SkippedFile
from pipeline.sinks.layout import TableLayout
from pipeline.table_folders import ATTEMPTS, MANIFEST, POINTER, SNAPSHOTS
from pipeline.tables import manifest_v2

FORMAT_VERSION = 4  # 3 has other columns in tables with chunks only, which the layout says
OLDEST_VERSION = 3
DATABASES = ("duckdb://", "bq://")  # schemes of tables that are not folders
SHOWN_FILES = 5  # of those that are gone
_SNAPSHOT_NAME = re.compile(r"[\w.-]+")
_FIX = f"put the name of another folder of {SNAPSHOTS}/ into {POINTER}, or delete {POINTER} and run embeam embed again"


@dataclass(frozen=True)
class TableFile:
    """One file of a snapshot: its name, rows, size in bytes and checksum."""

    name: str
    rows: int
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class GoneFiles:
    """Input files that the live rows come from and that are no longer among the input.

    Attributes:
      n: how many there are.
      first: the names of the first.
    """

    n: int = 0
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, sources: Iterable[str], inputs: Collection[str]) -> GoneFiles:
        """Those of the live rows' sources that are not among the inputs."""
        gone = sorted({source for source in sources if source and source not in inputs})
        return cls(len(gone), tuple(gone[:SHOWN_FILES]))

    def __str__(self) -> str:
        files = "an input file that is" if self.n == 1 else f"{self.n:,} input files that are"
        names = as_line(", ".join(self.first)) + (", ..." if self.n > len(self.first) else "")
        return f"{files} no longer among the input: {names}"


@dataclass(frozen=True)
class Manifest:
    """Everything about one snapshot.

    Attributes:
      snapshot: its name.
      created_at: when it was published, UTC, ISO 8601.
      embeam: version of the software.
      rows: rows in all files.
      file_format: a key of `SINKS`.
      compression: none or gzip.
      layout: the columns.
      fingerprint: sha256 over `identity`.
      identity: all that changes a vector.
      settings: the whole configuration, flat.
      files: files with rows, in order.
      index_files: the index of each of them, in the same order.
      dead_letter_files: files with dead letters.
      counts: documents, tokens and so on, by stage.
      dead_letters: count by reason.
      previous: the snapshot that was live before, or "".
      seconds: wall-clock time of the run, from its start to its publication.
      bad_files: input files that could not be read to their ends and were skipped; the rows from them stay.
      gone_files: input files of the previous snapshot that were no longer among the input: how many, and the first.
      parity: how close the fast graph is to the published one on this machine before the run (`precision`, `max_abs`,
        `min_cosine` over a few rows); empty where the published graph ran.
    """

    snapshot: str
    created_at: str
    embeam: str
    rows: int
    file_format: str
    compression: str
    layout: TableLayout
    fingerprint: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    files: tuple[TableFile, ...]
    index_files: tuple[TableFile, ...]
    dead_letter_files: tuple[TableFile, ...]
    counts: dict[str, dict[str, float]]
    dead_letters: dict[str, int]
    previous: str = ""
    seconds: float = 0.0
    bad_files: tuple[SkippedFile, ...] = ()
    gone_files: GoneFiles = GoneFiles()
    parity: dict[str, Any] = field(default_factory=dict)
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> str:
        own = {"layout": self.layout.to_json(), "bad_files": [bad._asdict() for bad in self.bad_files]}
        return json.dumps(asdict(self) | own, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        values = json.loads(text)
        if values["format_version"] == manifest_v2.VERSION:
            values = manifest_v2.upgrade_manifest(values)
        if values["format_version"] < OLDEST_VERSION:
            raise TableError(
                f"its format version {values['format_version']} is older than any that this embeam reads; "
                "make the table again in another folder"
            )
        if values["format_version"] > FORMAT_VERSION:
            raise TableError(
                f"its format version {values['format_version']} is newer than this embeam reads ({FORMAT_VERSION}); "
                "install a newer embeam"
            )
        values["layout"] = TableLayout.from_json(values["layout"])
        for name in ("files", "index_files", "dead_letter_files"):
            values[name] = tuple(TableFile(**entry) for entry in values[name])
        values["bad_files"] = tuple(SkippedFile(**entry) for entry in values.get("bad_files", ()))
        gone = values.get("gone_files", {"n": 0, "first": ()})
        values["gone_files"] = GoneFiles(gone["n"], tuple(gone["first"]))
        values["format_version"] = FORMAT_VERSION
        known = {attribute.name for attribute in fields(cls)}
        return cls(**{name: values[name] for name in known & set(values)})  # another embeam may write more


def open_table(table: str) -> tuple[Manifest, str]:
    """Reads the live snapshot's manifest.

    Args:
      table: the table's folder.

    Returns:
      The manifest and the snapshot's folder.

    Raises:
      ConfigError: if it is a database's table, which has no such folder.
      TableError: if there is no readable table.
    """
    if table.startswith(DATABASES):
        raise ConfigError(f"{table} is a database's table and has no folder; use read_table or iter_table")
    table = os.path.expanduser(table) if "://" not in table else table
    name = read_pointer(table)
    if not name:
        raise TableError(f"{table} is not a table: it has no file {POINTER}; embeam embed --output={table} makes one")
    return read_manifest(table, name), snapshot_folder(table, name)


def check_place(table: str) -> None:
    """Checks that a table's folder can be a folder.

    Raises:
      ConfigError: if there is no such file system.
      TableError: if it is a file.
    """
    check_scheme(table)
    if is_local(table) and os.path.isfile(table):
        raise TableError(f"{table} is a file, not a table; name a table's folder, or duckdb://FILE/TABLE")


def read_pointer(table: str) -> str:
    """The name of the live snapshot, or "" where nothing was published yet."""
    check_place(table)
    path = join(table, POINTER)
    if not exists(path):
        return ""
    try:
        name = read_text(path).strip()
    except UnicodeDecodeError:
        name = ""
    if not _SNAPSHOT_NAME.fullmatch(name):
        raise TableError(f"{path} is damaged: it names no snapshot; {_FIX}")
    return name


def read_manifest(table: str, name: str) -> Manifest:
    path = join(snapshot_folder(table, name), MANIFEST)
    if not exists(path):
        raise TableError(f"{table} is damaged: its live snapshot {name} has no {MANIFEST}; {_FIX}")
    try:
        return Manifest.from_json(read_text(path))
    except TableError as error:
        raise TableError(f"{path}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TableError(f"{path} is damaged ({error}); {_FIX}") from error


def snapshot_folder(table: str, name: str) -> str:
    return join(table, SNAPSHOTS, name)


def attempts_folder(table: str, name: str) -> str:
    return join(table, ATTEMPTS, name)
