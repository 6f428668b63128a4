"""Our own graph of the known families: the published module's numbers with less work.

What it saves: queries, keys and values come from one matmul; all dense layers are 2-D matmuls over tokens; heads are
mixed by a small matmul without transposing the scores; only the output that is asked for is computed, and where that is
the first token's, the last layer after its keys and values runs for that token alone. On processors, padding is taken
out between the rows for everything but attention itself. On GPUs every layer is compiled by XLA, once for each shape of
batches, as all layers share one function.

One letter glossary: B batch, L tokens, N tokens of all rows together, D width, A heads, K head size, F feed-forward.

Sources: post-layer-norm BERT, arXiv 1810.04805; talking heads, arXiv 2003.02436; gated GELU, arXiv 2002.05202.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config import VectorChoice
from pipeline.encoders.architecture import FAMILIES, Architecture, canonical_names
from pipeline.encoders.export import LAYER_NORM_EPSILON, MASKED_LOGIT
from pipeline.runtime import has_gpu, hear_onednn_out, load_tensorflow, native_half_precision
from pipeline.saved_model import list_variables, tensor_reader
from pipeline.vectors.pooling import pool_tokens

if TYPE_CHECKING:
    import tensorflow as tf

VERSION = 1  # of the arithmetic: raise it when numbers may change, so that remembered proofs are made again


class Dense(NamedTuple):
    kernel: tf.Tensor  # [inputs, outputs], in the precision of the matmuls
    bias: tf.Tensor  # [outputs], float32 like all other weights


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


class Mode(NamedTuple):
    """How the graph runs on one kind of device.

    Attributes:
      precision: of the matmuls; norms, softmax and the residual stream stay in float32.
      compiled: each layer goes through XLA.
      packed: padding is taken out of the dense layers. Their shapes then vary with every batch, which XLA cannot have.
      frozen: weights are constants of the graph, so that oneDNN lays them out once, for one more copy in memory; and
        the GELU is part of the matmul before it. Both pay in bfloat16, where a matmul takes less time than either.
      emulated: the device lacks the precision: numbers are rounded to it and multiplied in float32, at its speed.
    """

    precision: str = "float32"
    compiled: bool = False
    packed: bool = True
    frozen: bool = False
    emulated: bool = False


def choose_mode(precision: str) -> Mode:
    """The mode for this machine's devices."""
    native = native_half_precision() == precision
    emulated = precision != "float32" and not native
    if emulated:
        hear_onednn_out()
    if has_gpu():
        return Mode(precision, compiled=True, packed=False, emulated=emulated)
    return Mode(precision, frozen=native, emulated=emulated)


def read_weights(folder: str, a: Architecture, choice: VectorChoice, mode: Mode) -> Weights:
    """Reads the weights that an output needs, a layer at a time, so that there is never a second copy of them all."""
    tf = load_tensorflow()
    names = {official: given for given, official in canonical_names(list_variables(folder)).items()}
    read_tensor = tensor_reader(folder)
    with tf.device("CPU"):  # a GPU would get every array in float32 first
        weights = arrange_weights(lambda name: read_tensor(names[name]), a, choice, mode)
    if not has_gpu():
        return weights
    with tf.device("GPU"):
        return tf.nest.map_structure(lambda tensor: None if tensor is None else tf.identity(tensor), weights)


def arrange_weights(
    read_tensor: Callable[[str], tf.Tensor], a: Architecture, choice: VectorChoice, mode: Mode
) -> Weights:
    """Brings the weights that an output needs, by official name, into the shapes that the graph multiplies by."""
    import tensorflow as tf

    family = FAMILIES[a.family]

    def read(prefix: str, *wanted: str) -> list[tf.Tensor]:
        return [read_tensor(f"{prefix}/{name}") for name in wanted]

    def make_dense(kernel: tf.Tensor, bias: tf.Tensor) -> Dense:
        kernel = tf.cast(kernel, mode.precision)
        return Dense(tf.cast(kernel, tf.float32) if mode.emulated else kernel, bias)

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
        pooler=dense(family.pooler) if _is_pooled(choice) else None,
    )


