"""Encoders and preprocessors that are none, or are damaged: one sentence that names the folder, before a run begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.errors import ConfigError, EmbeamError, EncoderError
from tests.support.official import save_module
from tests.support.paths import ENCODER, PREPROCESSOR


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(ENCODER, tmp_path / "encoder"))


def check_refused(says: str, error: type[EmbeamError] = EncoderError, **settings: Any) -> str:
    with pytest.raises(error) as caught:
        make_embedding_spec(EmbedConfig.from_flat({name: str(value) for name, value in settings.items()}))
    said = str(caught.value)
    assert says in said
    assert "\n" not in said and len(said) < 500
    return said


def test_a_folder_without_an_encoder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no encoder")
    check_refused("the folder holds no saved_model.pb", encoder=tmp_path / "empty")
    check_refused("no such folder", encoder=tmp_path / "none")
    check_refused("is a file", encoder=tmp_path / "file")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "middle"])
def test_a_damaged_graph(encoder, damage):
    path = encoder / "saved_model.pb"
    data = path.read_bytes()
    middle = data[: len(data) // 2] + b"\xff" * 64 + data[len(data) // 2 + 64 :]
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": b"no graph", "empty": b"", "middle": middle}[damage])
    check_refused(str(encoder), encoder=encoder)


@pytest.mark.parametrize(
    "missing", ["variables", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
def test_missing_weights(encoder, missing):
    path = encoder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    check_refused(str(encoder), encoder=encoder)


def test_cut_weights(encoder):
    path = encoder / "variables/variables.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:1000])
    check_refused(str(encoder), encoder=encoder)


def test_encoder_and_preprocessor_swapped():
    said = check_refused(PREPROCESSOR, EmbeamError, encoder=PREPROCESSOR)
    assert "preprocessor" in said.replace(PREPROCESSOR, "")
    check_refused("is it an encoder?", encoder=ENCODER, preprocessor=ENCODER)


def test_a_model_that_takes_no_text(tmp_path):
    pixels = tf.TensorSpec([None, 8, 8, 3], tf.float32)
    image = tf.function(lambda x: {"pooled_output": tf.reduce_mean(x, [1, 2])}, input_signature=[pixels])
    nothing = tf.function(lambda: {"pooled_output": tf.zeros([1, 3])}, input_signature=[])
    for name, call in (("image", image), ("nothing", nothing)):
        check_refused("not a text encoder", encoder=save_module(tmp_path / name, call=call))


def test_a_vocabulary_larger_than_the_encoders(encoder):
    (vocabulary,) = (encoder / "assets").glob("*.txt")
    vocabulary.write_text(vocabulary.read_text() + "".join(f"piece{i}\n" for i in range(10)))
    check_refused("they do not belong together", ConfigError, encoder=encoder)
