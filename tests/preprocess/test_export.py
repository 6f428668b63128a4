"""The exported preprocessor against the official one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the preprocessor's ops

from pipeline.encoders.saved_model import TOKEN_INPUTS as INPUTS
from pipeline.preprocess.export import export_preprocessor, trimmed_lengths
from tests.support.exports import SPECIAL, read_vocabulary
from tests.support.paths import REFERENCE


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("preprocessor") / "tiny")
    export_preprocessor(read_vocabulary(), folder)
    return tf.saved_model.load(folder)


class TestPreprocessor:
    golden = np.load(REFERENCE / "golden_preprocess_v1000.npz")
    strings = [
        bytes.fromhex(s)
        for s in json.loads((REFERENCE / "golden_preprocess_v1000_strings.json").read_text())["strings_hex"]
    ]

    def check(self, packed, case):
        for name in INPUTS:
            np.testing.assert_array_equal(packed[name], self.golden[f"{case}/{name}"], err_msg=f"{case} {name}")
            assert packed[name].dtype == tf.int32

    def test_call(self, preprocessor):
        self.check(preprocessor(tf.constant(self.strings)), "default128")

    def test_tokenize(self, preprocessor):
        tokens = preprocessor.tokenize(tf.constant(self.strings))
        assert tokens.dtype == tf.int32
        np.testing.assert_array_equal(tokens.flat_values, self.golden["tokenize/flat_values"])
        np.testing.assert_array_equal(tokens.row_splits, self.golden["tokenize/word_splits"])
        np.testing.assert_array_equal(tokens.values.row_splits, self.golden["tokenize/piece_splits"])

    @pytest.mark.parametrize("length", [8, 16, 32, 512])
    def test_pack_one_segment(self, preprocessor, length):
        tokens = preprocessor.tokenize(tf.constant(self.strings))
        self.check(preprocessor.bert_pack_inputs([tokens], length), f"pack{length}")
        self.check(preprocessor.bert_pack_inputs([tokens.merge_dims(1, 2)], tf.constant(length)), f"pack{length}")

    @pytest.mark.parametrize("length", [8, 15, 32, 128])
    def test_pack_two_segments(self, preprocessor, length):
        tokens = preprocessor.tokenize(tf.constant(self.strings))
        pair = [tokens, tokens[::-1]]
        self.check(preprocessor.bert_pack_inputs(pair, length), f"pair{length}")
        flat = [segment.merge_dims(1, 2) for segment in pair]
        self.check(preprocessor.bert_pack_inputs(flat, seq_length=tf.constant(length)), f"pair{length}")

    def test_interface(self, preprocessor):
        special = {name: int(value) for name, value in preprocessor.tokenize.get_special_tokens_dict().items()}
        names = ["padding_id", "start_of_sequence_id", "end_of_segment_id", "mask_id", "vocab_size"]
        assert special == dict(zip(names, [0, 2, 3, 4, 1000], strict=True))
        assert preprocessor(tf.constant([], tf.string))["input_mask"].shape == (0, 128)
        for part in (preprocessor, preprocessor.tokenize, preprocessor.bert_pack_inputs):
            assert list(part.variables) == list(part.trainable_variables) == list(part.regularization_losses) == []

    def test_as_keras_layers(self, preprocessor):
        import tensorflow_hub as hub
        import tf_keras as keras

        segments = [keras.layers.Input([], dtype=tf.string) for _ in range(2)]
        tokens = [hub.KerasLayer(preprocessor.tokenize)(segment) for segment in segments]
        packed = hub.KerasLayer(preprocessor.bert_pack_inputs, arguments={"seq_length": 32})(tokens)
        strings = tf.constant(self.strings)
        self.check(keras.Model(segments, packed)([strings, strings[::-1]]), "pair32")

    @pytest.mark.exhaustive  # another export, of five seconds
    def test_keeps_case_and_accents_where_told(self, tmp_path):
        export_preprocessor([*SPECIAL, "cafe", "Café"], str(tmp_path / "cased"), lower_case=False)
        cased = tf.saved_model.load(str(tmp_path / "cased"))
        assert cased.tokenize(tf.constant(["Café cafe café"])).to_list() == [[[6], [5], [1]]]

    def test_segments_are_trimmed_in_turns(self):
        def one_by_one(first, second, room):
            kept = [0, 0]
            while sum(kept) < room and (kept[0] < first or kept[1] < second):
                number = int(kept[0] > kept[1])
                full = kept[number] == (first, second)[number]
                kept[1 - number if full else number] += 1
            return kept

        first, second = (axis.ravel() for axis in np.meshgrid(np.arange(8), np.arange(8)))
        for room in range(14):
            found = np.stack(trimmed_lengths([tf.constant(first), tf.constant(second)], room), axis=1)
            assert found.tolist() == [one_by_one(a, b, room) for a, b in zip(first, second, strict=True)]
