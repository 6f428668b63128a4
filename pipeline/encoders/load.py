"""Loads an encoder from its spec."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.encoders.architecture import Architecture, text_flops
from pipeline.encoders.base import Encoder, TextEncoder, TokenEncoder
from pipeline.encoders.fast import build_graph
from pipeline.encoders.mode import VERSION, Mode, choose_mode
from pipeline.encoders.published import build_published_graph, load_saved_model
from pipeline.encoders.runtime import native_half_precision
from pipeline.encoders.spec import EncoderSpec
from pipeline.encoders.streams import Streams
from pipeline.encoders.weights import read_weights
from pipeline.errors import EncoderError, first_line


def load_fast(spec: EncoderSpec) -> Encoder:
    a = spec.architecture
    assert a is not None
    mode = choose_mode(spec.precision, spec.attention)
    graph = build_graph(read_weights(spec.folder, a, spec.choice, mode), a, spec.choice, mode)
    return TokenEncoder(spec.choice, graph, mode.compiled, None if mode.compiled else make_streams(a, mode))


def make_streams(a: Architecture, mode: Mode) -> Streams:
    name = "-".join(map(str, (a.family, a.layers, a.width, a.feedforward, *mode, VERSION)))
    return Streams(name, text_flops(a, 1))


def load_published(spec: EncoderSpec) -> Encoder:
    return TokenEncoder(spec.choice, build_published_graph(load_saved_model(spec.folder, spec.handle), spec.choice))


def load_published_text(spec: EncoderSpec) -> Encoder:
    return TextEncoder(spec.choice, load_saved_model(spec.folder, spec.handle))


# By graph and input. To add a kind of encoder, add a line.
ENCODERS: dict[tuple[str, str], Callable[[EncoderSpec], Encoder]] = {
    ("fast", "tokens"): load_fast,
    ("published", "tokens"): load_published,
    ("published", "texts"): load_published_text,
}


def load_encoder(spec: EncoderSpec) -> Encoder:
    """Loads and warms up an encoder.

    Raises:
      EncoderError: if it cannot be loaded, fails on a small input, or this machine does not support its precision.
    """
    return _load_and_measure(spec)[0]


def measure_dimension(spec: EncoderSpec) -> int:
    """Measures D by running the encoder once, for a SavedModel that does not specify it.

    Raises:
      EncoderError: if the SavedModel cannot be loaded or fails on a small input.
    """
    return _load_and_measure(spec)[1]


def _load_and_measure(spec: EncoderSpec) -> tuple[Encoder, int]:
    shown = spec.handle or spec.folder
    if spec.native and spec.precision != "float32" and not native_half_precision():
        raise EncoderError(
            f"--precision={spec.precision} was planned on a machine that supports it natively, and this worker does "
            "not; use workers of one kind, or --precision=float32"
        )
    try:
        encoder = ENCODERS[spec.graph, spec.takes](spec)
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(f"{shown} cannot be loaded: {first_line(error)}") from error
    try:
        return encoder, encoder.warm_up()
    except Exception as error:
        raise EncoderError(f"{shown} loads but fails on a first small input: {first_line(error)}") from error
