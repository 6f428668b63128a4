"""Rows of the table against the official encoder, called directly with each text alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import pipeline
from pipeline.config import EncoderConfig
from pipeline.encoders.load import load_encoder
from pipeline.encoders.spec import describe_encoder
from pipeline.errors import ConfigError
from pipeline.records import Batch, Chunk, Document
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.official import (
    INPUTS,
    expected_vector,
    golden_texts,
    official_pack,
    official_tokens,
    pack_ids,
    save_module,
)
from tests.support.paths import PREPROCESSOR, REFERENCE
from tests.support.runs import embed_records, run_pipeline
from tests.support.tables import Rows, assert_close, read_dead_letters, read_rows

VECTORS = [
    "pooled_output",
    *(f"sequence_output:{pooling}" for pooling in ("mean", "max", "cls", "tokens")),
    *(f"encoder_outputs/{layer}:{pooling}" for layer in (0, 1) for pooling in ("mean", "max", "cls")),
    "encoder_outputs/-1:mean",
    "encoder_outputs/-2:cls",
]
both_graphs = pytest.mark.parametrize("graph", ["fast", "published"])
# More than one bucket, more than one batch of some, texts of every script, one without tokens and some that are cut.
TEXTS = [*golden_texts(), *some_texts(40)]
FEW_TEXTS = ["", "one", *some_texts(20, seed=2), golden_texts()[40]]


def pack_alone(segments: list[str], max_tokens: int) -> dict[str, np.ndarray]:
    """The official preprocessor's tensors for one text or pair: no longer than it is, nor than the limit."""
    n = sum(len(official_tokens(segment)) for segment in segments) + 1 + len(segments)
    return official_pack(segments, min(n, max_tokens))


def assert_rows_equal(rows: Rows, texts: Mapping[str, list[str]], vector: str, max_tokens: int = 512) -> None:
    """One row for each id, and in it what the official encoder gives for those segments alone."""
    assert set(rows) == {(name, 0) for name in texts}
    for name, segments in texts.items():
        packed = pack_alone(segments, max_tokens)
        row = rows[name, 0]
        assert_close(row["embedding"], expected_vector(packed, vector), segments)
        assert row["n_tokens"] == packed["input_mask"].sum()
        n_all = sum(len(official_tokens(segment)) for segment in segments) + 1 + len(segments)
        assert row["n_truncated"] == n_all - row["n_tokens"]


def by_id(texts: list[str], prefix: str = "") -> dict[str, list[str]]:
    return {str(i): [prefix + text] for i, text in enumerate(texts)}


@both_graphs
@pytest.mark.parametrize("vector", VECTORS)
def test_a_row_is_what_the_official_encoder_gives_for_its_text_alone(vector, graph, tmp_path):
    texts = TEXTS if vector in ("pooled_output", "sequence_output:mean") else FEW_TEXTS
    settings = {"vector": vector, "encoder_graph": graph}
    rows, manifest = embed_records(tmp_path, as_records(texts), preprocessor=PREPROCESSOR, **settings)
    assert manifest.counts["batch"]["batches"] > 4
    assert_rows_equal(rows, by_id(texts), vector)


def test_a_row_is_what_the_official_pair_of_models_gives_at_its_own_length_of_128(tmp_path):
    from tests.support.official import official_encoder, official_preprocessor

    texts = TEXTS[:120]
    rows, _ = embed_records(tmp_path, as_records(texts), max_tokens=128)
    for i, text in enumerate(texts):
        packed = official_preprocessor()(tf.constant([text]))  # [1, 128], as the models' documentation does it
        expected = official_encoder()(packed)["pooled_output"][0].numpy()
        assert_close(rows[str(i), 0]["embedding"], expected, text)


@both_graphs
@pytest.mark.parametrize("batch_tokens", [1, 700, 10_000_000])
def test_rows_do_not_depend_on_the_size_of_batches(batch_tokens, graph, tmp_path):
    texts = some_texts(150)
    rows, manifest = embed_records(tmp_path, as_records(texts), batch_tokens=batch_tokens, encoder_graph=graph)
    batches = manifest.counts["batch"]["batches"]
    assert batches == 150 + manifest.counts["encode"]["probes"] if batch_tokens == 1 else batches < 75
    assert_rows_equal(rows, by_id(texts), "pooled_output")


