"""The talking-heads gated-GELU BERT as names and shapes of weights: what one must have, and whether these are one's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.errors import EncoderError

_LAYER = re.compile(r"transformer_scaffold(?:_(\d+))?/")


class Architecture(NamedTuple):
    """The sizes that follow from the weights' shapes."""

    layers: int
    width: int
    heads: int
    head_size: int
    feedforward: int
    vocabulary: int
    positions: int
    types: int = 2


def layer_name(number: int) -> str:
    """Returns the prefix of a layer's weights; the first has no number."""
    return f"transformer_scaffold_{number}" if number else "transformer_scaffold"


def weight_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns every weight's name and shape, in the order of the TF Hub module's variables."""
    d, heads, k, f = a.width, a.heads, a.head_size, a.feedforward

    def norm(name: str) -> dict:
        return {f"{name}/gamma": (d,), f"{name}/beta": (d,)}

    def dense(name: str, kernel: tuple, bias: tuple) -> dict:
        return {f"{name}/kernel": kernel, f"{name}/bias": bias}

    layer = {
        "self_attention/pre_softmax_weight": (heads, heads),
        "self_attention/post_softmax_weight": (heads, heads),
        **dense("self_attention/query", (d, heads, k), (heads, k)),
        **dense("self_attention/key", (d, heads, k), (heads, k)),
        **dense("self_attention/value", (d, heads, k), (heads, k)),
        **dense("self_attention/attention_output", (heads, k, d), (d,)),
        **dense("feedforward/intermediate_0", (d, f), (f,)),
        **dense("feedforward/gate_0", (d, f), (f,)),
        **dense("feedforward/output_0", (f, d), (d,)),
        **norm("feedforward/output_layer_norm_0"),
        **norm("self_attention_layer_norm"),
    }
    return {
        "word_embeddings/embeddings": (a.vocabulary, d),
        "position_embedding/embeddings": (a.positions, d),
        "type_embeddings/embeddings": (a.types, d),
        **norm("embeddings/layer_norm"),
        **{f"{layer_name(i)}/{name}": shape for i in range(a.layers) for name, shape in layer.items()},
        **dense("cls_transform", (d, d), (d,)),
    }


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Reads the sizes off the shapes of the weights, by official name, and checks that all weights fit.

    Raises:
      EncoderError: if weights are missing, left over or of another shape; the message names them.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != rank:
            found = f"has shape {list(shapes[name])}, not {rank} axes" if name in shapes else "is missing"
            raise EncoderError(f"the weights do not fit: {name} {found}")
        return shapes[name]

    vocabulary, width = shape("word_embeddings/embeddings", 2)
    positions, types = (shape(f"{table}/embeddings", 2)[0] for table in ("position_embedding", "type_embeddings"))
    _, heads, head_size = shape(f"{layer_name(0)}/self_attention/query/kernel", 3)
    feedforward = shape(f"{layer_name(0)}/feedforward/intermediate_0/kernel", 2)[1]
    numbers = (_LAYER.match(name) for name in shapes)
    layers = 1 + max(int(match[1] or 0) for match in numbers if match)
    found = Architecture(layers, width, heads, head_size, feedforward, vocabulary, positions, types)
    expected = weight_shapes(found)
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is unused" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {list(shapes[name])} instead of {list(sizes)}"
        for name, sizes in expected.items()
        if name in shapes and tuple(shapes[name]) != sizes
    ]
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise EncoderError(f"the weights do not fit {found}: {shown}")
    return found


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Numbers the layers from 0, whatever number the exporting process began with: given name -> official name."""
    matches = {name: _LAYER.match(name) for name in names}
    numbers = sorted({int(match[1] or 0) for match in matches.values() if match})
    return {
        name: f"{layer_name(numbers.index(int(match[1] or 0)))}/{name[match.end() :]}" if match else name
        for name, match in matches.items()
    }


def recognise_architecture(variables: Mapping[str, tuple]) -> Architecture | None:
    """The sizes of a SavedModel's encoder, or None if its variables are not exactly those of this architecture."""
    names = canonical_names(variables)
    try:
        return infer_architecture({names[name]: shape for name, shape in variables.items()})
    except EncoderError:
        return None
