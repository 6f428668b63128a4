"""Publishes a snapshot in a folder from finished files; also checks the output before a run."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from apache_beam.io.filesystems import FileSystems

from pipeline.config import ReindexConfig
from pipeline.errors import RunError, TableError
from pipeline.files import (
    copy_file,
    delete_file,
    delete_folder,
    is_local,
    list_files,
    make_folder,
    strip_partial,
    write_atomically,
)
from pipeline.records import REASONS, BundleCounts, SkippedFile
from pipeline.sinks.index import SUFFIX as INDEX_SUFFIX
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.tfrecord import build_schema
from pipeline.sinks.writing import Shard
from pipeline.table_folders import ATTEMPTS, JOURNAL, MANIFEST, POINTER, REJECTED, SNAPSHOTS
from pipeline.tables.lock import LOCK
from pipeline.tables.manifest import Manifest, TableFile, attempts_folder, read_pointer
from pipeline.tables.pointer import replace_if

_NAMES = (SNAPSHOTS, ATTEMPTS, REJECTED, JOURNAL, LOCK, POINTER)  # the names in a table's folder
RESERVE_BYTES = 64 << 20  # to be left free on the output's disk


@dataclass(frozen=True)
class Publication:
    """The contents of a snapshot's manifest that are fixed before the run.

    Attributes:
      table: the table's folder; for a database, the folder beside it in which its runs work.
      name: of the new snapshot.
      previous: the snapshot that is live when the run starts, or "".
      version: of the live state when the run starts.
      started: seconds since the epoch.
      facts: fields of the manifest that the run does not change.
      max_dead_fraction: the share of dead letters that is tolerated.
      reindex: what happens to live rows and old snapshots.
    """

    table: str
    name: str
    previous: str
    version: str
    started: float
    facts: dict[str, Any]
    max_dead_fraction: float
    reindex: ReindexConfig = ReindexConfig()


def name_snapshot() -> str:
    """A new name; names sort by time."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:6]}"


def check_folder(table: str) -> None:
    """Checks, without writing, that the output is a table or can become one.

    Raises:
      TableError: if the folder holds something else or may not be written to.
    """
    if is_local(table) and os.path.exists(table):
        if not os.path.isdir(table):
            raise TableError(f"--output={table} is a file; give a folder")
        names = (name for name in os.listdir(table) if not name.startswith("."))  # files of file managers
        foreign = sorted(name for name in names if strip_partial(name) not in _NAMES)
        if foreign:
            raise TableError(
                f"--output={table} holds {foreign[0]!r} and is not a table; give an empty or new folder, or a table's"
            )
    if not is_local(table) and (set(table) & set("*?[") or "/" not in table.partition("://")[2].rstrip("/")):
        raise TableError(f"--output={table}: give a folder below the bucket, without any of * ? [ in its name")
    if is_local(table) and not os.access(parent := find_existing(table), os.W_OK | os.X_OK):
        raise TableError(f"--output={table} cannot be written to: {parent} may not be changed; check its permissions")


def find_existing(path: str) -> str:
    """The nearest folder above a local path, or the path itself, that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def check_writable(table: str) -> None:
    """Checks that files can be written to a table's folder, by writing one.

    Raises:
      TableError: if they cannot.
    """
    trial = FileSystems.join(attempts_folder(table, uuid.uuid4().hex), "trial")
    try:
        make_folder(os.path.dirname(trial))
        with FileSystems.create(trial, compression_type="uncompressed") as f:
            f.write(b"trial")
        delete_folder(os.path.dirname(trial))
    except Exception as error:
        raise TableError(f"--output={table} cannot be written to: {error}; check its permissions") from error


def check_free_space(table: str, n_rows: int, row_bytes: int) -> None:
    """Raises RunError if a local disk has no room for the rows that a run is estimated to write."""
    if not is_local(table):
        return
    free = shutil.disk_usage(find_existing(table)).free
    needed = n_rows * row_bytes + RESERVE_BYTES
    if needed > free:
        raise RunError(
            f"--output={table} needs about {needed / 1e9:.1f} GB for some {n_rows:,} new rows of {row_bytes:,} bytes, "
            f"and its disk has {free / 1e9:.1f} GB free; free some, or use --dtype=float16, int8 or --dimensions"
        )


def build_manifest(
    plan: Publication,
    shards: Sequence[Shard],
    counts: dict[str, dict[str, float]],
    bad_files: Iterable[SkippedFile] = (),
) -> Manifest:
    """The manifest of a snapshot of finished files, under their final names."""
    by_kind = defaultdict(list)
    for shard in sorted(shards, key=lambda shard: (shard.first, shard.path)):
        by_kind[shard.kind].append(shard)
    rows = by_kind["embeddings"]
    return Manifest(
        snapshot=plan.name,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        rows=sum(shard.rows for shard in rows),
        files=_name_files(rows),
        index_files=tuple(
            TableFile(f"index-{i:05d}-of-{len(rows):05d}{INDEX_SUFFIX}", shard.rows, *shard.index_size)
            for i, shard in enumerate(rows)
        ),
        dead_letter_files=_name_files(by_kind["dead_letters"]),
        counts=counts,
        dead_letters=count_dead(counts),
        previous=plan.previous,
        bad_files=tuple(bad_files),
        seconds=round(time.time() - plan.started, 3),
        **plan.facts,
    )


def count_dead(counts: dict[str, dict[str, float]]) -> dict[str, int]:
    """Dead letters by reason, from a run's counts."""
    return {reason: int(n) for reason, n in counts.get("write_dead_letters", {}).items() if reason in REASONS}


