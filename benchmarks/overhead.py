"""The cost of Beam and of the product's own Python: the whole pipeline against a bare loop around its encoder.

Reference: a Python loop that calls the same encoder object with the very same batches, which were packed beforehand by
the pipeline's own tokeniser, batcher and packer, and does nothing with the vectors. The pipeline reads a text file and
publishes a table; its steady time ends with the publication.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.child import BatchClock
from benchmarks.measure import BenchmarkError, Ratio, Report, Side, alternate, run_side, steady_rate
from benchmarks.models import find_models
from benchmarks.texts import make_sentences, write_lines

if TYPE_CHECKING:
    from pipeline.embedding_spec import EmbeddingSpec
    from pipeline.records import Batch

SIZE, COUNT, REPETITIONS = "base", 400, 3
CEILING = 10.0  # percent of the loop's rate


def capture_batches(texts: str, encoder: str, preprocessor: str, packed: str) -> dict[str, float]:
    """Writes all batches of a run as padded arrays. Runs in a child."""
    import numpy as np

    from pipeline.config import EmbedConfig
    from pipeline.embedding_spec import make_embedding_spec
    from pipeline.encoders.inputs import pack_batch

    plan = make_embedding_spec(EmbedConfig.from_flat({"encoder": encoder, "preprocessor": preprocessor}))
    with open(texts, encoding="utf-8") as file:
        batches = list(make_batches(plan, [line.rstrip("\n") for line in file]))
    arrays, n_padded = {}, 0
    for i, batch in enumerate(batches):
        n_padded += batch.rows * batch.length
        arrays[f"{i} n"] = np.array(len(batch))
        arrays |= {f"{i} {name}": array for name, array in pack_batch(batch).items()}
    np.savez(packed, allow_pickle=False, **arrays)
    return {"batches": len(batches), "padded_tokens": n_padded}


def make_batches(plan: EmbeddingSpec, texts: list[str]) -> Iterator[Batch]:
    """The pipeline's batches, by its own functions and without Beam; the ids of documents are the texts' numbers."""
    from pipeline.preprocess.batching import Batcher
    from pipeline.records import Chunk, Document

    batcher = Batcher(plan.buckets)
    for chunk in plan.split.load().split([Document(str(i), text) for i, text in enumerate(texts)]):
        assert isinstance(chunk, Chunk)
        if batch := batcher.add(chunk, chunk.n_tokens):
            yield batch
    yield from batcher.drain()


def encode_in_loop(encoder: str, packed: str) -> dict[str, float]:
    """The reference's side, in a child."""
    import numpy as np

    from pipeline.config import EncoderConfig
    from pipeline.encoders.load import load_encoder
    from pipeline.encoders.spec import describe_encoder
    from pipeline.records import Batch, Chunk, Document

    class PaddedBatch(Batch):
        """A batch with its arrays; its chunks are only counted."""

        def __init__(self, inputs: dict[str, np.ndarray], n: int) -> None:
            rows, length = inputs["input_mask"].shape
            super().__init__([Chunk(Document("", ""), "", 0, 1, b"", 0, 0, 0)] * n, length, rows)
            self.packed = inputs

    loaded = load_encoder(describe_encoder(EncoderConfig(encoder=encoder))[0])
    batches = []
    with np.load(packed) as arrays:
        for i in range(sum(name.endswith(" n") for name in arrays.files)):
            names = ("input_word_ids", "input_mask", "input_type_ids")
            inputs = {name: arrays[f"{i} {name}"] for name in names}
            batches.append(PaddedBatch(inputs, int(arrays[f"{i} n"])))
    _skip_packing()
    clock = BatchClock()
    for batch in batches:
        loaded.encode(batch)
        clock.tick(len(batch))
    return clock.stop()


def _skip_packing() -> None:
    """Replaces the packer in all modules: the encoders get the arrays of the batch."""
    from pipeline.encoders import inputs

    pack_batch = inputs.pack_batch
    for name, module in list(sys.modules.items()):
        if name.startswith("pipeline.") and vars(module).get("pack_batch") is pack_batch:
            vars(module)["pack_batch"] = lambda batch: batch.packed


def run(options: argparse.Namespace) -> Report:
    count, folder = options.count, options.folder
    encoder, preprocessor = find_models(options.encoder, options.preprocessor, options.size, options.models)
    texts, table, packed = (os.path.join(folder, name) for name in ("texts.txt", "table", "batches.npz"))
    write_lines(texts, make_sentences(count))
    models = {"encoder": encoder, "preprocessor": preprocessor}
    captured = run_side(
        Side("benchmarks.overhead:capture_batches", {"texts": texts, "packed": packed, **models}), folder
    )
    flags = {"input": texts, "output": table, **models}
    sides = {
        "bare loop": Side("benchmarks.overhead:encode_in_loop", {"encoder": encoder, "packed": packed}),
        "embeam": Side("benchmarks.child:embed", {"arguments": [f"--{name}={value}" for name, value in flags.items()]}),
    }
    runs = alternate(sides, options.repetitions, folder, lambda name: shutil.rmtree(table, ignore_errors=True))
    counts = {name: {run["items"] for run in side} for name, side in runs.items()}
    if any(found != {count} for found in counts.values()):
        raise BenchmarkError(f"the sides did not encode the same {count} documents: {counts}")
    cost = 100 * (steady_rate(runs["bare loop"]) / steady_rate(runs["embeam"]) - 1)
    elsewhere = [100 * (run["steady_seconds"] / run["encoder_seconds"] - 1) for run in runs["embeam"]]
    return Report(
        f"{count:,} sentences in {captured['batches']} batches, the same ones for both sides",
        "texts",
        runs,
        [Ratio("time of embeam beyond the bare loop's, steady", cost, at_most=CEILING, unit="percent")],
        {
            "encoder": encoder,
            "documents encoded once more, as spot checks, by embeam alone": runs["embeam"][0]["spot_checks"],
            "padded tokens": int(captured["padded_tokens"]),
            "within embeam, time outside the encoder over time inside, percent": statistics.median(elsewhere),
        },
    )
