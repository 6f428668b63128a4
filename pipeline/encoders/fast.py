"""The fast graph: our own graph of the known families, with the published module's numbers and less work.

Differences from the published graph: queries, keys and values come from one matmul; all dense layers are 2-D matmuls
over tokens; heads are mixed by a small matmul without transposing the scores; only the requested output is computed; if
that is the first token's, the last layer after its keys and values runs for that token only. On CPUs, padding is
removed between the rows for everything but attention itself, and dense layers and layer norms are single kernels of
oneDNN. On GPUs every layer is compiled by XLA, once for each shape of batches, as all layers share one function.

One letter glossary: B batch, L tokens, N tokens of all rows together, D width, A heads, K head size, F feed-forward.

Sources: post-layer-norm BERT, arXiv 1810.04805; talking heads, arXiv 2003.02436; gated GELU, arXiv 2002.05202.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config import VectorChoice
from pipeline.encoders.architecture import Architecture
from pipeline.encoders.export import LAYER_NORM_EPSILON, MASKED_LOGIT
from pipeline.encoders.mode import Mode
from pipeline.encoders.onednn import fused_dense, layer_norm
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.weights import Dense, Layer, Norm, Weights
from pipeline.vectors.pooling import pool_tokens

if TYPE_CHECKING:
    import tensorflow as tf

TOKEN_STEPS = 64  # numbers of tokens between a power of two and the next: at most 1/64 is padding


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
    first_only = choice.is_pooled_output or choice.pooling == "cls"

    def run(input_word_ids: tf.Tensor, input_mask: tf.Tensor, input_type_ids: tf.Tensor) -> tf.Tensor:
        x, rows = run_layers(input_word_ids, input_mask, input_type_ids, weights, a, mode, first_only)
        if weights.pooler is not None:
            return pool_first(x, weights.pooler, mode)
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
    rows = lay_out_rows(present, a, mode.packed)
    logit_mask = ((1.0 - present) * MASKED_LOGIT)[:, None, None, :]  # [B, 1, 1, L]
    x = embed_tokens(ids, types, rows, w, mode)  # [N, D]
    for i, layer in enumerate(w.layers):
        x = run_layer(x, logit_mask, rows, layer, first=first_only and i + 1 == len(w.layers))
    return x, rows


class Rows(NamedTuple):
    """The positions of a batch's tokens, and of each of their heads for attention.

    Attributes:
      shape: B and L.
      first: [B] which of the N computed tokens is a row's first.
      kept: [N] which of the B x L places are computed, or None for all, as are the next three.
      slots: [B, L] which of the N computed tokens stands in a place; 0 in places without one.
      to_heads: [3, B, A, L] where attention finds its queries, keys and values in [N x 3 x A, K].
      to_tokens: [N, A] where the tokens find their context in [B x A x L, K].
    """

    shape: tf.Tensor
    first: tf.Tensor
    kept: tf.Tensor | None = None
    slots: tf.Tensor | None = None
    to_heads: tf.Tensor | None = None
    to_tokens: tf.Tensor | None = None


def lay_out_rows(mask: tf.Tensor, a: Architecture, packed: bool) -> Rows:
    """Finds the tokens that must be computed: all, or those that are not padding.

    The first token of a row is always computed. So is a whole row in which no token may be attended to, because its
    softmax goes over all of them.
    """
    import tensorflow as tf

    shape = tf.shape(mask)
    if not packed:
        return Rows(shape, tf.range(shape[0]) * shape[1])
    length = shape[1]
    blank = tf.logical_not(tf.reduce_any(mask > 0, 1, keepdims=True))  # [B, 1]
    keep = (mask > 0) | blank | (tf.range(length) == 0)  # [B, L]
    flat = tf.reshape(keep, [-1])  # [B L]
    kept = tf.cast(tf.where(flat)[:, 0], tf.int32)  # [number of tokens]
    kept = tf.pad(kept, [[0, round_up_tokens(tf.size(kept)) - tf.size(kept)]])  # [N]: the first token again and again
    slots = tf.reshape(tf.where(flat, tf.cumsum(tf.cast(flat, tf.int32)) - 1, 0), shape)  # [B, L]
    heads = tf.range(a.heads)  # [A]
    part = tf.range(3)[:, None, None, None] * a.heads + heads[:, None]  # [3, 1, A, 1]
    to_heads = slots[:, None, :] * (3 * a.heads) + part  # [3, B, A, L]
    row, place = kept // length, kept % length  # [N] each
    to_tokens = ((row * a.heads)[:, None] + heads) * length + place[:, None]  # [N, A]
    return Rows(shape, slots[:, 0], kept, slots, to_heads, to_tokens)


def round_up_tokens(n: tf.Tensor) -> tf.Tensor:
    """Rounds n up to one of 64 numbers between a power of two and the next.

    oneDNN compiles its kernels for each new number of tokens and keeps them, some 60 kB each: 300 kB for a graph.
    Without rounding, thousands of packed batches with different numbers of tokens would fill the memory.
    """
    import tensorflow as tf

    steps = tf.constant([1 << i for i in range(24)])
    step = tf.reduce_max(tf.where(steps * TOKEN_STEPS <= n, steps, 1))
    return (n + step - 1) // step * step


def spread(x: tf.Tensor, rows: Rows) -> tf.Tensor:
    """Puts tokens [N, D] back into their places [B, L, D]; values in places of padding have no meaning."""
    import tensorflow as tf

    if rows.slots is not None:
        return tf.gather(x, rows.slots)
    return tf.reshape(x, tf.concat([rows.shape, [x.shape[-1]]], 0))


def split_heads(qkv: tf.Tensor, rows: Rows, a: Architecture) -> tf.Tensor:
    """Puts the tokens' queries, keys and values [N, 3D] where attention reads them: [3, B, A, L, K]."""
    import tensorflow as tf

    if rows.to_heads is not None:
        return tf.gather(tf.reshape(qkv, [-1, a.head_size]), rows.to_heads)
    qkv = tf.reshape(qkv, [rows.shape[0], rows.shape[1], 3, a.heads, a.head_size])
    return tf.transpose(qkv, [2, 0, 3, 1, 4])


