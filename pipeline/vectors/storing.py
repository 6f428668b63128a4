"""Vectors as they are stored: cut, normalised, and written as little-endian bytes of a dtype; and back.

Error bounds per number, for a vector x of finite numbers:

- `float32`: none.
- `float16`: |x| * 2**-11, or 2**-25 near zero; beyond 65504 a number becomes infinite and the row a dead letter.
- `int8`: half of the row's scale, which is max|x| / 127.
- `binary`: the sign alone is kept (zero counts as negative), eight numbers a byte, most significant bit first.
"""

from __future__ import annotations

import numpy as np

from pipeline.config import VectorConfig

_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # x 127 stays finite
STORED_DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1", "binary": "u1"}


def shape_vectors(vectors: np.ndarray, config: VectorConfig) -> np.ndarray:
    """Cuts vectors to the configured dimensions, then normalises them if asked to.

    Args:
      vectors: float32 `[B, D]`.

    Returns:
      float32 `[B, dimensions]`. A vector of zeros stays a vector of zeros.
    """
    if config.dimensions:
        vectors = vectors[:, : config.dimensions]
    if config.normalize:
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)  # [B, 1]; squares overflow float32
        vectors = vectors / np.where(norms > 0, norms, 1)
    return np.ascontiguousarray(vectors, np.float32)


def quantize_vectors(vectors: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Converts vectors to the stored dtype.

    Args:
      vectors: finite float32 `[B, D]`.

    Returns:
      The stored numbers `[B, D]` (`[B, ceil(D / 8)]` for binary) and float32 scales `[B]` (zeros unless int8).
    """
    scales = np.zeros(len(vectors), np.float32)
    if dtype == "int8":
        scales = np.minimum(np.abs(vectors).max(1, initial=0) / np.float32(127), _LARGEST_SCALE)
        divisors = np.where(scales > 0, scales, 1)[:, None]
        return np.clip(np.rint(vectors / divisors), -127, 127).astype(np.int8), scales
    if dtype == "binary":
        return np.packbits(vectors > 0, axis=1), scales
    with np.errstate(over="ignore"):
        return vectors.astype(STORED_DTYPES[dtype]), scales


def restore_vectors(stored: bytes, scales: np.ndarray, dtype: str, dimension: int) -> np.ndarray:
    """The inverse of `quantize_vectors` on the joined bytes of B rows.

    Returns:
      float32 `[B, dimension]`; binary vectors come back as -1 and +1.
    """
    numbers = np.frombuffer(stored, STORED_DTYPES[dtype]).reshape(len(scales), -1)
    if dtype == "int8":
        return numbers * np.asarray(scales, np.float32)[:, None]
    if dtype == "binary":
        return np.unpackbits(numbers, axis=1, count=dimension).astype(np.float32) * 2 - 1
    return numbers.astype(np.float32)
