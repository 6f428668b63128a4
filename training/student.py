"""The student: a talking-heads gated-GELU encoder that begins as the teacher without some of its layers.

The gated architecture contains the plain one: heads that are mixed by the identity stay separate, and a gate with a
kernel of zeros and a bias of ones leaves everything through. So nothing is lost at the start but the layers left out
and the pieces that the vocabulary lacks. The pooler begins as the identity.

One letter glossary: B batch, L tokens, N tokens of all rows together, D width, A heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import VectorChoice
from pipeline.encoders import fast
from pipeline.encoders.architecture import PLAIN, TALKING_HEADS, Architecture, infer_architecture, weight_shapes
from pipeline.encoders.mode import Mode
from pipeline.encoders.weights import arrange_weights
from pipeline.vectors.pooling import pool_tokens

if TYPE_CHECKING:
    import tensorflow as tf


# Weights that the teacher lacks: the last two parts of the name, and neutral initial values.
_NEW: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "self_attention/pre_softmax_weight": lambda shape: np.eye(*shape, dtype=np.float32),
    "self_attention/post_softmax_weight": lambda shape: np.eye(*shape, dtype=np.float32),
    "gate_0/kernel": lambda shape: np.zeros(shape, np.float32),
    "gate_0/bias": lambda shape: np.ones(shape, np.float32),
    "cls_transform/kernel": lambda shape: np.eye(*shape, dtype=np.float32),
    "cls_transform/bias": lambda shape: np.zeros(shape, np.float32),
}


def initial_student(
    teacher: Mapping[str, np.ndarray], pieces: Sequence[str], vocabulary: Sequence[str], layers: Sequence[int]
) -> dict[str, np.ndarray]:
    """Makes the student's weights before training, float32 by official name.

    Args:
      teacher: weights of a plain BERT by official name.
      pieces: the teacher's vocabulary.
      vocabulary: some of these pieces.
      layers: which of the teacher's layers, counted from 0.
    """
    given = infer_architecture({name: weight.shape for name, weight in teacher.items()})
    sizes = given._replace(layers=len(layers), vocabulary=len(vocabulary), family=TALKING_HEADS.name)
    number = {piece: i for i, piece in enumerate(pieces)}
    weights = {}
    for name, shape in weight_shapes(sizes).items():
        part = "/".join(name.split("/")[-2:])
        if part == "word_embeddings/embeddings":
            weights[name] = teacher[name][[number[piece] for piece in vocabulary]]
        elif part in _NEW:
            weights[name] = _NEW[part](shape)
        else:
            weights[name] = teacher[_teachers_name(name, layers)]
    return weights


def _teachers_name(name: str, layers: Sequence[int]) -> str:
    for own, theirs in enumerate(layers):
        prefix = TALKING_HEADS.layer_name(own) + "/"
        if name.startswith(prefix):
            name = f"{PLAIN.layer_name(theirs)}/{name.removeprefix(prefix)}"
    for part in ("up", "down", "forward_norm"):
        name = name.replace(f"/{getattr(TALKING_HEADS, part)}/", f"/{getattr(PLAIN, part)}/")
    return name


def make_forward(variables: Mapping[str, tf.Variable], a: Architecture) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """Makes the function from ids and mask, both int32 [B, L], to `pooled_output` and mean of tokens, both [B, D].

    It is the graph that embeds, and gradients go through it to the variables.
    """
    import tensorflow as tf

    mode = Mode()
    both = VectorChoice("pooled_output")  # needs all layers and the pooler

    def forward(ids: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        w = arrange_weights(lambda name: tf.convert_to_tensor(variables[name]), a, both, mode)
        assert w.pooler is not None
        x, rows = fast.run_layers(ids, mask, tf.zeros_like(ids), w, a, mode, first_only=False)  # [N, D]
        pooled = fast.pool_first(tf.gather(x, rows.first), w.pooler, mode)
        return pooled, pool_tokens(fast.spread(x, rows), mask, "mean")

    return forward