@both_graphs
def test_rows_do_not_depend_on_the_order_of_documents_or_on_their_files(graph, tmp_path):
    texts = some_texts(150)
    records = as_records(texts)
    np.random.default_rng(3).shuffle(records)
    for i, part in enumerate(np.array_split(records, 7)):
        write_jsonl(tmp_path / f"{i}.jsonl", part)
    run_pipeline(tmp_path, encoder_graph=graph)
    assert_rows_equal(read_rows(str(tmp_path / "table")), by_id(texts), "pooled_output")


@both_graphs
def test_rows_do_not_depend_on_bundles(graph, tmp_path):
    texts = some_texts(150)
    threads = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]
    rows, manifest = embed_records(tmp_path, as_records(texts), threads, split_bytes=2000, encoder_graph=graph)
    assert len(manifest.files) > 1, "the corpus fits into one bundle, which proves nothing"
    assert_rows_equal(rows, by_id(texts), "pooled_output")


@pytest.mark.parametrize("max_tokens", [16, 512])
def test_pairs_are_packed_and_typed_as_the_official_preprocessor_does(max_tokens, tmp_path):
    texts, seconds = some_texts(30, seed=4), ["", *some_texts(29, seed=5)]
    records = [{"id": str(i), "text": a, "other": b} for i, (a, b) in enumerate(zip(texts, seconds, strict=True))]
    rows, _ = embed_records(tmp_path, records, pair_field="other", max_tokens=max_tokens)
    pairs = {str(i): [a, b] for i, (a, b) in enumerate(zip(texts, seconds, strict=True))}
    assert_rows_equal(rows, pairs, "pooled_output", max_tokens)


def test_a_document_without_its_second_segment_is_a_single_text(tmp_path):
    records = [{"id": "0", "text": "alone"}, {"id": "1", "text": "one", "other": "two"}]
    rows, _ = embed_records(tmp_path, records, pair_field="other")
    assert_rows_equal(rows, {"0": ["alone"], "1": ["one", "two"]}, "pooled_output")


def test_the_prefix_is_part_of_every_text(tmp_path):
    rows, _ = embed_records(tmp_path, as_records(FEW_TEXTS), text_prefix="query: ")
    assert_rows_equal(rows, by_id(FEW_TEXTS, "query: "), "pooled_output")


def test_the_prefix_is_not_part_of_second_segments(tmp_path):
    rows, _ = embed_records(
        tmp_path, [{"id": "0", "text": "one", "other": "two"}], pair_field="other", text_prefix="query: "
    )
    assert_rows_equal(rows, {"0": ["query: one", "two"]}, "pooled_output")


@pytest.mark.parametrize("max_tokens", [3, 16, 37])
def test_long_texts_are_truncated_as_the_official_preprocessor_does(max_tokens, tmp_path):
    texts = some_texts(40, seed=6)
    rows, manifest = embed_records(tmp_path, as_records(texts), max_tokens=max_tokens, vector="sequence_output:mean")
    assert manifest.counts["preprocess"]["truncated_tokens"] > 0
    assert_rows_equal(rows, by_id(texts), "sequence_output:mean", max_tokens)


def list_windows(ids: tuple[int, ...], size: int, overlap: int) -> list[tuple[int, ...]]:
    """Windows of `size` tokens, each starting `overlap` tokens before the end of the last, until all are covered."""
    windows = [ids[:size]]
    end = size
    while end < len(ids):
        start = end - overlap
        windows.append(ids[start : start + size])
        end = start + size
    return windows


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("vector", ["pooled_output", "sequence_output:tokens"])
def test_chunks_are_windows_over_the_official_tokens(overlap, vector, tmp_path):
    texts = ["", *some_texts(25, seed=7)]
    rows, _ = embed_records(
        tmp_path, as_records(texts), on_long="chunk", chunk_overlap=overlap, max_tokens=16, vector=vector
    )
    expected = {
        (str(i), j): window
        for i, text in enumerate(texts)
        for j, window in enumerate(list_windows(official_tokens(text), 14, overlap))
    }
    assert set(rows) == set(expected)
    assert len(rows) > 2 * len(texts)
    for key, window in expected.items():
        assert_close(rows[key]["embedding"], expected_vector(pack_ids(window), vector), key)
        assert (rows[key]["n_tokens"], rows[key]["n_truncated"]) == (len(window) + 2, 0)


