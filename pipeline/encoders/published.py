"""Encoders that run the SavedModel's own graph, as published."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from pipeline.encoders.spec import EncoderSpec
from pipeline.errors import EncoderError, first_line
from pipeline.preprocess.packing import pack_batch, pack_texts
from pipeline.records import Batch, Chunk, Document
from pipeline.runtime import load_tensorflow
from pipeline.vectors.pooling import pool_outputs


class Encoder(Protocol):
    """A loaded encoder. Several threads may call it at once."""

    def encode(self, batch: Batch) -> list[np.ndarray] | np.ndarray:
        """Encodes a batch.

        Returns:
          float32 `[len(batch), D]`, or a list of `[n_tokens, D]` for token matrices.
        """
        ...

    def warm_up(self) -> int:
        """Runs one small input, so that the first batch finds everything built, and returns D, the vector's size."""
        ...


class TokenEncoder:
    """The TF Hub text encoder interface: three int32 `[B, L]` tensors in, named tensors out."""

    def __init__(self, spec: EncoderSpec) -> None:
        tf = load_tensorflow()
        self._tf = tf
        self._choice = spec.choice
        model = _load_saved_model(spec)
        spec_of = lambda name: tf.TensorSpec([None, None], tf.int32, name=name)  # noqa: E731

        @tf.function(input_signature=[spec_of("input_word_ids"), spec_of("input_mask"), spec_of("input_type_ids")])
        def encode(input_word_ids: Any, input_mask: Any, input_type_ids: Any) -> Any:
            inputs = {
                "input_word_ids": input_word_ids,
                "input_mask": input_mask,
                "input_type_ids": input_type_ids,
            }
            return pool_outputs(model(inputs), input_mask, spec.choice)

        self._encode = encode

    def encode(self, batch: Batch) -> list[np.ndarray] | np.ndarray:
        inputs = pack_batch(batch)
        vectors = self._encode(**{name: self._tf.constant(value) for name, value in inputs.items()}).numpy()
        if self._choice.pooling == "tokens":
            return [vectors[i, : chunk.n_tokens] for i, chunk in enumerate(batch)]
        return vectors[: len(batch)]

    def warm_up(self) -> int:
        return self.encode(Batch([_probe_chunk(np.zeros(8, "<i4").tobytes())], length=8))[0].shape[-1]


class TextEncoder:
    """Strings in, one vector per string out."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._tf = load_tensorflow()
        self._name = spec.choice.output
        self._model = _load_saved_model(spec)

    def encode(self, batch: Batch) -> np.ndarray:
        outputs = self._model(self._tf.constant(pack_texts(batch)))
        vectors = outputs[self._name] if self._name else outputs
        return vectors.numpy().astype(np.float32)

    def warm_up(self) -> int:
        return self.encode(Batch([_probe_chunk(b"warm up")]))[0].shape[-1]


ENCODERS = {"tokens": TokenEncoder, "texts": TextEncoder}


def load_encoder(spec: EncoderSpec) -> Encoder:
    """Loads and warms up an encoder.

    Raises:
      EncoderError: if the SavedModel cannot be loaded or fails on a small input.
    """
    return _load_and_measure(spec)[0]


def measure_dimension(spec: EncoderSpec) -> int:
    """D by running the encoder once, for a SavedModel that leaves it open.

    Raises:
      EncoderError: if the SavedModel cannot be loaded or fails on a small input.
    """
    return _load_and_measure(spec)[1]


def _load_and_measure(spec: EncoderSpec) -> tuple[Encoder, int]:
    encoder: Encoder = ENCODERS[spec.takes](spec)
    try:
        return encoder, encoder.warm_up()
    except Exception as error:
        raise EncoderError(
            f"{spec.handle or spec.folder} loads but fails on a first small input: {first_line(error)}"
        ) from error


def _load_saved_model(spec: EncoderSpec) -> Any:
    tf = load_tensorflow()
    try:
        return tf.saved_model.load(spec.folder)
    except Exception as error:
        raise EncoderError(f"{spec.handle or spec.folder} cannot be loaded: {first_line(error)}") from error


def _probe_chunk(ids: bytes) -> Chunk:
    return Chunk(Document("", ""), "", 0, 1, ids, len(ids) // 4, 1, 0)