def build_graph(weights: Weights, a: Architecture, choice: VectorChoice, mode: Mode) -> Callable[..., tf.Tensor]:
    """Makes the graph from the three int32 inputs `[B, L]` to float32 vectors `[B, D]`, or `[B, L, D]` for tokens.

    Rows of padding tokens hold numbers without meaning, as in the published module.
    """
    tf = load_tensorflow()
    inputs = [tf.TensorSpec([None, None], tf.int32)] * 3
    run = define_graph(weights, a, choice, mode)
    return tf.function(run, input_signature=inputs, autograph=False).get_concrete_function()


def define_graph(weights: Weights, a: Architecture, choice: VectorChoice, mode: Mode) -> Callable[..., tf.Tensor]:
    """The Python function that `build_graph` makes a graph of."""
    load_tensorflow()
    import tensorflow as tf

    first_only = _is_pooled(choice) or choice.pooling == "cls"

    def run(input_word_ids: tf.Tensor, input_mask: tf.Tensor, input_type_ids: tf.Tensor) -> tf.Tensor:
        w = tf.nest.map_structure(_freeze, weights) if mode.frozen else weights
        x, rows = run_layers(input_word_ids, input_mask, input_type_ids, w, a, mode, first_only)
        if w.pooler is not None:
            return pool_first(x, w.pooler, mode)
        if first_only:
            return x  # [B, D]
        return pool_tokens(spread(x, rows), input_mask, choice.pooling)

    return run


def run_layers(
    ids: tf.Tensor, mask: tf.Tensor, types: tf.Tensor, w: Weights, a: Architecture, mode: Mode, first_only: bool
) -> tuple[tf.Tensor, Rows]:
    """From the three inputs [B, L] to the last layer's tokens [N, D], or first tokens [B, D], and where they are."""
    import tensorflow as tf

    run_layer = functools.partial(forward_layer, a=a, mode=mode)
    if mode.compiled:
        run_layer = tf.function(run_layer, jit_compile=True, autograph=False)
    present = tf.cast(mask, tf.float32)  # [B, L]
    rows = lay_out_rows(present, mode.packed)
    logit_mask = ((1.0 - present) * MASKED_LOGIT)[:, None, None, :]  # [B, 1, 1, L]
    x = embed_tokens(ids, types, rows, w)  # [N, D]
    for i, layer in enumerate(w.layers):
        x = run_layer(x, logit_mask, rows, layer, first=first_only and i + 1 == len(w.layers))
    return x, rows


class Rows(NamedTuple):
    """Where the tokens of a batch are.

    Attributes:
      shape: B and L.
      kept: [N] which of the B x L places are computed, or None for all.
      slots: [B x L] which of the N computed tokens stands in a place; 0 in places without one.
      first: [B] which of the N computed tokens is a row's first.
    """

    shape: tf.Tensor
    kept: tf.Tensor | None
    slots: tf.Tensor | None
    first: tf.Tensor


def lay_out_rows(mask: tf.Tensor, packed: bool) -> Rows:
    """Finds the tokens that must be computed: all, or those that are not padding.

    A row's first token is computed in any case, and all of a row in which nothing may be attended to, as its softmax
    goes over all of them.
    """
    import tensorflow as tf

    shape = tf.shape(mask)
    if not packed:
        return Rows(shape, None, None, tf.range(shape[0]) * shape[1])
    blank = tf.logical_not(tf.reduce_any(mask > 0, 1, keepdims=True))  # [B, 1]
    keep = (mask > 0) | blank | (tf.range(shape[1]) == 0)  # [B, L]
    flat = tf.reshape(keep, [-1])
    slots = tf.where(flat, tf.cumsum(tf.cast(flat, tf.int32)) - 1, 0)  # [B L]
    kept = tf.cast(tf.where(flat)[:, 0], tf.int32)  # [N]
    return Rows(shape, kept, slots, tf.gather(slots, tf.range(shape[0]) * shape[1]))


