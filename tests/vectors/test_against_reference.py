"""Rows, as the stages make them from documents, against the official encoder, called directly with each text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.errors import ConfigError
from pipeline.records import Document
from tests.support.corpora import some_texts
from tests.support.models import save_hashing_preprocessor, save_text_encoder
from tests.support.official import (
    expected_vector,
    golden_texts,
    official_encoder,
    official_preprocessor,
    official_tokens,
    pack_ids,
)
from tests.support.paths import ENCODER, PREPROCESSOR
from tests.support.stages import as_documents, embed_directly
from tests.support.tables import assert_close, assert_official_segments

pytestmark = pytest.mark.numeric

# Both graphs and every kind of output and pooling.
FEW_VECTORS = [
    ("pooled_output", "fast"),
    ("pooled_output", "published"),
    ("sequence_output:mean", "fast"),
    ("sequence_output:tokens", "published"),
    ("encoder_outputs/0:max", "published"),
    ("encoder_outputs/-2:cls", "fast"),
]
VECTORS = [
    "pooled_output",
    *(f"sequence_output:{pooling}" for pooling in ("mean", "max", "cls", "tokens")),
    *(f"encoder_outputs/{layer}:{pooling}" for layer in (0, 1) for pooling in ("mean", "max", "cls")),
    "encoder_outputs/-1:mean",
    "encoder_outputs/-2:cls",
]
OTHER_VECTORS = [
    (vector, graph) for vector in VECTORS for graph in ("fast", "published") if (vector, graph) not in FEW_VECTORS
]
both_graphs = pytest.mark.parametrize("graph", ["fast", "published"])
# More than one bucket, more than one batch of some, texts of every script, one without tokens and some that are cut.
TEXTS = [*golden_texts(), *some_texts(40)]
FEW_TEXTS = ["", "one", *some_texts(20, seed=2), golden_texts()[40]]


def by_id(texts: list[str], prefix: str = "") -> dict[str, list[str]]:
    return {str(i): [prefix + text] for i, text in enumerate(texts)}


def check_vector(vector: str, graph: str) -> None:
    texts = TEXTS if vector in ("pooled_output", "sequence_output:mean") else FEW_TEXTS
    settings = {"vector": vector, "encoder_graph": graph, "preprocessor": PREPROCESSOR}
    found = embed_directly(as_documents(texts), **settings)
    assert len(found.batches) > 4
    assert_official_segments(found.rows, by_id(texts), vector)


@pytest.mark.parametrize(("vector", "graph"), FEW_VECTORS)
def test_a_row_is_what_the_official_encoder_gives_for_its_text_alone(vector, graph):
    check_vector(vector, graph)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("vector", "graph"), OTHER_VECTORS)
def test_so_it_is_for_every_vector_in_both_graphs(vector, graph):
    check_vector(vector, graph)


def test_a_row_is_what_the_official_pair_of_models_gives_at_its_own_length_of_128():
    texts = TEXTS[:120]
    rows = embed_directly(as_documents(texts), max_tokens=128).rows
    packed = official_preprocessor()(tf.constant(texts))  # [120, 128], as the models' documentation does it
    expected = official_encoder()(packed)["pooled_output"].numpy()
    for i, text in enumerate(texts):
        assert_close(rows[str(i), 0]["embedding"], expected[i], text)


@both_graphs
@pytest.mark.parametrize("batch_tokens", [1, 700, 10_000_000])
def test_rows_do_not_depend_on_the_size_of_batches(batch_tokens, graph):
    texts = some_texts(150)
    found = embed_directly(as_documents(texts), batch_tokens=batch_tokens, encoder_graph=graph)
    assert len(found.batches) == 150 if batch_tokens == 1 else len(found.batches) < 75
    assert_official_segments(found.rows, by_id(texts), "pooled_output")


def test_rows_do_not_depend_on_the_order_of_documents():
    texts = some_texts(150)
    documents = as_documents(texts)
    np.random.default_rng(3).shuffle(documents)
    assert_official_segments(embed_directly(documents).rows, by_id(texts), "pooled_output")


@pytest.mark.parametrize("max_tokens", [16, 512])
def test_pairs_are_packed_and_typed_as_the_official_preprocessor_does(max_tokens):
    pairs = list(zip(some_texts(30, seed=4), ["", *some_texts(29, seed=5)], strict=True))
    documents = [Document(str(i), *pair) for i, pair in enumerate(pairs)]
    rows = embed_directly(documents, pair_field="other", max_tokens=max_tokens).rows
    assert_official_segments(rows, {str(i): list(pair) for i, pair in enumerate(pairs)}, "pooled_output", max_tokens)


def test_a_document_without_its_second_segment_is_a_single_text():
    rows = embed_directly([Document("0", "alone"), Document("1", "one", "two")], pair_field="other").rows
    assert_official_segments(rows, {"0": ["alone"], "1": ["one", "two"]}, "pooled_output")


def test_the_prefix_is_part_of_every_text_and_not_of_second_segments():
    documents = [*as_documents(FEW_TEXTS), Document("pair", "one", "two")]
    rows = embed_directly(documents, pair_field="other", text_prefix="query: ").rows
    assert_official_segments(rows, by_id(FEW_TEXTS, "query: ") | {"pair": ["query: one", "two"]}, "pooled_output")


@pytest.mark.parametrize("max_tokens", [3, 16, 37])
def test_long_texts_are_truncated_as_the_official_preprocessor_does(max_tokens):
    texts = some_texts(40, seed=6)
    rows = embed_directly(as_documents(texts), max_tokens=max_tokens, vector="sequence_output:mean").rows
    assert any(row["n_truncated"] for row in rows.values())
    assert_official_segments(rows, by_id(texts), "sequence_output:mean", max_tokens)


def embed_windows(texts: list[str], **settings: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of chunks of 16 tokens, each with its own text."""
    return embed_directly(as_documents(texts), on_long="chunk", max_tokens=16, keep_text=True, **settings).rows


