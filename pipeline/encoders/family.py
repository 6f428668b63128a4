"""Recognising the talking-heads gated-GELU BERT by the names and shapes of its variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.saved_model import Shape

_LAYER = re.compile(r"^transformer_scaffold(?:_(\d+))?/")
_OUTER = (
    "word_embeddings/embeddings",
    "position_embedding/embeddings",
    "type_embeddings/embeddings",
    "embeddings/layer_norm/gamma",
    "embeddings/layer_norm/beta",
    "cls_transform/kernel",
    "cls_transform/bias",
)
_DENSE = (
    *(f"self_attention/{name}" for name in ("query", "key", "value", "attention_output")),
    *(f"feedforward/{name}" for name in ("intermediate_0", "gate_0", "output_0")),
)
_INNER = (
    "self_attention/pre_softmax_weight",
    "self_attention/post_softmax_weight",
    *(f"{name}/{leaf}" for name in _DENSE for leaf in ("kernel", "bias")),
    *(
        f"{name}/{leaf}"
        for name in ("self_attention_layer_norm", "feedforward/output_layer_norm_0")
        for leaf in ("gamma", "beta")
    ),
)


def canonical_names(names: list[str]) -> dict[str, str]:
    """Numbers the layers from 0, whatever number the exporting process began with: name -> `layer_3/...`."""
    numbers = sorted({int(match[1] or 0) for name in names if (match := _LAYER.match(name))})
    renamed = {}
    for name in names:
        match = _LAYER.match(name)
        renamed[name] = f"layer_{numbers.index(int(match[1] or 0))}/{name[match.end() :]}" if match else name
    return renamed


def recognise_family(variables: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The configuration of a talking-heads gated-GELU BERT, or None if the variables are not exactly those of one."""
    shapes = {new: variables[old] for old, new in canonical_names(list(variables)).items()}
    layers = len({name.split("/")[0] for name in shapes if name.startswith("layer_")})
    expected = {*_OUTER, *(f"layer_{i}/{name}" for i in range(layers) for name in _INNER)}
    if not layers or set(shapes) != expected:
        return None
    vocabulary_size, width = shapes["word_embeddings/embeddings"]
    return {
        "name": "talking_heads_ggelu_bert",
        "layers": layers,
        "width": width,
        "heads": shapes["layer_0/self_attention/query/kernel"][1],
        "feed_forward": shapes["layer_0/feedforward/gate_0/kernel"][1],
        "vocabulary_size": vocabulary_size,
        "positions": shapes["position_embedding/embeddings"][0],
    }
