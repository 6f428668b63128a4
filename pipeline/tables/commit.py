"""Commit: the step that waits for all others and publishes new and reused rows as the new state of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np

from pipeline.errors import RunError, ValidationError, as_line
from pipeline.progress import check_dead_fraction, describe_dead
from pipeline.records import BundleCounts, DeadLetter, Row, SkippedFile
from pipeline.reuse.complete import BLOCK, FRESH, LiveDecisions, decide_live, list_shared, number_files, plan_requests
from pipeline.reuse.dead_letters import DeadLetterFacts, find_examples
from pipeline.reuse.decide import ROW_COUNTS
from pipeline.reuse.index import SEGMENT, VectorIndex
from pipeline.reuse.journal import SegmentReader
from pipeline.reuse.live_table import DistributedReuse
from pipeline.reuse.local import LocalReuse
from pipeline.reuse.merge import Merger
from pipeline.sinks.readers import ROWS as LIVE
from pipeline.sinks.readers import FileReader, VectorReader
from pipeline.sinks.writing import DEAD_LETTERS, ROWS, Shard, ShardWriter
from pipeline.tables.lock import Lease
from pipeline.tables.manifest import GoneFiles, attempts_folder
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

FindExamples = Callable[[], Iterable[DeadLetter]]  # the first dead letter of each reason


def find_examples_in(shards: Iterable[Shard]) -> FindExamples:
    """Reads the dead letters of a run for examples once they are needed."""
    return lambda: find_examples(shard for shard in shards if shard.kind == DEAD_LETTERS)


def check_counts(
    counts: dict[str, dict[str, float]],
    max_dead_fraction: float,
    find_examples: FindExamples,
    bad_files: Sequence[SkippedFile] = (),
) -> None:
    """Raises RunError if nothing was read, or too much of it cannot be embedded."""
    dead = count_dead(counts)
    n = int(counts.get("read", {}).get("records", 0))
    if not n and not dead and bad_files:
        raise RunError(
            f"the input holds no documents that can be read: {len(bad_files):,} of its files are skipped, the first is "
            f"{as_line(str(bad_files[0]))}; repair them"
        )
    if not n and not dead:
        raise RunError("the input holds no documents; check --input and --on_empty")
    check_dead_fraction(dead, n, max_dead_fraction, find_examples)


def check_any_rows(shards: Sequence[Shard], counts: dict[str, dict[str, float]], find_examples: FindExamples) -> None:
    """Raises RunError if not one document has a row."""
    if not any(shard.kind == ROWS for shard in shards):
        n, dead = int(counts["read"]["records"]), count_dead(counts)
        reasons = describe_dead(dead, find_examples()) if dead else "all are blank, see --on_empty"
        raise RunError(f"none of {n:,} documents could be embedded: {reasons}")


@dataclass(frozen=True)
class LocalCompletion:
    """The rows of a run on the local engine with everything that it reuses, and what validation needs.

    Attributes:
      plan: of the commit.
      index: the vector index.
      readers: how its files are read.
      fresh: files with rows that were encoded.
      shards: all files that the run has written, and those that it links.
      counts: by stage.
      decisions: about the live rows.
      expected: how many documents there should be.
      spot_checks: rows that were encoded once more.
      whole: whether the files hold the whole table, or only what changes in a database.
      bad_files: input files that could not be read to their ends.
    """

    plan: CommitPlan
    index: VectorIndex
    readers: dict[str, VectorReader]
    fresh: list[Shard]
    shards: list[Shard]
    counts: dict[str, dict[str, float]]
    decisions: LiveDecisions
    expected: Expected
    spot_checks: Sequence[Row]
    whole: bool
    bad_files: tuple[SkippedFile, ...]

    def validate(self) -> None:
        """Raises ValidationError if the new state must not be published."""
        rows = [shard for shard in self.shards if shard.kind == ROWS]
        staying = np.zeros(0, int) if self.whole else np.flatnonzero(self.decisions.kept)
        blocks = (self.index.entries[staying[i : i + BLOCK]] for i in range(0, len(staying), BLOCK))
        check_rows(rows, blocks, len(staying), self.expected, self.index.folder)
        own = [shard for shard in rows if not shard.linked]
        check_vectors(number_files(own[:: max(1, len(own) // SAMPLED_FILES)], 0), self.readers[FRESH])
        files = zip(number_files(self.fresh, len(self.index.entries)), self.fresh, strict=True)
        compare_spot_checks(self.spot_checks, self.index, list(files), self.readers, self.plan.form.layout)

    def removed_rows(self) -> np.ndarray:
        """Numbers of the live rows that are deleted or replaced."""
        return np.flatnonzero(~self.decisions.kept)


@dataclass(frozen=True)
class DistributedCompletion:
    """As `LocalCompletion`, for a run whose workers have written all files."""

    plan: CommitPlan
    results: Results
    shards: list[Shard]
    counts: dict[str, dict[str, float]]
    expected: Expected
    bad_files: tuple[SkippedFile, ...]

    def validate(self) -> None:
        """Raises ValidationError if the new state must not be published."""
        merge = self.counts.get("merge", {})
        if twice := int(merge.get("duplicate_rows", 0)):
            raise ValidationError(f"{twice:,} rows have an id and chunk that another row has too")
        check_count(int(merge.get("documents_with_rows", 0)), self.expected)
        rows = [shard for shard in self.shards if shard.kind == ROWS]
        n_rows = sum(shard.rows for shard in rows)
        reuse = self.plan.reuse.back_end
        assert isinstance(reuse, DistributedReuse)
        n_live = sum(file.rows for file in reuse.files)
        if n_rows != (wanted := int(n_live - merge.get("dropped_rows", 0) + merge.get("new_rows", 0))):
            raise ValidationError(f"{n_rows:,} rows were written instead of {wanted:,}")
        form = self.plan.form
        reader = FileReader(form.name, form.layout, form.compression)
        check_vectors(number_files(rows[:: max(1, len(rows) // SAMPLED_FILES)], 0), reader)
        compare_samples(self.results.spot_checks, self.results.samples, form.layout)


Completion = LocalCompletion | DistributedCompletion


def complete(plan: CommitPlan, results: Results, whole: bool) -> Completion:
    """Completes a run's rows, by the back end that it ran with; see `complete_local`."""
    if isinstance(plan.reuse.back_end, DistributedReuse):
        return complete_distributed(plan, results)
    return complete_local(plan, results, whole)


