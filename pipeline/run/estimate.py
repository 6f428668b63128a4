"""Estimates the size and the time of a run from a sample of its documents: chunks, batches, seconds, bytes."""

from __future__ import annotations

import gzip
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import NamedTuple, Optional

import numpy as np

from pipeline.embed import SAFE_DOCUMENTS
from pipeline.embedding_spec import EmbeddingSpec
from pipeline.encoders.architecture import text_flops
from pipeline.encoders.runtime import has_gpu, load_tensorflow
from pipeline.errors import EmbeamError
from pipeline.preprocess.batching import Batcher
from pipeline.preprocess.chunking import is_encodable
from pipeline.records import Chunk, DeadLetter, Document, Row, cut_own_text, pack_kept
from pipeline.reuse.local import BUFFERED_CHARACTERS, BUFFERED_DOCUMENTS
from pipeline.sinks.index import ENTRY
from pipeline.sinks.writing import RowFormat
from pipeline.tables.folder import FolderStore
from pipeline.tables.manifest import Manifest, read_manifest
from pipeline.tables.retention import list_snapshots
from pipeline.tables.store import Store
from pipeline.vectors.storing import quantize_vectors

SAMPLE_ROWS, SAMPLE_ROW_BYTES = 256, 8 << 20  # rows that are written to memory to measure their size
LEAST_TOKENS = 10_000  # padded tokens of an earlier run from which its rate is trusted
SPEED_KEYS = ("encoder", "vector", "graph", "precision")  # of an identity
MATMUL_SECONDS = 0.1
MATMUL_SHARE = 0.5  # of the rate of bare matmuls that encoders reach, about
_NO_CHUNK = Chunk(Document("", ""), "", 0, 1, b"", 0, 0, 0)  # takes a place in a batch


class Measured(NamedTuple):
    """Measurements of some texts.

    Attributes:
      documents: how many there are.
      counts: their chunks, rows, content tokens, tokens that are cut or [UNK], and tokens in batches (bytes for text
        encoders).
      lengths: chunks by the padded length of their bucket.
      made: content hash to the number of rows, or to the dead letter.
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


def measure_texts(spec: EmbeddingSpec, form: RowFormat, documents: Sequence[Document]) -> Measured:
    """Tokenises texts, but encodes none."""
    rule, splitter = spec.vectors, spec.split.load()
    counts: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    made: dict[str, int | DeadLetter] = {}
    some: list[Chunk] = []
    for block in split_blocks(iter(documents)):
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
            counts["unknown"] += chunk.n_unknown or 0
            counts["used"] += size
            lengths[spec.buckets.length_for(size)] += 1
            made[chunk.content_hash] = chunk.n_chunks if rule.chunked else 1
            if len(some) < SAMPLE_ROWS:
                some.append(chunk)
    row_bytes = measure_row(spec, form, some) if some else 0.0
    return Measured(len(documents), counts, lengths, made, row_bytes)


def measure_row(spec: EmbeddingSpec, form: RowFormat, chunks: Sequence[Chunk]) -> float:
    """Measures bytes of a row and its index entry by writing some rows with random vectors to memory."""
    rng = np.random.default_rng(0)
    rows, n_bytes = [], 0
    for chunk in chunks:
        numbers = spec.dimension * (chunk.n_tokens if spec.vectors.tokens else 1)
        stored, scales = quantize_vectors(rng.standard_normal((1, numbers), np.float32), form.layout.dtype)
        document, start, end = chunk.document, chunk.char_start, chunk.char_end
        rows.append(
            Row(
                id=document.id,
                chunk=chunk.number,
                vector=stored.tobytes(),
                scale=float(scales[0]),
                n_tokens=chunk.n_tokens,
                n_truncated=chunk.n_truncated,
                content_hash=chunk.content_hash,
                kept=document.kept,
                text=cut_own_text(document.text, start, end) if form.layout.keep_text else None,
                n_chunks=chunk.n_chunks,
                source=document.origin.path,
                char_start=start,
                char_end=end,
                n_unknown=chunk.n_unknown,
            )
        )
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


class RowSize(NamedTuple):
    """Rows of one document, and bytes of a row with its index entry."""

    rows_per_document: float
    row_bytes: float


def measure_rows(spec: EmbeddingSpec, form: RowFormat, documents: Sequence[Document]) -> RowSize:
    """Measures rows by a sample of documents, which are tokenised only if the row size depends on their tokens."""
    good = [document for document in documents if is_encodable(document.id) and is_encodable(document.text)]
    documents = good or [Document("0" * 32, "", kept=pack_kept([None] * len(form.layout.kept)))]
    if spec.vectors.chunked or spec.vectors.tokens:
        measured = measure_texts(spec, form, documents)
        if measured.counts["rows"]:
            return RowSize(measured.counts["rows"] / measured.documents, measured.row_bytes)
    chunks = [Chunk(document, "0" * 32, 0, 1, b"", 0, 0, 0) for document in documents[:SAMPLE_ROWS]]
    return RowSize(1.0, measure_row(spec, form, chunks))


def live_row_bytes(live: Manifest | None, form: RowFormat | None = None) -> float:
    """Bytes of a row of the live table and its index entry; 0 if there is none, or none of the wanted form."""
    if live is None or not live.rows:
        return 0.0
    if form and (live.file_format, live.compression, live.layout) != (form.name, form.compression, form.layout):
        return 0.0
    return sum(file.n_bytes for file in (*live.files, *live.index_files)) / live.rows


class Scaled(NamedTuple):
    """`Measured` scaled up to all texts, and the time that they take.

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


