"""What the tests of the pipeline share: the official encoder and preprocessor, called directly, and small corpora.

`tests/reference` holds SavedModels that TensorFlow's own model library exported. Everything here asks those, or NumPy,
for what a row should be, and never the code under test.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the preprocessor's ops
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.config import EmbedConfig
from pipeline.job import build_table
from pipeline.tables.manifest import Manifest
from pipeline.tables.read import iter_table

REFERENCE = Path(__file__).resolve().parent / "reference"
ENCODER = str(REFERENCE / "tiny_v1000")
PREPROCESSOR = str(REFERENCE / "preprocess_v1000")
TOLERANCE = 2e-5  # max abs, for two orders of summation in float32
INPUTS = ("input_word_ids", "input_mask", "input_type_ids")

Rows = dict[tuple[str, int], dict[str, Any]]  # (id, chunk) -> the table's row


@functools.cache
def official_encoder() -> Any:
    return load_once(ENCODER)


@functools.cache
def official_preprocessor() -> Any:
    return load_once(PREPROCESSOR)


@functools.cache
def official_tokens(text: str) -> tuple[int, ...]:
    """Token ids of one text, by the official preprocessor."""
    return tuple(official_preprocessor().tokenize(tf.constant([text])).flat_values.numpy().tolist())


def official_pack(segments: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """The official preprocessor's three tensors `[1, length]` for one text, or one pair of them, alone."""
    preprocessor = official_preprocessor()
    tokens = [preprocessor.tokenize(tf.constant([segment])) for segment in segments]
    packed = preprocessor.bert_pack_inputs(tokens, seq_length=tf.constant(length))
    return {name: packed[name].numpy() for name in INPUTS}


def pack_ids(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Token ids between [CLS] and [SEP] as the encoder's three tensors `[1, len(ids) + 2]`."""
    row = np.array([[cls_id(), *ids, sep_id()]], np.int32)
    return dict(zip(INPUTS, (row, np.ones_like(row), np.zeros_like(row)), strict=True))


def vocabulary() -> list[str]:
    return Path(ENCODER, "assets/vocab.txt").read_text(encoding="utf-8").splitlines()


def cls_id() -> int:
    return vocabulary().index("[CLS]")


def sep_id() -> int:
    return vocabulary().index("[SEP]")


def official_outputs(packed: Mapping[str, np.ndarray], encoder: Any = None) -> dict[str, Any]:
    """Everything that the official encoder gives for one packed input, as NumPy."""
    outputs = (encoder or official_encoder())({name: tf.constant(value) for name, value in packed.items()})
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), outputs)


def expected_vector(packed: Mapping[str, np.ndarray], vector: str) -> np.ndarray:
    """What `--vector` promises for one packed input: `[D]`, or `[n_tokens, D]` for tokens, by plain loops."""
    outputs = official_outputs(packed)
    head, _, pooling = vector.partition(":")
    output, _, layer = head.partition("/")
    tensor = outputs[output][int(layer)] if layer else outputs[output]
    if not pooling:
        return tensor[0]
    real = [tensor[0, i] for i in range(tensor.shape[1]) if packed["input_mask"][0, i]]  # [CLS] and [SEP] are real
    if pooling == "cls":
        return real[0]
    if pooling == "mean":
        return sum(token.astype(np.float64) for token in real) / len(real)
    if pooling == "max":
        return functools.reduce(np.maximum, real)
    assert pooling == "tokens"
    return np.stack(real)


def golden_strings() -> list[bytes]:
    """The 230 hostile strings of the golden file, the last 10 of which are not UTF-8."""
    text = (REFERENCE / "golden_preprocess_v1000_strings.json").read_text(encoding="utf-8")
    return [bytes.fromhex(string) for string in json.loads(text)["strings_hex"]]


def golden_texts() -> list[str]:
    """Those of the golden strings that can be documents."""
    return [string.decode() for string in golden_strings()[:220]]


def some_texts(n: int, seed: int = 1, words: tuple[int, int] = (1, 60)) -> list[str]:
    """Texts of whole and unknown words, of many lengths and scripts."""
    rng = np.random.default_rng(seed)
    pieces = [piece for piece in vocabulary() if piece.isalpha()] + [
        "Émile",
        "zyzzyva",
        "東京",
        "it's",
        "3.14",
        "[SEP]",
    ]
    return [" ".join(rng.choice(pieces, rng.integers(*words))) for _ in range(n)]


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def as_records(texts: Iterable[str]) -> list[dict[str, str]]:
    """Texts as records whose ids are their numbers."""
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


def make_config(folder: Path, **settings: Any) -> EmbedConfig:
    """The tiny encoder over the folder's JSON lines; keyword settings are flags."""
    defaults = {"input": str(folder / "*.jsonl"), "output": str(folder / "table"), "encoder": ENCODER}
    return EmbedConfig.from_flat({**defaults, "id_field": "id", "on_empty": "embed", **settings})


@functools.lru_cache(maxsize=8)
def load_once(path: str) -> Any:
    return tf_load(path)


tf_load = tf.saved_model.load


def run_pipeline(folder: Path, beam_flags: Sequence[str] = (), **settings: Any) -> Manifest:
    """Runs the whole job in this process; a SavedModel that an earlier run has loaded is not loaded again."""
    with mock.patch.object(tf.saved_model, "load", load_once):
        return build_table(make_config(folder, **settings), PipelineOptions(list(beam_flags)))


def embed_records(
    folder: Path, records: Iterable[Mapping[str, Any]], beam_flags: Sequence[str] = (), **settings: Any
) -> tuple[Rows, Manifest]:
    """Runs the whole pipeline over some records, from a file to a table, and reads that back."""
    write_jsonl(folder / "corpus.jsonl", records)
    manifest = run_pipeline(folder, beam_flags, **settings)
    return read_rows(settings.get("output", str(folder / "table"))), manifest


def read_rows(table: str) -> Rows:
    rows: Rows = {}
    for row in iter_table(table):
        key = row["id"], row["chunk"]
        assert key not in rows, f"{key} is in the table twice"
        rows[key] = row
    return rows


def read_dead_letters(table: str) -> list[dict[str, Any]]:
    """The dead letters of a table, read as the JSON lines that they are."""
    snapshot = Path(table, "CURRENT").read_text().strip()
    paths = sorted(Path(table, "snapshots", snapshot).glob("dead_letters-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def assert_close(actual: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    """Max abs within the tolerance; a shape that only broadcasts is an error."""
    assert actual.shape == expected.shape, f"{what!r}: {actual.shape} instead of {expected.shape}"
    difference = float(np.max(np.abs(actual - expected), initial=0))
    assert difference <= TOLERANCE, f"{what!r} is off by {difference}"


def save_module(folder: Path, **attributes: Any) -> str:
    """Saves a SavedModel whose object has the given attributes; `call` becomes `__call__`."""
    module = tf.Module()
    for name, value in attributes.items():
        setattr(module, "__call__" if name == "call" else name, value)
    tf.saved_model.save(module, str(folder))
    return str(folder)