def place_files(manifest: Manifest, shards: Sequence[Shard], folder: str) -> None:
    """Moves finished files into a snapshot's folder and links unchanged files. May be repeated."""
    make_folder(folder)
    ordered = sorted(shards, key=lambda shard: (shard.first, shard.path))
    rows = [shard for shard in ordered if shard.kind == "embeddings"]
    dead_letters = [shard for shard in ordered if shard.kind == "dead_letters"]
    moves: list[tuple[str, str]] = []
    links: list[tuple[str, str]] = []
    for shard, file in zip([*rows, *dead_letters], [*manifest.files, *manifest.dead_letter_files], strict=True):
        (links if shard.linked else moves).append((shard.path, FileSystems.join(folder, file.name)))
    moves += [
        (shard.index_path, FileSystems.join(folder, file.name))
        for shard, file in zip(rows, manifest.index_files, strict=True)
    ]
    for source, target in links:
        copy_file(source, target)
    waiting = []
    for source, target in moves:
        if FileSystems.exists(source):  # else an interrupted attempt of this commit has moved it
            waiting.append((source, target))
        elif not FileSystems.exists(target):
            raise TableError(
                f"{source} is missing; check that no other program deletes files in the output, and run again"
            )
    if waiting:
        FileSystems.rename(*map(list, zip(*waiting, strict=True)))
    listed = {file.name for file in (*manifest.files, *manifest.index_files, *manifest.dead_letter_files)}
    for path in list_files(folder):  # an earlier attempt at the same commit may have moved others: a glob would read it
        if os.path.basename(path) not in listed:
            delete_file(path)
    if manifest.file_format == "tfrecord":
        write_atomically(FileSystems.join(folder, "schema.pbtxt"), _schema_text(manifest.layout))
    write_atomically(FileSystems.join(folder, MANIFEST), manifest.to_json())


def reject_snapshot(plan: Publication, manifest: Manifest, shards: Sequence[Shard]) -> str:
    """Moves a snapshot that failed validation to the folder of rejected ones, and deletes the last one there."""
    delete_folder(FileSystems.join(plan.table, REJECTED))
    folder = FileSystems.join(plan.table, REJECTED, plan.name)
    place_files(manifest, shards, folder)
    return str(folder)


def sum_counts(bundle_counts: Iterable[BundleCounts]) -> dict[str, dict[str, float]]:
    """Sums counts by stage."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for counted in bundle_counts:
        total[counted.stage].update(json.loads(counted.counts))
    return {stage: dict(sorted(counts.items())) for stage, counts in sorted(total.items())}


def make_live(plan: Publication) -> None:
    """Points to the new snapshot, if the pointer has not changed since the run started. May be repeated.

    Raises:
      TableError: if another run has published meanwhile.
    """
    path = FileSystems.join(plan.table, POINTER)
    if read_pointer(plan.table) == plan.name or replace_if(path, plan.name + "\n", plan.version):
        return
    if read_pointer(plan.table) != plan.name:
        raise TableError(
            f"another run has published {read_pointer(plan.table)} in {plan.table} since this one started from "
            f"{plan.previous or 'nothing'}; that snapshot stays live and this run's is kept in {SNAPSHOTS}/{plan.name}"
        )


def _name_files(shards: Sequence[Shard]) -> tuple[TableFile, ...]:
    return tuple(
        TableFile(f"{shard.kind}-{i:05d}-of-{len(shards):05d}{shard.suffix}", shard.rows, shard.n_bytes, shard.sha256)
        for i, shard in enumerate(shards)
    )


def _schema_text(layout: TableLayout) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(build_schema(layout)))