def join_heads(context: tf.Tensor, rows: Rows, a: Architecture) -> tf.Tensor:
    """Puts the heads of a token side by side: [B, A, L, K] to [N, D]."""
    import tensorflow as tf

    if rows.to_tokens is not None:
        context = tf.gather(tf.reshape(context, [-1, a.head_size]), rows.to_tokens)  # [N, A, K]
    else:
        context = tf.transpose(context, [0, 2, 1, 3])  # [B, L, A, K]
    return tf.reshape(context, [-1, a.heads * a.head_size])


def embed_tokens(ids: tf.Tensor, types: tf.Tensor, rows: Rows, w: Weights, mode: Mode) -> tf.Tensor:
    """Adds up the embeddings of words, positions and types and normalises: ids and types [B, L] int32 to [N, D]."""
    import tensorflow as tf

    places = tf.broadcast_to(tf.range(rows.shape[1]), rows.shape)  # [B, L]
    parts = [tf.reshape(part, [-1]) for part in (ids, places, types)]
    if rows.kept is not None:
        parts = [tf.gather(part, rows.kept) for part in parts]
    ids, places, types = parts  # [N] each
    x = tf.gather(w.words, ids) + tf.gather(w.positions, places)  # [N, D]
    x += tf.one_hot(types, w.types.shape[0]) @ w.types  # a type out of range adds nothing
    return normalise(x, w.norm, mode)


def forward_layer(
    x: tf.Tensor, logit_mask: tf.Tensor, rows: Rows, w: Layer, a: Architecture, mode: Mode, first: bool
) -> tf.Tensor:
    """One layer: x [N, D] to [N, D], or to [B, D] for the first tokens alone."""
    import tensorflow as tf

    rows = rows._replace(shape=tf.gather(tf.shape(logit_mask), [0, 3]))  # XLA must know it, and knows no arguments
    context = attend(x, logit_mask, rows, w, a, mode, first)  # [N, D] or [B, D], like all that follows
    if first:
        x = tf.gather(x, rows.first)  # [B, D]
    x = normalise(multiply_and_add(context, w.attended, x, mode), w.attended_norm, mode)
    return normalise(multiply_and_add(feed_forward(x, w, mode), w.down, x, mode), w.norm, mode)


