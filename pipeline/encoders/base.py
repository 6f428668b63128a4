"""The interface of a loaded encoder, and the common part of those that take token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from pipeline.config import VectorChoice
from pipeline.encoders.inputs import pack_batch, pack_texts
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.saved_model import TOKEN_INPUTS
from pipeline.encoders.streams import Streams
from pipeline.records import Batch, Chunk, Document


class Encoder(Protocol):
    """A loaded encoder. Several threads may call it at once."""

    def encode(self, batch: Batch) -> list[np.ndarray] | np.ndarray:
        """Encodes a batch.

        Returns:
          float32 `[len(batch), D]`, or a list of `[n_tokens, D]` for token matrices.
        """
        ...

    def warm_up(self) -> int:
        """Runs one small input, so that the first batch does not wait for set-up, and returns D, the vector's size."""
        ...

    def compile_shapes(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Compiles the graph for batches of these rows and lengths; does nothing if it is not compiled."""
        ...


class TokenEncoder:
    """The TF Hub text encoder interface: three int32 `[B, L]` tensors in, one float32 tensor out."""

    def __init__(
        self, choice: VectorChoice, graph: Callable[..., Any], compiled: bool = False, streams: Streams | None = None
    ) -> None:
        self._tf = load_tensorflow()
        self._streams = streams
        self._choice = choice
        self._graph = graph
        self._compiled = compiled

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Runs the graph over the three inputs, padding and all: float32 `[B, D]`, or `[B, L, D]` for tokens."""
        return self._streams.run(self._run_graph, inputs) if self._streams else self._run_graph(inputs)

    def _run_graph(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return self._graph(*(self._tf.constant(inputs[name]) for name in TOKEN_INPUTS)).numpy()

    def encode(self, batch: Batch) -> list[np.ndarray] | np.ndarray:
        vectors = self.run(pack_batch(batch))
        if self._choice.pooling == "tokens":
            return [vectors[i, : chunk.n_tokens] for i, chunk in enumerate(batch)]
        return vectors[: len(batch)]

    def warm_up(self) -> int:
        return self.encode(Batch([_trial_chunk(np.zeros(8, "<i4").tobytes())], length=8))[0].shape[-1]

    def compile_shapes(self, shapes: Iterable[tuple[int, int]]) -> None:
        for rows, length in shapes if self._compiled else ():
            self.run({name: np.ones((rows, length), np.int32) for name in TOKEN_INPUTS})


class TextEncoder:
    """Strings in, one vector per string out."""

    def __init__(self, choice: VectorChoice, model: Callable[..., Any]) -> None:
        self._tf = load_tensorflow()
        self._name = choice.output
        self._model = model

    def encode(self, batch: Batch) -> np.ndarray:
        outputs = self._model(self._tf.constant(pack_texts(batch)))
        vectors = outputs[self._name] if self._name else outputs
        return vectors.numpy().astype(np.float32)

    def warm_up(self) -> int:
        return self.encode(Batch([_trial_chunk(b"warm up")]))[0].shape[-1]

    def compile_shapes(self, shapes: Iterable[tuple[int, int]]) -> None:
        pass


def _trial_chunk(ids: bytes) -> Chunk:
    """A chunk without a document, to try an encoder with."""
    return Chunk(Document("", ""), "", 0, 1, ids, len(ids) // 4, 1, 0)
