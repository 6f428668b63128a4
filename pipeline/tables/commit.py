"""The one step that waits for all others: what was encoded and what was known become the new state of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems

from pipeline.errors import GateError, RunError
from pipeline.failures import PUBLISHING
from pipeline.progress import check_dead_fraction
from pipeline.records import Row, Tally
from pipeline.sinks.index import read_index
from pipeline.sinks.writing import DeadLetterFormat, RowFormat, Shard, ShardWriter
from pipeline.tables.carry import (
    FRESH,
    GONE,
    Carrier,
    Fates,
    FileReader,
    Letters,
    check_deletes,
    decide_fates,
    number_files,
    read_letters,
)
from pipeline.tables.gate import SAMPLED_FILES, Expected, check_probes, check_rows, check_vectors
from pipeline.tables.journal import delete_journals
from pipeline.tables.known import ROWS, SEGMENT, KnownVectors
from pipeline.tables.manifest import MANIFEST, attempts_folder, snapshot_folder
from pipeline.tables.publish import (
    Publication,
    build_manifest,
    count_dead,
    make_live,
    place_files,
    reject_snapshot,
    sum_tallies,
)
from pipeline.tables.recall import Note, RecallRule
from pipeline.tables.retention import expire_snapshots
from pipeline.tables.storage import create_file, delete_folder, join, read_text

AGREED = (
    "commit.json"  # in the attempt's folder: the files of the new snapshot, so that a repeated commit takes the same
)


class Results(NamedTuple):
    """All that a run has produced when its commit begins."""

    shards: list[Shard]
    tallies: list[Tally]
    notes: list[Note]
    probes: list[Row]


@dataclass(frozen=True)
class Takeover:
    """What a run may take over from the live table.

    Attributes:
      rule: where the index of known vectors is.
      reader: how the live table's files are read; None if there is no live table.
      reusable: whether its vectors have the wanted fingerprint.
      live: size and checksum of its files, by path.
    """

    rule: RecallRule
    reader: Optional[FileReader] = None
    reusable: bool = True
    live: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class FolderCommit:
    """Publishes a new snapshot in a table's folder.

    Attributes:
      publication: the snapshot.
      takeover: what may be taken over.
      form: how rows are written.
      shard_bytes: size at which a new file is begun.
      letter_format: how dead letters are written.
    """

    publication: Publication
    takeover: Takeover
    form: RowFormat
    shard_bytes: int
    letter_format: DeadLetterFormat

    def commit(self, results: Results) -> str:
        """Checks, completes and publishes what a run has produced; may be repeated. Returns the snapshot's name.

        Raises:
          RunError: if there is too little to publish, or the gate stops it.
          TableError: if another run has published meanwhile, or the live table is damaged.
        """
        plan = self.publication
        folder = snapshot_folder(plan.table, plan.name)
        if not FileSystems.exists(join(folder, MANIFEST)):  # else a repeated attempt at the same commit
            shards, counts = self._agree(results)
            manifest = build_manifest(plan, shards, counts)
            with PUBLISHING:
                place_files(manifest, shards, folder)
        with PUBLISHING:
            make_live(plan)
            delete_folder(attempts_folder(plan.table, plan.name))
            delete_journals(plan.table)
        expire_snapshots(plan.table, plan.reindex.keep_snapshots, plan.reindex.grace_seconds)
        return plan.name

    def _agree(self, results: Results) -> tuple[list[Shard], dict[str, dict[str, float]]]:
        path = join(attempts_folder(self.publication.table, self.publication.name), AGREED)
        if FileSystems.exists(path):
            values = json.loads(read_text(path))
            shards = [Shard(*fields)._replace(index_size=tuple(fields[8])) for fields in values["shards"]]
            return shards, values["counts"]
        shards, counts = self._complete(results)
        create_file(path, json.dumps({"shards": shards, "counts": counts}).encode())
        return shards, counts

    def _complete(self, results: Results) -> tuple[list[Shard], dict[str, dict[str, float]]]:
        plan = self.publication
        check_counts(sum_tallies(results.tallies), plan.max_dead_fraction)
        completion = complete_rows(self, results)
        counts = sum_tallies([*results.tallies, *completion.tallies])
        check_dead_fraction(count_dead(counts), int(counts["read"]["records"]), plan.max_dead_fraction)
        shards = [*results.shards, *completion.shards]
        rows = [shard for shard in shards if shard.kind == "embeddings"]
        if not rows:
            n, dead = int(counts["read"]["records"]), count_dead(counts)
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in dead.items())
            raise RunError(f"none of {n:,} documents could be embedded: {reasons or 'all are blank, see --on_empty'}")
        if plan.reindex.gate == "on":
            try:
                completion.check_gate(rows)
            except GateError as error:
                folder = reject_snapshot(plan, build_manifest(plan, shards, counts), shards)
                raise GateError(
                    f"the new snapshot failed the gate and lies in {folder}: {error}; the table is what it was; "
                    "look into it, or publish all the same with --gate=off"
                ) from error
        return shards, counts


def check_counts(counts: dict[str, dict[str, float]], max_dead_fraction: float) -> None:
    """Raises RunError if nothing was read, or too much of it cannot be embedded."""
    dead = count_dead(counts)
    n = int(counts.get("read", {}).get("records", 0))
    if not n and not dead:
        raise RunError("the input holds no documents; check --input and --on_empty")
    check_dead_fraction(dead, n, max_dead_fraction)


@dataclass(frozen=True)
class Completion:
    """What `complete_rows` adds to the fresh rows, and what the gate has to know."""

    commit: FolderCommit
    known: KnownVectors
    readers: dict[str, FileReader]
    fresh: list[Shard]
    shards: list[Shard]
    tallies: list[Tally]
    expected: Expected
    probes: list[Row]

    def check_gate(self, rows: Sequence[Shard]) -> None:
        """Raises GateError if the snapshot must not be published."""
        files = number_files(self.fresh, len(self.known.entries))
        check_rows(rows, self.expected)
        own = [shard for shard in rows if not shard.linked]
        check_vectors(number_files(own[:: max(1, len(own) // SAMPLED_FILES)], 0), self.readers[FRESH])
        pairs = list(zip(files, self.fresh, strict=True))
        check_probes(self.probes, self.known, pairs, self.readers, self.commit.form.layout)


def complete_rows(commit: FolderCommit, results: Results) -> Completion:
    """Turns a run's notes into rows: the local back end's second pass.

    Raises:
      RunError: if more of the table's documents are gone than is allowed.
    """
    plan, takeover = commit.publication, commit.takeover
    known = KnownVectors(takeover.rule.folder)
    fresh = [shard for shard in results.shards if shard.kind == "embeddings"]
    letters = read_letters(shard for shard in results.shards if shard.kind == "dead_letters")
    fresh_ids = np.concatenate([np.empty(0, "S16"), *(read_index(shard.index).entries["id"] for shard in fresh)])
    keeps_deleted = plan.reindex.deletes == "keep" or plan.reindex.retry_dead_letters
    fates = decide_fates(known, results.notes, letters, fresh_ids, keeps_deleted)
    check_deletes(fates.counts["deleted"], known.count_live_ids(), plan.reindex.max_delete_fraction)
    if not takeover.reusable:
        fates = _drop_all(fates)
    fresh_reader = FileReader(commit.form.name, commit.form.layout, commit.form.compression)
    readers = {FRESH: fresh_reader, SEGMENT: fresh_reader, ROWS: takeover.reader or fresh_reader}
    folder = attempts_folder(plan.table, plan.name)
    carrier = Carrier(known, readers, fresh, commit.form, folder, commit.shard_bytes)
    shards = carrier.carry(fates, results.notes, letters, takeover.live, takeover.rule.rows_stay)
    letter_writer = ShardWriter(folder, commit.letter_format, commit.shard_bytes)
    if carrier.dead:
        letter_writer.write(carrier.dead)
    reasons = [letter.reason for letter in carrier.dead]
    tallies = [
        Tally.of("carry", {**carrier.counts, **fates.counts}),
        Tally.of("write_dead_letters", {reason: reasons.count(reason) for reason in set(reasons)}),
    ]
    expected = expect_documents(commit, results, fates, letters, carrier)
    return Completion(
        commit, known, readers, fresh, [*shards, *letter_writer.finish()], tallies, expected, results.probes
    )


def _drop_all(fates: Fates) -> Fates:
    """No row of another fingerprint is carried: a stale document is lost until it can be embedded."""
    lost = {"lost": fates.counts["stale"] + fates.counts["kept"], "stale": 0, "kept": 0}
    return fates._replace(fate=np.full_like(fates.fate, GONE), counts=fates.counts | lost)


def expect_documents(
    commit: FolderCommit, results: Results, fates: Fates, letters: Letters, carrier: Carrier
) -> Expected:
    """How many documents the snapshot should have: from what was counted on the way, not from what was written."""
    counts = sum_tallies(results.tallies)
    read = int(counts.get("recall", {}).get("documents", 0))
    carried = fates.counts["stale"] + fates.counts["kept"]
    dead = {letter["id"] for found in letters.by_content.values() for letter in found}
    dead |= {letter.id for letter in carrier.dead}
    least = read - len(dead) + carried
    return Expected(least, read + carried if commit.form.layout.chunked else least)


class CommitResults(beam.DoFn):
    def __init__(self, commit: FolderCommit) -> None:
        self.commit = commit

    def process(
        self, _: Any, shards: list[Shard], tallies: list[Tally], notes: list[Note], probes: list[Row]
    ) -> list[str]:
        return [self.commit.commit(Results(list(shards), list(tallies), list(notes), list(probes)))]


@dataclass
class Commit(beam.PTransform):
    """Pipeline -> PCollection[str], the name of what was published.

    Attributes:
      commit: what publishes.
      shards: PCollection of the files that the run has finished.
      tallies: PCollection of what its stages have counted.
      notes: PCollection of what was recalled.
      probes: PCollection of rows that were encoded once more.
    """

    commit: FolderCommit
    shards: Any
    tallies: Any
    notes: Any
    probes: Any

    def expand(self, pipeline: Any) -> beam.PCollection:
        everything = (self.shards, self.tallies, self.notes, self.probes)
        return (
            pipeline
            | "Begin" >> beam.Create([None], reshuffle=False)
            | "CommitResults" >> beam.ParDo(CommitResults(self.commit), *map(beam.pvalue.AsList, everything))
        )
