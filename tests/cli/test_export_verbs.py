"""`embeam export-encoder` and `embeam export-preprocessor`: what they write works, and what cannot be is one line."""

import inspect
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders import export
from pipeline.encoders.default import VOCABULARY_FILE, default_vocabulary, default_weights
from pipeline.encoders.saved_model import TOKEN_INPUTS, describe_saved_model, read_flag, read_variables
from pipeline.encoders.saving import saveable
from pipeline.preprocess import export as preprocess_export
from pipeline.tables.manifest import open_table
from pipeline.tables.read import read_table
from tests.support.exports import SPECIAL
from tests.support.paths import ENCODER, PREPROCESSOR
from tests.support.processes import assert_one_line, start_cli, wait_for
from tests.support.tables import hash_folder

SIZES = ("--layers=2", "--hidden_size=24", "--heads=3", "--positions=32")
VOCABULARY = Path(ENCODER, "assets", "vocab.txt")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(call, tmp_path):
    """Runs what must fail: arguments -> the one line that is said; nothing is left behind."""

    def run(*arguments, code=2):
        before = sorted(tmp_path.rglob("*"))
        found, out, err = call(*arguments)
        assert (found, out) == (code, ""), err
        assert sorted(tmp_path.rglob("*")) == before
        return assert_one_line(err)

    return run


def read_weights(folder):
    return dict(read_variables(str(folder), describe_saved_model(str(folder)).variables))


def fingerprint(encoder):
    return make_embedding_spec(EmbedConfig.from_flat({"encoder": str(encoder)})).fingerprint


# What is given to the exporters, which have tests of their own.


class Given(NamedTuple):
    """An exporter's arguments, and what the verb says."""

    arguments: dict[str, Any]
    out: str


@pytest.fixture
def given(call, monkeypatch):
    """Runs a verb up to the writing: its arguments -> what the exporter is given, and stdout."""

    def run(verb, *arguments):
        seen = []
        module = {"export-encoder": export, "export-preprocessor": preprocess_export}[verb]
        name = verb.replace("-", "_")
        signature = inspect.signature(getattr(module, name))
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda *values, **named: seen.append(signature.bind(*values, **named)))
            code, out, err = call(verb, *arguments)
        assert (code, err) == (0, "")
        (bound,) = seen
        bound.apply_defaults()
        return Given(bound.arguments, out)

    return run


def assert_weights(given, expected):
    assert given.arguments["weights"].keys() == expected.keys()
    assert all(np.array_equal(given.arguments["weights"][name], expected[name]) for name in expected)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_seeded_weights_are_written(given, tmp_path, seed):
    flags = [] if seed is None else [f"--seed={seed}"]
    found = given("export-encoder", *SIZES, f"--vocab_file={VOCABULARY}", "--output=new/e", *flags)
    expected = export.initial_weights(2, 24, 3, 1000, positions=32, seed=seed or 0)
    assert_weights(found, expected)
    assert found.arguments["vocabulary"] == VOCABULARY.read_text().splitlines() and found.arguments["lower_case"]
    assert found.arguments["folder"] == str(tmp_path / "new" / "e")
    parameters = sum(weight.size for weight in expected.values())
    assert found.out.splitlines() == [
        f"new/e holds an encoder of {parameters:,} parameters, untrained: 2 layers, width 24, 3 heads, "
        "1,000 uncased pieces, up to 32 tokens",
        "next: embeam embed --input='corpus/*' --encoder=new/e --output=table",
    ]


@pytest.mark.parametrize("verb", [("export-encoder", *SIZES), ("export-preprocessor",)], ids=lambda verb: verb[0])
def test_a_cased_vocabulary_is_read_as_it_is(given, tmp_path, verb):
    (tmp_path / "v.txt").write_bytes(b"\xef\xbb\xbf[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n[MASK]\r\ncafe\r\nCaf\xc3\xa9")
    found = given(*verb, "--vocab_file=v.txt", "--cased", "--output=new")
    assert found.arguments["vocabulary"] == [*SPECIAL, "cafe", "Café"] and not found.arguments["lower_case"]
    assert "7 cased" in found.out


