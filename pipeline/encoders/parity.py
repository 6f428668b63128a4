"""The proof that our graph computes what a SavedModel computes: a few rows through both."""

from __future__ import annotations

import gc
import os
from typing import Any, NamedTuple

import numpy as np

from pipeline.cache import hash_file, remembered
from pipeline.config import VectorChoice
from pipeline.encoders.architecture import Architecture
from pipeline.encoders.base import TokenEncoder
from pipeline.encoders.fast import VERSION, Mode, build_graph, choose_mode, read_weights
from pipeline.encoders.published import load_saved_model
from pipeline.errors import first_line
from pipeline.runtime import load_tensorflow

POOLED, TOKENS = VectorChoice("pooled_output"), VectorChoice("sequence_output", None, "tokens")
LENGTHS = (1, 2, 5, 9, 17, 30, 47, 60)  # tokens of the probe's rows; longer ones would show the same
# What float32 may differ by in two orders of summation: up to 1e-4 was seen in the largest models, while another
# epsilon, mask or form of GELU changes far more.
LARGEST_DIFFERENCE = 1e-3
# Half precision is asked for and its figures are told; a cosine below this is a defect and no rounding.
LOWEST_COSINE = 0.98


class Parity(NamedTuple):
    """How near our graph came to the published one, over all rows of a probe and both kinds of output.

    Attributes:
      precision: what our graph ran in; the published one runs in its own.
      max_abs: largest difference of a number.
      min_cosine: lowest cosine between two vectors, of texts and of tokens.
      problem: why there are no figures, or "".
    """

    precision: str
    max_abs: float
    min_cosine: float
    problem: str = ""

    @property
    def holds(self) -> bool:
        if self.problem or not np.isfinite(self.max_abs):
            return False
        if self.precision == "float32":
            return self.max_abs <= LARGEST_DIFFERENCE
        return self.min_cosine >= LOWEST_COSINE

    def __str__(self) -> str:
        return self.problem or f"max abs {self.max_abs:.1e}, lowest cosine {self.min_cosine:.6f}"


def prove_parity(folder: str, architecture: Architecture, weights_hash: str, precision: str) -> Parity:
    """Runs a few rows of mixed lengths through a SavedModel and through our graph over its weights.

    Names and shapes do not tell the form of GELU, the epsilon of a norm or the masking; the outputs do. Loading both
    takes a while, so the figures are remembered in the cache under the names of all that they depend on.
    """
    tf = load_tensorflow()
    graph = hash_file(os.path.join(folder, "saved_model.pb"))
    mode = choose_mode(precision)
    name = "-".join(map(str, ("parity", graph[:16], weights_hash[:16], *mode, VERSION, tf.__version__)))
    try:
        figures = remembered(name, lambda: _measure(folder, architecture, mode))
    except Exception as error:
        return Parity(precision, float("inf"), 0.0, f"the probe failed: {first_line(error)}")
    return Parity(precision, figures[0], figures[1])


def _measure(folder: str, architecture: Architecture, mode: Mode) -> list[float]:
    """The largest difference and the lowest cosine."""
    inputs = _probe_inputs(architecture)
    mask = inputs["input_mask"] > 0  # [B, L]
    published = _run_published(load_saved_model(folder), inputs)
    gc.collect()  # the published weights go before ours come
    weights = read_weights(folder, architecture, POOLED, mode)
    ours = []
    for choice, needed in ((POOLED, weights), (TOKENS, weights._replace(pooler=None))):
        graph = build_graph(needed, architecture, choice, mode)
        ours.append(TokenEncoder(choice, graph).run(inputs))
    pairs = [(published[0], ours[0]), (published[1][mask], ours[1][mask])]  # what stands in padding means nothing
    return [
        float(max(np.abs(theirs - our).max() for theirs, our in pairs)),
        float(min(_cosines(theirs, our).min() for theirs, our in pairs)),
    ]


def _run_published(model: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    import tensorflow as tf

    outputs = model({name: tf.constant(value) for name, value in inputs.items()})
    return [outputs[name].numpy() for name in ("pooled_output", "sequence_output")]


def _probe_inputs(architecture: Architecture) -> dict[str, np.ndarray]:
    lengths = [min(length, architecture.positions) for length in LENGTHS]
    rng = np.random.default_rng(7)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)  # [B, L]
    ids = rng.integers(0, architecture.vocabulary, mask.shape).astype(np.int32)  # [B, L]
    types = rng.integers(0, min(2, architecture.types), mask.shape).astype(np.int32)  # [B, L]
    return {"input_word_ids": ids, "input_mask": mask, "input_type_ids": types}


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines between the rows of two matrices [N, D]: [N]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
