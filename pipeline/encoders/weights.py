"""An encoder's weights in the shapes and the precision that the fast graph multiplies by.

One letter glossary: D width, A heads, K head size, F feed-forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config import VectorChoice
from pipeline.encoders.architecture import FAMILIES, Architecture, canonical_names
from pipeline.encoders.mode import Mode
from pipeline.encoders.runtime import has_gpu, load_tensorflow
from pipeline.encoders.saved_model import list_variables, tensor_reader

if TYPE_CHECKING:
    import tensorflow as tf


class Dense(NamedTuple):
    kernel: tf.Tensor  # [inputs, outputs], in the precision of the matmuls
    bias: tf.Tensor  # [outputs], float32 like all other weights, or what a fused kernel wants


class Norm(NamedTuple):
    gamma: tf.Tensor  # [D]
    beta: tf.Tensor  # [D]


class Layer(NamedTuple):
    """One layer's weights, in the shapes that the graph multiplies by."""

    qkv: Dense  # [D, 3D]: queries, already divided by the root of K, keys, values
    mix_before: tf.Tensor | None  # [A (out), A (in)]
    mix_after: tf.Tensor | None
    attended: Dense  # [D, D]
    attended_norm: Norm
    up: Dense  # [D, F]
    gate: Dense | None  # [D, F]
    down: Dense  # [F, D]
    norm: Norm


class Weights(NamedTuple):
    words: tf.Tensor  # [vocabulary, D]
    positions: tf.Tensor  # [positions, D]
    types: tf.Tensor  # [types, D]
    norm: Norm
    layers: tuple[Layer, ...]
    pooler: Dense | None  # [D, D], where it is asked for


def read_weights(folder: str, a: Architecture, choice: VectorChoice, mode: Mode) -> Weights:
    """Reads the weights that an output needs, one layer at a time, so that no second copy of all exists."""
    tf = load_tensorflow()
    names = {official: given for given, official in canonical_names(list_variables(folder)).items()}
    read_tensor = tensor_reader(folder)
    with tf.device("CPU"):  # else every array would go to the GPU in float32 first
        weights = arrange_weights(lambda name: read_tensor(names[name]), a, choice, mode)
    if not has_gpu():
        return weights
    with tf.device("GPU"):
        return tf.nest.map_structure(lambda tensor: None if tensor is None else tf.identity(tensor), weights)


def arrange_weights(
    read_tensor: Callable[[str], tf.Tensor], a: Architecture, choice: VectorChoice, mode: Mode
) -> Weights:
    """Converts the weights that an output needs, by official name, to the shapes that the graph multiplies by."""
    import tensorflow as tf

    family = FAMILIES[a.family]

    def read(prefix: str, *wanted: str) -> list[tf.Tensor]:
        return [read_tensor(f"{prefix}/{name}") for name in wanted]

    def make_dense(kernel: tf.Tensor, bias: tf.Tensor) -> Dense:
        kernel = tf.cast(kernel, mode.precision)
        if mode.emulated:
            kernel = tf.cast(kernel, tf.float32)
        return Dense(kernel, tf.cast(bias, kernel.dtype) if mode.fused else bias)

    def dense(prefix: str, n_inputs: int = a.width) -> Dense:
        kernel, bias = read(prefix, "kernel", "bias")
        return make_dense(tf.reshape(kernel, [n_inputs, -1]), tf.reshape(bias, [-1]))

    def norm(prefix: str) -> Norm:
        return Norm(*read(prefix, "gamma", "beta"))

    def queries_keys_values(prefix: str) -> Dense:
        kernels, biases = [], []
        for name, scale in (("query", 1 / math.sqrt(a.head_size)), ("key", 1.0), ("value", 1.0)):
            kernel, bias = read(f"{prefix}/{name}", "kernel", "bias")  # [D, A, K], [A, K]
            kernels.append(tf.reshape(kernel, [a.width, -1]) * scale)
            biases.append(tf.reshape(bias, [-1]) * scale)
        return make_dense(tf.concat(kernels, 1), tf.concat(biases, 0))

    def layer(prefix: str) -> Layer:
        attention = f"{prefix}/self_attention"
        mixing = read(attention, "pre_softmax_weight", "post_softmax_weight") if family.talks else (None, None)
        before, after = (None if mix is None else tf.transpose(mix) for mix in mixing)
        return Layer(
            qkv=queries_keys_values(attention),
            mix_before=before,
            mix_after=after,
            attended=dense(f"{attention}/attention_output", a.heads * a.head_size),
            attended_norm=norm(f"{prefix}/self_attention_layer_norm"),
            up=dense(f"{prefix}/{family.up}"),
            gate=dense(f"{prefix}/{family.gate}") if family.gate else None,
            down=dense(f"{prefix}/{family.down}", a.feedforward),
            norm=norm(f"{prefix}/{family.forward_norm}"),
        )

    def table(name: str) -> tf.Tensor:
        return read(name, "embeddings")[0]

    n_layers = a.layers if choice.layer is None else choice.layer + 1
    return Weights(
        words=table("word_embeddings"),
        positions=table("position_embedding"),
        types=table("type_embeddings"),
        norm=norm("embeddings/layer_norm"),
        layers=tuple(layer(family.layer_name(i)) for i in range(n_layers)),
        pooler=dense(family.pooler) if choice.is_pooled_output else None,
    )