def scale_up(store: Store, spec: EmbeddingSpec, measured: Measured, n_texts: int) -> Scaled:
    """Scales the measurements of a sample up to all texts."""
    if not measured.counts["chunks"] or not n_texts:
        return Scaled({}, 0, 0.0, "idle", "")
    factor = n_texts / measured.documents
    counts = {name: n * factor for name, n in measured.counts.items()}
    shapes = count_batches(spec, measured, n_texts)
    padded = sum(rows * length for length, rows in shapes.items())
    rate, source, is_rough = find_rate(store, spec)
    if rate and not is_rough:
        return Scaled(counts, padded, padded / rate, "measured", source)
    if spec.encoder.architecture is not None:
        flops = sum(rows * text_flops(spec.encoder.architecture, length) for length, rows in shapes.items())
        return Scaled(counts, padded, flops / (MATMUL_SHARE * measure_matmul(spec)), "rough", "")
    return Scaled(counts, padded, padded / rate if rate else None, "rough" if rate else "unknown", source)


def count_batches(spec: EmbeddingSpec, measured: Measured, n_texts: int) -> Counter[int]:
    """Rows of all batches, padding rows included, by length."""
    # As in the graph: what waits for its bucket to fill leaves with the bundle, or after so many documents.
    most = SAFE_DOCUMENTS if spec.vectors.average or spec.vectors.chunked else n_texts
    total: Counter[int] = Counter()
    n_full, rest = divmod(n_texts, most)
    for n, times in ((most, n_full), (rest, 1)):
        batcher = Batcher(spec.buckets)
        for length, n_chunks in measured.lengths.items():
            expected = round(n_chunks * n / measured.documents)
            full, left = divmod(expected, spec.buckets.full_rows(length))
            total[length] += times * full * spec.buckets.full_rows(length)
            for _ in range(left if times else 0):
                batcher.add(_NO_CHUNK, length)
        for batch in batcher.drain():
            total[batch.length] += times * batch.rows
    return total


def find_rate(store: Store, spec: EmbeddingSpec) -> tuple[float, str, bool]:
    """Padded tokens that the same encoder took in a second in the table's longest run.

    Returns:
      The rate or 0, the snapshot of that run, and whether it was too short to be trusted.
    """
    best, rate, source = 0.0, 0.0, ""
    for manifest in read_manifests(store):
        same = all(manifest.identity.get(key) == spec.identity[key] for key in SPEED_KEYS)
        padded = manifest.counts.get("batch", {}).get("padded_tokens", 0.0)
        seconds = manifest.counts.get("encode", {}).get("encode_seconds", 0.0)
        if same and seconds > 0 and padded > best:
            best, rate, source = padded, padded / seconds, manifest.snapshot
    return rate, source, best < LEAST_TOKENS


def read_manifests(store: Store) -> Iterator[Manifest]:
    """Yields the manifests of all readable snapshots; for a database, that of the live state."""
    if not isinstance(store, FolderStore):
        live = store.read_live().manifest
        yield from [live] if live else []
        return
    for name in list_snapshots(store.work):
        try:
            yield read_manifest(store.work, name)
        except (EmbeamError, OSError):  # damaged, or removed meanwhile
            continue


def measure_matmul(spec: EmbeddingSpec) -> float:
    """FLOP/s of this machine's bare matmuls of the encoder's feed-forward, in about a tenth of a second."""
    tf = load_tensorflow()
    a = spec.encoder.architecture
    assert a is not None
    rows = min(spec.buckets.budget, 4096 if has_gpu() else 512)
    precision = spec.encoder.precision if spec.encoder.native else "float32"
    left, right = (tf.ones(shape, precision) for shape in ((rows, a.width), (a.width, a.feedforward)))
    tf.matmul(left, right)[0, 0].numpy()
    best, until = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < until:
        begun = time.perf_counter()
        tf.matmul(left, right)[0, 0].numpy()
        best = min(best, time.perf_counter() - begun)
    return 2 * rows * a.width * a.feedforward / best


def split_blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yields documents in lists of the size in which a run looks them up."""
    block: list[Document] = []
    characters = 0
    for document in documents:
        block.append(document)
        characters += count_characters(document)
        if len(block) >= BUFFERED_DOCUMENTS or characters >= BUFFERED_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def count_characters(document: Document) -> int:
    return len(document.text) + len(document.pair or "")
