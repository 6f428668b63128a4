"""What the fingerprint holds: everything that changes a vector, and nothing that does not."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders import export
from pipeline.encoders.export import export_encoder, initial_weights
from pipeline.encoders.parity import ParityCheck
from pipeline.encoders.saved_model import list_variables
from tests.support.exports import some_vocabulary
from tests.support.official import official_encoder, vocabulary
from tests.support.paths import ENCODER


def fingerprint(encoder, **settings):
    return make_embedding_spec(EmbedConfig.from_flat({"encoder": str(encoder), **settings})).fingerprint


class Hashed(tf.Module):
    """An encoder of strings whose two variables have no names of their own."""

    def __init__(self, path):
        super().__init__()
        self.first, self.second = tf.Variable(1.0), tf.Variable(2.0)
        self.words = tf.saved_model.Asset(str(path))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, texts):
        length = tf.cast(tf.strings.length(texts) + 0 * tf.strings.length(tf.io.read_file(self.words)), tf.float32)
        return tf.stack([length * self.first, length + self.second], 1)


def copy_model(folder, copy, change=lambda values: None):
    """Copies a SavedModel, byte by byte but for its weights, whose values by checkpoint key may be changed."""
    shutil.copytree(folder, copy)
    prefix = f"{copy}/variables/variables"
    reader = tf.train.load_checkpoint(prefix)
    values = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    change(values)
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=list(values), shape_and_slices=[""] * len(values), tensors=list(values.values())
    )
    return copy


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
    monkeypatch.setattr(ParityCheck, "_measure", lambda *_: [0.0, 1.0])  # tested elsewhere
    shutil.copytree(ENCODER, tmp_path / "copy")
    weights = {variable.name: variable.numpy() for variable in official_encoder().trainable_variables}
    export_encoder(weights, vocabulary(), str(tmp_path / "again"))
    assert fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "again") == fingerprint(ENCODER)


@pytest.mark.usefixtures("module_cache")
def test_one_weight_changes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ParityCheck, "_measure", lambda *_: [0.0, 1.0])

    def change(values):
        (key,) = (key for key, shape in list_variables(ENCODER).values() if shape == (512, 64))
        values[key][3, 5] += 1e-6

    same, other = copy_model(ENCODER, tmp_path / "same"), copy_model(ENCODER, tmp_path / "other", change)
    assert fingerprint(same) == fingerprint(ENCODER) != fingerprint(other)


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


def test_variables_without_names_and_assets_count(tmp_path):
    (tmp_path / "words.txt").write_text("a")
    model = tmp_path / "model"
    tf.saved_model.save(Hashed(tmp_path / "words.txt"), str(model))
    first, second = (f"{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in ("first", "second"))
    changes = {
        "first": lambda values: values.update({first: np.float32(3)}),
        "second": lambda values: values.update({second: np.float32(3)}),
        "swapped": lambda values: values.update({first: values[second], second: values[first]}),
    }
    copies = [copy_model(model, tmp_path / name, change) for name, change in changes.items()]
    asset = copy_model(model, tmp_path / "asset")
    (asset / "assets" / "words.txt").write_text("b")
    found = [fingerprint(folder) for folder in (model, *copies, asset)]
    assert len(set(found)) == len(found)
    assert fingerprint(copy_model(model, tmp_path / "same")) == found[0]
