"""Small models of kinds that are nobody's BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.support.official import save_module


def save_hashing_preprocessor(folder: Path, n_ids: int, can_pack: bool) -> str:
    """A preprocessor that is no WordPiece: words between blanks, hashed to ids; pads with 1 to 128 tokens."""

    def tokenize(texts: tf.Tensor) -> tf.RaggedTensor:
        words = tf.strings.split(texts, " ")
        return words.with_flat_values(5 + tf.strings.to_hash_bucket_fast(words.flat_values, n_ids - 5))

    def pack(segments: list[tf.RaggedTensor], length: Any) -> dict[str, tf.Tensor]:
        room = tf.cast(length, tf.int64) // len(segments) - 2
        parts = [tf.cast(segment[:, :room], tf.int32) for segment in segments]
        ends = [tf.fill([tf.shape(part)[0], 1], 3) for part in parts]
        starts = [tf.fill([tf.shape(part)[0], 1 - i], 2) for i, part in enumerate(parts)]
        full = [tf.concat(three, 1) for three in zip(starts, parts, ends, strict=True)]
        types = tf.concat([tf.zeros_like(part) + i for i, part in enumerate(full)], 1)
        ids = tf.concat(full, 1)
        shape = tf.stack([tf.constant(-1, tf.int64), tf.cast(length, tf.int64)])
        return {
            "input_word_ids": ids.to_tensor(1, shape=shape),
            "input_mask": tf.ones_like(ids).to_tensor(0, shape=shape),
            "input_type_ids": types.to_tensor(0, shape=shape),
        }

    strings = tf.TensorSpec([None], tf.string)
    call = tf.function(lambda texts: pack([tokenize(texts)], 128), input_signature=[strings])
    if not can_pack:
        return save_module(folder, call=call)
    spec = tf.RaggedTensorSpec([None, None], tf.int64)
    pack_any = tf.function(lambda inputs, seq_length: pack(inputs, seq_length))
    for n in (1, 2):
        pack_any.get_concrete_function([spec] * n, seq_length=tf.TensorSpec([], tf.int32))
    tokenizing = tf.function(tokenize, input_signature=[strings])
    return save_module(folder, call=call, tokenize=tokenizing, bert_pack_inputs=pack_any)


def save_text_encoder(folder: Path, named: bool, n_hashes: int = 4) -> str:
    """Strings to `[B, 1 + n_hashes]`: the length of each text and hashes of it."""

    def encode(texts: tf.Tensor) -> Any:
        sizes = tf.cast(tf.strings.length(texts), tf.float32)
        hashes = [tf.cast(tf.strings.to_hash_bucket_strong(texts, 97, [1, i]), tf.float32) for i in range(n_hashes)]
        vectors = tf.stack([sizes, *hashes], 1)
        return {"default": vectors, "other": vectors + 1} if named else vectors

    return save_module(folder, call=tf.function(encode, input_signature=[tf.TensorSpec([None], tf.string)]))