@pytest.mark.parametrize("overlap", [0, 5])
def test_an_average_weighs_windows_by_their_tokens(overlap, tmp_path):
    texts = ["", *some_texts(40, seed=8)]
    rows, _ = embed_records(
        tmp_path, as_records(texts), on_long="average", chunk_overlap=overlap, max_tokens=16, batch_tokens=60
    )
    assert set(rows) == {(str(i), 0) for i in range(len(texts))}
    for i, text in enumerate(texts):
        windows = list_windows(official_tokens(text), 14, overlap)
        vectors = np.array([expected_vector(pack_ids(window), "pooled_output") for window in windows], np.float64)
        weights = np.array([max(1, len(window)) for window in windows])[:, None]
        assert_close(rows[str(i), 0]["embedding"], (vectors * weights).sum(0) / weights.sum(), text)
        assert rows[str(i), 0]["n_tokens"] == sum(len(window) + 2 for window in windows)


def test_rejected_long_texts_become_dead_letters_and_no_others_do(tmp_path):
    texts = some_texts(40, seed=9)
    rows, manifest = embed_records(tmp_path, as_records(texts), on_long="reject", max_tokens=32, max_dead_fraction=1)
    too_long = {str(i) for i, text in enumerate(texts) if len(official_tokens(text)) + 2 > 32}
    assert 0 < len(too_long) < len(texts)
    letters = read_dead_letters(str(tmp_path / "table"))
    assert {letter["id"] for letter in letters} == too_long
    assert {(letter["stage"], letter["reason"]) for letter in letters} == {("preprocess", "too_long")}
    assert manifest.dead_letters == {"too_long": len(too_long)}
    kept = {name: segments for name, segments in by_id(texts).items() if name not in too_long}
    assert_rows_equal(rows, kept, "pooled_output", 32)


def test_rejecting_looks_at_both_segments_of_a_pair(tmp_path):
    words = ["the " * n for n in (5, 6, 7)]
    records = [{"id": str(len(a.split())), "text": a, "other": "the the the"} for a in words]
    rows, _ = embed_records(tmp_path, records, pair_field="other", on_long="reject", max_tokens=12, max_dead_fraction=1)
    assert set(rows) == {("5", 0), ("6", 0)}  # [CLS] 6 [SEP] 3 [SEP] are 12 tokens
    assert [letter["id"] for letter in read_dead_letters(str(tmp_path / "table"))] == ["7"]


@both_graphs
@pytest.mark.parametrize("case", ["b1_s8_full", "b4_s8_ragged", "b5_s16_ragged", "b8_s128_ragged", "b2_s37_oddlen"])
def test_the_loaded_encoder_gives_the_golden_vectors(case, graph):
    with np.load(REFERENCE / "golden_tiny_v1000.npz") as golden:
        ids, mask, types = (golden[f"{case}/{name}"] for name in INPUTS)
        expected = golden[f"{case}/pooled_output"]
    chunks = []
    for row in range(len(ids)):
        n = int(mask[row].sum())
        assert mask[row, :n].all()
        n_first = int((types[row, :n] == 0).argmin()) if types[row, :n].any() else n
        if types[row, :n_first].any() or not types[row, n_first:n].all():
            continue  # no text is typed like that
        chunks.append((row, Chunk(Document("", ""), "", 0, 1, ids[row, :n].astype("<i4").tobytes(), n_first, n, 0)))
    assert chunks, "no row of the case can be a chunk"
    spec, _ = describe_encoder(EncoderConfig(encoder=str(REFERENCE / "tiny_v1000"), encoder_graph=graph))
    assert spec.graph == graph
    encoder, batch = load_encoder(spec), Batch([chunk for _, chunk in chunks], ids.shape[1])
    vectors = np.asarray(encoder.encode(batch))
    assert_close(vectors, expected[[row for row, _ in chunks]], case)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, encoder.encode(batch)), "the same batch gives other numbers"


# --- preprocessors of another kind: called as they are ---------------------------------------------------------------


