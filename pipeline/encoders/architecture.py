"""The families of BERT encoders, as names and shapes of weights, and how weights are recognised as one of them.

Both families come from TensorFlow's model library. They differ in two parts, attention and feed-forward, and in names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.errors import EncoderError


class Family(NamedTuple):
    """What differs between families.

    Attributes:
      name: stands in fingerprints.
      layer: the prefix of a layer's weights, up to its number.
      first_is_bare: whether the first layer goes without a number.
      talks: whether heads are mixed before and after the softmax (talking heads) or not (multi-head attention).
      up: name of the feed-forward's first projection, which goes through GELU.
      gate: name of the linear projection that the GELU scales (gated GELU), or "" (one dense layer).
      down: name of the projection back.
      forward_norm: name of the normalisation after the feed-forward.
      pooler: name of the dense layer over the first token.
      signature: what the module's serving signature calls its outputs.
    """

    name: str
    layer: str
    first_is_bare: bool
    talks: bool
    up: str
    gate: str
    down: str
    forward_norm: str
    pooler: str
    signature: str

    def layer_name(self, number: int) -> str:
        """The prefix of a layer's weights, counted from 0."""
        return self.layer if self.first_is_bare and number == 0 else f"{self.layer}_{number}"


TALKING_HEADS = Family(
    name="talking_heads_ggelu_bert",
    layer="transformer_scaffold",
    first_is_bare=True,
    talks=True,
    up="feedforward/intermediate_0",
    gate="feedforward/gate_0",
    down="feedforward/output_0",
    forward_norm="feedforward/output_layer_norm_0",
    pooler="cls_transform",
    signature="encoder_scaffold",
)
PLAIN = Family(
    name="bert",
    layer="transformer/layer",
    first_is_bare=False,
    talks=False,
    up="intermediate",
    gate="",
    down="output",
    forward_norm="output_layer_norm",
    pooler="pooler_transform",
    signature="bert_encoder",
)
FAMILIES = {family.name: family for family in (TALKING_HEADS, PLAIN)}
_LAYER = {family: re.compile(rf"{re.escape(family.layer)}(?:_(\d+))?/") for family in FAMILIES.values()}


class Architecture(NamedTuple):
    """A family and the sizes that follow from the weights' shapes."""

    layers: int
    width: int
    heads: int
    head_size: int
    feedforward: int
    vocabulary: int
    positions: int
    types: int = 2
    family: str = TALKING_HEADS.name


def text_flops(a: Architecture, n_tokens: int) -> float:
    """FLOPs of one input, a multiply-add being two, by the formula of its architecture."""
    family = FAMILIES[a.family]
    inner = a.heads * a.head_size
    dense = 8 * a.width * inner + (6 if family.gate else 4) * a.width * a.feedforward
    per_key = 4 * inner + (4 * a.heads**2 if family.talks else 0)  # scores and context; both mixes
    return float(a.layers * n_tokens * (dense + per_key * n_tokens) + 2 * a.width**2)


def weight_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns every weight's name and shape, in the order of the variables of the family's modules on TF Hub."""
    d, heads, k, f = a.width, a.heads, a.head_size, a.feedforward
    family = FAMILIES[a.family]

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}/gamma": (d,), f"{name}/beta": (d,)}

    def dense(name: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"{name}/kernel": kernel, f"{name}/bias": bias}

    mixing = {f"self_attention/{place}_softmax_weight": (heads, heads) for place in ("pre", "post")}
    attention_norm = norm("self_attention_layer_norm")
    layer = {
        **(mixing if family.talks else {}),
        **dense("self_attention/query", (d, heads, k), (heads, k)),
        **dense("self_attention/key", (d, heads, k), (heads, k)),
        **dense("self_attention/value", (d, heads, k), (heads, k)),
        **dense("self_attention/attention_output", (heads, k, d), (d,)),
        **({} if family.gate else attention_norm),
        **dense(family.up, (d, f), (f,)),
        **(dense(family.gate, (d, f), (f,)) if family.gate else {}),
        **dense(family.down, (f, d), (d,)),
        **norm(family.forward_norm),
        **(attention_norm if family.gate else {}),
    }
    return {
        "word_embeddings/embeddings": (a.vocabulary, d),
        "position_embedding/embeddings": (a.positions, d),
        "type_embeddings/embeddings": (a.types, d),
        **norm("embeddings/layer_norm"),
        **{f"{family.layer_name(i)}/{name}": shape for i in range(a.layers) for name, shape in layer.items()},
        **dense(family.pooler, (d, d), (d,)),
    }


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Infers the family and the sizes from the weights, by official name, and checks that all weights fit.

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
    family = next((f for f in FAMILIES.values() if any(map(_LAYER[f].match, shapes))), TALKING_HEADS)
    first = family.layer_name(0)
    _, heads, head_size = shape(f"{first}/self_attention/query/kernel", 3)
    feedforward = shape(f"{first}/{family.up}/kernel", 2)[1]
    numbers = (_LAYER[family].match(name) for name in shapes)
    layers = 1 + max(int(match[1] or 0) for match in numbers if match)
    found = Architecture(layers, width, heads, head_size, feedforward, vocabulary, positions, types, family.name)
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
    """Maps given names to official names, with layers numbered from 0; exports may begin with another number."""
    canonical = {name: name for name in names}
    for family, pattern in _LAYER.items():
        matches = {name: match for name in canonical if (match := pattern.match(name))}
        numbers = sorted({int(match[1] or 0) for match in matches.values()})
        for name, match in matches.items():
            place = numbers.index(int(match[1] or 0))
            canonical[name] = f"{family.layer_name(place)}/{name[match.end() :]}"
    return canonical


def recognise_architecture(variables: Mapping[str, tuple[int, ...]]) -> Architecture | str:
    """The architecture of a SavedModel's encoder, or why its variables are not exactly those of a known family."""
    names = canonical_names(variables)
    try:
        return infer_architecture({names[name]: shape for name, shape in variables.items()})
    except EncoderError as error:
        return str(error)
