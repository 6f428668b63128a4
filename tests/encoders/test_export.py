"""The exported encoders against the official ones, and against a direct NumPy forward pass.

`tests/reference` holds encoders of both families and a preprocessor that TensorFlow's own model library exported (2
layers, width 64, 4 heads, 1000 pieces, random weights), with their outputs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the preprocessor's ops

from pipeline.encoders.export import export_encoder, initial_weights
from pipeline.encoders.saved_model import TOKEN_INPUTS as INPUTS
from pipeline.errors import EncoderError
from tests.support.exports import read_vocabulary, some_inputs, some_vocabulary
from tests.support.paths import REFERENCE
from tests.support.tables import TOLERANCE

# A key's bias shifts all logits of a query alike, which the softmax does not notice: its gradient is rounding noise.
WITHOUT_EFFECT = "/self_attention/key/bias:0"


GOLDEN = {"tiny_v1000": "golden_tiny_v1000.npz", "bert_v1000": "golden_bert_v1000.npz"}


@pytest.fixture(scope="module", params=GOLDEN)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def official(family):
    return tf.saved_model.load(str(REFERENCE / family))


@pytest.fixture(scope="module")
def official_weights(official):
    return {v.name: v.numpy() for v in official.trainable_variables}


@pytest.fixture(scope="module")
def exported_folder(official_weights, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("encoder") / "tiny")
    export_encoder(official_weights, read_vocabulary(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(exported_folder):
    return tf.saved_model.load(exported_folder)


@pytest.mark.numeric
class TestEncoderNumbers:
    # The row without any attendable key is compared too: float32 swallows its logits beside -1e9, so that it attends
    # evenly to all places here as there.
    def test_equals_the_official_encoder(self, exported, family):
        golden = np.load(REFERENCE / GOLDEN[family])
        cases = {key.split("/")[0] for key in golden}
        assert len(cases) > 1
        for case in cases:
            outputs = exported({name: golden[f"{case}/{name}"] for name in INPUTS})
            names = [
                name for name in ("pooled_output", "sequence_output", "encoder_outputs") if f"{case}/{name}" in golden
            ]
            assert len(names) > 1
            for name in names:
                np.testing.assert_allclose(np.stack(outputs[name]), golden[f"{case}/{name}"], rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize(
        "layers, width, heads",
        [(1, 6, 3), *(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((3, 40, 5), (11, 16, 1)))],
    )
    def test_equals_the_definition_in_numpy(self, tmp_path, layers, width, heads):
        weights = initial_weights(layers, width, heads, vocabulary_size=50, positions=20, seed=layers)
        inputs = some_inputs(n_texts=4, n_tokens=20, vocabulary_size=50)
        export_encoder(weights, some_vocabulary(50), str(tmp_path / "encoder"))
        outputs = tf.saved_model.load(str(tmp_path / "encoder"))(inputs)
        pooled, sequences = forward_in_numpy(weights, layers, inputs)
        assert len(outputs["encoder_outputs"]) == layers
        tolerance = 1e-5 * layers  # rounding grows with depth
        np.testing.assert_allclose(outputs["pooled_output"], pooled, rtol=0, atol=tolerance)
        np.testing.assert_allclose(np.stack(outputs["encoder_outputs"]), sequences, rtol=0, atol=tolerance)

    def test_padding_changes_nothing(self, exported):
        short = some_inputs(n_texts=5, n_tokens=9, vocabulary_size=1000)
        wide = {name: np.pad(value, ((0, 0), (0, 23))) for name, value in short.items()}
        wide["input_word_ids"][:, 9:] = 77  # nobody may look there
        narrow, padded = exported(short), exported(wide)
        np.testing.assert_allclose(narrow["pooled_output"], padded["pooled_output"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(narrow["sequence_output"], padded["sequence_output"][:, :9], rtol=0, atol=TOLERANCE)


def forward_in_numpy(weights, layers, inputs):
    """The encoder in float64, one text and one head at a time: pooled output and all layers' outputs."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-12) * w[f"{name}/gamma"] + w[f"{name}/beta"]

    pooled, sequences = [], []
    for ids, mask, types in zip(*(inputs[name] for name in INPUTS), strict=True):
        x = w["word_embeddings/embeddings"][ids] + w["type_embeddings/embeddings"][types]
        x = norm(x + w["position_embedding/embeddings"][: len(ids)], "embeddings/layer_norm")
        sequence = []
        for layer in range(layers):
            name = f"transformer_scaffold_{layer}" if layer else "transformer_scaffold"
            own = {key[len(name) + 1 :]: value for key, value in w.items() if key.startswith(name + "/")}
            x = norm(x + attention_in_numpy(own, x, mask), f"{name}/self_attention_layer_norm")
            inner = x @ own["feedforward/intermediate_0/kernel"] + own["feedforward/intermediate_0/bias"]
            gelu = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
            gated = gelu * (x @ own["feedforward/gate_0/kernel"] + own["feedforward/gate_0/bias"])
            forward = gated @ own["feedforward/output_0/kernel"] + own["feedforward/output_0/bias"]
            x = norm(x + forward, f"{name}/feedforward/output_layer_norm_0")
            sequence.append(x)
        pooled.append(np.tanh(x[0] @ w["cls_transform/kernel"] + w["cls_transform/bias"]))
        sequences.append(sequence)
    return np.array(pooled), np.array(sequences).swapaxes(0, 1)


