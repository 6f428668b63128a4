"""The built-in encoder, the one spot where its weights and its vocabulary come from.

It is small enough to be made on the machine that needs it, in a few seconds and without a download.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from pipeline.cache import cached_folder
from pipeline.encoders.export import FORMAT, export_encoder, initial_weights

IS_TRAINED = False
DEFAULT_NOTE = (
    "the built-in encoder is untrained: neighbours share words at best, not meaning; "
    "embeam embed --encoder=... takes a trained one"
)
LAYERS, WIDTH, HEADS, SEED = 2, 128, 4, 20031
VOCABULARY_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vocabulary.txt")


def default_vocabulary() -> list[str]:
    """Returns the built-in encoder's 8000 uncased word pieces, in the order of their ids."""
    with open(VOCABULARY_FILE, encoding="utf-8", newline="\n") as file:
        return file.read().removesuffix("\n").split("\n")


def default_weights() -> dict[str, np.ndarray]:
    """Returns the built-in encoder's weights by official variable name; the same bits on every machine."""
    return initial_weights(LAYERS, WIDTH, HEADS, len(default_vocabulary()), seed=SEED)


def default_encoder() -> str:
    """Returns the folder of the built-in encoder's SavedModel, made at first use in the cache folder.

    Its name holds a hash of all that goes into it: a release with another encoder makes another folder.

    Raises:
      EncoderError: if the cache folder cannot be written to.
    """
    weights, vocabulary = default_weights(), default_vocabulary()
    digest = hashlib.sha256("\n".join([str(FORMAT), *vocabulary]).encode())
    for name, weight in weights.items():
        digest.update(f"\n{name} {weight.shape} ".encode() + weight.tobytes())
    return cached_folder(
        f"default-encoder-{digest.hexdigest()[:12]}", lambda folder: export_encoder(weights, vocabulary, folder)
    )
