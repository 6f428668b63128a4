"""The official fixtures, and small inputs and vocabularies, for the tests of the exporters."""

import numpy as np

from pipeline.encoders.saved_model import TOKEN_INPUTS as INPUTS
from tests.support.paths import REFERENCE

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def read_vocabulary() -> list[str]:
    return (REFERENCE / "tiny_v1000/assets/vocab.txt").read_text(encoding="utf-8").splitlines()


def some_vocabulary(size: int) -> list[str]:
    return SPECIAL + [f"piece{i}" for i in range(size - len(SPECIAL))]


def some_inputs(n_texts: int, n_tokens: int, vocabulary_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, n_tokens + 1, n_texts)
    mask = (np.arange(n_tokens) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(0, vocabulary_size, (n_texts, n_tokens)).astype(np.int32) * mask
    types = rng.integers(0, 2, (n_texts, n_tokens)).astype(np.int32) * mask
    return dict(zip(INPUTS, (ids, mask, types), strict=True))