def test_the_built_in_encoder_is_written_without_sizes(given):
    found = given("export-encoder", "--output=new")
    assert_weights(found, default_weights())
    assert found.arguments["vocabulary"] == default_vocabulary() and found.arguments["lower_case"]
    assert "16,000 uncased pieces, up to 512 tokens" in found.out and "untrained" not in found.out
    found = given("export-preprocessor", "--output=new")
    assert found.arguments["vocabulary"] == default_vocabulary() and found.arguments["lower_case"]
    assert "16,000 uncased pieces" in found.out and "--preprocessor=new" in found.out


@pytest.mark.parametrize("swapped", [False, True], ids=["its own vocabulary", "another vocabulary"])
def test_the_weights_of_another_encoder_are_written(given, tmp_path, swapped):
    pieces, flags = VOCABULARY.read_text().splitlines(), ["--heads=4"]
    if swapped:
        pieces[-2:] = pieces[:-3:-1]
        (tmp_path / "v.txt").write_text("\n".join(pieces))
        flags = ["--vocab_file=v.txt"]
    found = given("export-encoder", f"--from_encoder={ENCODER}", *flags, "--output=new")
    assert_weights(found, read_weights(ENCODER))
    assert found.arguments["vocabulary"] == pieces and found.arguments["lower_case"]
    assert "2 layers, width 64, 4 heads, 1,000 uncased pieces, up to 512 tokens" in found.out
    assert "untrained" not in found.out


# What is written.


def test_an_encoder_that_is_written_makes_a_table(call, tmp_path):
    (tmp_path / "a.txt").write_text("a dog\na cat\na horse\n")
    flags = ("--layers=1", "--hidden_size=8", "--heads=2", "--positions=32", f"--vocab_file={VOCABULARY}")
    code, out, err = call("export-encoder", *flags, "--output=new/encoder")
    assert (code, err) == (0, "") and "--encoder=new/encoder" in out
    assert call("embed", "--input=a.txt", "--encoder=new/encoder", "--output=table").code == 0
    assert read_table("table")[1].shape == (3, 8)


@pytest.mark.exhaustive
def test_what_both_verbs_write_makes_a_table(call, tmp_path):
    (tmp_path / "a.txt").write_text("a dog\na cat\na horse\n")
    code, out, err = call("export-encoder", *SIZES, f"--vocab_file={VOCABULARY}", "--output=new/encoder")
    assert (code, err) == (0, "")
    parameters = sum(weight.size for weight in read_weights("new/encoder").values())
    assert out.splitlines() == [
        f"new/encoder holds an encoder of {parameters:,} parameters, untrained: 2 layers, width 24, 3 heads, "
        "1,000 uncased pieces, up to 32 tokens",
        "next: embeam embed --input='corpus/*' --encoder=new/encoder --output=table",
    ]
    code, out, err = call("export-preprocessor", f"--vocab_file={VOCABULARY}", "--output=new/preprocessor")
    assert (code, err) == (0, "")
    assert "1,000 uncased pieces" in out and "--preprocessor=new/preprocessor" in out
    shown = ("embed", "--input=a.txt", "--encoder=new/encoder")  # as the lines above advise
    assert call(*shown, "--output=table")[0] == 0
    assert call(*shown, "--preprocessor=new/preprocessor", "--output=other")[0] == 0
    assert open_table("table")[0].fingerprint == open_table("other")[0].fingerprint
    (ids, vectors), (other_ids, others) = (read_table(name) for name in ("table", "other"))
    assert vectors.shape == (3, 24)
    order = [other_ids.index(i) for i in ids]
    assert np.array_equal(vectors, others[order])


@pytest.mark.exhaustive
def test_without_sizes_the_built_in_encoder_is_written(call, tmp_path):
    (tmp_path / "a.txt").write_text("a dog\na cat\na horse\n")
    code, out, err = call("export-encoder", "--output=encoder")
    assert (code, err) == (0, "") and "16,000 uncased pieces, up to 512 tokens" in out and "untrained" not in out
    assert call("export-preprocessor", "--output=preprocessor")[0] == 0
    assert call("embed", "--input=a.txt", "--output=built_in")[0] == 0
    shown = ("--encoder=encoder", "--preprocessor=preprocessor")
    assert call("embed", "--input=a.txt", *shown, "--output=written")[0] == 0
    assert open_table("built_in")[0].fingerprint == open_table("written")[0].fingerprint


@pytest.mark.exhaustive
def test_the_seed_makes_the_weights(call):
    for name, *seed in (("a",), ("b", "--seed=0"), ("c", "--seed=1")):
        assert call("export-encoder", *SIZES, f"--vocab_file={VOCABULARY}", f"--output={name}", *seed)[0] == 0
    expected = export.initial_weights(2, 24, 3, 1000, positions=32, seed=0)
    found = read_weights("a")
    assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)
    assert fingerprint("a") == fingerprint("b") != fingerprint("c")


