"""Where a table is kept: a folder or a database. To add a kind: a class with this interface and a line in `STORES`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.saved_model import absolute_path
from pipeline.sinks.index import Index, read_index
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.writing import DeadLetterFormat, RowFormat
from pipeline.tables.joining import JoinRule, KnownFile
from pipeline.tables.known import ROWS, VectorFile
from pipeline.tables.manifest import POINTER, Manifest, read_manifest, read_pointer, snapshot_folder
from pipeline.tables.pointer import read_versioned
from pipeline.tables.publish import Publication, check_folder
from pipeline.tables.readers import FileReader, VectorReader, damaged
from pipeline.tables.recall import RecallRule
from pipeline.tables.storage import hash_content, join, measure_files

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Takeover:
    """What a run may take over from the live table.

    Attributes:
      rule: of the back end that looks up what is known: the local one's index, or the distributed one's joins.
      reader: how the live table's vectors are read; None if there is no live table.
      reusable: whether they have the wanted fingerprint.
      live: size and checksum of the live table's files, by path; empty for databases.
    """

    rule: RecallRule | JoinRule
    reader: Optional[VectorReader] = None
    reusable: bool = True
    live: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class CommitPlan:
    """All that is settled about the end of a run before it begins.

    Attributes:
      publication: the new state of the table.
      takeover: what may be taken over.
      form: how rows are written to files.
      shard_bytes: size at which a new file is begun.
      letter_format: how dead letters are written.
    """

    publication: Publication
    takeover: Takeover
    form: RowFormat
    shard_bytes: int
    letter_format: DeadLetterFormat


class Live(NamedTuple):
    """The state that readers see.

    Attributes:
      manifest: of it; None before the first run.
      version: changes whenever the state does.
    """

    manifest: Optional[Manifest]
    version: str


class Store(Protocol):
    """A place for a table.

    Attributes:
      shown: the table's name as the user gave it.
      work: folder for the lock, attempts and the journal: the table's own, or one beside the database.
    """

    shown: str
    work: str

    def check(self, config: EmbedConfig) -> None:
        """Checks before a run that the output can be written to, and that the settings fit it.

        Raises:
          ConfigError, TableError: if not.
        """

    def read_live(self) -> Live:
        """What is live.

        Raises:
          TableError: if it cannot be read.
        """

    def find_damaged(self, live: Manifest, by_checksum: bool) -> set[str]:
        """Paths of the live table's files whose rows must not be taken over.

        Args:
          live: from `read_live`.
          by_checksum: read everything, instead of looking at sizes alone.
        """

    def read_indexes(self, live: Manifest, scratch: str, lost: set[str]) -> Iterator[tuple[str, Index]]:
        """Yields path and index of each file of the live table; a database's rows have no path.

        Args:
          live: from `read_live`.
          scratch: local folder for what the commit will need to know of these rows.
          lost: paths of files to leave out, as if their rows had never been.

        Raises:
          TableError: if the table cannot be read.
        """

    def reader(self, live: Manifest, scratch: str) -> VectorReader:
        """How the live table's vectors are read."""

    def can_copy(self, live: Manifest, form: RowFormat) -> bool:
        """Whether unchanged rows can stay as they are stored."""

    def live_files(self, live: Manifest) -> dict[str, tuple[int, str]]:
        """Size and checksum of the live table's files, by path; none for a database."""

    def locate_dead_letters(self, live: Manifest, name: str) -> str:
        """Path or glob of the files with the dead letters of the last run."""

    def choose_form(self, config: EmbedConfig, layout: TableLayout) -> RowFormat:
        """How a run writes its rows to files."""

    def read_columns(self, live: Manifest) -> Iterator[dict[str, list]]:
        """Streams the live rows about a thousand at a time: column name to values, `embedding` as stored bytes.

        Raises:
          TableError: if the table is damaged.
        """

    def committer(self, plan: CommitPlan) -> Any:
        """The picklable object whose `commit(results)` publishes."""


