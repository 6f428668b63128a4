"""The one step that waits for all others: what was encoded and what was known become the new state of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np

from pipeline.errors import RunError, ValidationError
from pipeline.progress import check_dead_fraction
from pipeline.records import BundleCounts, Row, digest_id
from pipeline.reuse.actions import CARRIED, GONE, Fates, check_deletes, decide_fates, read_dead_letters
from pipeline.reuse.distributed import JoinRule
from pipeline.reuse.index import SEGMENT, KnownVectors
from pipeline.reuse.journal import SegmentReader
from pipeline.reuse.look_up import RecallRule
from pipeline.reuse.merge import Carrier
from pipeline.reuse.requests import FRESH, Letters, Wishes, number_files, plan_wishes
from pipeline.sinks.index import read_index
from pipeline.sinks.readers import ROWS, FileReader, VectorReader
from pipeline.sinks.writing import Shard, ShardWriter
from pipeline.tables.lock import Lease
from pipeline.tables.manifest import attempts_folder
from pipeline.tables.publish import build_manifest, count_dead, reject_snapshot, sum_counts
from pipeline.tables.store import CommitPlan, Committer, Results
from pipeline.tables.validation import (
    SAMPLED_FILES,
    Expected,
    check_count,
    check_rows,
    check_vectors,
    compare_samples,
    compare_spot_checks,
)


def check_counts(counts: dict[str, dict[str, float]], max_dead_fraction: float) -> None:
    """Raises RunError if nothing was read, or too much of it cannot be embedded."""
    dead = count_dead(counts)
    n = int(counts.get("read", {}).get("records", 0))
    if not n and not dead:
        raise RunError("the input holds no documents; check --input and --on_empty")
    check_dead_fraction(dead, n, max_dead_fraction)


def check_any_rows(shards: Sequence[Shard], counts: dict[str, dict[str, float]]) -> None:
    """Raises RunError if not one document has a row."""
    if not any(shard.kind == "embeddings" for shard in shards):
        n, dead = int(counts["read"]["records"]), count_dead(counts)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dead.items())
        raise RunError(f"none of {n:,} documents could be embedded: {reasons or 'all are blank, see --on_empty'}")


@dataclass(frozen=True)
class Completion:
    """A run's rows with everything that was taken over, and what validation needs.

    Attributes:
      plan: of the commit.
      known: the index of known vectors.
      readers: how its files are read.
      fresh: files with rows that were encoded.
      shards: all files that the run has written, and those that it links.
      counts: by stage.
      fates: of the live rows.
      expected: how many documents there should be.
      spot_checks: rows that were encoded once more.
      whole: whether the files hold the whole table, or only what changes in a database.
    """

    plan: CommitPlan
    known: KnownVectors
    readers: dict[str, VectorReader]
    fresh: list[Shard]
    shards: list[Shard]
    counts: dict[str, dict[str, float]]
    fates: Fates
    expected: Expected
    spot_checks: Sequence[Row]
    whole: bool

    def validate(self) -> None:
        """Raises ValidationError if the new state must not go live."""
        if self.plan.publication.reindex.validate == "off":
            return
        rows = [shard for shard in self.shards if shard.kind == "embeddings"]
        staying = np.zeros(0, int) if self.whole else np.flatnonzero(np.isin(self.fates.fate, CARRIED))
        check_rows(rows, self.known.entries[staying], self.expected)
        own = [shard for shard in rows if not shard.linked]
        check_vectors(number_files(own[:: max(1, len(own) // SAMPLED_FILES)], 0), self.readers[FRESH])
        files = zip(number_files(self.fresh, len(self.known.entries)), self.fresh, strict=True)
        compare_spot_checks(self.spot_checks, self.known, list(files), self.readers, self.plan.form.layout)

    def removed_rows(self) -> np.ndarray:
        """Numbers of the live rows that go, or are replaced."""
        return np.flatnonzero(~np.isin(self.fates.fate, CARRIED))


def complete(plan: CommitPlan, results: Results, whole: bool) -> Completion | JoinedCompletion:
    """Brings a run's rows to their end, by the back end that it ran with; see `complete_rows`."""
    if isinstance(plan.takeover.rule, JoinRule):
        return complete_joined(plan, results)
    return complete_rows(plan, results, whole)