@pytest.mark.parametrize("vector", ["pooled_output", "sequence_output:tokens"])
@pytest.mark.parametrize(
    "settings", [{}, {"chunk_overlap": 3}, {"chunk_by": "sentence"}, {"text_prefix": "the: "}], ids=str
)
def test_a_chunk_is_a_slice_of_its_text_and_has_the_official_vector_of_it(settings, vector):
    texts = ["", *some_texts(25, seed=7)]
    rows = embed_windows(texts, vector=vector, **settings)
    assert len(rows) > 2 * len(texts)
    prefix = settings.get("text_prefix", "")
    for key, row in rows.items():
        assert row["text"] == texts[int(key[0])][row["char_start"] : row["char_end"]]
        ids = official_tokens(prefix + row["text"])
        assert_close(row["embedding"], expected_vector(pack_ids(ids), vector), key)
        assert (row["n_tokens"], row["n_truncated"]) == (len(ids) + 2, 0) and len(ids) <= 14
    for i, text in enumerate(texts):
        own = [rows[key] for key in sorted(rows) if key[0] == str(i)]
        assert [row["n_chunks"] for row in own] == [len(own)] * len(own)
        ends = [0, *(row["char_end"] for row in own)]
        starts = [*(row["char_start"] for row in own), len(text)]
        for end, start in zip(ends, starts, strict=True):  # what is between two chunks has no tokens
            assert not official_tokens(text[end:start]), text


@pytest.mark.parametrize("overlap", [0, 5])
def test_an_average_weighs_windows_by_their_tokens(overlap):
    texts = ["", *some_texts(40, seed=8)]
    chunks = embed_windows(texts, chunk_overlap=overlap)
    settings = {"on_long": "average", "chunk_overlap": overlap, "max_tokens": 16, "batch_tokens": 60}
    rows = embed_directly(as_documents(texts), keep_text=True, **settings).rows
    assert set(rows) == {(str(i), 0) for i in range(len(texts))}
    for i, text in enumerate(texts):
        windows = [official_tokens(chunks[key]["text"]) for key in sorted(chunks) if key[0] == str(i)]
        vectors = np.array([expected_vector(pack_ids(window), "pooled_output") for window in windows], np.float64)
        weights = np.array([max(1, len(window)) for window in windows])[:, None]
        assert_close(rows[str(i), 0]["embedding"], (vectors * weights).sum(0) / weights.sum(), text)
        assert rows[str(i), 0]["n_tokens"] == sum(len(window) + 2 for window in windows)
        assert rows[str(i), 0]["text"] == text and "char_start" not in rows[str(i), 0]


def test_rejected_long_texts_become_dead_letters_and_no_others_do():
    texts = some_texts(40, seed=9)
    rows, dead_letters, _ = embed_directly(as_documents(texts), on_long="reject", max_tokens=32)
    too_long = {str(i) for i, text in enumerate(texts) if len(official_tokens(text)) + 2 > 32}
    assert 0 < len(too_long) < len(texts)
    assert {dead_letter.id for dead_letter in dead_letters} == too_long and len(dead_letters) == len(too_long)
    assert {(dead_letter.stage, dead_letter.reason) for dead_letter in dead_letters} == {("preprocess", "too_long")}
    kept = {name: segments for name, segments in by_id(texts).items() if name not in too_long}
    assert_official_segments(rows, kept, "pooled_output", 32)


def test_rejecting_looks_at_both_segments_of_a_pair():
    documents = [Document(str(n), "the " * n, "the the the") for n in (5, 6, 7)]
    rows, dead_letters, _ = embed_directly(documents, pair_field="other", on_long="reject", max_tokens=12)
    assert set(rows) == {("5", 0), ("6", 0)}  # [CLS] 6 [SEP] 3 [SEP] are 12 tokens
    assert [dead_letter.id for dead_letter in dead_letters] == ["7"]


# --- preprocessors of another kind: called as they are ---------------------------------------------------------------


@pytest.fixture(scope="module")
def calling_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_hashing_preprocessor(tmp_path_factory.mktemp("hashing") / "model", 1200, can_pack=False)