class FolderStore:
    """A folder of snapshots, on any file system of Beam."""

    def __init__(self, output: str) -> None:
        self.shown = output
        self.work = absolute_path(output)

    def check(self, config: EmbedConfig) -> None:
        check_folder(self.work)

    def read_live(self) -> Live:
        _, version = read_versioned(join(self.work, POINTER))
        name = read_pointer(self.work)
        return Live(read_manifest(self.work, name) if name else None, version)

    def find_damaged(self, live: Manifest, by_checksum: bool) -> set[str]:
        root = snapshot_folder(self.work, live.snapshot)
        there = {path.rpartition("/")[2]: n_bytes for path, n_bytes in measure_files(root).items()}
        damaged = set()
        for file, index_file in zip(live.files, live.index_files, strict=True):
            for part in (file, index_file):
                path = join(root, part.name)
                if there.get(part.name) != part.n_bytes or (by_checksum and hash_content(path) != part.sha256):
                    _LOGGER.warning("%s is damaged; its rows are made anew", path)
                    damaged.add(join(root, file.name))
        return damaged

    def read_indexes(self, live: Manifest, scratch: str, lost: set[str]) -> Iterator[tuple[str, Index]]:
        root = snapshot_folder(self.work, live.snapshot)
        for file, index_file in zip(live.files, live.index_files, strict=True):
            path = join(root, file.name)
            if path in lost:
                continue
            index_path = join(root, index_file.name)
            try:
                index = read_index(index_path)
            except Exception as error:  # every file system has exceptions of its own
                raise damaged(index_path, str(error)) from error
            if len(index.entries) != file.rows:
                raise damaged(index_path, f"it has {len(index.entries)} entries instead of {file.rows}")
            yield path, index

    def reader(self, live: Manifest, scratch: str) -> VectorReader:
        return FileReader(live.file_format, live.layout, live.compression)

    def can_copy(self, live: Manifest, form: RowFormat) -> bool:
        theirs: tuple[str, str, TableLayout] = live.file_format, live.compression, live.layout
        return theirs == (form.name, form.compression, form.layout)

    def locate_dead_letters(self, live: Manifest, name: str) -> str:
        return str(join(snapshot_folder(self.work, live.snapshot), name))

    def choose_form(self, config: EmbedConfig, layout: TableLayout) -> RowFormat:
        return RowFormat(config.write.output_format, layout, config.write.compression)

    def read_columns(self, live: Manifest) -> Iterator[dict[str, list]]:
        reader, none = FileReader(live.file_format, live.layout, live.compression), np.zeros(0, int)
        for file in live.files:
            path = join(snapshot_folder(self.work, live.snapshot), file.name)
            for stored in reader.read(VectorFile(path, ROWS, 0, file.rows), none):
                yield reader.columns(stored, np.arange(len(stored.numbers)))

    def committer(self, plan: CommitPlan) -> Any:
        from pipeline.tables.commit import FolderCommit

        return FolderCommit(plan)

    def known_files(self, live: Manifest, lost: set[str]) -> list[KnownFile]:
        """The live table's files for the distributed back end, but for the lost ones."""
        root = snapshot_folder(self.work, live.snapshot)
        return [
            KnownFile(VectorFile(join(root, file.name), ROWS, 0, file.rows), join(root, index.name))
            for file, index in zip(live.files, live.index_files, strict=True)
            if join(root, file.name) not in lost
        ]

    def live_files(self, live: Manifest) -> dict[str, tuple[int, str]]:
        root = snapshot_folder(self.work, live.snapshot)
        return {join(root, file.name): (file.n_bytes, file.sha256) for file in live.files}


# scheme -> module and class, imported when first used; everything else is a folder
STORES = {
    "duckdb://": ("pipeline.tables.duckdb", "DuckdbStore"),
    "bq://": ("pipeline.tables.bigquery", "BigqueryStore"),
}


def open_store(output: str, work_dir: str = "") -> Store:
    """The store that an output names.

    Args:
      output: a folder, or a database's table.
      work_dir: folder for what the runs on a table of BigQuery keep; not needed for reading.

    Raises:
      ConfigError: if it names none.
    """
    for scheme, (module, name) in STORES.items():
        if output.startswith(scheme):
            store: Store = getattr(importlib.import_module(module), name)(output, work_dir)
            return store
    return FolderStore(output)
