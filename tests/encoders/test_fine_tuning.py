"""The page on fine-tuning, run as it stands: its commands, its script, and the tables before and after."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders.default import default_weights
from pipeline.encoders.saved_model import describe_saved_model, read_variables
from pipeline.tables.manifest import open_table
from pipeline.tables.read import read_table
from tests.support.paths import ENCODER, ROOT

PAGE = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8")

# Goes on where the page's script ends.
CHECKS = """
import json

weights = encoder.trainable_variables
facts = {"names": [w.name for w in weights], "losses": history.history["loss"]}
facts["tokens"] = tf.keras.Model(text_input, packed)(texts)["input_mask"].shape[1]
for persistent in (False, True):
    with tf.GradientTape(persistent=persistent) as tape:
        loss = tf.reduce_sum(model(texts, training=True) ** 2)
    gradients = tape.gradient(loss, weights)
    facts[f"unreached, persistent={persistent}"] = [
        w.name
        for w, g in zip(weights, gradients)
        if g is None or "key/bias" not in w.name and not tf.reduce_any(tf.convert_to_tensor(g) != 0)
    ]
before = [w.numpy() for w in weights]
model.compile(tf.keras.optimizers.SGD(0.1), tf.keras.losses.BinaryCrossentropy(from_logits=True))
model.fit(texts, labels, epochs=2, verbose=0)
facts["left by SGD"] = [w.name for w, old in zip(weights, before) if (w.numpy() == old).all()]
with open("facts.json", "w") as file:
    json.dump(facts, file)
"""


def run(command, folder):
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(folder / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "-1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which all blocks of the page have run."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    for name in ("pipeline", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    (folder / "bin" / "embeam").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline.cli "$@"\n')
    (folder / "bin" / "embeam").chmod(0o755)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    code = [block for language, block in blocks if language == "python"]
    (folder / "fine_tune.py").write_text("\n".join([*code, CHECKS]))
    printed = [run(["bash", "-euc", block], folder) for language, block in blocks if language == "sh"]
    (folder / "printed").write_text("\n".join(printed))
    return folder


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "facts.json").read_text())


def read_weights(folder):
    return dict(read_variables(str(folder), describe_saved_model(str(folder)).variables))


def plan(encoder):
    return make_embedding_spec(EmbedConfig.from_flat({"encoder": str(encoder)}))


pytestmark = [pytest.mark.training, pytest.mark.timeout(600)]  # the first to ask for the folder waits for the page


def test_training_lowers_the_loss_and_changes_every_weight(folder, facts):
    assert facts["losses"][-1] < facts["losses"][0] / 2
    before, after = read_weights(folder / "encoder"), read_weights(folder / "tuned_encoder")
    assert before.keys() == after.keys() == {name.removesuffix(":0") for name in facts["names"]}
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


def test_gradients_reach_every_weight(facts):
    assert len(facts["names"]) == len(set(facts["names"])) == len(default_weights())
    for persistent in (False, True):
        assert facts[f"unreached, persistent={persistent}"] == []


def test_sgd_trains_too(facts):
    # A key's bias shifts all logits of a query alike, which the softmax does not notice.
    assert [name for name in facts["left by SGD"] if "self_attention/key/bias" not in name] == []


def test_longer_texts_are_packed_as_the_page_says(facts):
    assert facts["tokens"] == 256


def test_what_is_saved_is_the_same_encoder_but_for_its_weights(folder):
    before, after = (describe_saved_model(str(folder / name)) for name in ("encoder", "tuned_encoder"))
    assert (after.inputs, after.input_dtypes, after.outputs) == (before.inputs, before.input_dtypes, before.outputs)
    assert (after.variables, after.assets) == (before.variables, before.assets)
    assert before.methods <= after.methods
    old, new = folder / "encoder", folder / "tuned_encoder"
    assert (old / "assets/vocab.txt").read_bytes() == (new / "assets/vocab.txt").read_bytes()
    old, new = plan(old), plan(new)
    assert old.fingerprint != new.fingerprint
    for identity in (old.identity, new.identity):
        assert identity["encoder"]["family"] == "talking_heads_ggelu_bert"  # proven, so that only the weights count
        del identity["encoder"]["weights"]
    assert old.identity == new.identity


def test_the_tables_before_and_after_differ(folder):
    old, new = (open_table(str(folder / name))[0] for name in ("table", "tuned_table"))
    assert old.fingerprint != new.fingerprint
    (old_ids, old_vectors), (ids, vectors) = (read_table(str(folder / name)) for name in ("table", "tuned_table"))
    assert sorted(old_ids) == sorted(ids)
    vectors = vectors[[ids.index(i) for i in old_ids]]
    assert np.abs(vectors - old_vectors).max(axis=1).min() > 1e-3
    printed = (folder / "printed").read_text()
    assert new.fingerprint in printed and "nearest to" in printed


def test_an_official_encoder_is_saved_the_same_way(tmp_path):
    import tensorflow_hub as hub

    layer = hub.KerasLayer(str(ENCODER), trainable=True)
    for variable in layer.trainable_variables:
        variable.assign_add(tf.fill(variable.shape, 0.01))
    tuned = layer.resolved_object
    tf.saved_model.save(tuned, str(tmp_path / "tuned"), signatures=tuned.signatures)
    before, after = plan(ENCODER), plan(tmp_path / "tuned")
    assert after.identity["encoder"]["family"] == "talking_heads_ggelu_bert"
    assert after.fingerprint != before.fingerprint
    assert after.identity["preprocessing"] == before.identity["preprocessing"]
