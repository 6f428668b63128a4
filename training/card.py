"""The model card of the built-in encoder: description, training data, scores and weaknesses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.encoders.architecture import infer_architecture
from training.distil import Recipe
from training.scores import BAG, NAMES, Scores, format_scores

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model_card.md")


def write_card(
    folder: str,
    weights: Mapping[str, np.ndarray],
    layers: Sequence[int],
    recipe: Recipe,
    counts: tuple[int, int],
    scores: Mapping[str, Scores],
) -> None:
    """Writes `MODEL_CARD.md` beside the weights."""
    sizes = infer_architecture({name: weight.shape for name, weight in weights.items()})
    megabytes = os.path.getsize(os.path.join(folder, "weights.npz")) / 1e6
    with open(TEMPLATE, encoding="utf-8") as file:
        template = file.read()
    text = template.format(
        layers=sizes.layers,
        width=sizes.width,
        heads=sizes.heads,
        feedforward=sizes.feedforward,
        positions=sizes.positions,
        vocabulary=sizes.vocabulary,
        parameters=sum(weight.size for weight in weights.values()),
        megabytes=megabytes,
        taken=", ".join(str(layer + 1) for layer in layers),
        n_sentences=counts[0],
        n_passages=counts[1],
        recipe=recipe,
        scores=format_scores(scores),
        verdict=compare_with_bag(scores),
    )
    with open(os.path.join(folder, "MODEL_CARD.md"), "w", encoding="utf-8") as file:
        file.write(text)


def compare_with_bag(scores: Mapping[str, Scores]) -> str:
    """The columns in which the bag of tokens is better than all outputs of the encoder in float32."""
    own = [found for name, found in scores.items() if name.endswith("float32")]
    bag = scores[BAG]
    better = [NAMES[field] for field in Scores._fields if getattr(bag, field) > max(getattr(s, field) for s in own)]
    if not better:
        return "The bag of tokens is worse in every column."
    return f"**The bag of tokens is still better here: {', '.join(better)}.**"
