"""The built-in encoder: its weights, its vocabulary, and its SavedModel.

The folder `builtin` holds weights and vocabulary, packed, and their model card. The SavedModel is made from them on the
machine that needs it, in a few seconds and without a download.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from pipeline.encoders.cache import cached_folder
from pipeline.encoders.export import FORMAT, export_encoder
from pipeline.encoders.packed import unpack_weights

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "builtin")
WEIGHTS_FILE = os.path.join(FOLDER, "weights.npz")
VOCABULARY_FILE = os.path.join(FOLDER, "vocabulary.txt")


def read_vocabulary(path: str) -> list[str]:
    """Returns word pieces, one a line of a file, in the order of their ids."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return file.read().removesuffix("\n").split("\n")


def default_vocabulary() -> list[str]:
    """Returns the built-in encoder's uncased word pieces, in the order of their ids."""
    return read_vocabulary(VOCABULARY_FILE)


def default_weights() -> dict[str, np.ndarray]:
    """Returns the built-in encoder's weights by official variable name; the same bits on every machine."""
    return unpack_weights(WEIGHTS_FILE)


def default_encoder() -> str:
    """Returns the folder of the built-in encoder's SavedModel, made at first use in the cache folder.

    Its name contains a hash of its content: a release with another encoder makes another folder.

    Raises:
      EncoderError: if the cache folder cannot be written to.
    """
    digest = hashlib.sha256(str(FORMAT).encode())
    for path in (VOCABULARY_FILE, WEIGHTS_FILE):
        with open(path, "rb") as file:
            digest.update(file.read())
    return cached_folder(
        f"default-encoder-{digest.hexdigest()[:12]}",
        lambda folder: export_encoder(default_weights(), default_vocabulary(), folder),
    )
