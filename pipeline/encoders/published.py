"""The SavedModel's own graph, as published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config import VectorChoice
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.saved_model import TOKEN_INPUTS
from pipeline.errors import EncoderError, first_line
from pipeline.vectors.pooling import pool_outputs


def load_saved_model(folder: str, handle: str = "") -> Any:
    """Loads a SavedModel; `handle` is what the user called it.

    Raises:
      EncoderError: if it cannot be loaded.
    """
    try:
        return load_tensorflow().saved_model.load(folder)
    except Exception as error:
        raise EncoderError(f"{handle or folder} cannot be loaded: {first_line(error)}") from error


def build_published_graph(model: Any, choice: VectorChoice) -> Callable[..., Any]:
    """Makes the function from the int32 inputs `[B, L]` to float32 vectors `[B, D]`, or `[B, L, D]` for tokens."""
    tf = load_tensorflow()

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32, name=name) for name in TOKEN_INPUTS])
    def encode(*inputs: Any) -> Any:
        outputs = model(dict(zip(TOKEN_INPUTS, inputs, strict=True)))
        return pool_outputs(outputs, inputs[1], choice)

    return encode
