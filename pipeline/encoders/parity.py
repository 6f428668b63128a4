"""The parity check: runs a few rows through a SavedModel and through our graph, and compares the vectors."""

from __future__ import annotations

import functools
import gc
import os
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import VectorChoice
from pipeline.encoders.architecture import Architecture
from pipeline.encoders.base import TokenEncoder
from pipeline.encoders.cache import hash_file, remembered
from pipeline.encoders.fast import build_graph
from pipeline.encoders.mode import VERSION, Mode, choose_modes
from pipeline.encoders.published import load_saved_model
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.weights import Weights, read_weights
from pipeline.errors import first_line

POOLED, TOKENS = VectorChoice("pooled_output"), VectorChoice("sequence_output", None, "tokens")
LENGTHS = (1, 2, 5, 9, 17, 30, 47, 60)  # tokens of the rows that are compared; longer ones would show the same
# The largest difference of float32 between two orders of summation: up to 1e-4 was measured in the largest models;
# another epsilon, mask or form of GELU changes far more.
LARGEST_DIFFERENCE = 1e-3
# Half precision is chosen by the user and its figures are reported; a cosine below this is a defect, not rounding.
LOWEST_COSINE = 0.98
# A faster mode that rounds more than the next one is accepted from this cosine on.
NEAR_COSINE = 0.9995


class Parity(NamedTuple):
    """How close our graph is to the published one, over all rows of the check and both kinds of output.

    Attributes:
      precision: what our graph's dense layers ran in; the published one runs in its own.
      max_abs: largest difference of a number.
      min_cosine: lowest cosine between two vectors, of texts and of tokens.
      problem: why there are no figures, or "".
      attention: what our graph's attention ran in.
    """

    precision: str
    max_abs: float
    min_cosine: float
    problem: str = ""
    attention: str = "float32"

    @property
    def holds(self) -> bool:
        if self.problem or not np.isfinite(self.max_abs):
            return False
        if self.precision == "float32":
            return self.max_abs <= LARGEST_DIFFERENCE
        return self.min_cosine >= LOWEST_COSINE

    def __str__(self) -> str:
        return self.problem or f"max abs {self.max_abs:.1e}, lowest cosine {self.min_cosine:.6f}"


class ParityCheck:
    """Runs a few rows of mixed lengths through a SavedModel, once, and through our graph with its weights.

    Names and shapes do not show the form of GELU, the epsilon of a norm or the masking; the outputs do. Loading both
    graphs is slow, so the figures are cached under the names of everything that they depend on.
    """

    def __init__(self, folder: str, architecture: Architecture, weights_hash: str) -> None:
        self._folder = folder
        self._architecture = architecture
        self._names = (hash_file(os.path.join(folder, "saved_model.pb"))[:16], weights_hash[:16])

    def prove(self, precision: str) -> Parity:
        """The figures of the fastest mode for a precision that is close enough, or else of the closest one."""
        tried = []
        for mode in choose_modes(precision):
            tried.append(self._measure_once(mode))
            if tried[-1].holds and tried[-1].min_cosine >= NEAR_COSINE:
                return tried[-1]
        return max(tried, key=lambda parity: parity.min_cosine)

    def _measure_once(self, mode: Mode) -> Parity:
        name = "-".join(map(str, ("parity", *self._names, *mode, VERSION, load_tensorflow().__version__)))
        try:
            difference, cosine = remembered(name, lambda: self._measure(mode), _are_figures)
        except Exception as error:
            return Parity(
                mode.precision, float("inf"), 0.0, f"the parity check failed: {first_line(error)}", mode.attention
            )
        return Parity(mode.precision, difference, cosine, attention=mode.attention)

    def _measure(self, mode: Mode) -> list[float]:
        """The largest difference and the lowest cosine."""
        mask = self._inputs["input_mask"] > 0  # [B, L]
        published = self._published  # frees the memory before our weights are loaded
        weights = read_weights(self._folder, self._architecture, POOLED, mode)
        pooled = self._run_fast(weights, POOLED, mode)
        tokens = self._run_fast(weights._replace(pooler=None), TOKENS, mode)
        pairs = [(published[0], pooled), (published[1][mask], tokens[mask])]  # values of padding have no meaning
        return [
            float(max(np.abs(theirs - ours).max() for theirs, ours in pairs)),
            float(min(cosines(theirs, ours).min() for theirs, ours in pairs)),
        ]

    def _run_fast(self, weights: Weights, choice: VectorChoice, mode: Mode) -> np.ndarray:
        graph = build_graph(weights, self._architecture, choice, mode)
        vectors = TokenEncoder(choice, graph).run(self._inputs)
        del graph
        gc.collect()  # graphs have reference cycles, and hold the layouts of their kernels
        return vectors

    @functools.cached_property
    def _published(self) -> list[np.ndarray]:
        """The published graph's pooled output [B, D] and tokens [B, L, D]."""
        import tensorflow as tf

        model = load_saved_model(self._folder)
        outputs = model({name: tf.constant(value) for name, value in self._inputs.items()})
        arrays = [outputs[name].numpy() for name in ("pooled_output", "sequence_output")]
        del model, outputs
        gc.collect()
        return arrays

    @functools.cached_property
    def _inputs(self) -> dict[str, np.ndarray]:
        a = self._architecture
        lengths = [min(length, a.positions) for length in LENGTHS]
        rng = np.random.default_rng(7)
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)  # [B, L]
        ids = rng.integers(0, a.vocabulary, mask.shape).astype(np.int32)  # [B, L]
        types = rng.integers(0, min(2, a.types), mask.shape).astype(np.int32)  # [B, L]
        return {"input_word_ids": ids, "input_mask": mask, "input_type_ids": types}


def _are_figures(value: Any) -> bool:
    return isinstance(value, list) and [type(number) for number in value] == [float, float]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines between the rows of two matrices [N, D]: [N]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
