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
def _official_graph() -> Any:
    """The official encoder for inputs of any shape: called as it is, it would be traced again for each."""
    specs = {name: tf.TensorSpec([None, None], tf.int32, name=name) for name in INPUTS}
    return tf.function(official_encoder().__call__, input_signature=[specs], autograph=False)


@functools.cache
def official_preprocessor() -> Any:
    return tf.saved_model.load(PREPROCESSOR)


@functools.cache
def _official_tokenizer() -> Any:
    strings = tf.TensorSpec([None], tf.string)
    return tf.function(official_preprocessor().tokenize.__call__, input_signature=[strings], autograph=False)


def tokenize_together(texts: Sequence[str]) -> list[list[int]]:
    """Token ids of some texts, by the official preprocessor."""
    return _official_tokenizer()(tf.constant(texts, tf.string)).merge_dims(-2, -1).to_list()


@functools.cache
def official_tokens(text: str) -> tuple[int, ...]:
    """Token ids of one text, by the official preprocessor."""
    return tuple(tokenize_together([text])[0])


def official_pack(segments: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """The official preprocessor's three tensors `[1, length]` for one text, or one pair of them, alone."""
    return _pack(tuple(segments), length)


@functools.cache
def _pack(segments: tuple[str, ...], length: int) -> dict[str, np.ndarray]:
    preprocessor = official_preprocessor()
    tokens = [preprocessor.tokenize(tf.constant([segment])) for segment in segments]
    packed = preprocessor.bert_pack_inputs(tokens, seq_length=tf.constant(length))
    return {name: packed[name].numpy() for name in INPUTS}


def pack_alone(segments: Sequence[str], max_tokens: int) -> dict[str, np.ndarray]:
    """The official preprocessor's tensors for one text or pair: no longer than it is, nor than the limit."""
    return official_pack(segments, min(count_tokens(segments), max_tokens))


def count_tokens(segments: Sequence[str]) -> int:
    """Tokens of one text or pair with [CLS] and [SEP], by the official preprocessor."""
    return sum(len(official_tokens(segment)) for segment in segments) + 1 + len(segments)


def pack_ids(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Token ids between [CLS] and [SEP] as the encoder's three tensors `[1, len(ids) + 2]`."""
    row = np.array([[cls_id(), *ids, sep_id()]], np.int32)
    return dict(zip(INPUTS, (row, np.ones_like(row), np.zeros_like(row)), strict=True))


def vocabulary() -> list[str]:
    return Path(ENCODER, "assets/vocab.txt").read_text(encoding="utf-8").splitlines()


@functools.cache
def cls_id() -> int:
    return vocabulary().index("[CLS]")


@functools.cache
def sep_id() -> int:
    return vocabulary().index("[SEP]")


def official_outputs(packed: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Everything that the official encoder gives for one packed input, as NumPy; remembered."""
    return _outputs(*((packed[name].shape, packed[name].tobytes()) for name in INPUTS))


@functools.cache
def _outputs(*tensors: tuple[tuple[int, ...], bytes]) -> dict[str, Any]:
    arrays = (np.frombuffer(data, np.int32).reshape(shape) for shape, data in tensors)
    outputs = _official_graph()({name: tf.constant(array) for name, array in zip(INPUTS, arrays, strict=True)})
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
