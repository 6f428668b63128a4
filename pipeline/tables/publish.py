"""The end of a run: from finished files to the live snapshot, and the checks of the output before the run."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from pipeline.errors import RunError, TableError
from pipeline.failures import PUBLISHING
from pipeline.progress import check_dead_fraction
from pipeline.records import REASONS, Tally
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.tfrecord import build_schema
from pipeline.sinks.writing import Shard
from pipeline.tables.manifest import (
    ATTEMPTS,
    MANIFEST,
    POINTER,
    SNAPSHOTS,
    Manifest,
    TableFile,
    attempts_folder,
    delete_file,
    delete_folder,
    list_files,
    make_folder,
    read_manifest,
    read_pointer,
    snapshot_folder,
    write_atomically,
)

RESERVE_BYTES = 64 << 20  # left free on the output's disk


@dataclass(frozen=True)
class Publication:
    """All that a snapshot's manifest says and that is known before the run.

    Attributes:
      table: the table's folder.
      name: of the new snapshot.
      previous: the snapshot that is live when the run starts, or "".
      started: seconds since the epoch.
      facts: fields of the manifest that the run does not change.
      max_dead_fraction: the share of dead letters that is tolerated.
    """

    table: str
    name: str
    previous: str
    started: float
    facts: dict[str, Any]
    max_dead_fraction: float


def name_snapshot() -> str:
    """A new name; names sort by time."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def check_output(table: str) -> str:
    """Checks before a run that the output is a table or can become one, and can be written to.

    Returns:
      The name of the live snapshot, or "".

    Raises:
      TableError: if the folder holds something else or cannot be written to.
    """
    if "://" not in table and os.path.exists(table):
        if not os.path.isdir(table):
            raise TableError(f"--output={table} is a file; give a folder")
        ours = (SNAPSHOTS, ATTEMPTS, POINTER, ".")  # a dot: what file managers leave behind
        foreign = sorted(name for name in os.listdir(table) if not name.startswith(ours))
        if foreign:
            raise TableError(
                f"--output={table} holds {foreign[0]!r} and is no table; give an empty or new folder, or a table's"
            )
    probe = FileSystems.join(attempts_folder(table, uuid.uuid4().hex), "probe")
    try:
        make_folder(os.path.dirname(probe))
        with FileSystems.create(probe, compression_type="uncompressed") as f:
            f.write(b"probe")
        delete_folder(os.path.dirname(probe))
    except Exception as error:
        raise TableError(f"--output={table} cannot be written to: {error}; check its permissions") from error
    previous = read_pointer(table)
    if previous:
        read_manifest(table, previous)
    return previous


def check_free_space(table: str, n_rows: int, row_bytes: int) -> None:
    """Raises RunError if a local disk has no room for the estimated table."""
    if "://" in table:
        return
    folder = table
    while not os.path.exists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free
    needed = n_rows * row_bytes + RESERVE_BYTES
    if needed > free:
        raise RunError(
            f"--output={table} needs about {needed / 1e9:.1f} GB for some {n_rows:,} rows of {row_bytes:,} bytes, and "
            f"its disk has {free / 1e9:.1f} GB free; free some, or use --dtype=float16, int8 or --dimensions"
        )


def publish_snapshot(plan: Publication, shards: Iterable[Shard], tallies: Iterable[Tally]) -> Manifest:
    """Moves a run's finished files into a new snapshot and makes it the live one. May be repeated.

    Raises:
      RunError: if too many documents are dead letters or none is left; nothing is published then.
      TableError: if another run has published meanwhile.
    """
    folder = snapshot_folder(plan.table, plan.name)
    if FileSystems.exists(FileSystems.join(folder, MANIFEST)):  # a repeated attempt at the same commit
        manifest = read_manifest(plan.table, plan.name)
        _make_live(plan)
        delete_folder(attempts_folder(plan.table, plan.name))
        return manifest
    counts = sum_tallies(tallies)
    dead = {reason: int(n) for reason, n in counts.get("write_dead_letters", {}).items() if reason in REASONS}
    rows_in = int(counts.get("read", {}).get("records", 0))
    if not rows_in and not dead:
        raise RunError("the input holds no documents; check --input and --on_empty")
    check_dead_fraction(dead, rows_in, plan.max_dead_fraction)
    by_kind = defaultdict(list)
    for shard in sorted(shards, key=lambda shard: (shard.first, shard.path)):
        by_kind[shard.kind].append(shard)
    if not by_kind["embeddings"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dead.items()) or "all are blank, see --on_empty"
        raise RunError(f"none of {rows_in:,} documents could be embedded: {reasons}")
    make_folder(folder)
    manifest = Manifest(
        snapshot=plan.name,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        rows=sum(shard.rows for shard in by_kind["embeddings"]),
        files=_move_shards(by_kind["embeddings"], folder),
        dead_letter_files=_move_shards(by_kind["dead_letters"], folder),
        counts=counts,
        dead_letters=dead,
        previous=plan.previous,
        seconds=round(time.time() - plan.started, 3),
        **plan.facts,
    )
    _delete_unlisted(folder, manifest)
    if manifest.file_format == "tfrecord":
        write_atomically(FileSystems.join(folder, "schema.pbtxt"), _schema_text(manifest.layout))
    write_atomically(FileSystems.join(folder, MANIFEST), manifest.to_json())
    _make_live(plan)
    delete_folder(attempts_folder(plan.table, plan.name))
    return manifest


