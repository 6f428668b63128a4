"""The stages of a run, one after the other and without an engine: documents to rows and dead letters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.utils.windowed_value import WindowedValue

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders.handler import LoadedEncoder
from pipeline.encoders.load import load_encoder
from pipeline.preprocess.batching import CollectBatches
from pipeline.preprocess.chunking import SplitDocuments
from pipeline.records import Batch, DeadLetter, Document, Row
from pipeline.vectors.finishing import FinishVectors
from tests.support.paths import ENCODER
from tests.support.tables import Rows


class Staged(NamedTuple):
    """What became of some documents: rows as a reader of the table gives them, dead letters, and the batches."""

    rows: Rows
    dead_letters: list[DeadLetter]
    batches: list[Batch]


def run_bundle(do_fn: beam.DoFn, elements: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """What a DoFn makes of one bundle: (tag, value), in order; the main output's tag is ""."""
    do_fn.setup()
    do_fn.start_bundle()
    outputs = [output for element in elements for output in do_fn.process(element)]
    for output in [*outputs, *(do_fn.finish_bundle() or ())]:
        tag = ""
        if isinstance(output, beam.pvalue.TaggedOutput):
            tag, output = output.tag, output.value
        yield tag, output.value if isinstance(output, WindowedValue) else output


def embed_directly(documents: Sequence[Document], **settings: Any) -> Staged:
    """Embeds documents as one bundle with the tiny encoder; keyword settings are flags."""
    plan = make_embedding_spec(EmbedConfig.from_flat({"encoder": ENCODER, **settings}))
    split = list(run_bundle(SplitDocuments(plan.split), documents))
    collect = CollectBatches(plan.buckets, plan.vectors.counts_tokens)
    batches = [batch for tag, batch in run_bundle(collect, [chunk for tag, chunk in split if not tag]) if not tag]
    encoder = LoadedEncoder(load_encoder(plan.encoder))
    finished = list(run_bundle(FinishVectors(plan.vectors), map(encoder.start, batches)))
    layout = plan.layout()
    rows: Rows = {}
    for row in (row for tag, row in finished if not tag):
        assert isinstance(row, Row) and (row.id, row.chunk) not in rows
        columns = {name: values[0] for name, values in layout.values([row]).items()}
        scales = [columns["scale"]] if "scale" in columns else None
        if layout.tokens:
            columns["embedding"] = layout.restore_tokens(row.vector, row.n_tokens, scales)
        else:
            columns["embedding"] = layout.restore(row.vector, 1, scales)[0]
        rows[row.id, row.chunk] = columns
    dead_letters = [dead_letter for tag, dead_letter in [*split, *finished] if tag == "dead_letters"]
    return Staged(rows, dead_letters, batches)


def as_documents(texts: Iterable[str]) -> list[Document]:
    """Texts as documents whose ids are their numbers."""
    return [Document(str(i), text) for i, text in enumerate(texts)]
