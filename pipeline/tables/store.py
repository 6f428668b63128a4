"""Where a table is kept: a folder or a database. To add a kind: a class with this interface and a line in `STORES`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Protocol

from pipeline.config import EmbedConfig
from pipeline.sinks.layout import TableLayout
from pipeline.tables.manifest import Manifest

if TYPE_CHECKING:  # what only a run needs
    from pipeline.sinks.index import Index
    from pipeline.sinks.writing import DeadLetterFormat, RowFormat
    from pipeline.tables.joining import JoinRule
    from pipeline.tables.publish import Publication
    from pipeline.tables.readers import VectorReader
    from pipeline.tables.recall import RecallRule


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


class Table(Protocol):
    """A place of a table, for readers.

    Attributes:
      shown: the table's name as the user gave it.
      work: folder for the lock, attempts and the journal: the table's own, or one beside the database.
    """

    shown: str
    work: str

    def read_live(self) -> Live:
        """What is live.

        Raises:
          TableError: if it cannot be read.
        """

    def locate_dead_letters(self, live: Manifest, name: str) -> str:
        """Path or glob of the files with the dead letters of the last run."""

    def read_columns(self, live: Manifest) -> Iterator[dict[str, list]]:
        """Streams the live rows about a thousand at a time: column name to values, `embedding` as stored bytes.

        Raises:
          TableError: if the table is damaged.
        """


class Store(Table, Protocol):
    """A place for a table, for runs."""

    def check(self, config: EmbedConfig) -> None:
        """Checks before a run that the output can be written to, and that the settings fit it.

        Raises:
          ConfigError, TableError: if not.
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

    def choose_form(self, config: EmbedConfig, layout: TableLayout) -> RowFormat:
        """How a run writes its rows to files."""

    def committer(self, plan: CommitPlan) -> Any:
        """The picklable object whose `commit(results)` publishes."""


# scheme -> module and class, imported when first used; the first that fits counts
STORES = {
    "duckdb://": ("pipeline.tables.duckdb", "DuckdbStore"),
    "bq://": ("pipeline.tables.bigquery", "BigqueryStore"),
    "": ("pipeline.tables.folder", "FolderStore"),
}
TABLES = STORES | {"": ("pipeline.tables.folder_table", "FolderTable")}  # the same, for readers


def open_store(output: str, work_dir: str = "") -> Store:
    """The store that an output names.

    Args:
      output: a folder, or a database's table.
      work_dir: folder for what the runs on a table of BigQuery keep; not needed for reading.

    Raises:
      ConfigError: if it names none.
    """
    store: Store = _find_class(STORES, output)(output, work_dir)
    return store


def find_table(name: str) -> Table:
    """As `open_store`, for readers: of a folder on a local disk, it loads neither Beam nor TensorFlow."""
    table: Table = _find_class(TABLES, name)(name)
    return table


def _find_class(places: dict[str, tuple[str, str]], output: str) -> Any:
    module, name = next(place for scheme, place in places.items() if output.startswith(scheme))
    return getattr(importlib.import_module(module), name)
