"""Weights in a small file."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline.encoders.export import initial_weights
from pipeline.encoders.packed import SMALLEST, pack_weights, unpack_weights
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def weights():
    weights = initial_weights(2, 96, 4, vocabulary_size=700)
    weights["word_embeddings/embeddings"][3] *= 40  # a unit of its own scale
    weights["transformer_scaffold/feedforward/gate_0/kernel"][:, 7] = 0  # a unit without any
    return weights


@pytest.mark.parametrize("levels", [127, 31])
def test_every_number_is_within_half_a_step(weights, tmp_path, levels):
    pack_weights(weights, str(tmp_path / "weights.npz"), levels)
    found = unpack_weights(str(tmp_path / "weights.npz"))
    assert list(found) == list(weights)
    rounded = 0
    for name, weight in weights.items():
        assert found[name].dtype == np.float32 and found[name].shape == weight.shape
        if weight.size < SMALLEST:
            np.testing.assert_array_equal(found[name], weight)
            continue
        rounded += 1
        for unit, expected in zip(units(name, found[name]), units(name, weight), strict=True):
            step = np.abs(expected).max() / levels
            assert np.abs(unit - expected).max() <= step * 0.5001
            assert len(np.unique(unit)) <= 2 * levels + 1
    assert rounded > 10


def units(name, weight):
    """Rows of a table, one output of a kernel at a time."""
    if name.endswith("embeddings"):
        return list(weight)
    inputs = 2 if "attention_output" in name else 1
    return list(weight.reshape(int(np.prod(weight.shape[:inputs])), -1).T)


def test_the_file_is_small_and_always_the_same(weights, tmp_path):
    for name in ("one.npz", "other.npz"):
        pack_weights(weights, str(tmp_path / name), 63)
    one, other = ((tmp_path / name).read_bytes() for name in ("one.npz", "other.npz"))
    assert one == other
    assert len(one) < sum(weight.size for weight in weights.values())  # bytes, where float32 takes four times as many


def test_reading_needs_no_tensorflow(weights, tmp_path):
    pack_weights(weights, str(tmp_path / "weights.npz"))
    code = (
        "import sys; from pipeline.encoders.packed import unpack_weights; "
        f"unpack_weights({str(tmp_path / 'weights.npz')!r}); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
