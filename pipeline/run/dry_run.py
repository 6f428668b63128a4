"""Dry run: looks all documents up in the vector index and tokenises a sample of them.

The whole input is read. Nothing is encoded and nothing is written to the output. It takes no lock, so it can run beside
a job.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.errors import EmbeamError
from pipeline.preprocess.chunking import WordpieceRule
from pipeline.records import KEPT_NULLS, DeadLetter, Document, SkippedFile, digest_id
from pipeline.reuse.complete import LiveDecisions, decide_live
from pipeline.reuse.decide import DocumentAction
from pipeline.reuse.digests import DigestSet, is_in
from pipeline.reuse.index import VectorIndex
from pipeline.reuse.local import DocumentLookUp, LocalReuse, MarkWriter, marks_file
from pipeline.run.estimate import (
    Measured,
    count_characters,
    live_row_bytes,
    measure_texts,
    scale_up,
    split_blocks,
)
from pipeline.run.read_input import Accounts, read_outcomes
from pipeline.run.resolve import (
    NewRows,
    ResolvedRun,
    check_bad_files,
    collect_errors,
    find_changes,
    find_stops,
    prepare_local_reuse,
    resolve,
)
from pipeline.sinks.index import parse_hashes
from pipeline.sources.stdin import removing_copy
from pipeline.tables.commit import check_any_rows, check_counts, check_deletes
from pipeline.tables.folder import FolderStore
from pipeline.tables.manifest import GoneFiles
from pipeline.tables.store import ReusePlan

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 2000, 16_000_000  # the most that are tokenised


@dataclass(frozen=True)
class DryRun:
    """What a run would do. Counts of documents and vectors are exact unless `is_sampled`, or dead letters are expected.

    Attributes:
      documents: documents that can be read, without duplicates.
      new: documents whose id has no row.
      changed: documents whose text has changed.
      updated: documents with the same text, but other kept fields or another file format.
      remade: documents with the same text, whose rows are of another encoder or other settings.
      unchanged: documents whose rows stay.
      reused: documents that are not unchanged and whose vector is known already.
      same_text: documents that are not unchanged and have the text of another one that is encoded.
      to_encode: texts that are encoded.
      deleted: documents of the table that are gone from the input.
      stale: documents whose old rows stay because their new text cannot be embedded or read.
      kept: documents that are gone from the input and whose rows stay.
      lost: documents whose rows were made by another encoder and cannot be made again.
      skipped_empty: blank texts that are left out.
      kept_nulls: values of kept fields that do not fit and become null, by column.
      dead_letters: by reason; those of texts that are too long are judged by the sample.
      chunks: inputs of the encoder.
      tokens: tokens that are encoded, without [CLS] and [SEP]; None where the encoder tokenises itself.
      cut_tokens: tokens that reach no chunk.
      unknown_tokens: tokens that are [UNK]; None where that is not known.
      padding: share of padding in the batches.
      seconds: time in the encoder, on one worker; None if its speed is unknown.
      speed: where `seconds` comes from: `measured` in an earlier run, `rough` or `unknown`; `idle`: nothing to encode.
      speed_source: the snapshot whose run was measured.
      rows: of the new snapshot.
      bytes: of its files.
      gone: documents of those deleted whose file is no longer among the input.
      n_gone_files: input files of the table that are no longer among the input.
      gone_files: the first of them.
      bad_files: files that cannot be read to their ends: file, reason and message.
      is_sampled: whether tokens, chunks, time and size are scaled up from a part of the texts.
      changes: settings that make the table's vectors unusable, such as `preprocessing.max_tokens 128 -> 256`.
      stops: messages of the errors that would stop the run.
    """

    documents: int
    new: int
    changed: int
    updated: int
    remade: int
    unchanged: int
    reused: int
    same_text: int
    to_encode: int
    deleted: int
    stale: int
    kept: int
    lost: int
    skipped_empty: int
    kept_nulls: dict[str, int]
    dead_letters: dict[str, int]
    chunks: int
    tokens: Optional[int]
    cut_tokens: Optional[int]
    unknown_tokens: Optional[int]
    padding: float
    seconds: Optional[float]
    speed: str
    speed_source: str
    rows: int
    bytes: int
    gone: int
    n_gone_files: int
    gone_files: list[str]
    bad_files: list[dict[str, str]]
    is_sampled: bool
    changes: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)


@removing_copy()
def make_dry_run(config: EmbedConfig) -> DryRun:
    """Makes the dry run of a configuration, from its whole input.

    Args:
      config: of the run.

    Raises:
      EmbeamError: if the run cannot begin: settings that do not fit, no input, a damaged table.
    """
    resolved = resolve(config)
    live, spec, form = resolved.live, resolved.spec, resolved.form
    with tempfile.TemporaryDirectory(prefix="embeam-plan-") as scratch:
        inputs = resolved.input.sources
        plan = prepare_local_reuse(resolved.store, live, spec, form, scratch, inputs, resolved.config)
        assert isinstance(plan.back_end, LocalReuse)
        seen = look_up_all(resolved, plan.back_end, scratch)
        measured = measure_texts(spec, form, seen.sample.documents)
        return combine(resolved, plan, seen, measured)


class ThinnedSample:
    """Every k-th of a stream of documents; k is doubled whenever the sample grows too large.

    Attributes:
      documents: the sample.
      n: how many documents have passed.
    """

    def __init__(self, most: int = SAMPLE_TEXTS, most_characters: int = SAMPLE_CHARACTERS) -> None:
        self.documents: list[Document] = []
        self.n = 0
        self._step = 1
        self._most, self._most_characters = most, most_characters
        self._characters = 0

    def add(self, document: Document) -> None:
        if self.n % self._step == 0:
            self.documents.append(document)
            self._characters += count_characters(document)
        self.n += 1
        while len(self.documents) > max(1, self._most) or (
            self._characters > self._most_characters and len(self.documents) > 1
        ):
            self.documents = self.documents[::2]
            self._step *= 2
            self._characters = sum(map(count_characters, self.documents))

    @property
    def is_whole(self) -> bool:
        return len(self.documents) == self.n


class Seen(NamedTuple):
    """The result of one pass over the input.

    Attributes:
      read: counts of the reading, as in the manifest.
      counts: documents by change and action, as in the manifest.
      kept_nulls: values of kept fields that become null, by column.
      dead: dead letters of the reading, by reason.
      examples: the first of them for each reason.
      dead_letters: the documents and files that they belong to.
      bad_files: those that cannot be read to their ends, each once.
      reused_ids: digests of the ids of documents that reuse vectors, ascending.
      reused_contents: content hashes of the rows whose vectors they get, ascending.
      n_reused: how many rows they get.
      same_text: of some documents with the text of another one that is encoded: content hash, id and file.
      sample: of the texts to encode.
      vector_index: the vectors that are known already.
      note: path of the notes on live rows.
    """

    read: Counter[str]
    counts: Counter[str]
    kept_nulls: Counter[str]
    dead: Counter[str]
    examples: dict[str, DeadLetter]
    dead_letters: Accounts
    bad_files: list[SkippedFile]
    reused_ids: np.ndarray
    reused_contents: np.ndarray
    n_reused: int
    same_text: list[tuple[str, str, str]]
    sample: ThinnedSample
    vector_index: VectorIndex
    note: str


def look_up_all(resolved: ResolvedRun, reuse: LocalReuse, scratch: str) -> Seen:
    """Reads the whole input and looks every document up, as a run does."""
    index, note = VectorIndex(reuse.folder), os.path.join(reuse.folder, "plan")
    look_up, marks = DocumentLookUp(index, reuse), MarkWriter(marks_file(note))
    sample, dead_letters = ThinnedSample(), Accounts(set(), set())
    read: Counter[str] = Counter()
    kept_nulls: Counter[str] = Counter()
    dead: Counter[str] = Counter()
    examples: dict[str, DeadLetter] = {}
    bad_files: dict[str, SkippedFile] = {}
    ids, contents = DigestSet(), DigestSet()
    n_reused = 0
    same_text: list[tuple[str, str, str]] = []

    def documents() -> Iterator[Document]:
        for outcome in read_outcomes(resolved.input, resolved.config.read, resolved.kept, scratch):
            if isinstance(outcome, Document):
                yield outcome
            elif isinstance(outcome, DeadLetter):
                dead[outcome.reason] += 1
                examples.setdefault(outcome.reason, outcome)
                dead_letters.add(outcome.id, outcome.reason, outcome.origin.path)
            elif isinstance(outcome, SkippedFile):
                bad_files.setdefault(outcome.file, outcome)
                dead_letters.incomplete_files.add(outcome.file)
            else:
                (kept_nulls if outcome.stage == KEPT_NULLS else read).update(json.loads(outcome.counts))

    for block in split_blocks(documents()):
        found = look_up.look_up(block)
        marks.write(block, found)
        for i, action in enumerate(found.actions.tolist()):
            if action == DocumentAction.ENCODE:
                sample.add(block[i])
            elif action == DocumentAction.SHARE and len(same_text) < SAMPLE_TEXTS:
                same_text.append((found.hashes[i], block[i].id, block[i].origin.path))
        reused = np.flatnonzero(found.actions == DocumentAction.REUSE).tolist()
        n_reused += sum(len(found.known[i]) for i in reused)
        ids.add(np.array([digest_id(block[i].id) for i in reused], "S16"))
        contents.add(parse_hashes([found.hashes[i] for i in reused]))
    marks.close()
    return Seen(
        read,
        look_up.counts,
        kept_nulls,
        dead,
        examples,
        dead_letters,
        sorted(bad_files.values()),
        ids.sorted(),
        contents.sorted(),
        n_reused,
        same_text,
        sample,
        index,
        note,
    )


def combine(resolved: ResolvedRun, plan: ReusePlan, seen: Seen, measured: Measured) -> DryRun:
    """Combines the counts, and finds the errors that would stop the run."""
    live, spec, form = resolved.live, resolved.spec, resolved.form
    counts = seen.counts
    to_encode, n_equal = counts["encoded"], counts["same_text"]
    scaled = scale_up(resolved.store, spec, measured, to_encode)
    factor = to_encode / measured.documents if measured.documents else 0.0
    each = measured.counts["rows"] / measured.documents if measured.documents else 1.0
    dead = seen.dead.copy()
    for reason, n in Counter(dead_letter.reason for dead_letter in measured.dead_letters).items():
        dead[reason] += round(n * factor)
    for dead_letter in measured.dead_letters:
        seen.dead_letters.add(dead_letter.id, dead_letter.reason, dead_letter.origin.path)
        seen.examples.setdefault(dead_letter.reason, dead_letter)
    equal_rows = 0.0
    for content_hash, document_id, path in seen.same_text:  # they get what the text that is encoded gets
        made = measured.made.get(content_hash, each)
        if isinstance(made, DeadLetter):
            dead[made.reason] += 1
            seen.dead_letters.add(document_id, made.reason, path)
        else:
            equal_rows += made
    if seen.same_text:
        equal_rows *= n_equal / len(seen.same_text)
    dead_ids = np.unique(np.array(list(seen.dead_letters.ids), "S16"))
    dead_ids = dead_ids[~is_in(dead_ids, seen.reused_ids)]
    incomplete, moved = seen.dead_letters.incomplete_files, seen.reused_contents
    inputs, policy = resolved.input.sources, plan.back_end.policy
    decisions = decide_live(seen.vector_index, [seen.note], dead_ids, incomplete, moved, frozenset(inputs), policy)
    n_kept = int(decisions.kept.sum())
    rows = n_kept + seen.n_reused + round(to_encode * each + equal_rows)
    row_bytes = live_row_bytes(live, form) or measured.row_bytes or live_row_bytes(live)
    return DryRun(
        **{name: counts[name] for name in ("documents", "new", "changed", "updated", "remade", "unchanged")},
        **{name: counts[name] for name in ("reused", "same_text")},
        to_encode=to_encode,
        **{name: decisions.counts[name] for name in ("deleted", "stale", "kept", "lost")},
        skipped_empty=seen.read["skipped_empty"],
        kept_nulls=dict(seen.kept_nulls),
        dead_letters={reason: n for reason, n in sorted(dead.items()) if n},
        chunks=round(scaled.counts.get("chunks", 0)),
        tokens=round(scaled.counts.get("tokens", 0)) if spec.vectors.counts_tokens else None,
        cut_tokens=round(scaled.counts.get("cut", 0)) if spec.vectors.counts_tokens else None,
        unknown_tokens=round(scaled.counts.get("unknown", 0)) if isinstance(spec.split, WordpieceRule) else None,
        padding=max(0.0, 1 - scaled.counts["used"] / scaled.padded) if scaled.padded else 0.0,
        seconds=scaled.seconds,
        speed=scaled.speed,
        speed_source=scaled.source,
        rows=rows,
        bytes=round(rows * row_bytes),
        gone=decisions.counts["gone"],
        n_gone_files=plan.gone.n,
        gone_files=list(plan.gone.first),
        bad_files=[bad._asdict() for bad in seen.bad_files],
        is_sampled=measured.documents < to_encode,
        changes=find_changes(live, spec),
        stops=[
            *map(str, find_stops(resolved, NewRows(rows - n_kept if resolved.rows_stay else rows, row_bytes))),
            *map(str, find_late_stops(resolved, plan.gone, seen, dead, decisions, rows)),
        ],
    )


def find_late_stops(
    resolved: ResolvedRun, gone: GoneFiles, seen: Seen, dead: Counter[str], decisions: LiveDecisions, n_rows: int
) -> Iterator[EmbeamError]:
    """Finds the errors that stop a run after it has read its input."""
    config = resolved.config
    may_be_empty = n_rows or (resolved.live and not isinstance(resolved.store, FolderStore))
    counts: dict[str, dict[str, float]] = {
        "read": {"records": float(seen.read["records"])},
        "write_dead_letters": dict(sorted(dead.items())),
    }
    bad_files = [bad for bad in seen.bad_files if bad not in resolved.input.bad_files]
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_bad_files(bad_files, config),
        lambda: check_counts(counts, config.write.max_dead_fraction, seen.examples.values, seen.bad_files),
        lambda: check_deletes(decisions.counts, config.reindex.max_delete_fraction, gone),
        lambda: None if may_be_empty else check_any_rows([], counts, seen.examples.values),
    )
    return collect_errors(checks)