def attention_in_numpy(w, x, mask):
    def head(name, number):
        return x @ w[f"self_attention/{name}/kernel"][:, number] + w[f"self_attention/{name}/bias"][number]

    before, after = w["self_attention/pre_softmax_weight"], w["self_attention/post_softmax_weight"]
    numbers = range(len(before))
    logits = [head("query", n) @ head("key", n).T / np.sqrt(head("key", n).shape[1]) for n in numbers]
    shares = []
    for m in numbers:
        mixed = np.where(mask == 1, sum(logits[n] * before[n, m] for n in numbers), -np.inf)
        exponentials = np.exp(mixed - mixed.max(-1, keepdims=True))
        shares.append(exponentials / exponentials.sum(-1, keepdims=True))
    result = np.zeros_like(x) + w["self_attention/attention_output/bias"]
    for m in numbers:
        mixed = sum(shares[n] * after[n, m] for n in numbers)
        result += mixed @ head("value", m) @ w["self_attention/attention_output/kernel"][m]
    return result


class TestEncoderInterface:
    def test_equals_the_official_interface(self, exported, official):
        def described(variables):
            return [(v.name, v.shape, v.dtype, v.trainable) for v in variables]

        assert described(exported.variables) == described(official.variables)
        assert described(exported.trainable_variables) == described(official.trainable_variables)
        assert list(exported.regularization_losses) == []
        assert bool(exported.do_lower_case) and not exported.do_lower_case.trainable
        path = Path(exported.vocab_file.asset_path.numpy().decode())
        assert path.name == "vocab.txt" and path.read_text(encoding="utf-8").splitlines() == read_vocabulary()

    def test_signature_equals_the_official_one(self, exported, official):
        own, reference = (module.signatures["serving_default"] for module in (exported, official))
        inputs = {name: tf.constant(value) for name, value in some_inputs(3, 7, 1000).items()}
        assert own.structured_input_signature == reference.structured_input_signature
        expected = reference(**inputs)
        found = own(**inputs)
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE)

    def test_outputs(self, exported):
        outputs = exported(some_inputs(3, 7, 1000))
        assert sorted(outputs) == ["default", "encoder_outputs", "pooled_output", "sequence_output"]
        assert isinstance(outputs["encoder_outputs"], list)
        assert outputs["sequence_output"].shape == (3, 7, 64) and outputs["pooled_output"].shape == (3, 64)
        np.testing.assert_array_equal(outputs["default"], outputs["pooled_output"])
        np.testing.assert_array_equal(outputs["encoder_outputs"][-1], outputs["sequence_output"])

    def test_rejects_what_the_official_encoder_rejects(self, exported):
        inputs = some_inputs(3, 7, 1000)
        wrong = [
            {name: value.astype(np.int64) for name, value in inputs.items()},
            list(inputs.values()),
            {name: inputs[name] for name in INPUTS[:2]},
            {name: value[0] for name, value in inputs.items()},
        ]
        for value in wrong:
            with pytest.raises(ValueError, match="Could not find matching concrete function"):
                exported(value)
        assert exported({name: value[:0] for name, value in inputs.items()})["default"].shape == (0, 64)

    def test_dropout_in_training_only(self, exported):
        inputs = some_inputs(3, 7, 1000)
        still = exported(inputs)["pooled_output"].numpy()
        for same in (exported(inputs, training=False), exported(inputs, False, None)):
            np.testing.assert_allclose(same["pooled_output"], still, rtol=0, atol=TOLERANCE)
        first, second = (exported(inputs, training=True)["pooled_output"].numpy() for _ in range(2))
        assert np.abs(first - still).max() > 0.01 and np.abs(first - second).max() > 0.01

    @pytest.mark.training
    def test_gradients_reach_every_weight(self, exported):
        inputs = some_inputs(3, 7, 1000)
        with tf.GradientTape(persistent=True) as tape:
            outputs = exported(inputs, training=True)
            loss = tf.reduce_sum(outputs["pooled_output"] ** 2) + tf.reduce_sum(outputs["sequence_output"] ** 3)
        for variable in exported.trainable_variables:
            gradient = tape.gradient(loss, variable)
            assert gradient is not None, variable.name
            assert np.abs(tf.convert_to_tensor(gradient)).max() > 1e-4 or variable.name.endswith(WITHOUT_EFFECT), (
                variable.name
            )

    @pytest.mark.training
    def test_fine_tunes_as_a_keras_layer(self, exported_folder, official):
        import tensorflow_hub as hub
        import tf_keras as keras

        inputs = {name: keras.layers.Input([None], dtype=tf.int32, name=name) for name in INPUTS}
        layer = hub.KerasLayer(exported_folder, trainable=True)
        model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)["pooled_output"]))
        assert len(layer.trainable_weights) == len(official.trainable_variables)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        before = [weight.numpy() for weight in layer.trainable_weights]
        model.fit(some_inputs(8, 7, 1000), np.ones(8), epochs=1, verbose=0)
        for weight, old in zip(layer.trainable_weights, before, strict=True):
            assert np.abs(weight.numpy() - old).max() > 0 or weight.name.endswith(WITHOUT_EFFECT), weight.name


