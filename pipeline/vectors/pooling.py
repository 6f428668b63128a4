"""From an encoder's outputs to vectors, inside its graph: only the requested output is computed and copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.config import VectorChoice


def pool_outputs(outputs: Mapping[str, Any], mask: Any, choice: VectorChoice) -> Any:
    """Selects and pools one output.

    `mean` and `max` go over all tokens that are not padding, [CLS] and [SEP] included, as sentence encoders are
    commonly pooled (Reimers and Gurevych 2019, arXiv 1908.10084).

    Args:
      outputs: the encoder's named tensors.
      mask: int32 `[B, L]`, 1 for tokens, 0 for padding.
      choice: what to select.

    Returns:
      float32 `[B, D]`, or `[B, L, D]` for `tokens`.
    """
    import tensorflow as tf

    selected = outputs[choice.output]
    if choice.layer is not None:
        selected = selected[choice.layer]  # [B, L, D]
    return pool_tokens(tf.cast(selected, tf.float32), mask, choice.pooling)


def pool_tokens(tokens: Any, mask: Any, pooling: str) -> Any:
    """Pools float32 `[B, L, D]` to `[B, D]`; without a pooling, or for `tokens`, returns it unchanged."""
    import tensorflow as tf

    if pooling == "cls":
        return tokens[:, 0]  # [B, D]
    keep = tf.cast(mask, tf.float32)[:, :, tf.newaxis]  # [B, L, 1]
    if pooling == "mean":
        total = tf.reduce_sum(tf.where(keep > 0, tokens, 0.0), 1)  # [B, D]; NaN in padding times 0 would be NaN
        return total / tf.maximum(tf.reduce_sum(keep, 1), 1.0)  # [B, D]
    if pooling == "max":
        return tf.reduce_max(tf.where(keep > 0, tokens, -np.inf), 1)  # [B, D]
    return tokens
