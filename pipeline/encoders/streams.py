"""Runs parts of a batch in parallel, in the number that measures fastest for this machine and encoder.

Between two matmuls all cores wait for each other, and memory-bound ops leave the multiplication units idle. Parts of a
batch that run in parallel fill these gaps on some machines; on others they slow each other down.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.encoders.cache import look_up, remember
from pipeline.encoders.runtime import describe_processor

Inputs = dict[str, np.ndarray]  # int32 [B, L] each, by name

LEAST_FLOPS = 2e9  # of a part: below this, threads cost more than they gain
TRIALS = 4  # batches timed with each number of streams


class Streams:
    """Runs batches in one part or in several at once.

    The first large batches are run with one number after the other and timed; the fastest is used from then on and
    remembered. It changes vectors by no more than another order of summation does.
    """

    def __init__(self, name: str, flops_per_token: float) -> None:
        """Reads the cached measurements.

        Args:
          name: contains everything that the best number depends on besides the machine.
          flops_per_token: of the encoder, a multiply-add being two.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._counts = [1 << i for i in range(cores.bit_length())]  # 1, 2, 4 up to the cores
        self._flops_per_token = flops_per_token
        self._name = f"streams-{describe_processor()}-{cores}-{name}"
        self._best = look_up(self._name, lambda value: value in self._counts)
        self._rates: dict[int, list[float]] = {count: [] for count in self._counts}
        self._threads = ThreadPoolExecutor(cores, "stream")

    def run(self, encode: Callable[[Inputs], np.ndarray], inputs: Inputs) -> np.ndarray:
        """Encodes a batch: what `encode` gives for all rows, in their order."""
        n_tokens = int(inputs["input_mask"].sum())
        most = min(len(inputs["input_mask"]), int(n_tokens * self._flops_per_token / LEAST_FLOPS))
        if most < self._counts[-1]:  # the batch is too small to compare numbers of parts
            return self._run_parts(encode, inputs, max(1, min(most, self._best or 1)))
        if self._best is not None:
            return self._run_parts(encode, inputs, self._best)
        count = min(self._counts, key=lambda count: len(self._rates[count]))
        begun = time.perf_counter()
        vectors = self._run_parts(encode, inputs, count)
        self._note(count, n_tokens / (time.perf_counter() - begun))
        return vectors

    def _note(self, count: int, rate: float) -> None:
        """Adds a measurement, and chooses the number once there are enough."""
        self._rates[count].append(rate)
        if min(map(len, self._rates.values())) >= TRIALS and self._best is None:
            self._best = max(self._counts, key=lambda count: statistics.median(self._rates[count]))
            remember(self._name, self._best)

    def _run_parts(self, encode: Callable[[Inputs], np.ndarray], inputs: Inputs, count: int) -> np.ndarray:
        if count == 1:
            return encode(inputs)
        split = {name: np.array_split(array, count) for name, array in inputs.items()}
        parts = ({name: arrays[i] for name, arrays in split.items()} for i in range(count))
        return np.concatenate(list(self._threads.map(encode, parts)))
