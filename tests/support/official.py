"""The official encoder and preprocessor, called directly: what a token and a vector should be.

`tests/reference` holds SavedModels that TensorFlow's own model library exported. Everything here asks those, or NumPy,
and never the code under test.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the preprocessor's ops

from tests.support.paths import ENCODER, PREPROCESSOR, REFERENCE

INPUTS = ("input_word_ids", "input_mask", "input_type_ids")


@functools.cache
def official_encoder() -> Any:
    return tf.saved_model.load(ENCODER)


@functools.cache
def official_preprocessor() -> Any:
    return tf.saved_model.load(PREPROCESSOR)


@functools.cache
def official_tokens(text: str) -> tuple[int, ...]:
    """Token ids of one text, by the official preprocessor."""
    return tuple(official_preprocessor().tokenize(tf.constant([text])).flat_values.numpy().tolist())


def official_pack(segments: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """The official preprocessor's three tensors `[1, length]` for one text, or one pair of them, alone."""
    preprocessor = official_preprocessor()
    tokens = [preprocessor.tokenize(tf.constant([segment])) for segment in segments]
    packed = preprocessor.bert_pack_inputs(tokens, seq_length=tf.constant(length))
    return {name: packed[name].numpy() for name in INPUTS}


def pack_ids(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Token ids between [CLS] and [SEP] as the encoder's three tensors `[1, len(ids) + 2]`."""
    row = np.array([[cls_id(), *ids, sep_id()]], np.int32)
    return dict(zip(INPUTS, (row, np.ones_like(row), np.zeros_like(row)), strict=True))


def vocabulary() -> list[str]:
    return Path(ENCODER, "assets/vocab.txt").read_text(encoding="utf-8").splitlines()


def cls_id() -> int:
    return vocabulary().index("[CLS]")


def sep_id() -> int:
    return vocabulary().index("[SEP]")


def official_outputs(packed: Mapping[str, np.ndarray], encoder: Any = None) -> dict[str, Any]:
    """Everything that the official encoder gives for one packed input, as NumPy."""
    outputs = (encoder or official_encoder())({name: tf.constant(value) for name, value in packed.items()})
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), outputs)


def expected_vector(packed: Mapping[str, np.ndarray], vector: str) -> np.ndarray:
    """What `--vector` promises for one packed input: `[D]`, or `[n_tokens, D]` for tokens, by plain loops."""
    outputs = official_outputs(packed)
    head, _, pooling = vector.partition(":")
    output, _, layer = head.partition("/")
    tensor = outputs[output][int(layer)] if layer else outputs[output]
    if not pooling:
        return tensor[0]
    real = [tensor[0, i] for i in range(tensor.shape[1]) if packed["input_mask"][0, i]]  # [CLS] and [SEP] are real
    if pooling == "cls":
        return real[0]
    if pooling == "mean":
        return sum(token.astype(np.float64) for token in real) / len(real)
    if pooling == "max":
        return functools.reduce(np.maximum, real)
    assert pooling == "tokens"
    return np.stack(real)


def golden_strings() -> list[bytes]:
    """The 230 hostile strings of the golden file, the last 10 of which are not UTF-8."""
    text = (REFERENCE / "golden_preprocess_v1000_strings.json").read_text(encoding="utf-8")
    return [bytes.fromhex(string) for string in json.loads(text)["strings_hex"]]


def golden_texts() -> list[str]:
    """Those of the golden strings that can be documents."""
    return [string.decode() for string in golden_strings()[:220]]


@functools.cache
def official_vector(text: str, max_tokens: int = 512, vector: str = "pooled_output") -> np.ndarray:
    """What `--vector` promises for a text of at most `max_tokens`, cut by the official preprocessor's tokens."""
    return expected_vector(pack_ids(official_tokens(text)[: max_tokens - 2]), vector)


def save_module(folder: Path, **attributes: Any) -> str:
    """Saves a SavedModel whose object has the given attributes; `call` becomes `__call__`."""
    module = tf.Module()
    for name, value in attributes.items():
        setattr(module, "__call__" if name == "call" else name, value)
    tf.saved_model.save(module, str(folder))
    return str(folder)
