"""One side of a benchmark in a process of its own: `python -m benchmarks.child MODULE:FUNCTION ARGUMENTS RESULT`.

ARGUMENTS is a JSON object of keyword arguments; what the function returns goes to the file RESULT, as JSON. A process
of its own gives every measurement a fresh memory peak and pays for its own imports.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


class BatchClock:
    """The time of the first batch, and the counts since then."""

    def __init__(self) -> None:
        self.first_batch_at = 0.0  # time.monotonic() is the same clock in all processes of a machine
        self.first_items: float = 0
        self.items: float = 0
        self.encoder_seconds = 0.0
        self.spot_checks = 0

    def tick(self, n_items: float, encoder_seconds: float = 0.0, spot_checks: int = 0) -> None:
        """Records a finished batch, its time in the encoder, and its other counts."""
        self.items += n_items
        self.spot_checks += spot_checks
        if self.first_batch_at:
            self.encoder_seconds += encoder_seconds
        else:
            self.first_batch_at, self.first_items = time.monotonic(), n_items

    def stop(self) -> dict[str, float]:
        """The steady part, from the first batch until now: its start, count, length, and the encoder's share."""
        return {
            "first_batch_at": self.first_batch_at,
            "items": self.items,
            "steady_items": self.items - self.first_items,
            "steady_seconds": time.monotonic() - self.first_batch_at,
            "encoder_seconds": self.encoder_seconds,
            "spot_checks": self.spot_checks,
        }


def time_batches(owner: Any, method: str, is_spot_check: Callable[[Any], bool] = lambda item: False) -> BatchClock:
    """Patches a method of a class, whose first argument is a batch, to report each finished batch.

    Args:
      owner: the class.
      method: its name; an iterator that it returns is read at once.
      is_spot_check: whether an item of a batch is a spot check, which takes time but does not count as an item.
    """
    clock = BatchClock()
    encode = getattr(owner, method)

    def timed(self: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        begun = time.monotonic()
        outputs = encode(self, batch, *rest, **named)
        if isinstance(outputs, Iterator):
            outputs = list(outputs)
        seconds, spot_checks = time.monotonic() - begun, sum(map(is_spot_check, batch))
        clock.tick(len(batch) - spot_checks, seconds, spot_checks)
        return outputs

    setattr(owner, method, timed)
    return clock


def is_spot_check(chunk: Any) -> bool:
    """Whether a chunk is a spot check."""
    return bool(chunk.document.is_spot_check)


def embed(arguments: list[str]) -> dict[str, float]:
    """The product's side: `embeam embed` with these arguments, through its command line."""
    from pipeline.cli.main import main
    from pipeline.encoders.handler import LoadedEncoder

    clock = time_batches(LoadedEncoder, "encode", is_spot_check)
    main(["embed", *arguments])
    return clock.stop()


def run(function: str, arguments: str, result: str) -> None:
    module, _, name = function.partition(":")
    returned = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    with open(result, "w") as file:
        json.dump(returned, file)


if __name__ == "__main__":
    run(*sys.argv[1:])