def validate_snapshot(completion: Completion, failed: str, it: str) -> None:
    """Validates a new state; keeps a rejected one in its own folder and raises.

    Args:
      completion: the new state.
      failed: the beginning of the message: what failed validation and where it "is kept".
      it: the pronoun for it in the message.

    Raises:
      ValidationError: with the reason and the folder.
    """
    if completion.plan.publication.reindex.validate == "off":
        return
    try:
        completion.validate()
    except ValidationError as error:
        publication = completion.plan.publication
        manifest = build_manifest(publication, completion.shards, completion.counts, completion.bad_files)
        folder = reject_snapshot(publication, manifest, completion.shards)
        raise ValidationError(
            f"{failed} in {folder}: {error}; the table is unchanged; inspect {it}, or "
            f"publish {it} anyway with --validate=off"
        ) from error


def check_deletes(counts: Mapping[str, float], max_fraction: float, gone: GoneFiles) -> None:
    """Raises RunError if more documents are gone than is allowed, without renamed ones: the input may be wrong.

    Args:
      counts: of `decide_rows`.
      max_fraction: of the live documents that may be gone.
      gone: the input files of the live table that are no longer among the input.
    """
    n_deleted, n_live = int(counts.get("deleted", 0) - counts.get("moved", 0)), int(counts.get("live", 0))
    if n_live and n_deleted / n_live > max_fraction:
        n_gone = int(counts.get("gone", 0))
        why = f" ({n_gone:,} of them come from {gone})" if n_gone else ""
        raise RunError(
            f"{n_deleted:,} of the table's {n_live:,} documents are gone from the input, more than "
            f"--max_delete_fraction={max_fraction:g} allows{why}; check --input, or raise it, or use --deletes=keep "
            "(what was encoded is kept for the next run)"
        )


