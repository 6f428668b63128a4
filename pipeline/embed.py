"""The product as one graph: documents in, rows and dead letters out, and around it reading, writing, publishing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import apache_beam as beam

from pipeline.config import EmbedConfig, KeptField
from pipeline.encoders.handler import Encode
from pipeline.plan import EmbedPlan, plan_embedding
from pipeline.preprocess.batching import BatchByTokens
from pipeline.preprocess.chunking import Preprocess
from pipeline.progress import Progress
from pipeline.sinks.writing import DeadLetterFormat, RowFormat, WriteTo
from pipeline.sources.planning import InputPlan
from pipeline.sources.read import ReadDocuments
from pipeline.tables.manifest import attempts_folder
from pipeline.tables.publish import Publication, Publish
from pipeline.vectors.finishing import Finish


class Embedded(NamedTuple):
    """What `EmbedDocuments` gives."""

    rows: beam.PCollection  # of Row
    dead_letters: beam.PCollection  # of DeadLetter


@dataclass
class EmbedDocuments(beam.PTransform):
    """PCollection[Document] -> rows and dead letters, for use in any Beam batch pipeline.

    All stages fuse: a document's chunks stay in one bundle, and no step shuffles.

    Attributes:
      config: preprocessing, batching, encoder and vectors; `read` and `write` are not used, but for `keep_text`.

    Raises:
      ConfigError, EncoderError: when it is built, if the configuration cannot work.
    """

    config: EmbedConfig = field(default_factory=EmbedConfig)

    def __post_init__(self) -> None:
        super().__init__()
        self.plan = plan_embedding(self.config)

    def expand(self, documents: beam.PCollection) -> Embedded:
        if not documents.windowing.is_default():
            raise ValueError("EmbedDocuments works on batch pipelines only: give it the global window")
        rows, dead_letters, _ = embed_documents(documents, self.plan)
        return Embedded(rows, dead_letters | "DeadLetters" >> beam.Flatten())


def embed_documents(documents: beam.PCollection, plan: EmbedPlan) -> tuple[beam.PCollection, tuple, tuple]:
    """Documents -> rows, the dead letters of each stage, the tallies of each stage."""
    chunks, bad_documents, preprocess_tallies = documents | "Preprocess" >> Preprocess(plan.split)
    batches, batch_tallies = chunks | "Batch" >> BatchByTokens(plan.buckets, plan.vectors.counts_tokens)
    encoded = batches | "Encode" >> Encode(plan.encoder, plan.buckets.full_shapes())
    rows, bad_vectors, encode_tallies = encoded | "Finish" >> Finish(plan.vectors)
    return rows, (bad_documents, bad_vectors), (preprocess_tallies, batch_tallies, encode_tallies)


@dataclass(frozen=True)
class Job:
    """One run from files to a published table, with everything settled.

    Attributes:
      config: what the user asked for.
      input: the files and how they are split.
      kept: the kept fields, all with a type.
      plan: how documents become rows.
      publication: the snapshot that comes out.
      distributed: whether the engine may shuffle what grows with the corpus.
      progress: what the stages report to.
    """

    config: EmbedConfig
    input: InputPlan
    kept: tuple[KeptField, ...]
    plan: EmbedPlan
    publication: Publication
    distributed: bool
    progress: Progress


def build_pipeline(pipeline: beam.Pipeline, job: Job) -> beam.PCollection:
    """Adds the whole job to a pipeline.

    Returns:
      PCollection[str]: the name of the published snapshot.
    """
    write = job.config.write
    attempts = attempts_folder(job.publication.table, job.publication.name)
    documents, unread, read_tallies = pipeline | "Read" >> ReadDocuments(
        job.input, job.config.read, job.kept, attempts, job.distributed, job.progress
    )
    rows, bad, tallies = embed_documents(documents, job.plan)

    row_format = RowFormat(write.output_format, job.plan.layout(job.kept), write.compression)
    shards, row_tallies = rows | "WriteRows" >> WriteTo(attempts, row_format, write.shard_bytes, job.progress)
    all_shards, all_tallies = [shards], [read_tallies, *tallies, row_tallies]

    # One writer per stage instead of one for all: the local engine would hold what crosses a Flatten in memory.
    letter_format = DeadLetterFormat(write.dead_letter_text)
    for stage, letters in zip(("Read", "Preprocess", "Encode"), (unread, *bad), strict=True):
        to = WriteTo(attempts, letter_format, write.shard_bytes, job.progress)
        letter_shards, letter_tallies = letters | f"Write{stage}DeadLetters" >> to
        all_shards.append(letter_shards)
        all_tallies.append(letter_tallies)

    shards = tuple(all_shards) | "Shards" >> beam.Flatten()
    counted = tuple(all_tallies) | "Tallies" >> beam.Flatten()
    return pipeline | "Publish" >> Publish(job.publication, shards, counted)
