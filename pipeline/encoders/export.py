"""Writes BERT encoders, with talking heads and gated GELU or plain ones, as SavedModels with the interface of TF Hub.

In order: seeded values for the weights (`initial_weights`), the forward pass (`encode` and the functions before it),
the SavedModel around it (`export_encoder`). Names and shapes of the weights are in `architecture`.

One letter glossary, also used with einsum in lower case: B batch, L tokens (Q where they query), D width, A heads,
K head size, F feed-forward, V vocabulary, P positions. All numbers are float32.

Sources: post-layer-norm BERT, arXiv 1810.04805; talking heads, arXiv 2003.02436; gated GELU, arXiv 2002.05202; the tanh
form of GELU, arXiv 1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoders.architecture import (
    FAMILIES,
    TALKING_HEADS,
    Architecture,
    Family,
    infer_architecture,
    weight_shapes,
)
from pipeline.encoders.saved_model import TOKEN_INPUTS
from pipeline.encoders.saving import check_vocabulary, new_folder, saveable, vocabulary_file
from pipeline.errors import EncoderError

if TYPE_CHECKING:
    import tensorflow as tf

    Weights = Mapping[str, tf.Tensor]  # or variables
    Dropout = Callable[[tf.Tensor], tf.Tensor]

FORMAT = 1  # part of the names of cached encoders: raise it when the export of the same weights changes
DROPOUT = 0.1
LAYER_NORM_EPSILON = 1e-12
MASKED_LOGIT = -1e9


def initial_weights(
    layers: int, width: int, heads: int, vocabulary_size: int, positions: int = 512, seed: int = 0
) -> dict[str, np.ndarray]:
    """Makes seeded, untrained weights, float32 by official name, with which texts differ in every output.

    BERT's own initial values (0.02 everywhere) give even attention, and all texts nearly the same pooled output. These
    give selective attention, mixed heads and biases that matter. They are uniform rather than normal: only exactly
    rounded operations are used, so that every machine makes the same bits.

    Args:
      width: D, a multiple of `heads`; F is 4 D.
      positions: P, the most tokens of an input.
      seed: weight i is drawn from PCG64([seed, i]).

    Raises:
      EncoderError: if the width is not a multiple of the heads.
    """
    if width % heads:
        raise EncoderError(f"a width of {width} is not a multiple of {heads} heads; use a multiple of {heads}")
    sizes = Architecture(layers, width, heads, width // heads, 4 * width, vocabulary_size, positions)
    weights = {}
    for i, (name, shape) in enumerate(weight_shapes(sizes).items()):
        uniform = np.random.Generator(np.random.PCG64([seed, i])).random(shape, dtype=np.float32)
        weights[name] = (uniform - np.float32(0.5)) * np.float32(math.sqrt(12) * _deviation(name, shape))
        if name.endswith("gamma"):
            weights[name] += np.float32(1)
        if name.endswith("_softmax_weight"):  # mostly its own head, so that every head has an effect
            weights[name] += np.float32(0.75) * np.eye(heads, dtype=np.float32)
    return weights


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a weight's initial values, such that a sum over its inputs stays near 1."""
    if name.startswith("word_embeddings"):
        return 0.08
    if name.endswith(("embeddings", "gamma", "beta", "bias")):  # less than the words, which must dominate the positions
        return 0.04
    if name.endswith("_softmax_weight"):
        return 0.5 / math.sqrt(shape[0])
    if name.endswith(("query/kernel", "key/kernel")):  # logits with a deviation of 2: selective attention
        return math.sqrt(2 / shape[0])
    fan_in = shape[0] * shape[1] if "attention_output" in name else shape[0]
    return 1 / math.sqrt(fan_in)


def scoped(weights: Weights, prefix: str) -> Weights:
    """Returns the weights below a prefix, by the rest of their names."""
    return {name[len(prefix) + 1 :]: weight for name, weight in weights.items() if name.startswith(prefix + "/")}


