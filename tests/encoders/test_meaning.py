"""The built-in encoder knows meaning from words: paraphrases come before look-alikes, in both of its outputs."""

from __future__ import annotations

import collections
import math
import re

import numpy as np
import pytest

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders.default import default_vocabulary, default_weights
from pipeline.encoders.export import export_encoder, initial_weights
from pipeline.search.embedder import Embedder

# A sentence, another that says nearly the same in other words, and one that shares its words.
CASES = [
    (
        "The doctor told him to give up smoking.",
        "His physician advised quitting cigarettes.",
        "The doctor told him to give a speech.",
    ),
    ("The movie was boring.", "I found the film dull.", "The movie was released."),
    (
        "She is afraid of flying.",
        "Going by aeroplane terrifies her.",
        "She is proud of flying the flag.",
    ),
    (
        "Where can I get something to eat?",
        "I am hungry, is there a restaurant nearby?",
        "Where can I get something to read?",
    ),
    (
        "The trial ended with a verdict of guilty.",
        "A jury convicted the defendant.",
        "The trial of the new drug ended with a party.",
    ),
    (
        "Loans got more expensive this year.",
        "The cost of borrowing money has risen.",
        "This year got more rain.",
    ),
    (
        "It rained heavily all night.",
        "There was a storm with a downpour until dawn.",
        "He snored heavily all night.",
    ),
    (
        "The recipe calls for two cups of flour.",
        "You need a lot of wheat meal to bake this.",
        "The nurse calls for two cups of tea.",
    ),
    (
        "The patient complained of a severe headache.",
        "Someone ill reported strong pain in his head.",
        "The patient teacher complained of severe noise.",
    ),
    (
        "The teacher praised her pupils.",
        "The instructor complimented the students.",
        "The teacher lost her keys.",
    ),
]
VECTORS = ["pooled_output", "sequence_output:mean"]

pytestmark = pytest.mark.numeric


def test_a_bag_of_words_takes_the_look_alike():
    for sentence, paraphrase, look_alike in CASES:
        assert overlap(sentence, look_alike) > overlap(sentence, paraphrase), sentence


def overlap(one: str, other: str) -> float:
    """The cosine between the counts of words."""
    a, b = (collections.Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    return sum(a[word] * b[word] for word in a) / math.sqrt(
        sum(n * n for n in a.values()) * sum(n * n for n in b.values())
    )


def embed_cases(vector: str, encoder: str = "") -> np.ndarray:
    """The vectors of all sentences, of length 1: [case, sentence or paraphrase or look-alike, D]."""
    config = EmbedConfig.from_flat({"vector": vector, "encoder": encoder, "normalize": True})
    return (
        Embedder(make_embedding_spec(config))
        .embed([text for case in CASES for text in case])
        .reshape(len(CASES), 3, -1)
    )


def margins(vectors: np.ndarray) -> np.ndarray:
    """How much nearer the paraphrase is than the look-alike, in cosine, for each case."""
    return np.einsum("cd,cd->c", vectors[:, 0], vectors[:, 1] - vectors[:, 2])


@pytest.mark.parametrize("vector", VECTORS)
def test_the_paraphrase_is_nearer(vector):
    found = margins(embed_cases(vector))
    assert found.min() > 0.02, dict(zip([case[0] for case in CASES], found.tolist(), strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("damage", ["untrained", "scrambled"])
def test_weights_without_meaning_would_be_noticed(damage, vector, tmp_path):
    vocabulary = default_vocabulary()
    if damage == "untrained":
        weights = initial_weights(2, 128, 4, len(vocabulary))
    else:
        weights = default_weights()
        rng = np.random.default_rng(0)
        weights["word_embeddings/embeddings"] = rng.permutation(weights["word_embeddings/embeddings"])
    export_encoder(weights, vocabulary, str(tmp_path / "encoder"))
    assert (margins(embed_cases(vector, str(tmp_path / "encoder"))) > 0).mean() < 0.5