def sum_tallies(tallies: Iterable[Tally]) -> dict[str, dict[str, float]]:
    """Sums tallies by stage."""
    total: dict[str, Counter] = defaultdict(Counter)
    for tally in tallies:
        total[tally.stage].update(json.loads(tally.counts))
    return {stage: dict(sorted(counts.items())) for stage, counts in sorted(total.items())}


def _move_shards(shards: list[Shard], folder: str) -> tuple[TableFile, ...]:
    files, sources, targets = [], [], []
    for i, shard in enumerate(shards):
        name = f"{shard.kind}-{i:05d}-of-{len(shards):05d}{shard.suffix}"
        files.append(TableFile(name, shard.rows, shard.n_bytes, shard.sha256))
        target = FileSystems.join(folder, name)
        if FileSystems.exists(shard.path):  # else an interrupted attempt at the same commit has moved it
            sources.append(shard.path)
            targets.append(target)
        elif not FileSystems.exists(target):
            raise TableError(f"{shard.path} has vanished; does another program clean the output? run again")
    if sources:
        FileSystems.rename(sources, targets)
    return tuple(files)


def _delete_unlisted(folder: str, manifest: Manifest) -> None:
    """Removes what an earlier attempt at the same commit may have moved here: a glob would read it."""
    listed = {file.name for file in (*manifest.files, *manifest.dead_letter_files)}
    for path in list_files(folder):
        if os.path.basename(path) not in listed:
            delete_file(path)


def _make_live(plan: Publication) -> None:
    """Points to the new snapshot if the pointer is what the run started from; locally no other run can come between.

    On object stores two runs that publish within the same moment may both believe that they did; the last one is live.
    """
    if "://" in plan.table:
        return _replace_pointer(plan)
    folder = os.open(os.path.join(plan.table, SNAPSHOTS), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        _replace_pointer(plan)
    finally:
        os.close(folder)


def _replace_pointer(plan: Publication) -> None:
    live = read_pointer(plan.table)
    if live == plan.name:
        return
    if live != plan.previous:
        raise TableError(
            f"another run has published {live} in {plan.table} since this one started from "
            f"{plan.previous or 'nothing'}; the other's table stays live and this one's lies in {SNAPSHOTS}/{plan.name}"
        )
    write_atomically(FileSystems.join(plan.table, POINTER), plan.name + "\n")


def _schema_text(layout: TableLayout) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(build_schema(layout)))


class PublishSnapshot(beam.DoFn):
    def __init__(self, plan: Publication) -> None:
        self.plan = plan

    def process(self, _: Any, shards: list[Shard], tallies: list[Tally]) -> list[str]:
        with PUBLISHING:
            return [publish_snapshot(self.plan, shards, tallies).snapshot]


@dataclass
class Publish(beam.PTransform):
    """Pipeline -> PCollection[str], the new snapshot's name: the one step that waits for all others."""

    plan: Publication
    shards: Any
    tallies: Any

    def expand(self, pipeline: Any) -> beam.PCollection:
        return (
            pipeline
            | "Begin" >> beam.Create([None], reshuffle=False)
            | "PublishSnapshot"
            >> beam.ParDo(PublishSnapshot(self.plan), beam.pvalue.AsList(self.shards), beam.pvalue.AsList(self.tallies))
        )
