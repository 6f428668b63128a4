"""What a run would do, without doing it: documents looked up in the index of known vectors, a sample of them tokenised.

The whole input is read. Nothing is encoded, nothing is written to the output; a running job is not disturbed, nor does
it disturb.
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
from pipeline.records import DeadLetter, Document
from pipeline.reuse.actions import CARRIED, check_deletes, decide_fates
from pipeline.reuse.index import KnownVectors
from pipeline.reuse.look_up import MarkWriter, Recaller, RecallRule
from pipeline.reuse.requests import Letters
from pipeline.run.estimate import (
    Measured,
    count_characters,
    live_row_bytes,
    measure_texts,
    scale_up,
    split_blocks,
)
from pipeline.run.read_input import Accounts, read_outcomes
from pipeline.run.resolve import NewRows, ResolvedRun, find_changes, find_stops, prepare_takeover, resolve
from pipeline.tables.commit import check_any_rows, check_counts
from pipeline.tables.folder import FolderStore

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 2000, 16_000_000  # that are tokenised


@dataclass(frozen=True)
class DryRun:
    """What a run would do. Counts of documents and vectors are exact unless `is_sampled`, or dead letters are expected.

    Attributes:
      documents: that can be read, without duplicates.
      new: whose id has no row.
      changed: whose text is another one.
      updated: whose text is the same, but not the kept fields, or that are stored in another way.
      unchanged: whose rows stay.
      reused: of all but the unchanged: those whose vector is known.
      same_text: of all but the unchanged: those with the text of another one that is encoded.
      to_encode: texts that are encoded.
      deleted: documents of the table that are gone from the input.
      stale: documents whose old rows stay because their new text cannot be embedded or read.
      kept: documents that are gone and whose rows stay.
      lost: documents whose rows cannot stay, as another encoder made them, and that cannot be made anew.
      skipped_empty: blank texts that are left out.
      dead_letters: by reason; those of texts that are too long are judged by the sample.
      chunks: inputs of the encoder.
      tokens: that are encoded, without [CLS] and [SEP]; None where the encoder tokenises itself.
      cut_tokens: that reach no chunk.
      padding: share of padding in the batches.
      seconds: in the encoder, on one worker; None if nothing is known of its speed.
      speed: where `seconds` comes from: `measured` in an earlier run, `rough` or `unknown`; `idle`: nothing to encode.
      speed_source: the snapshot whose run was measured.
      rows: of the new snapshot.
      bytes: of its files.
      is_sampled: whether tokens, chunks, time and size are scaled up from a part of the texts.
      changes: what makes the table's vectors useless, such as `preprocessing.max_tokens 128 -> 256`.
      stops: what would stop the run.
    """

    documents: int
    new: int
    changed: int
    updated: int
    unchanged: int
    reused: int
    same_text: int
    to_encode: int
    deleted: int
    stale: int
    kept: int
    lost: int
    skipped_empty: int
    dead_letters: dict[str, int]
    chunks: int
    tokens: Optional[int]
    cut_tokens: Optional[int]
    padding: float
    seconds: Optional[float]
    speed: str
    speed_source: str
    rows: int
    bytes: int
    is_sampled: bool
    changes: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)


def make_dry_run(config: EmbedConfig) -> DryRun:
    """Says what a run would do, from its whole input.

    Args:
      config: of the run.

    Raises:
      EmbeamError: if the run could not even begin: settings that do not fit, no input, a damaged table.
    """
    resolved = resolve(config)
    live, spec, form = resolved.live, resolved.spec, resolved.form
    with tempfile.TemporaryDirectory(prefix="embeam-plan-") as scratch:
        takeover = prepare_takeover(resolved.store, live, spec, form, scratch)
        assert isinstance(takeover.rule, RecallRule)
        seen = look_up_all(resolved, takeover.rule, scratch)
        measured = measure_texts(spec, form, seen.sample.documents)
        return combine(resolved, takeover.reusable, seen, measured)


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
    """What one pass over the input tells.

    Attributes:
      read: counts of the reading, as in the manifest.
      counts: documents, as the run's recalling counts them.
      dead: dead letters of the reading, by reason.
      dead_letters: whose they are.
      recalled: numbers of the known rows whose vectors other rows are made of.
      equal: of some documents with the text of another one that is encoded: content hash, id and file.
      sample: of the texts to encode.
      known: the index.
      marks: the notes on live rows.
    """

    read: Counter[str]
    counts: Counter[str]
    dead: Counter[str]
    dead_letters: Accounts
    recalled: np.ndarray
    equal: list[tuple[str, str, str]]
    sample: ThinnedSample
    known: KnownVectors
    marks: MarkWriter


def look_up_all(resolved: ResolvedRun, rule: RecallRule, scratch: str) -> Seen:
    """Reads the whole input and looks every document up, as a run does."""
    known = KnownVectors(rule.folder)
    recaller, marks = Recaller(known, rule), MarkWriter(os.path.join(rule.folder, "marks-plan.bin"))
    sample, dead_letters = ThinnedSample(), Accounts(set(), set())
    read: Counter[str] = Counter()
    dead: Counter[str] = Counter()
    recalled = [np.empty(0, np.int64)]
    equal: list[tuple[str, str, str]] = []

    def documents() -> Iterator[Document]:
        for outcome in read_outcomes(resolved.input, resolved.config.read, resolved.kept, scratch):
            if isinstance(outcome, Document):
                yield outcome
            elif isinstance(outcome, DeadLetter):
                dead[outcome.reason] += 1
                dead_letters.add(outcome.id, outcome.reason, outcome.origin.path)
            else:
                read.update(json.loads(outcome.counts))

    for block in split_blocks(documents()):
        verdicts = recaller.judge(block)
        marks.write(block, verdicts)
        recalled += [rows.astype(np.int64) for rows in verdicts.known.values()]
        for i in sorted(verdicts.to_encode):
            sample.add(block[i])
        for i, rows in verdicts.known.items():
            if not len(rows) and i not in verdicts.to_encode and len(equal) < SAMPLE_TEXTS:
                equal.append((verdicts.names[i], block[i].id, block[i].origin.path))
    marks.close()
    return Seen(read, recaller.counts, dead, dead_letters, np.concatenate(recalled), equal, sample, known, marks)


def combine(resolved: ResolvedRun, reusable: bool, seen: Seen, measured: Measured) -> DryRun:
    """Puts the counts together, and finds what would stop the run."""
    live, spec, form = resolved.live, resolved.spec, resolved.form
    config, counts = resolved.config, seen.counts
    to_encode, n_equal = counts["encoded"], counts["same_text"]
    scaled = scale_up(resolved.store, spec, measured, to_encode)
    factor = to_encode / measured.documents if measured.documents else 0.0
    each = measured.counts["rows"] / measured.documents if measured.documents else 1.0
    dead = seen.dead.copy()
    for reason, n in Counter(dead_letter.reason for dead_letter in measured.dead_letters).items():
        dead[reason] += round(n * factor)
    for dead_letter in measured.dead_letters:
        seen.dead_letters.add(dead_letter.id, dead_letter.reason, dead_letter.origin.path)
    equal_rows = 0.0
    for content_hash, document_id, path in seen.equal:  # they share the fate of the text that is encoded
        made = measured.made.get(content_hash, each)
        if isinstance(made, DeadLetter):
            dead[made.reason] += 1
            seen.dead_letters.add(document_id, made.reason, path)
        else:
            equal_rows += made
    if seen.equal:
        equal_rows *= n_equal / len(seen.equal)
    ids = np.unique(np.array(list(seen.dead_letters.ids), "S16"))
    dead_letters = Letters(ids, seen.dead_letters.incomplete_files, {})
    keeps = config.reindex.keeps_deleted
    fates = decide_fates(seen.known, [seen.marks.note], dead_letters, seen.recalled, np.empty(0, "S16"), keeps)
    carried = int(np.isin(fates.fate, CARRIED).sum()) if reusable else 0
    rows = carried + len(seen.recalled) + round(to_encode * each + equal_rows)
    row_bytes = live_row_bytes(live, form) or measured.row_bytes or live_row_bytes(live)
    lost = 0 if reusable else fates.counts["stale"] + fates.counts["kept"]
    return DryRun(
        **{name: counts[name] for name in ("documents", "new", "changed", "updated", "unchanged")},
        **{name: counts[name] for name in ("reused", "same_text")},
        to_encode=to_encode,
        deleted=fates.counts["deleted"],
        stale=fates.counts["stale"] if reusable else 0,
        kept=fates.counts["kept"] if reusable else 0,
        lost=lost,
        skipped_empty=seen.read["skipped_empty"],
        dead_letters={reason: n for reason, n in sorted(dead.items()) if n},
        chunks=round(scaled.counts.get("chunks", 0)),
        tokens=round(scaled.counts.get("tokens", 0)) if spec.vectors.counts_tokens else None,
        cut_tokens=round(scaled.counts.get("cut", 0)) if spec.vectors.counts_tokens else None,
        padding=max(0.0, 1 - scaled.counts["used"] / scaled.padded) if scaled.padded else 0.0,
        seconds=scaled.seconds,
        speed=scaled.speed,
        speed_source=scaled.source,
        rows=rows,
        bytes=round(rows * row_bytes),
        is_sampled=measured.documents < to_encode,
        changes=find_changes(live, spec),
        stops=[
            *map(str, find_stops(resolved, NewRows(rows - carried if resolved.rows_stay else rows, row_bytes))),
            *find_late_stops(resolved, seen, dead, fates.counts["deleted"] - fates.counts["moved"], rows),
        ],
    )


def find_late_stops(resolved: ResolvedRun, seen: Seen, dead: Counter[str], deleted: int, n_rows: int) -> Iterator[str]:
    """The messages with which a run would stop after it has read its input."""
    config = resolved.config
    may_be_empty = n_rows or (resolved.live and not isinstance(resolved.store, FolderStore))
    counts: dict[str, dict[str, float]] = {
        "read": {"records": float(seen.read["records"])},
        "write_dead_letters": dict(sorted(dead.items())),
    }
    n_live = seen.known.count_live_ids()
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_counts(counts, config.write.max_dead_fraction),
        lambda: check_deletes(deleted, n_live, config.reindex.max_delete_fraction),
        lambda: None if may_be_empty else check_any_rows([], counts),
    )
    for check in checks:
        try:
            check()
        except EmbeamError as error:
            yield str(error)
