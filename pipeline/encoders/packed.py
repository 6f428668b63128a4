"""Weights in a small file: whole numbers of a few bits with a scale for every unit, deflated in an `.npz`.

Most of an encoder's weights are far smaller than the largest of their column, so their high bits are mostly alike and
deflating them takes a tenth more off.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LEVELS = 127  # the largest whole number, the same below zero
SMALLEST = 4096  # numbers: arrays below this stay float32
_SCALE = ":scale"


def pack_weights(weights: Mapping[str, np.ndarray], path: str, levels: int = LEVELS) -> None:
    """Writes weights, each rounded to a multiple of its unit's largest magnitude divided by `levels`.

    A unit is a row of a table of embeddings, or the last axis' place in a kernel, which is an output of its layer.

    Args:
      weights: float32 by official name.
      path: file to create, `.npz`.
      levels: at most 127; fewer make a smaller file.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        if weight.size < SMALLEST:
            arrays[name] = weight
            continue
        scale = np.abs(weight).max(_unit_axes(name, weight.ndim), keepdims=True) / np.float32(levels)
        arrays[name + _SCALE] = scale
        arrays[name] = np.rint(weight / np.where(scale, scale, np.float32(1))).astype(np.int8)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def unpack_weights(path: str) -> dict[str, np.ndarray]:
    """Reads what `pack_weights` wrote: float32 by official name, the same bits on every machine."""
    with np.load(path) as arrays:
        return {
            name: arrays[name] * arrays[name + _SCALE] if name + _SCALE in arrays else arrays[name]
            for name in arrays.files
            if not name.endswith(_SCALE)
        }


def _unit_axes(name: str, rank: int) -> tuple[int, ...]:
    """The axes that share a scale."""
    if name.endswith("embeddings"):
        return (1,)
    if name.endswith(("query/kernel", "key/kernel", "value/kernel")):  # [D, A, K], of which D is summed over
        return (0,)
    return tuple(range(rank - 1))