@pytest.mark.exhaustive
def test_cased_vocabularies(call, tmp_path):
    (tmp_path / "v.txt").write_bytes(b"\xef\xbb\xbf[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n[MASK]\r\ncafe\r\nCaf\xc3\xa9")
    assert "7 cased" in call("export-encoder", *SIZES, "--vocab_file=v.txt", "--cased", "--output=e")[1]
    assert "7 cased" in call("export-preprocessor", "--vocab_file=v.txt", "--cased", "--output=p")[1]
    assert not read_flag("e", "do_lower_case")
    assert tf.saved_model.load("p").tokenize(tf.constant(["Café cafe café"])).to_list() == [[[6], [5], [1]]]
    assert make_embedding_spec(EmbedConfig.from_flat({"encoder": "e", "preprocessor": "p"})).fingerprint == fingerprint(
        "e"
    )


@pytest.mark.exhaustive
def test_the_weights_of_another_encoder(call):
    code, out, err = call("export-encoder", f"--from_encoder={ENCODER}", "--heads=4", "--output=again")
    assert (code, err) == (0, "")
    assert "2 layers, width 64, 4 heads, 1,000 uncased pieces, up to 512 tokens" in out and "untrained" not in out
    assert Path("again/assets/vocab.txt").read_bytes() == VOCABULARY.read_bytes()
    assert fingerprint("again") == fingerprint(ENCODER)


@pytest.mark.exhaustive
def test_the_weights_of_another_encoder_with_another_vocabulary(call, tmp_path):
    pieces = VOCABULARY.read_text().splitlines()
    (tmp_path / "v.txt").write_text("\n".join([*pieces[:-2], pieces[-1], pieces[-2]]))
    assert call("export-encoder", f"--from_encoder={ENCODER}", "--vocab_file=v.txt", "--output=again")[0] == 0
    assert Path("again/assets/vocab.txt").read_text().splitlines()[-1] == pieces[-2]
    assert fingerprint("again") != fingerprint(ENCODER)


# What is refused.

NEW = ("export-encoder", *SIZES, f"--vocab_file={VOCABULARY}", "--output=new")
FROM = ("export-encoder", f"--from_encoder={ENCODER}", "--output=new")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*NEW, "--layers=0"), "--layers: 0 is not a whole number from 1"),
        ((*NEW, "--heads=-3"), "--heads: -3 is not"),
        ((*NEW, "--hidden_size=24.0"), "--hidden_size: 24.0 is not"),
        ((*NEW, "--seed=-1"), "--seed: -1 is not a whole number from 0"),
        ((*NEW, "--heads=5"), "--hidden_size=24 is not a multiple of --heads=5; use a multiple of 5"),
        ((*NEW, "--positions=2"), "--positions=2 leaves no room"),
        ((*NEW, "--hidden_size=30000000"), "GB of memory"),
        ((*NEW, "--layers=1000000000000"), "GB of memory"),
        ((*NEW, "--vocab_file="), "needs --vocab_file too"),
        ((*NEW, "--output="), "--output= is not a local folder"),
        ((*NEW, "--output=gs://bucket/new"), "--output=gs://bucket/new is not a local folder"),
        ((*NEW, "--output=half\udcff"), "is not UTF-8"),
        ((*NEW, "--output=/dev/null/new"), "--output=/dev/null/new cannot be written"),
        ((*NEW, f"--output={'x' * 300}"), "cannot be written"),
        ((*NEW, "other"), "--output=other"),
        ((*NEW, "--vocab-file=x"), "--vocab_file"),
        ((*NEW, "--hiden_size=3"), "--hidden_size"),
        (NEW[:-1], "--output"),
        (("export-encoder", "--layers=2", "--output=new"), "needs --hidden_size, --heads, --vocab_file too"),
        ((*FROM, "--layers=3"), f"--layers=3: --from_encoder={ENCODER} has 2; leave it out"),
        ((*FROM, "--positions=100"), "has 512"),
        ((*FROM, "--seed=0"), "--seed=0: the weights come from"),
        ((*FROM, "--cased"), "is uncased; leave it out"),
        ((*FROM, f"--vocab_file={VOCABULARY_FILE}"), "has 16,000 pieces and the encoder 1,000 word embeddings"),
        (("export-encoder", "--cased", "--output=new"), "needs --layers, --hidden_size, --heads, --vocab_file too"),
        (("export-encoder", "--seed=0", "--output=new"), "needs --layers, --hidden_size, --heads, --vocab_file too"),
        (("export-preprocessor", "--cased", "--output=new"), "--cased: the built-in encoder's vocabulary is uncased"),
        (("export-preprocessor", f"--vocab_file={VOCABULARY}", "--output=/dev/null/new"), "cannot be written"),
        (("export-preprocessor", f"--vocab_file={VOCABULARY}", "--output=new", "--layers=2"), "--layers"),
    ],
    ids=lambda value: " ".join(value[2:]).replace("\udcff", "?")[-60:] if isinstance(value, tuple) else None,
)
def test_flags_that_cannot_work(refused, arguments, says):
    assert says in refused(*arguments)