def layer_norm(w: Weights, x: tf.Tensor) -> tf.Tensor:
    """Shifts and scales each vector of x [B, L, D] to mean 0 and variance 1, then by beta and gamma."""
    import tensorflow as tf

    centred = x - tf.reduce_mean(x, -1, keepdims=True)  # [B, L, D]
    variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)  # [B, L, 1]
    return centred * tf.math.rsqrt(variance + LAYER_NORM_EPSILON) * w["gamma"] + w["beta"]  # [B, L, D]


def embed(w: Weights, ids: tf.Tensor, types: tf.Tensor) -> tf.Tensor:
    """Adds up the embeddings of words, positions and types (ids and types [B, L] int32) and normalises: [B, L, D]."""
    import tensorflow as tf

    type_table = w["type_embeddings/embeddings"]  # [types, D]
    x = tf.gather(w["word_embeddings/embeddings"], ids)  # [B, L, D]
    x += w["position_embedding/embeddings"][: tf.shape(ids)[1]]  # [L, D]
    x += tf.einsum("blt,td->bld", tf.one_hot(types, type_table.shape[0]), type_table)  # out of range: adds nothing
    return layer_norm(scoped(w, "embeddings/layer_norm"), x)


def attend(w: Weights, x: tf.Tensor, mask: tf.Tensor, dropout: Dropout) -> tf.Tensor:
    """Attention; heads are mixed before and after the softmax where there are weights for that: [B, L, D] to the same.

    The mask, [B, L] float, is 1 for tokens that may be attended to and 0 for padding.
    """
    import tensorflow as tf

    def heads(name: str) -> tf.Tensor:
        return tf.einsum("bld,dak->blak", x, w[f"{name}/kernel"]) + w[f"{name}/bias"]  # [B, L, A, K]

    def mix(scores: tf.Tensor, name: str) -> tf.Tensor:
        if name not in w:
            return scores
        return tf.einsum("baql,am->bmql", scores, w[name])  # [B, A, Q, L]; m are the heads that listen

    query, key, value = heads("query"), heads("key"), heads("value")  # [B, L, A, K]
    logits = tf.einsum("bqak,blak->baql", query, key) * (1 / math.sqrt(key.shape[-1]))  # [B, A, Q, L]
    logits = mix(logits, "pre_softmax_weight") + (1.0 - mask)[:, None, None, :] * MASKED_LOGIT  # [B, A, Q, L]
    shares = dropout(mix(tf.nn.softmax(logits), "post_softmax_weight"))  # [B, A, Q, L], may be negative
    context = tf.einsum("baql,blak->bqak", shares, value)  # [B, L, A, K]
    return tf.einsum("blak,akd->bld", context, w["attention_output/kernel"]) + w["attention_output/bias"]  # [B, L, D]


def feed_forward(w: Weights, x: tf.Tensor, family: Family) -> tf.Tensor:
    """GELU of one projection of x [B, L, D], which scales another, linear one where there is one: [B, L, D]."""
    import tensorflow as tf

    def dense(y: tf.Tensor, name: str) -> tf.Tensor:
        return tf.einsum("bli,io->blo", y, w[f"{name}/kernel"]) + w[f"{name}/bias"]

    hidden = tf.nn.gelu(dense(x, family.up), approximate=True)  # [B, L, F]
    if family.gate:
        hidden *= dense(x, family.gate)  # [B, L, F]
    return dense(hidden, family.down)  # [B, L, D]