def spread(x: tf.Tensor, rows: Rows) -> tf.Tensor:
    """Puts tokens [N, D] back into their places [B, L, D]; what stands in places of padding means nothing."""
    import tensorflow as tf

    if rows.slots is not None:
        x = tf.gather(x, rows.slots)
    return tf.reshape(x, tf.concat([rows.shape, [x.shape[-1]]], 0))


def embed_tokens(ids: tf.Tensor, types: tf.Tensor, rows: Rows, w: Weights) -> tf.Tensor:
    """Adds up the embeddings of words, places and types and normalises: ids and types [B, L] int32 to [N, D]."""
    import tensorflow as tf

    places = tf.broadcast_to(tf.range(rows.shape[1]), rows.shape)  # [B, L]
    parts = [tf.reshape(part, [-1]) for part in (ids, places, types)]
    if rows.kept is not None:
        parts = [tf.gather(part, rows.kept) for part in parts]
    ids, places, types = parts  # [N] each
    x = tf.gather(w.words, ids) + tf.gather(w.positions, places)  # [N, D]
    x += tf.one_hot(types, w.types.shape[0]) @ w.types  # a type beyond adds nothing
    return normalise(x, w.norm)


def forward_layer(
    x: tf.Tensor, logit_mask: tf.Tensor, rows: Rows, w: Layer, a: Architecture, mode: Mode, first: bool
) -> tf.Tensor:
    """One layer: x [N, D] to [N, D], or to [B, D] for the first tokens alone."""
    import tensorflow as tf

    rows = rows._replace(shape=tf.gather(tf.shape(logit_mask), [0, 3]))  # XLA must know it, and knows no arguments
    attended = attend(x, logit_mask, rows, w, a, mode, first)  # [N, D] or [B, D], like all that follows
    if first:
        x = tf.gather(x, rows.first)  # [B, D]
    x = normalise(x, w.attended_norm, attended)
    return normalise(x, w.norm, feed_forward(x, w, mode))


def attend(
    x: tf.Tensor, logit_mask: tf.Tensor, rows: Rows, w: Layer, a: Architecture, mode: Mode, first: bool
) -> tf.Tensor:
    """Multi-head attention, whose heads are mixed before and after the softmax where there are weights for it.

    Between the matmuls of the scores and of the context all is float32. On processors these two are as well: they are a
    few percent of the work, and rounding here costs more accuracy than anywhere else.
    """
    import tensorflow as tf

    batch, length = rows.shape[0], rows.shape[1]
    qkv = spread(multiply(x, w.qkv, mode), rows)  # [B, L, 3D]
    qkv = tf.cast(qkv, w.qkv.kernel.dtype if mode.compiled else tf.float32)
    qkv = tf.transpose(tf.reshape(qkv, [batch, length, 3, a.heads, a.head_size]), [2, 0, 3, 1, 4])
    query, key, value = qkv[0], qkv[1], qkv[2]  # [B, A, L, K]
    if first:
        query = query[:, :, :1]  # [B, A, 1, K]
    scores = tf.cast(tf.matmul(query, key, transpose_b=True), tf.float32)  # [B, A, L (query), L]
    shares = tf.nn.softmax(mix_heads(scores, w.mix_before) + logit_mask)  # [B, A, L, L]
    shares = mix_heads(shares, w.mix_after)  # [B, A, L, L], may be negative
    context = tf.matmul(tf.cast(shares, value.dtype), value)  # [B, A, L, K]
    context = tf.transpose(context, [0, 2, 1, 3])  # [B, L, A, K]
    context = tf.reshape(context, [-1, a.heads * a.head_size])  # [B L, D]
    if rows.kept is not None and not first:
        context = tf.gather(context, rows.kept)  # [N, D]
    return multiply(context, w.attended, mode)


