"""Vectors: pooled, cut, normalised and rounded within the bounds that are promised; broken ones become dead letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from pipeline.config import VectorChoice, VectorConfig
from pipeline.records import Chunk, DeadLetter, Document
from pipeline.vectors.finishing import ChunkAverager, VectorRule, finish_chunks
from pipeline.vectors.pooling import pool_outputs
from pipeline.vectors.storing import quantize_vectors, restore_vectors, shape_vectors
from tests.support.corpora import some_texts
from tests.support.official import save_module
from tests.support.stages import as_documents, embed_directly
from tests.support.tables import TOLERANCE, assert_close

NUMBERS = st.floats(-(2.0**126), 2.0**126, width=32)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 40))
MATRICES = st_np.arrays(np.float32, SHAPES, elements=NUMBERS | st.floats(-2, 2, width=32))
SMALL_MATRICES = st_np.arrays(np.float32, SHAPES, elements=st.floats(-65504, 65504, width=32))


def store_and_restore(vectors: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    stored, scales = quantize_vectors(vectors, dtype)
    joined = b"".join(row.tobytes() for row in stored)
    return restore_vectors(joined, scales, dtype, vectors.shape[1]), scales


@given(MATRICES)
def test_float32_keeps_every_bit(vectors):
    restored, scales = store_and_restore(vectors, "float32")
    assert restored.tobytes() == vectors.tobytes()
    assert not scales.any()


@given(SMALL_MATRICES)
def test_float16_is_within_its_bound(vectors):
    restored, _ = store_and_restore(vectors, "float16")
    error = np.abs(restored.astype(np.float64) - vectors)
    assert (error <= np.maximum(np.abs(vectors.astype(np.float64)) * 2**-11, 2**-25)).all()


@given(MATRICES)
@example(np.full((1, 2), np.finfo(np.float32).max))
def test_int8_is_within_half_a_step(vectors):
    restored, scales = store_and_restore(vectors, "int8")
    assert restored.dtype == np.float32
    exact = vectors.astype(np.float64)
    steps = np.abs(exact).max(1, keepdims=True) / 127
    error = np.abs(restored.astype(np.float64) - exact)
    slack = np.abs(exact) * 2**-21 + 127 * 2**-149  # float32's own rounding of scale and product
    assert (error <= steps / 2 + slack).all()
    assert np.allclose(scales, steps[:, 0], rtol=1e-6, atol=2**-149)


@given(MATRICES)
def test_int8_uses_the_whole_range_and_no_more(vectors):
    stored, scales = quantize_vectors(vectors, "int8")
    assert stored.dtype == np.int8
    for row, scale in zip(stored, scales, strict=True):
        if scale > np.finfo(np.float32).tiny:
            assert np.abs(row.astype(int)).max() == 127


@given(MATRICES)
def test_binary_keeps_signs_eight_a_byte_most_significant_first(vectors):
    stored, _ = quantize_vectors(vectors, "binary")
    dimension = vectors.shape[1]
    assert stored.shape == (len(vectors), -(-dimension // 8))
    for row, numbers in zip(stored.tolist(), vectors.tolist(), strict=True):
        bits = "".join(f"{byte:08b}" for byte in row)
        assert bits == "".join("1" if number > 0 else "0" for number in numbers).ljust(len(bits), "0")
    restored, _ = store_and_restore(vectors, "binary")
    assert (restored == np.where(vectors > 0, 1, -1)).all()


@given(MATRICES)
def test_normalized_vectors_have_length_one_and_their_direction(vectors):
    shaped = shape_vectors(vectors, VectorConfig(normalize=True))
    for before, after in zip(vectors.astype(np.float64), shaped.astype(np.float64), strict=True):
        length = np.sqrt(sum(number * number for number in before))
        if length == 0:
            assert not after.any()
        else:
            assert abs(np.linalg.norm(after) - 1) < 1e-6
            assert np.abs(after - before / length).max() < 1e-6


@given(MATRICES, st.integers(1, 40), st.booleans())
def test_dimensions_are_cut_before_normalizing(vectors, dimensions, normalize):
    shaped = shape_vectors(vectors, VectorConfig(dimensions=dimensions, normalize=normalize))
    alone = shape_vectors(vectors[:, :dimensions], VectorConfig(normalize=normalize))
    assert shaped.dtype == np.float32
    assert shaped.flags.c_contiguous
    assert shaped.tobytes() == alone.tobytes()


@settings(max_examples=50)
@given(
    st_np.arrays(np.float32, (3, 4, 2), elements=st.floats(-100, 100, width=32)),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.integers(0, 3),
)
def test_pooling_ignores_padding_whatever_it_holds(values, sizes, n_padding):
    mask = np.array([[int(i < size) for i in range(4 + n_padding)] for size in sizes], np.int32)
    padded = np.concatenate([values, np.full((3, n_padding, 2), 1e9, np.float32)], 1)
    padded[mask == 0] = 1e9
    for pooling, pool in (("mean", np.mean), ("max", np.max)):
        choice = VectorChoice("x", None, pooling)
        pooled = pool_outputs({"x": tf.constant(padded)}, tf.constant(mask), choice).numpy()
        for row, size in enumerate(sizes):
            expected = pool(values[row, :size].astype(np.float64), axis=0)
            np.testing.assert_allclose(pooled[row], expected, rtol=1e-5, atol=1e-4)


# --- through all stages -----------------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_rows_hold_what_the_settings_say(dtype):
    documents = as_documents(some_texts(30))
    plain = embed_directly(documents).rows
    shaped = embed_directly(documents, dtype=dtype, dimensions=37, normalize=True).rows
    assert set(shaped) == set(plain)
    for key, row in plain.items():
        cut = row["embedding"][:37].astype(np.float64)
        exact = cut / np.linalg.norm(cut)
        found = shaped[key]["embedding"]
        if dtype == "binary":
            clear = np.abs(exact) > TOLERANCE
            assert (found == np.where(exact > 0, 1, -1))[clear].all() and set(found.tolist()) <= {-1, 1}
            continue
        bound = {"float32": 0, "float16": 2**-12, "int8": np.abs(exact).max() / 127 / 2}[dtype]
        assert np.abs(found - exact).max() <= bound + TOLERANCE


def save_failing_encoder(folder: Path) -> str:
    """An encoder of strings that gives a broken number for texts that name one."""
    values = {"nan": float("nan"), "inf": float("inf"), "minus": float("-inf"), "large": 1e5}

    def encode(texts: tf.Tensor) -> tf.Tensor:
        sizes = tf.cast(tf.strings.length(texts), tf.float32)
        numbers = tf.ones_like(sizes)
        for name, value in values.items():
            numbers = tf.where(tf.strings.regex_full_match(texts, f".*{name}.*"), value, numbers)
        return tf.stack([sizes, numbers], 1)

    return save_module(folder, call=tf.function(encode, input_signature=[tf.TensorSpec([None], tf.string)]))


@pytest.fixture(scope="module")
def failing_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_failing_encoder(tmp_path_factory.mktemp("failing") / "encoder")


def some_broken(word: str) -> tuple[list[str], set[str]]:
    """Texts, and the ids of those with the word."""
    return [f"text {i}" + f" {word}" * (i % 4 == 0) for i in range(40)], {str(i) for i in range(0, 40, 4)}


@pytest.mark.parametrize(
    ("word", "dtype", "message"),
    [
        ("nan", "float32", "NaN"),
        ("inf", "float32", "infinity"),
        ("minus", "int8", "infinity"),
        ("nan", "binary", "NaN"),
        ("large", "float16", "65504"),
    ],
)
def test_vectors_that_are_not_finite_become_dead_letters_and_no_others(word, dtype, message, failing_encoder):
    texts, broken = some_broken(word)
    rows, dead_letters, _ = embed_directly(as_documents(texts), encoder=failing_encoder, dtype=dtype)
    assert {dead_letter.id for dead_letter in dead_letters} == broken and len(dead_letters) == len(broken)
    assert {(dead_letter.stage, dead_letter.reason) for dead_letter in dead_letters} == {("encode", "not_finite")}
    assert all(
        message in dead_letter.message and dead_letter.text == texts[int(dead_letter.id)]
        for dead_letter in dead_letters
    )
    assert {name for name, _ in rows} == set(map(str, range(40))) - broken
    assert all(np.isfinite(row["embedding"]).all() for row in rows.values())


# --- averaging chunks -------------------------------------------------------------------------------------------------


def make_parts(name: str, weights: list[int], vectors: np.ndarray) -> list[tuple[Chunk, np.ndarray, str]]:
    document = Document(name, name)
    return [
        (Chunk(document, name, i, len(weights), b"\0" * 4 * (w + 2), w + 2, w, 0), vectors[i], "")
        for i, w in enumerate(weights)
    ]


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=5),
    st.randoms(),
    st.integers(0, 2**32 - 1),
)
def test_averages_do_not_depend_on_the_order_in_which_chunks_arrive(documents, random, seed):
    rng = np.random.default_rng(seed)
    parts, expected = [], {}
    for i, weights in enumerate(documents):
        vectors = rng.normal(size=(len(weights), 3)).astype(np.float32)
        parts += make_parts(str(i), weights, vectors)
        expected[str(i)] = sum(w * v.astype(np.float64) for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    random.shuffle(parts)
    averager = ChunkAverager()
    results = [result for part in parts if (result := averager.add(part)) is not None]
    assert not averager.unfinished()
    assert sorted(chunk.document.id for chunk, _, _ in results) == sorted(expected)
    for chunk, vector, error in results:
        assert error == ""
        assert_close(vector, expected[chunk.document.id])


@pytest.mark.parametrize(
    ("broken", "reason", "message"),
    [
        ((np.array([np.nan, 1], np.float32), ""), "not_finite", "the vector holds NaN"),
        ((None, "no such token"), "encoder_error", "chunk 1: no such token"),
    ],
    ids=["NaN", "error"],
)
def test_an_average_with_a_broken_chunk_is_one_dead_letter(broken, reason, message):
    parts = make_parts("a", [3, 1, 2], np.ones((3, 2), np.float32))
    parts[1] = (parts[1][0], *broken)
    averager = ChunkAverager()
    results = [result for part in parts if (result := averager.add(part)) is not None]
    (dead_letter,) = finish_chunks(results, VectorRule(average=True))
    assert isinstance(dead_letter, DeadLetter)
    assert (dead_letter.id, dead_letter.reason) == ("a", reason) and dead_letter.message.endswith(message)


def test_equal_documents_at_once_are_averaged_each_for_itself():
    one = make_parts("same", [3, 1], np.array([[1.0], [5.0]], np.float32))
    averager = ChunkAverager()
    results = [averager.add(part) for part in (one[0], one[0], one[1], one[1])]
    assert [result is not None for result in results] == [False, False, True, True]
    assert [result[1].tolist() for result in results[2:]] == [[2.0], [2.0]]


def test_a_torn_document_is_noticed():
    averager = ChunkAverager()
    averager.add(make_parts("torn", [1, 1], np.zeros((2, 1), np.float32))[0])
    assert [chunk.document.id for chunk in averager.unfinished()] == ["torn"]


@given(st.lists(st.sampled_from(["good", "nan", "inf", "error"]), max_size=12))
def test_every_chunk_becomes_a_row_or_a_dead_letter(kinds):
    values = {"good": np.ones(2, np.float32), "nan": np.array([1, np.nan], np.float32), "error": None}
    values["inf"] = np.array([np.inf, 1], np.float32)
    results = [
        (Chunk(Document(f"{i}{kind}", ""), "", 0, 1, b"\0" * 12, 3, 1, 0), values[kind], "bad" * (kind == "error"))
        for i, kind in enumerate(kinds)
    ]
    finished = list(finish_chunks(results, VectorRule()))
    rows = [row.id for row in finished if not isinstance(row, DeadLetter)]
    dead_letters = {
        dead_letter.id: dead_letter.reason for dead_letter in finished if isinstance(dead_letter, DeadLetter)
    }
    assert rows == [f"{i}good" for i, kind in enumerate(kinds) if kind == "good"]
    reasons = {"nan": "not_finite", "inf": "not_finite", "error": "encoder_error"}
    assert dead_letters == {f"{i}{kind}": reasons[kind] for i, kind in enumerate(kinds) if kind != "good"}