def encode(
    weights: Weights, inputs: Mapping[str, tf.Tensor], training: bool = False, family: Family = TALKING_HEADS
) -> dict[str, Any]:
    """Runs the encoder.

    Args:
      weights: tensors or variables by the family's official names.
      inputs: `input_word_ids`, `input_mask`, `input_type_ids`, each [B, L] int32.
      training: use dropout.

    Returns:
      `pooled_output`, also as `default`, [B, D]; `encoder_outputs`, a list with [B, L, D] for every layer, the last of
      which is `sequence_output`. Rows of padding have no meaning.
    """
    import tensorflow as tf

    def dropout(x: tf.Tensor) -> tf.Tensor:
        return tf.nn.dropout(x, DROPOUT) if training else x

    mask = tf.cast(inputs["input_mask"], tf.float32)  # [B, L]
    x = dropout(embed(weights, inputs["input_word_ids"], inputs["input_type_ids"]))  # [B, L, D]
    outputs: list[tf.Tensor] = []
    while w := scoped(weights, family.layer_name(len(outputs))):
        attended = dropout(attend(scoped(w, "self_attention"), x, mask, dropout))  # [B, L, D]
        x = layer_norm(scoped(w, "self_attention_layer_norm"), x + attended)  # [B, L, D]
        forward = dropout(feed_forward(w, x, family))  # [B, L, D]
        x = layer_norm(scoped(w, family.forward_norm), x + forward)  # [B, L, D]
        outputs.append(x)
    pooler = scoped(weights, family.pooler)
    pooled = tf.tanh(x[:, 0] @ pooler["kernel"] + pooler["bias"])  # [B, D]
    return {"pooled_output": pooled, "default": pooled, "sequence_output": x, "encoder_outputs": outputs}


def export_encoder(
    weights: Mapping[str, np.ndarray], vocabulary: Sequence[str], folder: str, *, lower_case: bool = True
) -> None:
    """Writes an encoder as a SavedModel; the folder appears only when it is complete.

    Args:
      weights: arrays by official variable name, with or without the `:0` of TensorFlow; all sizes follow from them.
      vocabulary: one word piece per row of the word embeddings, for `.vocab_file`.
      folder: local path to create.
      lower_case: whether the vocabulary is for uncased text, for `.do_lower_case`.

    Raises:
      EncoderError: if weights or vocabulary do not fit, or the folder exists.
    """
    import tensorflow as tf

    weights = {name.removesuffix(":0"): np.asarray(weight, np.float32) for name, weight in weights.items()}
    architecture = infer_architecture({name: np.shape(weight) for name, weight in weights.items()})
    family = FAMILIES[architecture.family]
    check_vocabulary(vocabulary)
    if len(vocabulary) != (n_rows := architecture.vocabulary):
        raise EncoderError(f"{len(vocabulary)} pieces do not fit {n_rows} word embeddings; give one piece for each")
    variables = {name: tf.Variable(weights[name], name=name) for name in weight_shapes(architecture)}

    def call(inputs: dict[str, tf.Tensor], training: bool = False, mask: None = None) -> dict[str, Any]:
        return encode(variables, inputs, training, family)

    def serve(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        # The modules on TF Hub were exported by Keras, which named their outputs so, in the order of their sorted keys.
        flat = tf.nest.flatten(encode(variables, inputs, family=family))
        return {f"{family.signature}_{i}" if i else family.signature: tensor for i, tensor in enumerate(flat)}

    specs = {name: tf.TensorSpec([None, None], tf.int32, name=name) for name in TOKEN_INPUTS}
    called, served = tf.function(call, autograph=False), tf.function(serve, autograph=False)
    for training in (True, False):
        called.get_concrete_function(specs, training, None)
    do_lower_case = tf.Variable(lower_case, trainable=False)
    with new_folder(folder) as temporary, vocabulary_file(vocabulary) as path:
        encoder = saveable(
            __call__=called,
            variables=[*variables.values(), do_lower_case],
            trainable_variables=list(variables.values()),
            regularization_losses=[],
            vocab_file=tf.saved_model.Asset(path),
            do_lower_case=do_lower_case,
        )
        tf.saved_model.save(encoder, temporary, {"serving_default": served.get_concrete_function(**specs)})
