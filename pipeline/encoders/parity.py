"""Whether a SavedModel computes what its variables' names and shapes suggest."""

from __future__ import annotations

import os

import numpy as np

from pipeline.cache import hash_file, remembered
from pipeline.encoders.architecture import Architecture, canonical_names
from pipeline.encoders.export import INPUTS, encode
from pipeline.runtime import load_tensorflow
from pipeline.saved_model import list_variables, read_variables

TOLERANCE = 1e-3  # max abs: rounding reaches 1e-4 in the largest models, another epsilon or mask changes far more


def computes_architecture(folder: str, architecture: Architecture) -> bool:
    """Runs a few short rows through a SavedModel and through our own forward pass over its weights.

    Names and shapes do not tell the form of GELU, the epsilon of a norm or the masking; the outputs do. It loads the
    model, so the verdict is remembered in the cache under the hash of its graph.
    """
    graph = hash_file(os.path.join(folder, "saved_model.pb"))
    return remembered(f"architecture-{graph[:24]}", lambda: _compare_outputs(folder, architecture))


def _compare_outputs(folder: str, architecture: Architecture) -> bool:
    tf = load_tensorflow()
    rng = np.random.default_rng(7)
    mask = (np.arange(6) < [[6], [4], [1]]).astype(np.int32)  # [B, L]
    ids = rng.integers(0, architecture.vocabulary, mask.shape).astype(np.int32)  # [B, L]
    types = rng.integers(0, 2, mask.shape).astype(np.int32)  # [B, L]
    inputs = {name: tf.constant(value) for name, value in zip(INPUTS, (ids, mask, types), strict=True)}
    names = canonical_names(list_variables(folder))
    weights = {names[name]: tf.constant(value) for name, value in read_variables(folder, names)}
    ours = encode(weights, inputs)
    theirs = tf.saved_model.load(folder)(inputs)
    differences = [(ours[name] - theirs[name]).numpy() for name in ("pooled_output", "sequence_output")]
    differences[1] = differences[1][mask > 0]  # what stands in padding means nothing
    return all(np.abs(difference).max() <= TOLERANCE for difference in differences)