class TestEncoderErrors:
    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("cls_transform/bias", None, "cls_transform/bias is missing"),
            ("word_embeddings/embeddings", None, "word_embeddings/embeddings is missing"),
            ("transformer_scaffold/self_attention/query/kernel", np.zeros([8, 8]), r"shape \[8, 8\], not 3 axes"),
            ("transformer_scaffold_1/feedforward/gate_0/bias", np.zeros([3]), r"gate_0/bias has shape \[3\] .* \[32\]"),
            ("mlm/bias", np.zeros([3]), "mlm/bias is unused"),
        ],
    )
    def test_names_the_weight(self, tmp_path, name, value, message):
        weights = initial_weights(2, 8, 2, 10, positions=4)
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
        with pytest.raises(EncoderError, match=message):
            export_encoder(weights, some_vocabulary(10), str(tmp_path / "encoder"))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "vocabulary, message",
        [
            (some_vocabulary(9), "9 pieces do not fit 10"),
            ([*some_vocabulary(9), "piece0"], "'piece0', occurs twice"),
            ([*some_vocabulary(9), "a\nb"], "line break"),
            ([f"piece{i}" for i in range(10)], r"lacks \[PAD\]"),
        ],
    )
    def test_checks_the_vocabulary(self, tmp_path, vocabulary, message):
        weights = initial_weights(1, 8, 2, 10, positions=4)
        with pytest.raises(EncoderError, match=message):
            export_encoder(weights, vocabulary, str(tmp_path / "encoder"))

    def test_keeps_a_folder_that_exists(self, tmp_path):
        (tmp_path / "encoder").mkdir()
        (tmp_path / "encoder" / "precious").touch()
        with pytest.raises(EncoderError, match="exists already"):
            export_encoder(initial_weights(1, 8, 2, 10), some_vocabulary(10), str(tmp_path / "encoder"))
        assert [path.name for path in tmp_path.rglob("*")] == ["encoder", "precious"]

    def test_heads_must_share_the_width(self):
        with pytest.raises(EncoderError, match="multiple of 3"):
            initial_weights(1, 8, 3, 10)