def save_hashing_preprocessor(folder: Path, n_ids: int, can_pack: bool) -> str:
    """A preprocessor that is no WordPiece: words between blanks, hashed to ids; pads with 1 to 128 tokens."""

    def tokenize(texts: tf.Tensor) -> tf.RaggedTensor:
        words = tf.strings.split(texts, " ")
        return words.with_flat_values(5 + tf.strings.to_hash_bucket_fast(words.flat_values, n_ids - 5))

    def pack(segments: list[tf.RaggedTensor], length: Any) -> dict[str, tf.Tensor]:
        room = tf.cast(length, tf.int64) // len(segments) - 2
        parts = [tf.cast(segment[:, :room], tf.int32) for segment in segments]
        ends = [tf.fill([tf.shape(part)[0], 1], 3) for part in parts]
        starts = [tf.fill([tf.shape(part)[0], 1 - i], 2) for i, part in enumerate(parts)]
        full = [tf.concat(three, 1) for three in zip(starts, parts, ends, strict=True)]
        types = tf.concat([tf.zeros_like(part) + i for i, part in enumerate(full)], 1)
        ids = tf.concat(full, 1)
        shape = tf.stack([tf.constant(-1, tf.int64), tf.cast(length, tf.int64)])
        return {
            "input_word_ids": ids.to_tensor(1, shape=shape),
            "input_mask": tf.ones_like(ids).to_tensor(0, shape=shape),
            "input_type_ids": types.to_tensor(0, shape=shape),
        }

    strings = tf.TensorSpec([None], tf.string)
    call = tf.function(lambda texts: pack([tokenize(texts)], 128), input_signature=[strings])
    if not can_pack:
        return save_module(folder, call=call)
    spec = tf.RaggedTensorSpec([None, None], tf.int64)
    pack_any = tf.function(lambda inputs, seq_length: pack(inputs, seq_length))
    for n in (1, 2):
        pack_any.get_concrete_function([spec] * n, seq_length=tf.TensorSpec([], tf.int32))
    tokenizing = tf.function(tokenize, input_signature=[strings])
    return save_module(folder, call=call, tokenize=tokenizing, bert_pack_inputs=pack_any)


def test_an_unknown_preprocessor_without_packing_is_called_as_it_is(tmp_path):
    folder = save_hashing_preprocessor(tmp_path / "hashing", 1000, can_pack=False)
    texts = ["", "one", *some_texts(30, seed=10, words=(1, 150))]
    rows, _ = embed_records(tmp_path, as_records(texts), preprocessor=folder, vector="sequence_output:mean")
    preprocessor = tf.saved_model.load(folder)
    assert len(rows) == len(texts)
    for i, text in enumerate(texts):
        packed = {name: tensor.numpy() for name, tensor in preprocessor(tf.constant([text])).items()}
        assert_close(rows[str(i), 0]["embedding"], expected_vector(packed, "sequence_output:mean"), text)
        assert rows[str(i), 0]["n_tokens"] == packed["input_mask"].sum()
        assert rows[str(i), 0]["n_truncated"] is None  # it does not tell


@pytest.mark.parametrize("max_tokens", [20, 512])
def test_an_unknown_preprocessor_with_packing_packs_to_the_limit(max_tokens, tmp_path):
    folder = save_hashing_preprocessor(tmp_path / "hashing", 1000, can_pack=True)
    texts, seconds = some_texts(30, seed=11), some_texts(30, seed=12)
    records = [{"id": str(i), "text": a, "other": b} for i, (a, b) in enumerate(zip(texts, seconds, strict=True))]
    del records[7]["other"]
    rows, _ = embed_records(tmp_path, records, preprocessor=folder, pair_field="other", max_tokens=max_tokens)
    preprocessor = tf.saved_model.load(folder)
    for record in records:
        segments = [record[name] for name in ("text", "other") if name in record]
        tokens = [preprocessor.tokenize(tf.constant([segment])) for segment in segments]
        packed = preprocessor.bert_pack_inputs(tokens, seq_length=tf.constant(max_tokens))
        expected = expected_vector({name: tensor.numpy() for name, tensor in packed.items()}, "pooled_output")
        assert_close(rows[record["id"], 0]["embedding"], expected, segments)


def test_a_preprocessor_that_cannot_pack_pairs_is_refused_for_pairs(tmp_path):
    folder = save_hashing_preprocessor(tmp_path / "hashing", 1000, can_pack=False)
    with pytest.raises(ConfigError, match="pair_field"):
        embed_records(tmp_path, [{"id": "0", "text": "a", "b": "b"}], preprocessor=folder, pair_field="b")


