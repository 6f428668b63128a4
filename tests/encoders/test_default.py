"""The built-in encoder and the cache it is made in."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the preprocessor's ops

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders import cache, default
from pipeline.encoders.export import initial_weights
from pipeline.encoders.saved_model import describe_saved_model, read_variables
from pipeline.errors import EncoderError
from tests.support.exports import SPECIAL, some_inputs
from tests.support.paths import ROOT


class TestDefaultEncoder:
    def test_weights_are_the_same_everywhere(self):
        weights = initial_weights(2, 8, 2, 10, positions=4, seed=3)
        digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights.values())).hexdigest()
        assert digest[:12] == "8339ec2c2216"
        assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}

    def test_vocabulary(self):
        vocabulary = default.default_vocabulary()
        assert len(vocabulary) == len(set(vocabulary)) == 16_000 and vocabulary[:5] == SPECIAL
        characters = [c for c in map(chr, range(33, 127)) if c == c.lower()]
        assert {*characters, *("##" + c for c in characters if c.isalnum())} <= set(vocabulary)

    def test_the_model_card_is_of_these_weights(self):
        card = Path(default.FOLDER, "MODEL_CARD.md").read_text(encoding="utf-8")
        assert f"{sum(weight.size for weight in default.default_weights().values()):,} parameters" in card
        assert f"{os.path.getsize(default.WEIGHTS_FILE) / 1e6:.1f} MB" in card

    def test_is_made_once_of_the_packed_weights(self, own_cache):
        folder = default.default_encoder()
        changed = os.stat(folder).st_mtime_ns
        assert default.default_encoder() == folder and os.stat(folder).st_mtime_ns == changed
        weights = default.default_weights()
        model = describe_saved_model(folder)
        assert set(model.variables) == set(weights)
        for name, value in read_variables(folder, weights):
            assert value.tobytes() == weights[name].tobytes(), name

    def test_is_proven_to_be_what_it_says(self):
        identity = make_embedding_spec(EmbedConfig()).identity
        assert identity["encoder"]["family"] == "talking_heads_ggelu_bert"
        assert identity["dimensions"] == 384

    @pytest.mark.exhaustive
    def test_two_processes_at_once(self, own_cache, tmp_path):
        command = [sys.executable, "-c", "from pipeline.encoders.default import *; print(default_encoder())"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        first, second = (process.communicate()[0].strip() for process in processes)
        assert [process.returncode for process in processes] == [0, 0]
        assert first == second and os.listdir(tmp_path / "cache") == [os.path.basename(first)]
        weights = default.default_weights()
        model = tf.saved_model.load(first)
        for variable in model.trainable_variables:
            assert variable.numpy().tobytes() == weights[variable.name[:-2]].tobytes()
        pooled = model(some_inputs(6, 12, 16_000))["pooled_output"].numpy()
        assert pooled.shape == (6, len(weights["cls_transform/bias"])) and pooled.std(0).mean() > 0.1

    def test_loading_needs_no_tensorflow(self):
        code = (
            "import sys, pipeline.encoders.default, pipeline.preprocess.export; assert 'tensorflow' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.usefixtures("own_cache")
class TestCache:
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

    def test_the_second_process_uses_the_first_ones_folder(self):
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

    def test_says_how_to_fix_an_unusable_place(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "file"))
        with pytest.raises(EncoderError, match="set EMBEAM_CACHE_DIR"):
            cache.cached_folder("model", self.make)

    @pytest.mark.parametrize("found", [True, False, [0.5, float("inf")], []])
    def test_what_was_found_out_is_not_found_out_again(self, found):
        calls = []
        for _ in range(2):
            assert cache.remembered("fact", lambda: calls.append(1) or found, lambda value: value == found) == found
        assert len(calls) == 1

    @pytest.mark.parametrize("content", [b"", b"[1.0, ", b"null", b"0", b'"true"', b"\xff", None])
    def test_what_is_damaged_is_found_out_again(self, content):
        calls = []

        def remember():
            return cache.remembered("fact", lambda: calls.append(1) or True, lambda value: isinstance(value, bool))

        remember()
        path = Path(cache.cache_dir(), "remembered", "fact")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        assert remember() is True and len(calls) == 2
        assert remember() is True and len(calls) == 2  # as the file is whole again