def attend(
    x: tf.Tensor, logit_mask: tf.Tensor, rows: Rows, w: Layer, a: Architecture, mode: Mode, first: bool
) -> tf.Tensor:
    """Multi-head attention, whose heads are mixed before and after the softmax where there are weights for it.

    On GPUs, everything between the matmuls of the scores and of the context is float32, which costs nothing with XLA.
    On CPUs it is in the precision of these two matmuls: they are a few percent of the work, and rounding here costs
    more accuracy than elsewhere.

    Returns:
      The context of all tokens [N, D], or of the first ones [B, D].
    """
    import tensorflow as tf

    query, key, value = tf.unstack(tf.cast(split_heads(multiply(x, w.qkv, mode), rows, a), mode.attention))
    if first:
        query = query[:, :, :1]  # [B, A, 1, K]
    scores = tf.matmul(query, key, transpose_b=True)  # [B, A, L (query), L]
    if mode.compiled:
        scores = tf.cast(scores, tf.float32)
    scores = mix_heads(scores, w.mix_before) + tf.cast(logit_mask, scores.dtype)  # [B, A, L, L]
    shares = mix_heads(tf.nn.softmax(scores), w.mix_after)  # [B, A, L, L], may be negative
    context = tf.matmul(tf.cast(shares, value.dtype), value)  # [B, A, L, K]
    if first:
        return tf.reshape(context, [-1, a.heads * a.head_size])  # [B, D]
    return join_heads(context, rows, a)


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
    return tf.reshape(tf.matmul(tf.cast(mix, flat.dtype), flat), shape)


def feed_forward(x: tf.Tensor, w: Layer, mode: Mode) -> tf.Tensor:
    """GELU of one projection, scaled by another where there is one: x [N, D] to [N, F], before the projection back."""
    import tensorflow as tf

    x = tf.cast(x, mode.precision)  # once for both
    hidden = multiply(x, w.up, mode, activate=True)
    return hidden if w.gate is None else hidden * multiply(x, w.gate, mode)


def multiply(
    x: tf.Tensor, dense: Dense, mode: Mode, activate: bool = False, residual: tf.Tensor | None = None
) -> tf.Tensor:
    """x [N, inputs] times the kernel plus the bias, and the GELU of that or its sum with a residual: [N, outputs].

    The result, like the residual, is in float32, but in the kernel's precision where that is one fused kernel.
    """
    import tensorflow as tf

    x = tf.cast(tf.cast(x, mode.precision), dense.kernel.dtype)
    if mode.fused:
        return fused_dense(x, dense.kernel, dense.bias, activate, residual, mode.laid_out)
    product = tf.cast(tf.matmul(x, dense.kernel), tf.float32)  # [N, outputs]
    product = tf.nn.bias_add(product, dense.bias)
    if activate:
        return gelu(product)
    return product if residual is None else residual + product


def multiply_and_add(x: tf.Tensor, dense: Dense, residual: tf.Tensor, mode: Mode) -> tf.Tensor:
    """The same of x [N, inputs] with a residual [N, D] added: float32 [N, D], whatever the precision."""
    import tensorflow as tf

    if mode.fused and dense.kernel.dtype != residual.dtype:
        return residual + tf.cast(multiply(x, dense, mode), residual.dtype)
    return multiply(x, dense, mode, residual=residual)


def gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form of GELU (arXiv 1606.08415), as x times a sigmoid, which takes the fewest passes over memory."""
    import tensorflow as tf

    c = 2 * math.sqrt(2 / math.pi)
    return x * tf.sigmoid(x * (c + c * 0.044715 * tf.square(x)))


def normalise(x: tf.Tensor, w: Norm, mode: Mode) -> tf.Tensor:
    """Layer norm of x [N, D] in float32."""
    import tensorflow as tf

    if mode.fused:
        return layer_norm(x, w.gamma, w.beta, LAYER_NORM_EPSILON)
    centred = x - tf.reduce_mean(x, -1, keepdims=True)  # [N, D]
    variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)  # [N, 1]
    return centred * tf.math.rsqrt(variance + LAYER_NORM_EPSILON) * w.gamma + w.beta