def pool_first(x: tf.Tensor, pooler: Dense, mode: Mode) -> tf.Tensor:
    """The pooled output of first tokens: [B, D] to the same, in float32."""
    import tensorflow as tf

    return tf.tanh(tf.cast(multiply(x, pooler, mode), tf.float32))


def mix_heads(scores: tf.Tensor, mix: tf.Tensor | None) -> tf.Tensor:
    """Makes every head's scores a weighted sum of all heads': [B, A, L, L] to the same."""
    import tensorflow as tf

    if mix is None:
        return scores
    shape = tf.shape(scores)
    flat = tf.reshape(scores, [shape[0], mix.shape[0], shape[2] * shape[3]])  # [B, A, L L]
    return tf.reshape(tf.matmul(mix, flat), shape)


def feed_forward(x: tf.Tensor, w: Layer, mode: Mode) -> tf.Tensor:
    """GELU of one projection, scaled by another where there is one, and projected back: x [N, D] to [N, D]."""
    hidden = multiply_fused(x, w.up, "GeluApproximate") if mode.frozen else gelu(multiply(x, w.up, mode))  # [N, F]
    if w.gate is not None:
        hidden *= multiply(x, w.gate, mode)  # [N, F]
    return multiply(hidden, w.down, mode)


def multiply(x: tf.Tensor, dense: Dense, mode: Mode) -> tf.Tensor:
    """x [N, inputs] times the kernel plus the bias: [N, outputs], in float32 but where the addition is fused."""
    import tensorflow as tf

    if mode.frozen:
        return multiply_fused(x, dense)
    x = tf.cast(x, mode.precision)
    product = tf.matmul(tf.cast(x, dense.kernel.dtype), dense.kernel)  # [N, outputs]
    return tf.nn.bias_add(tf.cast(product, tf.float32), dense.bias)


def gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form of GELU (arXiv 1606.08415), as x times a sigmoid, which takes the fewest passes over memory."""
    import tensorflow as tf

    c = 2 * math.sqrt(2 / math.pi)
    return x * tf.sigmoid(x * (c + c * 0.044715 * tf.square(x)))


def multiply_fused(x: tf.Tensor, dense: Dense, *more: str) -> tf.Tensor:
    """Matmul, bias and perhaps a GELU in one kernel of oneDNN, rounded once: [N, outputs] in the kernel's precision.

    TensorFlow would make this op of a matmul and the many ops of a GELU itself, but only where its arithmetic optimiser
    has not rearranged them before. It has no public function.
    """
    import tensorflow as tf
    from tensorflow.python.framework import op_def_library

    return op_def_library.apply_op(
        "_FusedMatMul",
        name="fused_matmul",
        a=tf.cast(x, dense.kernel.dtype),
        b=dense.kernel,
        args=[tf.cast(dense.bias, dense.kernel.dtype)],
        fused_ops=["BiasAdd", *more],
        epsilon=0.0,
        leakyrelu_alpha=0.0,
        transpose_a=False,
        transpose_b=False,
    )


def normalise(x: tf.Tensor, w: Norm, more: tf.Tensor | None = None) -> tf.Tensor:
    """Layer norm of x, or of x plus something of another precision: [N, D] to [N, D] in float32."""
    import tensorflow as tf

    if more is not None:
        x += tf.cast(more, tf.float32)
    centred = x - tf.reduce_mean(x, -1, keepdims=True)  # [N, D]
    variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)  # [N, 1]
    return centred * tf.math.rsqrt(variance + LAYER_NORM_EPSILON) * w.gamma + w.beta


def _is_pooled(choice: VectorChoice) -> bool:
    return choice.output in ("pooled_output", "default")


def _freeze(tensor: Any) -> Any:
    import tensorflow as tf

    return None if tensor is None else tf.constant(tensor.numpy())
