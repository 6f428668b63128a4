"""The whole graph: reads documents, embeds them, writes rows and dead letters, and publishes the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import apache_beam as beam

import pipeline.coders  # noqa: F401  registers the coders of the records
from pipeline.config import EmbedConfig
from pipeline.embedding_spec import EmbeddingSpec, make_embedding_spec
from pipeline.encoders.handler import Encode
from pipeline.preprocess.batching import BatchByTokens
from pipeline.preprocess.chunking import Preprocess
from pipeline.progress import Progress
from pipeline.read_config import KeptField
from pipeline.reuse.distributed import LookUpVectors, ReuseRows
from pipeline.reuse.journal_writer import Journal
from pipeline.reuse.local import LocalReuse, LookUp
from pipeline.sinks.writing import WriteTo
from pipeline.sources.planning import InputPlan
from pipeline.sources.read import ReadDocuments
from pipeline.tables.commit import Commit
from pipeline.tables.lock import Lease
from pipeline.tables.store import CommitPlan, Committer
from pipeline.vectors.finishing import Finish

DEAD_LETTER_STAGES = ("Read", "Preprocess", "Encode", "Duplicate", "Shared")
SAFE_DOCUMENTS = 1000  # the most that are encoded again after a crash, or those of half a minute


class Embedded(NamedTuple):
    """What `EmbedDocuments` gives."""

    rows: beam.PCollection  # of Row
    dead_letters: beam.PCollection  # of DeadLetter


@dataclass
class EmbedDocuments(beam.PTransform):
    """PCollection[Document] -> rows and dead letters, for use in any Beam batch pipeline.

    All stages fuse: a document's chunks stay in one bundle, and no step shuffles.

    Attributes:
      config: preprocessing, batching, encoder and vectors; of `read` and `write` only `keep_text` is used.

    Raises:
      ConfigError, EncoderError: on construction, if the configuration cannot work.
    """

    config: EmbedConfig = field(default_factory=EmbedConfig)

    def __post_init__(self) -> None:
        super().__init__()
        self.spec = make_embedding_spec(self.config)

    def expand(self, documents: beam.PCollection) -> Embedded:
        if not documents.windowing.is_default():
            raise ValueError("EmbedDocuments works on batch pipelines only: give it the global window")
        chunks, bad_documents, _ = documents | "Preprocess" >> Preprocess(self.spec.split)
        embedded = chunks | "Embed" >> EncodeChunks(self.spec)
        dead_letters = (bad_documents, embedded.dead_letters) | "DeadLetters" >> beam.Flatten()
        return Embedded(embedded.rows, dead_letters)


class Encoding(NamedTuple):
    """What `EncodeChunks` gives."""

    rows: beam.PCollection  # of Row
    spot_checks: beam.PCollection  # of Row, for comparison only
    dead_letters: beam.PCollection  # of DeadLetter
    bundle_counts: beam.PCollection  # of BundleCounts


@dataclass
class EncodeChunks(beam.PTransform):
    """PCollection[Chunk] -> Encoding: all steps that need the encoder.

    Attributes:
      spec: how documents become rows.
      journal: folder of the journal, which keeps finished vectors; "" for none.
      gpu_memory_mib: the GPU memory that a process may take if it shares the GPU; 0 if it does not.
    """

    spec: EmbeddingSpec
    journal: str = ""
    gpu_memory_mib: int = 0

    def expand(self, chunks: beam.PCollection) -> Encoding:
        spec, vectors = self.spec, self.spec.vectors
        # A document of several chunks is in the journal only with its last one, which must not wait for a full bucket.
        max_waiting = SAFE_DOCUMENTS if vectors.average or vectors.chunked else 0
        batches, batch_counts = chunks | "Batch" >> BatchByTokens(spec.buckets, vectors.counts_tokens, max_waiting)
        encoded = batches | "Encode" >> Encode(spec.encoder, spec.buckets.full_shapes(), self.gpu_memory_mib)
        rows, spot_checks, bad_vectors, encode_counts = encoded | "Finish" >> Finish(vectors)
        if self.journal:
            rows = rows | "Journal" >> Journal(self.journal)
        bundle_counts = (batch_counts, encode_counts) | "BundleCounts" >> beam.Flatten()
        return Encoding(rows, spot_checks, bad_vectors, bundle_counts)


@dataclass(frozen=True)
class Job:
    """One run from files to a published table, with everything resolved.

    Attributes:
      config: what the user asked for.
      input: the files and how they are split.
      kept: the kept fields, all with a type.
      spec: how documents become rows.
      attempts: folder for what the run writes before it is published.
      journal: folder for finished vectors.
      commit_plan: what the commit needs and is resolved before the run.
      committer: the commit itself, by the kind of output.
      distributed: whether the engine may shuffle what grows with the corpus.
      place_encoder: wraps the transform that encodes for the engine, such as to run it on dedicated workers.
      gpu_memory_mib: the GPU memory that a process may take if it shares the GPU; 0 if it does not.
      lease: the table's lock, which the job's workers renew and release where the job may outlive its launcher.
      progress: what the stages report to.
    """

    config: EmbedConfig
    input: InputPlan
    kept: tuple[KeptField, ...]
    spec: EmbeddingSpec
    attempts: str
    journal: str
    commit_plan: CommitPlan
    committer: Committer
    distributed: bool
    place_encoder: Callable[[beam.PTransform], beam.PTransform]
    gpu_memory_mib: int
    lease: Lease | None
    progress: Progress


def build_pipeline(pipeline: beam.Pipeline, job: Job) -> beam.PCollection:
    """Adds the whole job to a pipeline.

    Returns:
      PCollection[str]: the name of what was published.
    """
    write, plan = job.config.write, job.commit_plan
    reuse = plan.reuse.back_end
    read = pipeline | "Read" >> ReadDocuments(
        job.input, job.config.read, job.kept, job.attempts, job.distributed, job.progress
    )
    looked_up = read.documents | "LookUp" >> (LookUp(reuse) if isinstance(reuse, LocalReuse) else LookUpVectors(reuse))
    chunks, bad_documents, preprocess_counts = looked_up.documents | "Preprocess" >> Preprocess(job.spec.split)
    encode = EncodeChunks(job.spec, job.journal, job.gpu_memory_mib)
    embedded = chunks | "Embed" >> job.place_encoder(encode)
    rows, dead_letters = embedded.rows, [read.dead_letters, bad_documents, embedded.dead_letters]
    bundle_counts = [read.bundle_counts, looked_up.bundle_counts, preprocess_counts, embedded.bundle_counts]
    results, shards = {"spot_checks": embedded.spot_checks, "bad_files": read.bad_files}, []
    if isinstance(reuse, LocalReuse):
        results["notes"] = looked_up.notes
    else:
        reused = rows | "Reuse" >> ReuseRows(reuse, looked_up, dead_letters, read.bad_files)
        rows, results["samples"] = reused.rows, reused.samples
        dead_letters += [looked_up.dead_letters, reused.dead_letters]
        bundle_counts.append(reused.bundle_counts)
        shards.append(reused.shards)
    row_shards, row_counts = rows | "WriteRows" >> WriteTo(job.attempts, plan.form, write.shard_bytes, job.progress)
    shards, bundle_counts = [*shards, row_shards], [*bundle_counts, row_counts]

    # One writer per stage instead of one for all: the local engine holds the inputs of a Flatten in memory.
    for stage, some in zip(DEAD_LETTER_STAGES, dead_letters, strict=False):
        to = WriteTo(job.attempts, plan.dead_letter_format, write.shard_bytes, job.progress)
        dead_shards, dead_counts = some | f"Write{stage}DeadLetters" >> to
        shards.append(dead_shards)
        bundle_counts.append(dead_counts)

    results["shards"] = tuple(shards) | "Shards" >> beam.Flatten()
    results["bundle_counts"] = tuple(bundle_counts) | "BundleCounts" >> beam.Flatten()
    return pipeline | "Commit" >> Commit(job.committer, results, job.lease)
