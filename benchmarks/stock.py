"""The product against code that a Beam user writes today: the same English sentences to a TFRecord table of vectors.

Reference: `ordinary.py`, with ReadFromText, RunInference over a handler of the user's own, batches of 32 padded to the
preprocessor's 128 tokens, the encoder called as published, WriteToTFRecord, on the same local engine. The product:
`embeam embed`, with its defaults. Afterwards both tables are compared, vector by vector.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil

from benchmarks.child import time_batches
from benchmarks.measure import BenchmarkError, Ratio, Report, Side, alternate, run_side, steady_rate, whole_rate
from benchmarks.models import find_models
from benchmarks.texts import make_sentences, write_lines

SIZE, COUNT, REPETITIONS = "small", 2000, 5
FLOOR = 2.5
TOLERANCE = 2e-4  # largest difference of a number; another GELU or a wrong mask differ by more
STOCK_TOKENS = 128  # the preprocessor's own length


def embed_stock(**arguments: str) -> dict[str, float]:
    """The reference's side, in a child."""
    from benchmarks import ordinary

    clock = time_batches(ordinary.TextEncoderHandler, "run_inference")
    ordinary.embed_texts(**arguments)
    return clock.stop()


def compare_tables(source: str, records: str, table: str) -> dict[str, float]:
    """The largest difference between the two tables, and how long the texts are. Runs in a child."""
    import numpy as np
    import tensorflow as tf

    from pipeline import open_table, read_table

    ids, vectors = read_table(table)
    vector_at = {int(id.rpartition("@")[2]): vector for id, vector in zip(ids, vectors, strict=True)}
    with open(source, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    offsets = np.cumsum([0] + [len(line) for line in lines])
    text_at = {int(offset): line.rstrip(b"\n") for offset, line in zip(offsets, lines, strict=False)}
    ours = {text_at[offset]: vector for offset, vector in vector_at.items()}
    worst, rows = 0.0, 0
    for record in tf.data.TFRecordDataset(sorted(glob.glob(records + "*"))).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        stock = np.array(features["embedding"].float_list.value, np.float32)
        worst = max(worst, float(np.abs(stock - ours[features["text"].bytes_list.value[0]]).max()))
        rows += 1
    pieces = open_table(table)[0].counts["preprocess"]["tokens"]
    return {"max_difference": worst, "stock_rows": rows, "rows": len(ids), "mean_pieces": pieces / len(ids)}


def run(options: argparse.Namespace) -> Report:
    count, folder = options.count, options.folder
    encoder, preprocessor = find_models(options.encoder, options.preprocessor, options.size, options.models)
    texts, table, stock = (os.path.join(folder, name) for name in ("texts.txt", "table", "stock"))
    write_lines(texts, make_sentences(count))
    flags = {"input": texts, "output": table, "encoder": encoder, "preprocessor": preprocessor}
    arguments = [f"--{name}={value}" for name, value in flags.items()] + [f"--max_tokens={STOCK_TOKENS}"]
    records = os.path.join(stock, "embeddings")
    settings = {"source": texts, "output": records, "preprocessor": preprocessor, "encoder": encoder}
    sides = {
        "stock Beam": Side("benchmarks.stock:embed_stock", settings),
        "embeam": Side("benchmarks.child:embed", {"arguments": arguments}),
    }

    def clear(name: str) -> None:
        shutil.rmtree(table if name == "embeam" else stock, ignore_errors=True)

    runs = alternate(sides, options.repetitions, folder, clear)
    compared = run_side(
        Side("benchmarks.stock:compare_tables", {"source": texts, "records": records, "table": table}), folder
    )
    if compared["rows"] != count or compared["stock_rows"] != count or compared["max_difference"] > TOLERANCE:
        raise BenchmarkError(f"the two tables differ: {compared}")
    theirs, ours = runs["stock Beam"], runs["embeam"]
    return Report(
        f"{count:,} sentences of {compared['mean_pieces']:.1f} word pieces on average, from text to a TFRecord table",
        "texts",
        runs,
        [
            Ratio("embeam / stock Beam, whole process", whole_rate(ours) / whole_rate(theirs), at_least=FLOOR),
            Ratio("embeam / stock Beam, steady", steady_rate(ours) / steady_rate(theirs)),
        ],
        {
            "encoder": encoder,
            "mean word pieces": compared["mean_pieces"],
            "largest difference of a number": compared["max_difference"],
            "tolerance": TOLERANCE,
        },
    )
