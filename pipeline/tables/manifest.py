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
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.errors import ConfigError, TableError
from pipeline.files import check_scheme, exists, join, read_text
from pipeline.sinks.layout import TableLayout
from pipeline.tables import manifest_v2

FORMAT_VERSION = 4  # 3 has other columns in tables with chunks only, which the layout says
OLDEST_VERSION = 3
POINTER = "CURRENT"
MANIFEST = "manifest.json"
SNAPSHOTS = "snapshots"
ATTEMPTS = "attempts"
REJECTED = "rejected"
DATABASES = ("duckdb://", "bq://")  # schemes of tables that are not folders
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
    parity: dict[str, Any] = field(default_factory=dict)
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"layout": self.layout.to_json()}, indent=1) + "\n"

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


def read_pointer(table: str) -> str:
    """The name of the live snapshot, or "" where nothing was published yet."""
    check_scheme(table)
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