@pytest.fixture(scope="module")
def packing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_hashing_preprocessor(tmp_path_factory.mktemp("hashing") / "model", 1000, can_pack=True)


def pack_with(folder: str, texts: list[str]) -> list[dict[str, np.ndarray]]:
    """The preprocessor's own tensors `[1, 128]` for each text."""
    packed = {name: tensor.numpy() for name, tensor in tf.saved_model.load(folder)(tf.constant(texts)).items()}
    return [{name: array[i : i + 1] for name, array in packed.items()} for i in range(len(texts))]


@both_graphs
def test_a_preprocessor_without_packing_is_called_as_it_is_and_a_token_beyond_the_vocabulary_costs_its_own_row_only(
    graph, calling_only
):
    texts = ["", "one", *some_texts(20, seed=10, words=(1, 150)), *(f"w{i}" for i in range(60))]
    settings = {"preprocessor": calling_only, "vector": "sequence_output:mean", "encoder_graph": graph}
    rows, dead_letters, _ = embed_directly(as_documents(texts), **settings)
    packed = pack_with(calling_only, texts)
    beyond = {str(i) for i in range(len(texts)) if packed[i]["input_word_ids"].max() >= 1000}  # the encoder's ids
    assert 10 < len(beyond) < len(texts) - 10
    assert {dead_letter.id for dead_letter in dead_letters} == beyond and len(dead_letters) == len(beyond)
    assert {(dead_letter.stage, dead_letter.reason) for dead_letter in dead_letters} == {("encode", "encoder_error")}
    assert {name for name, _ in rows} == set(map(str, range(len(texts)))) - beyond
    for (name, _), row in rows.items():
        own = packed[int(name)]
        assert_close(row["embedding"], expected_vector(own, "sequence_output:mean"), texts[int(name)])
        assert row["n_tokens"] == own["input_mask"].sum()
        assert row["n_truncated"] is None  # it does not tell


@pytest.mark.parametrize("max_tokens", [20, pytest.param(512, marks=pytest.mark.exhaustive)])
def test_an_unknown_preprocessor_with_packing_packs_to_the_limit(max_tokens, packing):
    segments = [list(pair) for pair in zip(some_texts(30, seed=11), some_texts(30, seed=12), strict=True)]
    singles = some_texts(5, seed=14)
    documents = [*(Document(f"pair{i}", *pair) for i, pair in enumerate(segments)), *as_documents(singles)]
    np.random.default_rng(5).shuffle(documents)
    rows = embed_directly(documents, preprocessor=packing, pair_field="other", max_tokens=max_tokens).rows
    assert len(rows) == len(documents)
    preprocessor = tf.saved_model.load(packing)
    for name, columns in (("pair", list(zip(*segments, strict=True))), ("", [singles])):
        tokens = [preprocessor.tokenize(tf.constant(column)) for column in columns]
        packed = preprocessor.bert_pack_inputs(tokens, seq_length=tf.constant(max_tokens))
        for i in range(len(columns[0])):
            alone = {key: tensor[i : i + 1].numpy() for key, tensor in packed.items()}
            assert_close(rows[f"{name}{i}", 0]["embedding"], expected_vector(alone, "pooled_output"), (name, i))


def test_a_preprocessor_that_cannot_pack_pairs_is_refused_for_pairs(calling_only):
    settings = {"encoder": ENCODER, "preprocessor": calling_only, "pair_field": "b"}
    with pytest.raises(ConfigError, match="pair_field"):
        make_embedding_spec(EmbedConfig.from_flat(settings))


# --- encoders that take strings --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_encoders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, str]:
    """By whether their outputs have names."""
    folder = tmp_path_factory.mktemp("text_encoders")
    return {named: save_text_encoder(folder / str(named), named) for named in (False, True)}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_an_encoder_of_strings_gets_the_texts_themselves(named, batch_tokens, text_encoders):
    texts = TEXTS[::3]
    settings = {"encoder": text_encoders[named], "text_prefix": "q: ", "batch_tokens": batch_tokens}
    rows, _, batches = embed_directly(as_documents(texts), **settings)
    outputs = tf.saved_model.load(text_encoders[named])(tf.constant(["q: " + text for text in texts]))
    expected = (outputs["default"] if named else outputs).numpy()
    assert {name for name, _ in rows} == set(map(str, range(len(texts))))
    for i, text in enumerate(texts):
        assert_close(rows[str(i), 0]["embedding"], expected[i], text)
        assert not {"n_tokens", "n_truncated"} & set(rows[str(i), 0])
    assert len(batches) > (1 if batch_tokens > 1 else len(texts) - 1)


def test_an_encoder_of_strings_gives_the_output_that_is_asked_for(text_encoders):
    rows = embed_directly(as_documents(["text"]), encoder=text_encoders[True], vector="other").rows
    expected = tf.saved_model.load(text_encoders[True])(tf.constant(["text"]))["other"][0].numpy()
    assert_close(rows["0", 0]["embedding"], expected)
