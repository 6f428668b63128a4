"""A table in a folder of snapshots, on any file system of Beam, for runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.config import EmbedConfig
from pipeline.files import create_file, exists, join, measure_files, read_checksum, read_text
from pipeline.records import SkippedFile
from pipeline.reuse.live_table import LiveFile
from pipeline.signals import PUBLISHING
from pipeline.sinks.index import Index, read_index, read_sources
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.readers import FileReader, VectorReader, damaged
from pipeline.sinks.writing import RowFormat, Shard
from pipeline.table_folders import MANIFEST
from pipeline.tables.attempts import clean_up, cleaning_up
from pipeline.tables.commit import check_any_rows, complete, find_examples_in, validate_snapshot
from pipeline.tables.folder_table import FolderTable
from pipeline.tables.manifest import Manifest, attempts_folder, snapshot_folder
from pipeline.tables.publish import build_manifest, check_folder, check_writable, make_live, place_files
from pipeline.tables.retention import expire_snapshots
from pipeline.tables.store import CommitPlan, Committer, Results

# In the attempt's folder: the list of the new snapshot's files, so that a repeated commit uses the same.
AGREED = "commit.json"
_THREADS = 32  # object stores take some 50 ms for each file
_LOGGER = logging.getLogger(__name__)


class FolderStore(FolderTable):
    """A folder of snapshots, for runs."""

    def check(self, config: EmbedConfig) -> None:
        check_folder(self.work)

    def check_columns(self, live: Manifest | None, layout: TableLayout) -> None:
        """Does nothing: each snapshot has columns of its own."""

    def check_writable(self) -> None:
        check_writable(self.work)

    def find_damaged(self, live: Manifest, by_checksum: bool) -> set[str]:
        root = snapshot_folder(self.work, live.snapshot)
        there = {path.rpartition("/")[2]: n_bytes for path, n_bytes in measure_files(root).items()}
        damaged = set()
        for file, index_file in zip(live.files, live.index_files, strict=True):
            for part in (file, index_file):
                path = join(root, part.name)
                if there.get(part.name) != part.n_bytes or (by_checksum and not has_checksum(path, part.sha256)):
                    _LOGGER.warning("%s is damaged; its rows are made again", path)
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
            except Exception as error:  # each file system raises its own exceptions
                raise damaged(index_path, str(error)) from error
            if len(index.entries) != file.rows:
                raise damaged(index_path, f"it has {len(index.entries)} entries instead of {file.rows}")
            yield path, index

    def reader(self, live: Manifest, scratch: str) -> VectorReader:
        return FileReader(live.file_format, live.layout, live.compression)

    def can_copy(self, live: Manifest, form: RowFormat) -> bool:
        theirs: tuple[str, str, TableLayout] = live.file_format, live.compression, live.layout
        return theirs == (form.name, form.compression, form.layout)

    def choose_form(self, config: EmbedConfig, layout: TableLayout) -> RowFormat:
        return RowFormat(config.write.output_format, layout, config.write.compression)

    def committer(self, plan: CommitPlan) -> FolderCommit:
        return FolderCommit(plan)

    def list_live_files(self, live: Manifest, lost: set[str]) -> list[LiveFile]:
        """The live table's files with their indexes, except the lost ones."""
        root = snapshot_folder(self.work, live.snapshot)
        return [
            LiveFile(join(root, file.name), file.rows, file.n_bytes, file.sha256, join(root, index.name))
            for file, index in zip(live.files, live.index_files, strict=True)
            if join(root, file.name) not in lost
        ]

    def list_sources(self, files: Iterable[LiveFile]) -> set[str]:
        """The input files that the rows of some files come from, from the ends of their index files.

        Raises:
          TableError: if one is damaged.
        """
        with ThreadPoolExecutor(_THREADS) as threads:
            return {source for some in threads.map(_read_sources, files) for source in some}

    def live_files(self, live: Manifest) -> dict[str, tuple[int, str]]:
        root = snapshot_folder(self.work, live.snapshot)
        return {join(root, file.name): (file.n_bytes, file.sha256) for file in live.files}


def _read_sources(file: LiveFile) -> list[str]:
    try:
        return read_sources(file.index_path)
    except Exception as error:  # each file system raises its own exceptions
        raise damaged(file.index_path, str(error)) from error


def has_checksum(path: str, sha256: str) -> bool:
    """Whether a file can be read and has the size or checksum in the manifest."""
    try:
        return read_checksum(path)[0] == sha256
    except Exception:  # each file system raises its own exceptions
        return False


@dataclass(frozen=True)
class FolderCommit(Committer):
    """Publishes a new snapshot in a table's folder."""

    plan: CommitPlan

    def commit(self, results: Results) -> str:
        """Checks, completes and publishes what a run has produced; may be repeated. Returns the snapshot's name.

        Raises:
          RunError: if there is too little to publish, or validation stops it.
          TableError: if another run has published meanwhile, or the live table is damaged.
        """
        plan = self.plan.publication
        folder = snapshot_folder(plan.table, plan.name)
        if not exists(join(folder, MANIFEST)):  # else the commit is repeated
            shards, counts, bad_files = self._agree(results)
            manifest = build_manifest(plan, shards, counts, bad_files)
            with PUBLISHING:
                place_files(manifest, shards, folder)
        with PUBLISHING:
            make_live(plan)
            clean_up(plan.table, plan.name, plan.facts["fingerprint"])
        with cleaning_up(plan.table):
            expire_snapshots(plan.table, plan.reindex.keep_snapshots, plan.reindex.grace_seconds)
        return plan.name

    def _agree(self, results: Results) -> tuple[list[Shard], dict[str, dict[str, float]], Sequence[SkippedFile]]:
        publication = self.plan.publication
        path = join(attempts_folder(publication.table, publication.name), AGREED)
        if exists(path):
            values = json.loads(read_text(path))
            shards = [Shard(*fields)._replace(index_size=tuple(fields[8])) for fields in values["shards"]]
            return shards, values["counts"], [SkippedFile(*fields) for fields in values["bad_files"]]
        completion = complete(self.plan, results, whole=True)
        shards, counts, bad_files = completion.shards, completion.counts, completion.bad_files
        check_any_rows(shards, counts, find_examples_in(shards))
        validate_snapshot(completion, "the new snapshot failed validation and is kept", "it")
        create_file(path, json.dumps({"shards": shards, "counts": counts, "bad_files": bad_files}).encode())
        return shards, counts, bad_files
