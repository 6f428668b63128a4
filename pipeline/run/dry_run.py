"""What a run would do, without doing it: documents looked up in the index of known vectors, a sample of them tokenised.

The whole input is read. Nothing is encoded, nothing is written to the output; a running job is not disturbed, nor does
it disturb.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.embed import SAFE_DOCUMENTS
from pipeline.embedding_spec import EmbeddingSpec
from pipeline.encoders.architecture import text_flops
from pipeline.encoders.runtime import has_gpu, load_tensorflow
from pipeline.errors import EmbeamError
from pipeline.preprocess.batching import Batcher
from pipeline.preprocess.chunking import is_encodable
from pipeline.records import Chunk, DeadLetter, Document, Row, digest_id
from pipeline.reuse.complete import LiveDecisions, decide_live
from pipeline.reuse.decide import DocumentAction, ReusePolicy
from pipeline.reuse.digests import DigestSet, is_in
from pipeline.reuse.index import VectorIndex
from pipeline.reuse.local import (
    BUFFERED_CHARACTERS,
    BUFFERED_DOCUMENTS,
    DocumentLookUp,
    LocalReuse,
    MarkWriter,
    marks_file,
)
from pipeline.run.verify import Accounts, read_outcomes
from pipeline.sinks.index import ENTRY, parse_hashes
from pipeline.sinks.writing import RowFormat
from pipeline.tables.commit import check_counts, check_deletes
from pipeline.tables.folder import FolderStore
from pipeline.tables.manifest import Manifest, read_manifest
from pipeline.tables.publish import check_free_space
from pipeline.tables.retention import list_snapshots
from pipeline.tables.store import Store
from pipeline.vectors.storing import quantize_vectors

if TYPE_CHECKING:
    from pipeline.run.resolve import ResolvedRun

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 2000, 16_000_000  # that are tokenised
SAMPLE_ROWS, SAMPLE_ROW_BYTES = 256, 8 << 20  # that are written to memory, to see how large they get
LEAST_TOKENS = 10_000  # padded ones of an earlier run whose rate is trusted
SPEED_KEYS = ("encoder", "vector", "graph", "precision")  # of an identity
MATMUL_SECONDS = 0.1
_NO_CHUNK = Chunk(Document("", ""), "", 0, 1, b"", 0, 0, 0)  # takes a place in a batch
MATMUL_SHARE = 0.5  # of the rate of bare matmuls that encoders reach, about


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
    """Forecasts a run from its whole input.

    Args:
      config: of the run.

    Raises:
      EmbeamError: if the run could not even begin: settings that do not fit, no input, a damaged table.
    """
    from pipeline.run.resolve import prepare_local_reuse, resolve

    resolved = resolve(config)
    config = resolved.config  # which retrying changes
    live = resolved.store.read_live().manifest
    form = resolved.store.choose_form(config, resolved.plan.layout(resolved.kept))
    with tempfile.TemporaryDirectory(prefix="embeam-plan-") as scratch:
        reuse = prepare_local_reuse(resolved.store, live, resolved.plan, form, scratch, config).back_end
        assert isinstance(reuse, LocalReuse)
        seen = look_up_all(resolved, reuse, scratch)
        measured = measure_texts(resolved.plan, form, seen.sample.documents)
        return combine(resolved, live, form, reuse.policy, seen, measured)


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
            self._characters += _size(document)
        self.n += 1
        while len(self.documents) > max(1, self._most) or (
            self._characters > self._most_characters and len(self.documents) > 1
        ):
            self.documents = self.documents[::2]
            self._step *= 2
            self._characters = sum(map(_size, self.documents))

    @property
    def is_whole(self) -> bool:
        return len(self.documents) == self.n


class Seen(NamedTuple):
    """What one pass over the input tells.

    Attributes:
      read: counts of the reading, as in the manifest.
      counts: documents by change and action, as in the manifest.
      dead: dead letters of the reading, by reason.
      dead_letters: whose they are.
      reused_ids: digests of the ids of documents that get rows from known vectors, ascending.
      reused_contents: content hashes of the known rows whose vectors they get, ascending.
      n_reused: how many rows they get.
      same_text: of some documents with the text of another one that is encoded: content hash, id and file.
      sample: of the texts to encode.
      known: the index of known vectors.
      note: path of the notes on live rows.
    """

    read: Counter[str]
    counts: Counter[str]
    dead: Counter[str]
    dead_letters: Accounts
    reused_ids: np.ndarray
    reused_contents: np.ndarray
    n_reused: int
    same_text: list[tuple[str, str, str]]
    sample: ThinnedSample
    known: VectorIndex
    note: str


def look_up_all(resolved: ResolvedRun, reuse: LocalReuse, scratch: str) -> Seen:
    """Reads the whole input and looks every document up, as a run does."""
    index, note = VectorIndex(reuse.folder), os.path.join(reuse.folder, "plan")
    look_up, marks = DocumentLookUp(index, reuse), MarkWriter(marks_file(note))
    sample, dead_letters = ThinnedSample(), Accounts(set(), set())
    read: Counter[str] = Counter()
    dead: Counter[str] = Counter()
    ids, contents = DigestSet(), DigestSet()
    n_reused = 0
    same_text: list[tuple[str, str, str]] = []

    def documents() -> Iterator[Document]:
        for outcome in read_outcomes(resolved.found, resolved.config.read, resolved.kept, scratch):
            if isinstance(outcome, Document):
                yield outcome
            elif isinstance(outcome, DeadLetter):
                dead[outcome.reason] += 1
                dead_letters.add(outcome.id, outcome.reason, outcome.origin.path)
            else:
                read.update(json.loads(outcome.counts))

    for block in _blocks(documents()):
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
        dead,
        dead_letters,
        ids.sorted(),
        contents.sorted(),
        n_reused,
        same_text,
        sample,
        index,
        note,
    )


class Measured(NamedTuple):
    """What becomes of some texts.

    Attributes:
      documents: how many there are.
      counts: their chunks, rows, content tokens, tokens that are cut, and tokens in batches (bytes for text encoders).
      lengths: chunks by the padded length of their bucket.
      made: content hash to the number of rows, or to why there is a dead letter instead.
      row_bytes: of one row and its index entry; 0 if there is none.
    """

    documents: int
    counts: Counter[str]
    lengths: Counter[int]
    made: dict[str, int | DeadLetter]
    row_bytes: float

    @property
    def dead_letters(self) -> list[DeadLetter]:
        return [made for made in self.made.values() if isinstance(made, DeadLetter)]


def measure_texts(plan: EmbeddingSpec, form: RowFormat, documents: Sequence[Document]) -> Measured:
    """Tokenises texts, but encodes none."""
    rule, splitter = plan.vectors, plan.split.load()
    counts: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    made: dict[str, int | DeadLetter] = {}
    some: list[Chunk] = []
    for block in _blocks(iter(documents)):
        good = [document for document in block if is_encodable(document.text) and is_encodable(document.pair or "")]
        for chunk in splitter.split(good):
            if isinstance(chunk, DeadLetter):
                made[chunk.content_hash or ""] = chunk
                continue
            size = chunk.n_tokens if rule.counts_tokens else len(chunk.ids)
            counts["chunks"] += 1
            counts["rows"] += rule.chunked or chunk.number == 0
            counts["tokens"] += chunk.n_content
            counts["cut"] += chunk.n_truncated or 0
            counts["used"] += size
            lengths[plan.buckets.length_for(size)] += 1
            made[chunk.content_hash] = chunk.n_chunks if rule.chunked else 1
            if len(some) < SAMPLE_ROWS:
                some.append(chunk)
    row_bytes = measure_row(plan, form, some) if some else 0.0
    return Measured(len(documents), counts, lengths, made, row_bytes)


def measure_row(plan: EmbeddingSpec, form: RowFormat, chunks: Sequence[Chunk]) -> float:
    """Bytes of a row and its index entry, by writing some with random vectors to memory."""
    rng = np.random.default_rng(0)
    rows, n_bytes = [], 0
    for chunk in chunks:
        numbers = plan.dimension * (chunk.n_tokens if plan.vectors.tokens else 1)
        stored, scales = quantize_vectors(rng.standard_normal((1, numbers), np.float32), form.layout.dtype)
        document = chunk.document
        text = document.text if form.layout.keep_text else None
        counted = (chunk.n_tokens, chunk.n_truncated)
        own = (document.id, chunk.number, stored.tobytes(), float(scales[0]), *counted, chunk.content_hash)
        rows.append(Row(*own, document.kept, text, chunk.n_chunks, document.origin.path))
        n_bytes += len(rows[-1].vector)
        if n_bytes > SAMPLE_ROW_BYTES:
            break
    stream = BytesIO()
    zipped = gzip.GzipFile("", "wb", 6, stream, mtime=0) if form.compression == "gzip" else None
    writer = form.open(zipped or stream)
    writer.write(rows)
    writer.close()
    if zipped is not None:
        zipped.close()
    return len(stream.getvalue()) / len(rows) + ENTRY.itemsize


class Scaled(NamedTuple):
    """What `Measured` comes to for all texts, and how long it takes.

    Attributes:
      counts: as measured.
      padded: tokens or bytes in the batches, padding included.
      seconds: in the encoder; None if unknown.
      speed: `measured`, `rough`, `unknown` or `idle`.
      source: the snapshot whose run was measured.
    """

    counts: dict[str, float]
    padded: int
    seconds: Optional[float]
    speed: str
    source: str


def scale_up(store: Store, plan: EmbeddingSpec, measured: Measured, n_texts: int) -> Scaled:
    """From a sample to all texts."""
    if not measured.counts["chunks"] or not n_texts:
        return Scaled({}, 0, 0.0, "idle", "")
    factor = n_texts / measured.documents
    counts = {name: n * factor for name, n in measured.counts.items()}
    shapes = count_batches(plan, measured, n_texts)
    padded = sum(rows * length for length, rows in shapes.items())
    rate, source, is_rough = find_rate(store, plan)
    if rate and not is_rough:
        return Scaled(counts, padded, padded / rate, "measured", source)
    if plan.encoder.architecture is not None:
        flops = sum(rows * text_flops(plan.encoder.architecture, length) for length, rows in shapes.items())
        return Scaled(counts, padded, flops / (MATMUL_SHARE * measure_matmul(plan)), "rough", "")
    return Scaled(counts, padded, padded / rate if rate else None, "rough" if rate else "unknown", source)


def count_batches(plan: EmbeddingSpec, measured: Measured, n_texts: int) -> Counter[int]:
    """Rows of all batches, padding rows included, by length."""
    # As in the graph: what waits for its bucket to fill leaves with the bundle, or after so many documents.
    most = SAFE_DOCUMENTS if plan.vectors.average or plan.vectors.chunked else n_texts
    total: Counter[int] = Counter()
    n_full, rest = divmod(n_texts, most)
    for n, times in ((most, n_full), (rest, 1)):
        batcher = Batcher(plan.buckets)
        for length, n_chunks in measured.lengths.items():
            expected = round(n_chunks * n / measured.documents)
            full, left = divmod(expected, plan.buckets.full_rows(length))
            total[length] += times * full * plan.buckets.full_rows(length)
            for _ in range(left if times else 0):
                batcher.add(_NO_CHUNK, length)
        for batch in batcher.drain():
            total[batch.length] += times * batch.rows
    return total


def find_rate(store: Store, plan: EmbeddingSpec) -> tuple[float, str, bool]:
    """Padded tokens that the same encoder took in a second in the table's longest run.

    Returns:
      The rate or 0, the snapshot of that run, and whether it was too short to be trusted.
    """
    best, rate, source = 0.0, 0.0, ""
    for manifest in read_manifests(store):
        same = all(manifest.identity.get(key) == plan.identity[key] for key in SPEED_KEYS)
        padded = manifest.counts.get("batch", {}).get("padded_tokens", 0.0)
        seconds = manifest.counts.get("encode", {}).get("encode_seconds", 0.0)
        if same and seconds > 0 and padded > best:
            best, rate, source = padded, padded / seconds, manifest.snapshot
    return rate, source, best < LEAST_TOKENS


def read_manifests(store: Store) -> Iterator[Manifest]:
    """Those of all snapshots that can be read; of a database that of the live state."""
    if not isinstance(store, FolderStore):
        live = store.read_live().manifest
        yield from [live] if live else []
        return
    for name in list_snapshots(store.work):
        try:
            yield read_manifest(store.work, name)
        except (EmbeamError, OSError):  # damaged, or removed meanwhile
            continue


def measure_matmul(plan: EmbeddingSpec) -> float:
    """FLOP/s of this machine's bare matmuls of the encoder's feed-forward, in about a tenth of a second."""
    tf = load_tensorflow()
    a = plan.encoder.architecture
    assert a is not None
    rows = min(plan.buckets.budget, 4096 if has_gpu() else 512)
    precision = plan.encoder.precision if plan.encoder.native else "float32"
    left, right = (tf.ones(shape, precision) for shape in ((rows, a.width), (a.width, a.feedforward)))
    tf.matmul(left, right)[0, 0].numpy()
    best, until = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < until:
        begun = time.perf_counter()
        tf.matmul(left, right)[0, 0].numpy()
        best = min(best, time.perf_counter() - begun)
    return 2 * rows * a.width * a.feedforward / best


def combine(
    resolved: ResolvedRun, live: Manifest | None, form: RowFormat, policy: ReusePolicy, seen: Seen, measured: Measured
) -> DryRun:
    """Puts the counts together, and finds what would stop the run."""
    plan, counts = resolved.plan, seen.counts
    to_encode, n_equal = counts["encoded"], counts["same_text"]
    scaled = scale_up(resolved.store, plan, measured, to_encode)
    factor = to_encode / measured.documents if measured.documents else 0.0
    each = measured.counts["rows"] / measured.documents if measured.documents else 1.0
    dead = seen.dead.copy()
    for reason, n in Counter(dead_letter.reason for dead_letter in measured.dead_letters).items():
        dead[reason] += round(n * factor)
    for dead_letter in measured.dead_letters:
        seen.dead_letters.add(dead_letter.id, dead_letter.reason, dead_letter.origin.path)
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
    incomplete, moved = seen.dead_letters.incomplete, seen.reused_contents
    decisions = decide_live(seen.known, [seen.note], dead_ids, incomplete, moved, policy)
    rows = int(decisions.kept.sum()) + seen.n_reused + round(to_encode * each + equal_rows)
    row_bytes = live_row_bytes(live, form) or measured.row_bytes or live_row_bytes(live)
    return DryRun(
        **{name: counts[name] for name in ("documents", "new", "changed", "updated", "unchanged")},
        **{name: counts[name] for name in ("reused", "same_text")},
        to_encode=to_encode,
        **{name: decisions.counts[name] for name in ("deleted", "stale", "kept", "lost")},
        skipped_empty=seen.read["skipped_empty"],
        dead_letters={reason: n for reason, n in sorted(dead.items()) if n},
        chunks=round(scaled.counts.get("chunks", 0)),
        tokens=round(scaled.counts.get("tokens", 0)) if plan.vectors.counts_tokens else None,
        cut_tokens=round(scaled.counts.get("cut", 0)) if plan.vectors.counts_tokens else None,
        padding=max(0.0, 1 - scaled.counts["used"] / scaled.padded) if scaled.padded else 0.0,
        seconds=scaled.seconds,
        speed=scaled.speed,
        speed_source=scaled.source,
        rows=rows,
        bytes=round(rows * row_bytes),
        is_sampled=measured.documents < to_encode,
        changes=find_changes(live, plan),
        stops=list(find_stops(resolved, live, seen, dead, decisions, rows, row_bytes)),
    )


def live_row_bytes(live: Manifest | None, form: RowFormat | None = None) -> float:
    """Bytes of a row of the live table and its index entry; 0 if there is none, or none of the wanted form."""
    if live is None or not live.rows:
        return 0.0
    if form and (live.file_format, live.compression, live.layout) != (form.name, form.compression, form.layout):
        return 0.0
    return sum(file.n_bytes for file in (*live.files, *live.index_files)) / live.rows


def find_changes(live: Manifest | None, plan: EmbeddingSpec) -> list[str]:
    """What makes all rows of the live table useless."""
    from pipeline.run.resolve import describe_changes

    if live is None or live.fingerprint == plan.fingerprint:
        return []
    return list(describe_changes(live.identity, plan.identity))


def find_stops(
    resolved: ResolvedRun,
    live: Manifest | None,
    seen: Seen,
    dead: Counter[str],
    decisions: LiveDecisions,
    rows: int,
    row_bytes: float,
) -> Iterator[str]:
    """The messages that a run would stop with."""
    from pipeline.run.resolve import check_model

    config = resolved.config
    reindex = config.reindex
    if live is not None and config.read.limit:
        yield f"--limit={config.read.limit} is for trials and --output={config.write.output} already holds a table"
    refuses = reindex.on_model_change == "stop" or reindex.keeps_deleted
    counts: dict[str, dict[str, float]] = {
        "read": {"records": float(seen.read["records"])},
        "write_dead_letters": {**dead},
    }
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_model(live, resolved.plan, config) if refuses else None,
        lambda: check_free_space(resolved.store.work, rows, round(row_bytes)),
        lambda: check_counts(counts, config.write.max_dead_fraction),
        lambda: check_deletes(decisions.counts, reindex.max_delete_fraction),
    )
    for check in checks:
        try:
            check()
        except EmbeamError as error:
            yield str(error)


def _blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of the sizes in which a run looks them up."""
    block: list[Document] = []
    characters = 0
    for document in documents:
        block.append(document)
        characters += _size(document)
        if len(block) >= BUFFERED_DOCUMENTS or characters >= BUFFERED_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _size(document: Document) -> int:
    return len(document.text) + len(document.pair or "")
