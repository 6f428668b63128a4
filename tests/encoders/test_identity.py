"""What the fingerprint holds: everything that changes a vector, and nothing that does not."""

import shutil

import pytest
import tensorflow as tf

from pipeline.config import EmbedConfig
from pipeline.encoders import export, parity
from pipeline.encoders.export import export_encoder, initial_weights
from pipeline.plan import plan_embedding
from tests.support.exports import some_vocabulary
from tests.support.official import official_encoder, vocabulary
from tests.support.paths import ENCODER


def fingerprint(encoder, **settings):
    return plan_embedding(EmbedConfig.from_flat({"encoder": str(encoder), **settings})).fingerprint


class Hashed(tf.Module):
    """An encoder of strings whose two variables have no names of their own."""

    def __init__(self, first, second, path):
        super().__init__()
        self.first, self.second = tf.Variable(first), tf.Variable(second)
        self.words = tf.saved_model.Asset(str(path))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, texts):
        length = tf.cast(tf.strings.length(texts) + 0 * tf.strings.length(tf.io.read_file(self.words)), tf.float32)
        return tf.stack([length * self.first, length + self.second], 1)


def save_hashed(tmp_path, name, first=1.0, second=2.0, words="a"):
    path = tmp_path / f"{name}.txt"
    path.write_text(words)
    (tmp_path / name).mkdir()
    shutil.move(path, tmp_path / name / "words.txt")
    tf.saved_model.save(Hashed(first, second, tmp_path / name / "words.txt"), str(tmp_path / name / "model"))
    return tmp_path / name / "model"


SETTINGS = [
    {"text_prefix": "query: "},
    {"vector": "sequence_output:mean"},
    {"vector": "encoder_outputs/0:mean"},
    {"normalize": True},
    {"dimensions": 8},
    {"dtype": "int8"},
    {"max_tokens": 64},
    {"on_long": "chunk"},
    {"on_long": "chunk", "chunk_overlap": 8},
]


def test_every_setting_that_changes_vectors_changes_it():
    found = [fingerprint(ENCODER), *(fingerprint(ENCODER, **settings) for settings in SETTINGS)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "settings", [{"batch_tokens": 100}, {"output_format": "parquet"}, {"keep_text": True}, {"max_tokens": 512}], ids=str
)
def test_settings_that_change_no_vector_do_not_change_it(settings):
    assert fingerprint(ENCODER, **settings) == fingerprint(ENCODER)


@pytest.mark.usefixtures("module_cache")
def test_a_copy_and_a_new_export_of_the_same_encoder_have_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_measure", lambda *_: [0.0, 1.0])  # that exports compute the same is tested elsewhere
    shutil.copytree(ENCODER, tmp_path / "copy")
    weights = {variable.name: variable.numpy() for variable in official_encoder().trainable_variables}
    export_encoder(weights, vocabulary(), str(tmp_path / "again"))
    assert fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "again") == fingerprint(ENCODER)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("module_cache")
def test_one_weight_changes_it_and_so_does_a_graph_that_computes_something_else(tmp_path, monkeypatch):
    weights = initial_weights(1, 8, 2, 20, positions=16)
    export_encoder(weights, some_vocabulary(20), str(tmp_path / "one"))
    monkeypatch.setattr(export, "LAYER_NORM_EPSILON", 0.1)
    export_encoder(weights, some_vocabulary(20), str(tmp_path / "graph"))
    monkeypatch.undo()
    weights["cls_transform/bias"][3] += 1e-6
    export_encoder(weights, some_vocabulary(20), str(tmp_path / "weight"))
    assert len({fingerprint(tmp_path / name) for name in ("one", "graph", "weight")}) == 3


@pytest.mark.usefixtures("module_cache")
def test_variables_without_names_and_assets_count(tmp_path):
    found = [
        fingerprint(save_hashed(tmp_path, "a")),
        fingerprint(save_hashed(tmp_path, "b", first=3.0)),
        fingerprint(save_hashed(tmp_path, "c", second=3.0)),
        fingerprint(save_hashed(tmp_path, "d", words="b")),
    ]
    assert len(set(found)) == 4