@dataclass(frozen=True)
class JoinedCompletion:
    """As `Completion`, where joins have brought everything together already."""

    plan: CommitPlan
    results: Results
    shards: list[Shard]
    counts: dict[str, dict[str, float]]
    expected: Expected

    def validate(self) -> None:
        """Raises ValidationError if the new state must not go live."""
        if self.plan.publication.reindex.validate == "off":
            return
        carry = self.counts.get("merge", {})
        if twice := int(carry.get("duplicate_rows", 0)):
            raise ValidationError(f"{twice:,} rows have an id and chunk that another row has too")
        check_count(int(carry.get("documents", 0)), self.expected)
        form = self.plan.form
        rows = [shard for shard in self.shards if shard.kind == "embeddings"]
        reader = FileReader(form.name, form.layout, form.compression)
        check_vectors(number_files(rows[:: max(1, len(rows) // SAMPLED_FILES)], 0), reader)
        compare_samples(self.results.spot_checks, self.results.samples, form.layout)


def validate_snapshot(completion: Completion | JoinedCompletion, failed: str, it: str) -> None:
    """Lets a new state pass that may go live; what may not is kept aside.

    Args:
      completion: the new state.
      failed: what is said of one that may not: what failed and "lies".
      it: what is said to be looked into.

    Raises:
      ValidationError: saying why, and where it lies.
    """
    try:
        completion.validate()
    except ValidationError as error:
        plan, shards = completion.plan.publication, completion.shards
        folder = reject_snapshot(plan, build_manifest(plan, shards, completion.counts), shards)
        raise ValidationError(
            f"{failed} in {folder}: {error}; the table is what it was; look into {it}, or "
            "publish all the same with --validate=off"
        ) from error


def complete_joined(plan: CommitPlan, results: Results) -> JoinedCompletion:
    """Checks what the distributed back end has counted.

    Raises:
      RunError: if more of the table's documents are gone than is allowed, or too much cannot be embedded.
    """
    counts = sum_counts(results.bundle_counts)
    check_counts(counts, plan.publication.max_dead_fraction)
    carry = counts.get("merge", {})
    reindex = plan.publication.reindex
    gone = int(carry.get("deleted", 0) - carry.get("moved", 0))
    check_deletes(gone, int(carry.get("live", 0)), reindex.max_delete_fraction)
    dead_letters = read_dead_letters(shard for shard in results.shards if shard.kind == "dead_letters")
    dead = {dead_letter["id"] for found in dead_letters.by_content.values() for dead_letter in found}
    read = int(counts.get("reuse", {}).get("documents", 0))
    expected = Expected(read - len(dead), read if plan.form.layout.chunked else read - len(dead))
    return JoinedCompletion(plan, results, list(results.shards), counts, expected)


def complete_rows(plan: CommitPlan, results: Results, whole: bool) -> Completion:
    """Turns a run's notes into rows: the local back end's second pass.

    Args:
      plan: of the commit.
      results: of the run.
      whole: write all rows of the table, not only the new ones.

    Raises:
      RunError: if more of the table's documents are gone than is allowed, or too much cannot be embedded.
    """
    publication, takeover, rule = plan.publication, plan.takeover, plan.takeover.rule
    assert isinstance(rule, RecallRule)
    check_counts(sum_counts(results.bundle_counts), publication.max_dead_fraction)
    known = KnownVectors(rule.folder)
    fresh = [shard for shard in results.shards if shard.kind == "embeddings"]
    dead_letters = read_dead_letters(shard for shard in results.shards if shard.kind == "dead_letters")
    reindex = publication.reindex
    wishes = plan_wishes(results.notes, dead_letters, fresh, len(known.entries))
    new_ids = np.concatenate([wishes.ids, *(read_index(shard.index_path).entries["id"] for shard in fresh)])
    dead_ids = np.array([digest_id(dead_letter.id or "") for dead_letter in wishes.dead], "S16")
    dead_letters = dead_letters._replace(ids=np.unique(np.concatenate([dead_letters.ids, dead_ids])))
    recalled = wishes.wants["row"].astype(np.int64)
    fates = decide_fates(known, results.notes, dead_letters, recalled, new_ids, reindex.keeps_deleted)
    gone = fates.counts["deleted"] - fates.counts["moved"]
    check_deletes(gone, known.count_live_ids(), reindex.max_delete_fraction)
    if not takeover.reusable:
        fates = _drop_all(fates)
    fresh_reader = FileReader(plan.form.name, plan.form.layout, plan.form.compression)
    readers: dict[str, VectorReader] = {
        FRESH: fresh_reader,
        SEGMENT: SegmentReader(plan.form.layout),
        ROWS: takeover.reader or fresh_reader,
    }
    folder = attempts_folder(publication.table, publication.name)
    carrier = Carrier(known, readers, plan.form, folder, plan.shard_bytes)
    carried = np.isin(fates.fate, CARRIED) if whole else np.zeros(known.n_live, bool)
    shards = carrier.carry(carried, fates, wishes, takeover.live, whole and rule.rows_stay)
    dead_letter_writer = ShardWriter(folder, plan.dead_letter_format, plan.shard_bytes)
    if wishes.dead:
        dead_letter_writer.write(wishes.dead)
    counts = sum_counts(
        [
            *results.bundle_counts,
            BundleCounts.of("merge", {**carrier.counts, **fates.counts}),
            BundleCounts.of("write_dead_letters", Counter(dead_letter.reason for dead_letter in wishes.dead)),
        ]
    )
    check_counts(counts, publication.max_dead_fraction)
    expected = expect_documents(plan, counts, fates, dead_letters, wishes)
    everything = [*results.shards, *shards, *dead_letter_writer.finish()]
    return Completion(plan, known, readers, fresh, everything, counts, fates, expected, results.spot_checks, whole)


def _drop_all(fates: Fates) -> Fates:
    """No row of another fingerprint is carried: a stale document is lost until it can be embedded."""
    lost = {"lost": fates.counts["stale"] + fates.counts["kept"], "stale": 0, "kept": 0}
    return fates._replace(fate=np.full_like(fates.fate, GONE), counts=fates.counts | lost)


def expect_documents(
    plan: CommitPlan, counts: dict[str, dict[str, float]], fates: Fates, dead_letters: Letters, wishes: Wishes
) -> Expected:
    """How many documents should have rows: from what was counted on the way, not from what was written."""
    read = int(counts.get("reuse", {}).get("documents", 0))
    carried = fates.counts["stale"] + fates.counts["kept"]
    dead = {dead_letter["id"] for found in dead_letters.by_content.values() for dead_letter in found}
    dead |= {dead_letter.id for dead_letter in wishes.dead}
    least = read - len(dead) + carried
    return Expected(least, read + carried if plan.form.layout.chunked else least)


class CommitResults(beam.DoFn):
    def __init__(self, commit: Committer, lease: Lease | None = None) -> None:
        self.commit = commit
        self.lease = lease

    def process(self, _: Any, **results: list[Any]) -> list[str]:
        name = self.commit.commit(Results(**results))
        if self.lease:
            self.lease.release()
        return [name]


@dataclass
class Commit(beam.PTransform):
    """Pipeline -> PCollection[str], the name of what was published.

    Attributes:
      commit: what publishes; from a store's `committer`.
      results: PCollections of what the run has produced, by the name of their field in `Results`.
      lease: what is given back when all is done, where nobody may be waiting for it.
    """

    commit: Committer
    results: dict[str, beam.PCollection]
    lease: Lease | None = None

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection:
        sides = {name: beam.pvalue.AsList(collection) for name, collection in self.results.items()}
        committed = (
            pipeline
            | "Begin" >> beam.Create([None], reshuffle=False)
            | "CommitResults" >> beam.ParDo(CommitResults(self.commit, self.lease), **sides).with_output_types(str)
        )
        return self.commit.finish(pipeline, committed)