@pytest.mark.parametrize("verb", [("export-encoder", *SIZES), ("export-preprocessor",)], ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("folder", "cannot be read: Is a directory"),
        (b"[PAD]\n[UNK]\n[CLS]\nna\xefve\n", "is not UTF-8: see line 4"),
        (b"", "piece 0 of the vocabulary, '', is empty"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", "lacks [MASK]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "'a', occurs twice"),
    ],
)
def test_a_vocabulary_that_is_none(refused, tmp_path, verb, content, says):
    path = tmp_path / "v.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    line = refused(*verb, "--vocab_file=v.txt", "--output=new")
    assert "--vocab_file=v.txt" in line and says in line


@pytest.mark.parametrize("verb", [("export-encoder", *SIZES), ("export-preprocessor",)], ids=lambda verb: verb[0])
def test_an_output_that_exists_stays(refused, tmp_path, verb):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").write_text("precious")
    before = hash_folder(tmp_path)
    assert "--output=new exists already" in refused(*verb, f"--vocab_file={VOCABULARY}", "--output=new")
    assert hash_folder(tmp_path) == before


def test_encoders_whose_weights_cannot_be_taken(refused, tmp_path):
    def line(folder):
        return refused("export-encoder", f"--from_encoder={folder}", "--output=new", code=1)

    assert "there is no such folder" in line(tmp_path / "none")
    assert "--from_encoder= is not a SavedModel" in line("")  # an unset variable of a shell
    assert "is not a talking-heads gated-GELU BERT: " in line(PREPROCESSOR)
    encoder = shutil.copytree(ENCODER, tmp_path / "encoder")
    (encoder / "saved_model.pb").write_bytes(b"damaged")
    assert "is damaged" in line(encoder)


def test_an_encoder_that_computes_something_else_is_not_written_as_ours(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    weights = export.initial_weights(1, 8, 2, 1000, positions=16)
    with monkeypatch.context() as patched:
        patched.setattr(export, "LAYER_NORM_EPSILON", 0.1)
        export.export_encoder(weights, VOCABULARY.read_text().splitlines(), str(tmp_path / "e"))
    assert "does not give the same vectors as our graph" in refused(
        "export-encoder", "--from_encoder=e", "--output=new", code=1
    )


def test_an_encoder_without_its_vocabulary_needs_one(given, refused, tmp_path):
    model = tf.saved_model.load(str(ENCODER))
    called = tf.function(lambda inputs: model(inputs))
    called.get_concrete_function({name: tf.TensorSpec([None, None], tf.int32, name) for name in TOKEN_INPUTS})
    bare = saveable(__call__=called, variables=list(model.trainable_variables))
    tf.saved_model.save(bare, str(tmp_path / "bare"))
    arguments = ("export-encoder", "--from_encoder=bare", "--output=new")
    assert "has no vocabulary; name its file with --vocab_file" in refused(*arguments)
    assert_weights(given(*arguments, f"--vocab_file={VOCABULARY}"), read_weights(ENCODER))


@pytest.mark.crash
@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="watches the folder as it appears")
def test_a_signal_leaves_nothing_behind(tmp_path):
    sizes = ("--layers=48", "--hidden_size=64", "--heads=4")  # a second or more of writing
    process = start_cli("export-encoder", *sizes, f"--vocab_file={VOCABULARY}", f"--output={tmp_path}/new")
    wait_for(lambda: os.listdir(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "stopped" in assert_one_line(err)
    assert os.listdir(tmp_path) == []
