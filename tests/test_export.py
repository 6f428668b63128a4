"""The exported encoder and preprocessor against the official ones, and the built-in encoder.

`tests/reference` holds an encoder and a preprocessor that TensorFlow's own model library exported (2 layers, width 64,
4 heads, 1000 pieces, random weights), with their outputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import cache, default
from pipeline.encoders.export import INPUTS, export_encoder, initial_weights
from pipeline.errors import EncoderError
from pipeline.preprocess.export import export_preprocessor, trimmed_lengths

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_text")  # registers the preprocessor's ops

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"
TOLERANCE = 2e-5  # max abs, for two orders of summation in float32
# A key's bias shifts all logits of a query alike, which the softmax does not notice: its gradient is rounding noise.
WITHOUT_EFFECT = [f"transformer_scaffold{layer}/self_attention/key/bias:0" for layer in ("", "_1")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def read_vocabulary() -> list[str]:
    return (REFERENCE / "tiny_v1000/assets/vocab.txt").read_text(encoding="utf-8").splitlines()


def some_vocabulary(size: int) -> list[str]:
    return SPECIAL + [f"piece{i}" for i in range(size - len(SPECIAL))]


def some_inputs(n_texts: int, n_tokens: int, vocabulary_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, n_tokens + 1, n_texts)
    mask = (np.arange(n_tokens) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(0, vocabulary_size, (n_texts, n_tokens)).astype(np.int32) * mask
    types = rng.integers(0, 2, (n_texts, n_tokens)).astype(np.int32) * mask
    return dict(zip(INPUTS, (ids, mask, types), strict=True))


@pytest.fixture(scope="module")
def official():
    return tf.saved_model.load(str(REFERENCE / "tiny_v1000"))


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


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("preprocessor") / "tiny")
    export_preprocessor(read_vocabulary(), folder)
    return tf.saved_model.load(folder)


class TestEncoderNumbers:
    # The row without any attendable key is compared too: float32 swallows its logits beside -1e9, so that it attends
    # evenly to all places here as there.
    @pytest.mark.parametrize(
        "case", sorted({key.split("/")[0] for key in np.load(REFERENCE / "golden_tiny_v1000.npz")})
    )
    def test_equals_the_official_encoder(self, exported, case):
        golden = np.load(REFERENCE / "golden_tiny_v1000.npz")
        outputs = exported({name: golden[f"{case}/{name}"] for name in INPUTS})
        for name in ("pooled_output", "sequence_output", "encoder_outputs"):
            np.testing.assert_allclose(np.stack(outputs[name]), golden[f"{case}/{name}"], rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("layers, width, heads", [(1, 6, 3), (3, 40, 5), (11, 16, 1)])
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
        np.testing.assert_array_equal(exported(inputs, training=False)["pooled_output"], still)
        np.testing.assert_array_equal(exported(inputs, False, None)["pooled_output"], still)
        first, second = (exported(inputs, training=True)["pooled_output"].numpy() for _ in range(2))
        assert np.abs(first - still).max() > 0.01 and np.abs(first - second).max() > 0.01

    def test_gradients_reach_every_weight(self, exported):
        inputs = some_inputs(3, 7, 1000)
        with tf.GradientTape(persistent=True) as tape:
            outputs = exported(inputs, training=True)
            loss = tf.reduce_sum(outputs["pooled_output"] ** 2) + tf.reduce_sum(outputs["sequence_output"] ** 3)
        for variable in exported.trainable_variables:
            gradient = tape.gradient(loss, variable)
            assert gradient is not None, variable.name
            assert np.abs(tf.convert_to_tensor(gradient)).max() > 1e-4 or variable.name in WITHOUT_EFFECT, variable.name

    def test_fine_tunes_as_a_keras_layer(self, exported_folder):
        hub, keras = pytest.importorskip("tensorflow_hub"), pytest.importorskip("tf_keras")
        inputs = {name: keras.layers.Input([None], dtype=tf.int32, name=name) for name in INPUTS}
        layer = hub.KerasLayer(exported_folder, trainable=True)
        model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)["pooled_output"]))
        assert len(layer.trainable_weights) == 47
        model.compile(keras.optimizers.SGD(0.1), "mse")
        before = [weight.numpy() for weight in layer.trainable_weights]
        model.fit(some_inputs(8, 7, 1000), np.ones(8), epochs=1, verbose=0)
        for weight, old in zip(layer.trainable_weights, before, strict=True):
            assert np.abs(weight.numpy() - old).max() > 0 or weight.name in WITHOUT_EFFECT, weight.name


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
        hub, keras = pytest.importorskip("tensorflow_hub"), pytest.importorskip("tf_keras")
        segments = [keras.layers.Input([], dtype=tf.string) for _ in range(2)]
        tokens = [hub.KerasLayer(preprocessor.tokenize)(segment) for segment in segments]
        packed = hub.KerasLayer(preprocessor.bert_pack_inputs, arguments={"seq_length": 32})(tokens)
        strings = tf.constant(self.strings)
        self.check(keras.Model(segments, packed)([strings, strings[::-1]]), "pair32")

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


class TestDefaultEncoder:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "cache"))

    def test_weights_are_the_same_everywhere(self):
        weights = initial_weights(2, 8, 2, 10, positions=4, seed=3)
        digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights.values())).hexdigest()
        assert digest[:12] == "8339ec2c2216"
        assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}

    def test_vocabulary(self):
        vocabulary = default.default_vocabulary()
        assert len(vocabulary) == len(set(vocabulary)) == 8000 and vocabulary[:5] == SPECIAL
        characters = [c for c in map(chr, range(33, 127)) if c == c.lower()]
        assert {*characters, *("##" + c for c in characters)} <= set(vocabulary)

    def test_two_makes_hold_the_same_weights(self, tmp_path, monkeypatch):
        first = tf.saved_model.load(default.default_encoder())
        monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "other"))
        second = tf.saved_model.load(default.default_encoder())
        weights = default.default_weights()
        for own, other in zip(first.trainable_variables, second.trainable_variables, strict=True):
            assert own.numpy().tobytes() == other.numpy().tobytes() == weights[own.name[:-2]].tobytes()
        pooled = first(some_inputs(6, 12, 8000))["pooled_output"].numpy()
        assert pooled.shape == (6, 128) and pooled.std(0).mean() > 0.1

    def test_is_made_once(self):
        folder = default.default_encoder()
        changed = os.stat(folder).st_mtime_ns
        assert default.default_encoder() == folder and os.stat(folder).st_mtime_ns == changed

    def test_two_processes_at_once(self, tmp_path):
        command = [sys.executable, "-c", "from pipeline.encoders.default import *; print(default_encoder())"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        first, second = (process.communicate()[0].strip() for process in processes)
        assert [process.returncode for process in processes] == [0, 0]
        assert first == second and os.listdir(tmp_path / "cache") == [os.path.basename(first)]
        tf.saved_model.load(first)

    def test_loading_needs_no_tensorflow(self):
        code = (
            "import sys, pipeline.encoders.default, pipeline.preprocess.export; assert 'tensorflow' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


class TestCache:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "cache"))

    @staticmethod
    def make(folder):
        os.makedirs(os.path.join(folder, "variables"))
        Path(folder, "variables", "data").write_bytes(b"1234")

    def test_place(self, tmp_path, monkeypatch):
        assert cache.cache_dir() == str(tmp_path / "cache")
        monkeypatch.delenv("EMBEAM_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache.cache_dir() == str(tmp_path / "xdg" / "embeam")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache.cache_dir() == str(tmp_path / ".cache" / "embeam")

    @pytest.mark.parametrize("damage", [lambda data: data.write_bytes(b"12"), lambda data: data.unlink()])
    def test_a_damaged_folder_is_not_used(self, damage):
        folder = cache.cached_folder("model", self.make)
        damage(Path(folder, "variables", "data"))
        other = cache.cached_folder("model", self.make)
        assert other != folder and Path(other, "variables", "data").read_bytes() == b"1234"
        assert cache.cached_folder("model", self.make) == other

    def test_the_loser_uses_the_winners_folder(self):
        def make_slowly(folder):
            self.make(folder)
            winner.append(cache.cached_folder("model", self.make))

        winner: list[str] = []
        assert cache.cached_folder("model", make_slowly) == winner[0]
        assert os.listdir(cache.cache_dir()) == ["model"]

    def test_a_failure_leaves_nothing(self):
        def fail(folder):
            self.make(folder)
            raise KeyError("no such weight")

        with pytest.raises(KeyError):
            cache.cached_folder("model", fail)
        assert os.listdir(cache.cache_dir()) == []

    def test_says_how_to_mend_an_unusable_place(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "file"))
        with pytest.raises(EncoderError, match="set EMBEAM_CACHE_DIR"):
            cache.cached_folder("model", self.make)