@both_graphs
def test_a_token_beyond_the_vocabulary_costs_its_own_row_only(graph, tmp_path):
    folder = save_hashing_preprocessor(tmp_path / "hashing", 1200, can_pack=False)  # the encoder knows 1000 ids
    texts = [f"w{i}" for i in range(60)]
    preprocessor = tf.saved_model.load(folder)
    highest = preprocessor(tf.constant(texts))["input_word_ids"].numpy().max(1)
    beyond = {str(i) for i in range(60) if highest[i] >= 1000}
    assert 0 < len(beyond) < 60
    settings = {"preprocessor": folder, "max_dead_fraction": 1, "encoder_graph": graph}
    rows, manifest = embed_records(tmp_path, as_records(texts), **settings)
    letters = read_dead_letters(str(tmp_path / "table"))
    assert {letter["id"] for letter in letters} == beyond
    assert {(letter["stage"], letter["reason"]) for letter in letters} == {("encode", "encoder_error")}
    assert {name for name, _ in rows} == set(map(str, range(60))) - beyond
    assert manifest.dead_letters == {"encoder_error": len(beyond)}
    for (name, _), row in rows.items():
        packed = {key: t.numpy() for key, t in preprocessor(tf.constant([texts[int(name)]])).items()}
        assert_close(row["embedding"], expected_vector(packed, "pooled_output"), name)


# --- encoders that take strings --------------------------------------------------------------------------------------


def save_text_encoder(folder: Path, named: bool) -> str:
    """Strings to `[B, 5]`: lengths and hashes of each text by itself."""

    def encode(texts: tf.Tensor) -> Any:
        sizes = tf.cast(tf.strings.length(texts), tf.float32)
        hashes = [tf.cast(tf.strings.to_hash_bucket_strong(texts, 97, [1, i]), tf.float32) for i in range(4)]
        vectors = tf.stack([sizes, *hashes], 1)
        return {"default": vectors, "other": vectors + 1} if named else vectors

    return save_module(folder, call=tf.function(encode, input_signature=[tf.TensorSpec([None], tf.string)]))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_an_encoder_of_strings_gets_the_texts_themselves(named, batch_tokens, tmp_path):
    folder = save_text_encoder(tmp_path / "encoder", named)
    texts = TEXTS[::3]
    rows, manifest = embed_records(
        tmp_path, as_records(texts), encoder=folder, text_prefix="q: ", batch_tokens=batch_tokens
    )
    encoder = tf.saved_model.load(folder)
    assert {name for name, _ in rows} == set(map(str, range(len(texts))))
    for i, text in enumerate(texts):
        outputs = encoder(tf.constant(["q: " + text]))
        assert_close(rows[str(i), 0]["embedding"], (outputs["default"] if named else outputs)[0].numpy(), text)
        assert rows[str(i), 0].get("n_tokens") is None
        assert rows[str(i), 0].get("n_truncated") is None
    assert manifest.counts["batch"]["batches"] > (1 if batch_tokens > 1 else len(texts) - 1)


def test_an_encoder_of_strings_gives_the_output_that_is_asked_for(tmp_path):
    folder = save_text_encoder(tmp_path / "encoder", named=True)
    rows, _ = embed_records(tmp_path, as_records(["text"]), encoder=folder, vector="other")
    expected = tf.saved_model.load(folder)(tf.constant(["text"]))["other"][0].numpy()
    assert_close(rows["0", 0]["embedding"], expected)


# --- the Python entry points ------------------------------------------------------------------------------------------


def test_the_public_function_can_be_called_again_and_again(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", as_records(["one", "two"]))
    from tests.support.runs import make_config

    for i in range(2):
        manifest = pipeline.build_table(make_config(tmp_path, output=str(tmp_path / f"table{i}")))
        assert manifest.rows == 2


def test_embed_documents_gives_the_same_rows_inside_any_pipeline(tmp_path):
    import apache_beam as beam
    from apache_beam.testing.util import assert_that

    from pipeline.embed import EmbedDocuments
    from pipeline.engine import make_runner
    from tests.support.runs import make_config

    texts = some_texts(20, seed=13)
    config = make_config(tmp_path)
    options = beam.options.pipeline_options.PipelineOptions([])

    def check(rows: list[Any]) -> None:
        assert {row.id for row in rows} == set(map(str, range(len(texts))))
        for row in rows:
            expected = expected_vector(pack_alone([texts[int(row.id)]], 512), "pooled_output")
            assert_close(np.frombuffer(row.vector, "<f4"), expected, row.id)

    with beam.Pipeline(runner=make_runner(options), options=options) as p:
        documents = p | beam.Create([Document(str(i), text) for i, text in enumerate(texts)])
        assert_that((documents | EmbedDocuments(config)).rows, check)
