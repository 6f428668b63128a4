"""Writes an encoder with random weights, built and exported by tf-models-official alone; and what it answers.

The model comes from that package's `build_encoder` and is written by its `export_model`, so that names, signature and
graph are those of its own exports. Only the weights, and the vocabulary of 30522, are made up here. DIR/NAME is the
SavedModel and DIR/golden_NAME.npz its inputs and outputs, `<case>/<name>`; NAME is the size, or bert_SIZE for plain
BERT. The size v1000 is tiny with the vocabulary of 1000, as kept in this folder: tiny_v1000 and bert_v1000.

It runs in an environment of its own, because the package pins another TensorFlow than the project's:

    python3 -m venv build/official && build/official/bin/pip install tf-models-official==2.20.0
    build/official/bin/python tests/reference/export_official.py --family bert --size base --out build/reference
"""

import argparse
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a GPU may round float32 more coarsely

import gin
import numpy as np
import tensorflow as tf
import tf_keras
from official.nlp.configs.encoders import EncoderConfig, build_encoder
from official.nlp.modeling.networks import BertEncoder, EncoderScaffold
from official.nlp.tools.export_tfhub_lib import export_model

Inputs = dict[str, np.ndarray]

VOCABULARY_OF_1000 = Path(__file__).resolve().parent / "preprocess_v1000/assets/vocab.txt"
LAYERS_WIDTH_HEADS = {
    "v1000": (2, 64, 4),
    "tiny": (2, 64, 4),
    "small": (4, 256, 4),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
SEEDS = {
    "talking_heads": {"v1000": 12, "tiny": 111, "small": 114, "base": 115, "large": 116},
    "bert": {"v1000": 21, "tiny": 211, "small": 214, "base": 215, "large": 216},
}
ENCODER_CLASS = {"talking_heads": EncoderScaffold, "bert": BertEncoder}
TALKING_HEADS_GIN = """
    build_encoder.encoder_cls = @EncoderScaffold
    EncoderScaffold.hidden_cls = @TransformerScaffold
    TransformerScaffold.attention_cls = @TalkingHeadsAttention
    TransformerScaffold.feedforward_cls = @GatedFeedforward
"""

# Not every golden file holds every case: they would be large.
LONG_CASE = "b1_s512_maxlen"
SHORT_CASES_OF_BIG = {"b4_s8_ragged", "b5_s16_ragged", "b3_s128_ragged", "b3_s16_holey_mask", "b2_s8_allmasked_row1"}
CASES_NOT_IN_BERT_V1000 = {"b1_s8_full", "b1_s16_full", "b3_s128_ragged", "b8_s128_ragged"}


def make_vocabulary() -> list[str]:
    """30522 pieces, of which only the special tokens mean anything: they have the ids they have in uncased BERT."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    return [special.get(i, f"word{i}") for i in range(30522)]


def make_weights(name: str, shape: tuple[int, ...], layers: int, rng: np.random.Generator) -> np.ndarray:
    """Values that let a mistake show: attention that prefers some tokens, and no bias, gain or offset left at rest.

    The package's own start would not do: from kernels that small every token attends evenly to all others, biases of
    zero may be lost unnoticed, and so may a mixing of heads that is near zero.
    """
    owner, leaf = name.removesuffix(":0").split("/")[-2:]
    noise = rng.standard_normal(shape, np.float32)
    if leaf == "embeddings":
        return noise * np.float32(0.06 if owner == "word_embeddings" else 0.03)
    if leaf in ("bias", "beta"):
        return noise * np.float32(0.05)
    if leaf == "gamma":
        return 1 + noise * np.float32(0.1)
    if leaf in ("pre_softmax_weight", "post_softmax_weight"):
        return noise * np.float32(0.6 / shape[0] ** 0.5) + np.float32(0.7) * np.eye(shape[0], dtype=np.float32)
    assert leaf == "kernel", name
    # The gains of a shallow model, in each of many layers, would make the tokens of a text alike.
    attend, mix, feed = (3.0**0.5, 0.9, 1.2) if layers <= 4 else (1.5**0.5, 0.6, 0.85)
    gains = {"query": attend, "key": attend, "value": mix, "attention_output": mix, "output": feed, "output_0": feed}
    n_summed = np.prod(shape[:-1]) if owner == "attention_output" else shape[0]
    return noise * np.float32(gains.get(owner, 1.0) / n_summed**0.5)


def make_inputs(vocabulary: list[str]) -> dict[str, Inputs]:
    """Texts of random ids: the number after `b` is that of the texts, the number after `s` their padded length."""
    rng = np.random.default_rng(99)
    cls, sep, last_special = (vocabulary.index(piece) for piece in ("[CLS]", "[SEP]", "[MASK]"))
    cases: dict[str, Inputs] = {}

    def add(name: str, lengths: list[int], pairs: bool = True, lowest: int = last_special + 1) -> Inputs:
        padded = int(name.split("_")[1].removeprefix("s"))
        ids, mask, types = (np.zeros((len(lengths), padded), np.int32) for _ in range(3))
        for row, length in enumerate(lengths):
            ids[row, :length] = rng.integers(lowest, len(vocabulary), length)
            ids[row, 0] = cls
            if length > 1:
                ids[row, length - 1] = sep
            mask[row, :length] = 1
            if pairs and length >= 4:
                second = rng.integers(2, length - 1)
                ids[row, second - 1] = sep
                types[row, second:length] = 1
        cases[name] = {"input_word_ids": ids, "input_mask": mask, "input_type_ids": types}
        return cases[name]

    add("b1_s8_full", [8])
    add("b4_s8_ragged", [8, 5, 2, 3])
    add("b1_s16_full", [16], pairs=False)
    add("b5_s16_ragged", list(rng.integers(2, 17, 5)))
    add("b3_s128_ragged", [128, 77, 9])
    add("b8_s128_ragged", list(rng.integers(2, 129, 8)))
    add("b2_s1", [1, 1])
    add("b2_s37_oddlen", [37, 20])
    add(LONG_CASE, [400])
    holey = add("b3_s16_holey_mask", [16, 16, 16], lowest=0)
    holey["input_mask"][:] = rng.integers(0, 2, (3, 16))
    holey["input_mask"][:, 0] = 1
    holey["input_type_ids"][:] = rng.integers(0, 2, (3, 16))
    add("b2_s8_allmasked_row1", [8, 8])["input_mask"][1] = 0
    garbage = add("b2_s8_garbage_padding", [6, 8])
    garbage["input_word_ids"][0, 6:] = last_special + 8
    garbage["input_type_ids"][0, 6:] = 1
    return cases


def write_model(folder: Path, config: EncoderConfig, family: str, seed: int, vocab_file: Path, probe: Inputs) -> Inputs:
    """Exports to `folder`, and returns what the model answered to `probe` before that."""
    encoder = build_encoder(config)
    assert type(encoder) is ENCODER_CLASS[family]
    for i, variable in enumerate(encoder.variables):
        rng = np.random.default_rng([seed, i])
        variable.assign(make_weights(variable.name, tuple(variable.shape), config.bert.num_layers, rng))
    answer = encoder(probe, training=False)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        checkpoint = tf.train.Checkpoint(model=encoder, encoder=encoder).save(f"{scratch}/bert_model.ckpt")
        del encoder, variable  # a large one is 1.3 GB
        tf_keras.backend.clear_session()  # so that layers are named as in a process that does nothing but export
        gc.collect()
        files = {"model_checkpoint_path": checkpoint, "vocab_file": str(vocab_file)}
        export_model(str(folder), encoder_config=config, with_mlm=False, do_lower_case=True, **files)
    tf_keras.backend.clear_session()
    gc.collect()
    return {name: answer[name].numpy() for name in ("pooled_output", "sequence_output")}


def export_official(family: str, size: str, out: Path, vocab_file: Path) -> None:
    layers, width, heads = LAYERS_WIDTH_HEADS[size]
    name = {"bert": f"bert_{size}", "talking_heads": "tiny_v1000" if size == "v1000" else size}[family]
    vocabulary = vocab_file.read_text(encoding="utf-8").splitlines()
    inputs = make_inputs(vocabulary)
    shape = {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    config = EncoderConfig()
    config.override({"type": "bert", "bert": {**shape, "vocab_size": len(vocabulary)}}, is_strict=True)
    gin.parse_config(TALKING_HEADS_GIN if family == "talking_heads" else "")
    unsaved = write_model(out / name, config, family, SEEDS[family][size], vocab_file, inputs["b4_s8_ragged"])

    big = size in ("base", "large")
    kept = SHORT_CASES_OF_BIG | {LONG_CASE} if big else set(inputs)
    if name == "bert_v1000":
        kept -= CASES_NOT_IN_BERT_V1000
    loaded = tf.saved_model.load(str(out / name))
    golden = {}
    for case in sorted(kept):
        outputs = loaded({key: tf.constant(value) for key, value in inputs[case].items()}, training=False)
        golden |= {f"{case}/{key}": value for key, value in inputs[case].items()}
        golden[f"{case}/pooled_output"] = np.asarray(outputs["pooled_output"])
        if not (big and case == LONG_CASE):
            golden[f"{case}/sequence_output"] = np.asarray(outputs["sequence_output"])
        if not (big or (name == "bert_v1000" and case == LONG_CASE)):
            golden[f"{case}/encoder_outputs"] = np.asarray(outputs["encoder_outputs"])
    for key, value in unsaved.items():  # equal up to rounding, which grows with the depth
        np.testing.assert_allclose(golden[f"b4_s8_ragged/{key}"], value, rtol=0, atol=1e-4)
    np.savez_compressed(out / f"golden_{name}.npz", **golden)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SEEDS, required=True)
    parser.add_argument("--size", choices=LAYERS_WIDTH_HEADS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocab_file", type=Path, help="default: 30522 made-up pieces; for v1000 the one here")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        made_up = Path(scratch, "vocab.txt")
        made_up.write_text("\n".join(make_vocabulary()) + "\n", encoding="utf-8")
        default = VOCABULARY_OF_1000 if a.size == "v1000" else made_up
        export_official(a.family, a.size, a.out.resolve(), a.vocab_file or default)
