"""Measures how fast this machine multiplies matrices: the reference for an encoder's speed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

SECONDS = 1.0  # of trying each way
# Tokens x inputs x outputs: the dense layers of a `base` encoder and a large square.
SHAPES = ((2048, 768, 3072), (2048, 3072, 768), (2048, 2048, 2048))


def measure_matmul(precision: str) -> dict[str, float]:
    """The best rate in FLOP/s over shapes and libraries, with all cores. Runs in a child."""
    import numpy as np

    from pipeline.encoders.runtime import load_tensorflow

    tf = load_tensorflow()
    rates: dict[str, float] = {}
    for rows, inputs, outputs in SHAPES:
        rng = np.random.default_rng(0)
        a, b = (rng.random(shape, dtype=np.float32) for shape in ((rows, inputs), (inputs, outputs)))
        left, right = tf.cast(a, precision), tf.cast(b, precision)
        ways: dict[str, Callable[[], Any]] = {"TensorFlow": _graph_matmul(tf, left, right)}
        if precision == "float32":
            ways["NumPy"] = functools.partial(np.matmul, a, b)
        for name, multiply in ways.items():
            rate = 2 * rows * inputs * outputs / _best_seconds(multiply)
            rates[name] = max(rates.get(name, 0.0), rate)
    return {"items": 1, "flops": max(rates.values()), **{f"flops of {name}": rate for name, rate in rates.items()}}


def _graph_matmul(tf: Any, left: Any, right: Any) -> Callable[[], Any]:
    kernel = tf.constant(right)
    multiply = tf.function(lambda x: tf.matmul(x, kernel))
    return lambda: multiply(left)


def _best_seconds(function: Callable[[], Any]) -> float:
    function()
    best, until = float("inf"), time.monotonic() + SECONDS
    while time.monotonic() < until:
        begun = time.monotonic()
        function()
        best = min(best, time.monotonic() - begun)
    return best