def complete_distributed(plan: CommitPlan, results: Results) -> DistributedCompletion:
    """Checks what the workers have counted.

    Raises:
      RunError: if more of the table's documents are gone than is allowed, or too much cannot be embedded.
    """
    counts, bad_files = sum_counts(results.bundle_counts), results.list_bad_files()
    examples = find_examples_in(results.shards)
    check_counts(counts, plan.publication.max_dead_fraction, examples, bad_files)
    merge = counts["merge"] = dict.fromkeys(ROW_COUNTS, 0.0) | counts.get("merge", {})
    check_deletes(merge, plan.publication.reindex.max_delete_fraction, plan.reuse.gone)
    expected = expect_documents(plan, counts, int(merge.get("dead", 0)))
    return DistributedCompletion(plan, results, list(results.shards), counts, expected, bad_files)


def complete_local(plan: CommitPlan, results: Results, whole: bool) -> LocalCompletion:
    """Turns the notes of a run on the local engine into rows.

    Args:
      plan: of the commit.
      results: of the run.
      whole: write all rows of the table, not only the new ones.

    Raises:
      RunError: if more of the table's documents are gone than is allowed, or too much cannot be embedded.
    """
    publication, reuse = plan.publication, plan.reuse.back_end
    assert isinstance(reuse, LocalReuse)
    bad_files = results.list_bad_files()
    examples = find_examples_in(results.shards)
    check_counts(sum_counts(results.bundle_counts), publication.max_dead_fraction, examples, bad_files)
    folder, policy = attempts_folder(publication.table, publication.name), reuse.policy
    index = VectorIndex(reuse.folder)
    fresh = [shard for shard in results.shards if shard.kind == ROWS]
    fresh_files = number_files(fresh, len(index.entries))
    shared = list_shared(results.notes)
    dead = DeadLetterFacts((shard for shard in results.shards if shard.kind == DEAD_LETTERS), shared)
    dead_writer = ShardWriter(folder, plan.dead_letter_format, plan.shard_bytes)
    pairs = list(zip(fresh_files, fresh, strict=True))
    requests = plan_requests(results.notes, index, pairs, shared, dead, dead_writer)
    incomplete = dead.incomplete | {bad.file for bad in bad_files}
    decisions = decide_live(index, results.notes, requests.dead_ids, incomplete, requests.moved, reuse.inputs, policy)
    check_deletes(decisions.counts, publication.reindex.max_delete_fraction, plan.reuse.gone)
    fresh_reader = FileReader(plan.form.name, plan.form.layout, plan.form.compression)
    readers: dict[str, VectorReader] = {
        FRESH: fresh_reader,
        SEGMENT: SegmentReader(plan.form.layout),
        LIVE: plan.reuse.reader or fresh_reader,
    }
    merger = Merger(index, readers, plan.form, folder, plan.shard_bytes, whole and policy.rows_stay)
    kept = decisions.kept if whole else np.zeros(index.n_live, bool)
    shards = merger.merge(kept, decisions, requests, fresh_files, plan.reuse.live)
    own = [
        BundleCounts.of("merge", {**merger.counts, **decisions.counts}),
        BundleCounts.of("write_dead_letters", requests.dead_counts),
    ]
    counts = sum_counts([*results.bundle_counts, *own])
    everything = [*results.shards, *shards, *requests.dead_shards]
    check_counts(counts, publication.max_dead_fraction, find_examples_in(everything))
    expected = expect_documents(plan, counts, dead.n_documents + requests.n_dead)
    return LocalCompletion(
        plan, index, readers, fresh, everything, counts, decisions, expected, results.spot_checks, whole, bad_files
    )


def expect_documents(plan: CommitPlan, counts: dict[str, dict[str, float]], n_dead: int) -> Expected:
    """How many documents should have rows, from the counts of the run and not from the written files.

    Args:
      plan: of the commit.
      counts: of the run, by stage.
      n_dead: documents that were read and have a dead letter.
    """
    read, merge = int(counts.get("reuse", {}).get("documents", 0)), counts.get("merge", {})
    stays = int(merge.get("stale", 0) + merge.get("kept", 0))
    least = read - n_dead + stays
    return Expected(least, read + stays if plan.form.layout.chunked else least)


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
      results: PCollections of the run's results, by the name of their field in `Results`.
      lease: the lock to release at the end, if the launcher may be gone.
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
