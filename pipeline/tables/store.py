"""What a place for tables has to do: a folder, or a database. `stores.py` lists them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Optional, Protocol

from pipeline.config import EmbedConfig
from pipeline.records import BundleCounts, Row, SkippedFile
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.tables.manifest import GoneFiles, Manifest

if TYPE_CHECKING:  # only needed by runs
    import apache_beam as beam

    from pipeline.reuse.live_table import DistributedReuse
    from pipeline.reuse.local import LocalReuse
    from pipeline.sinks.index import Index
    from pipeline.sinks.readers import VectorReader
    from pipeline.sinks.writing import DeadLetterFormat, RowFormat, Shard
    from pipeline.tables.publish import Publication


@dataclass(frozen=True)
class ReusePlan:
    """What a run may reuse of the live table and the journal.

    Attributes:
      back_end: where vectors are looked up, by the kind of engine; its `policy` says which may be reused.
      reader: how the live table's vectors are read; None if there is no live table.
      live: size and checksum of the live table's files, by path; empty for databases.
      gone: input files that live rows come from and that are no longer there.
    """

    back_end: LocalReuse | DistributedReuse
    reader: Optional[VectorReader] = None
    live: dict[str, tuple[int, str]] = field(default_factory=dict)
    gone: GoneFiles = GoneFiles()


@dataclass(frozen=True)
class CommitPlan:
    """What a commit needs and is resolved before the run.

    Attributes:
      publication: the new state of the table.
      reuse: what may be reused.
      form: how rows are written to files.
      shard_bytes: size at which a new file is started.
      dead_letter_format: how dead letters are written.
    """

    publication: Publication
    reuse: ReusePlan
    form: RowFormat
    shard_bytes: int
    dead_letter_format: DeadLetterFormat


class Results(NamedTuple):
    """The results of a run when its commit begins.

    Attributes:
      shards: files of rows and dead letters.
      bundle_counts: the counts of its stages.
      spot_checks: rows that were encoded once more.
      notes: paths of the local back end's notes on documents that are not encoded.
      samples: rows to compare spot checks with, from the distributed back end.
      bad_files: input files that could not be read to their ends.
    """

    shards: Sequence[Shard]
    bundle_counts: Sequence[BundleCounts]
    spot_checks: Sequence[Row]
    notes: Sequence[str] = ()
    samples: Sequence[Row] = ()
    bad_files: Sequence[SkippedFile] = ()

    def list_bad_files(self) -> tuple[SkippedFile, ...]:
        """The bad files in order, each once: several ranges of one may have failed."""
        return tuple({bad.file: bad for bad in sorted(self.bad_files, reverse=True)}.values())[::-1]


class Committer(Protocol):
    """Publishes a run; picklable."""

    def commit(self, results: Results) -> str:
        """Checks, completes and publishes what a run has produced; may be repeated.

        Returns:
          The name of the published state, or the input of `finish`.

        Raises:
          RunError: if there is too little to publish, or validation stops it.
          TableError: if another run has changed the table, or it cannot be written to.
        """

    def finish(self, pipeline: beam.Pipeline, committed: beam.PCollection) -> beam.PCollection:
        """Adds the steps of a commit that need more than one worker, such as loading rows.

        Args:
          pipeline: of the run.
          committed: PCollection[str] of what `commit` has returned.

        Returns:
          PCollection[str] of the name of what was published.
        """
        return committed


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

    def read_columns(self, live: Manifest) -> Iterator[Columns]:
        """Streams the live rows about a thousand at a time: column name to values, `embedding` as stored bytes.

        Raises:
          TableError: if the table is damaged.
        """


class Store(Table, Protocol):
    """A place for a table, for runs."""

    def check(self, config: EmbedConfig) -> None:
        """Checks, without writing, that the output is a table or can become one, and that the settings fit it.

        Raises:
          ConfigError, TableError: if not.
        """

    def check_columns(self, live: Optional[Manifest], layout: TableLayout) -> None:
        """Checks that rows with a layout can be written beside those columns that are there already.

        Raises:
          TableError: if a column has another type.
        """

    def check_writable(self) -> None:
        """Checks that the output can be written to, by writing.

        Raises:
          TableError: if it cannot.
        """

    def find_damaged(self, live: Manifest, by_checksum: bool) -> set[str]:
        """Paths of damaged files of the live table, whose rows must not be reused.

        Args:
          live: from `read_live`.
          by_checksum: compare checksums, which reads all files, instead of sizes.
        """

    def read_indexes(self, live: Manifest, scratch: str, lost: set[str]) -> Iterator[tuple[str, Index]]:
        """Yields path and index of each file of the live table; a database's rows have no path.

        Args:
          live: from `read_live`.
          scratch: local folder for data about these rows that the commit needs.
          lost: paths of files to leave out; their rows count as missing.

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

    def committer(self, plan: CommitPlan) -> Committer:
        """What publishes the run."""
