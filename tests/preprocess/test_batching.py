"""Batches: each chunk once, within the budget, in few shapes and little memory; and what happens when one fails."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EncoderConfig
from pipeline.encoders.handler import LoadedEncoder
from pipeline.encoders.load import load_encoder
from pipeline.encoders.spec import describe_encoder
from pipeline.preprocess.batching import Batcher, Buckets, bucket_lengths
from pipeline.records import Batch, Chunk, Document
from tests.support.paths import ENCODER
from tests.support.tables import TOLERANCE

GRIDS = st.builds(
    lambda max_tokens, budget: Buckets(tuple(bucket_lengths(max_tokens)), budget),
    st.integers(3, 700),
    st.integers(1, 5000),
)


def make_chunk(name: object, n_tokens: int) -> Chunk:
    ids = np.full(n_tokens, 7, "<i4").tobytes()
    return Chunk(Document(str(name), ""), "", 0, 1, ids, n_tokens, n_tokens, 0)


def batch_all(buckets: Buckets, sizes: list[int]) -> tuple[list[Batch], int]:
    """All batches of one bundle, and the most chunks that waited at any time."""
    batcher, batches, n_waiting, most_waiting = Batcher(buckets), [], 0, 0
    for i, size in enumerate(sizes):
        batch = batcher.add(make_chunk(i, size), size)
        n_waiting += 1
        most_waiting = max(most_waiting, n_waiting)
        if batch is not None:
            batches.append(batch)
            n_waiting -= len(batch)
    return [*batches, *batcher.drain()], most_waiting


@st.composite
def bundles(draw) -> tuple[Buckets, list[int]]:
    buckets = draw(GRIDS)
    sizes = draw(st.lists(st.integers(2, buckets.lengths[-1]), max_size=150))
    return buckets, sizes


@given(bundles())
def test_every_chunk_is_in_one_batch(bundle):
    buckets, sizes = bundle
    batches, _ = batch_all(buckets, sizes)
    assert Counter(chunk.document.id for batch in batches for chunk in batch) == Counter(map(str, range(len(sizes))))
    assert all(batches)  # none is empty


@given(bundles())
def test_batches_fit_their_chunks_and_the_budget(bundle):
    buckets, sizes = bundle
    for batch in batch_all(buckets, sizes)[0]:
        assert max(chunk.n_tokens for chunk in batch) <= batch.length
        assert batch.length in buckets.lengths
        assert len(batch) <= batch.rows
        assert batch.rows == 1 or batch.rows * batch.length <= buckets.budget


@given(GRIDS, st.lists(st.lists(st.integers(2, 700), max_size=150), max_size=4))
def test_shapes_come_from_a_small_fixed_grid(buckets, many_bundles):
    """However many bundles there are: for each length a full batch, and powers of two below it."""
    shapes = set()
    for sizes in many_bundles:
        batches, _ = batch_all(buckets, [min(size, buckets.lengths[-1]) for size in sizes])
        shapes |= {(batch.rows, batch.length) for batch in batches}
    for length in buckets.lengths:
        full = max(1, buckets.budget // length)
        allowed = {full, *(1 << power for power in range(full.bit_length()))}
        assert {rows for rows, other in shapes if other == length} <= allowed
    assert len(bucket_lengths(512)) <= 40


@given(bundles())
def test_no_more_chunks_wait_than_fit_into_one_batch_of_each_length(bundle):
    buckets, sizes = bundle
    _, most_waiting = batch_all(buckets, sizes)
    assert most_waiting <= sum(max(1, buckets.budget // length) for length in buckets.lengths)


def test_a_long_bundle_of_one_length_leaves_as_it_comes():
    buckets = Buckets(tuple(bucket_lengths(512)), 4096)
    batcher = Batcher(buckets)
    batches = [batch for i in range(10_000) if (batch := batcher.add(make_chunk(i, 30), 30))]
    assert sum(map(len, batches)) > 9_800
    assert len({(batch.rows, batch.length) for batch in batches}) == 1


@given(st.integers(3, 5000))
def test_lengths_ascend_to_the_limit_and_waste_little(max_tokens):
    lengths = bucket_lengths(max_tokens)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_tokens
    for shorter, longer in itertools.pairwise(lengths):
        assert longer - shorter <= max(4, shorter)


@given(GRIDS, st.data())
def test_a_chunk_goes_to_the_shortest_length_that_holds_it(buckets, data):
    size = data.draw(st.integers(1, buckets.lengths[-1]))
    assert buckets.length_for(size) == min(length for length in buckets.lengths if length >= size)


def test_partial_batches_are_filled_with_shorter_chunks_instead_of_padding():
    batches, _ = batch_all(Buckets((8, 16), 1 << 20), [16, 16, 16, 8])
    assert [(len(batch), batch.rows, batch.length) for batch in batches] == [(4, 4, 16)]


# --- the encoder itself does not care ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    spec, _ = describe_encoder(EncoderConfig(encoder=ENCODER, vector="sequence_output:mean"))
    return load_encoder(spec)


IDS = st.lists(st.integers(5, 999), min_size=1, max_size=14)


@pytest.mark.numeric
@settings(max_examples=40)
@given(st.lists(IDS, min_size=1, max_size=7), st.integers(0, 3), st.sampled_from([16, 32]), st.randoms())
def test_vectors_do_not_depend_on_padding_company_or_order(encoder, texts, n_padding, length, random):
    chunks = [
        Chunk(Document("", ""), "", 0, 1, np.array([2, *ids, 3], "<i4").tobytes(), len(ids) + 2, len(ids), 0)
        for ids in texts
    ]
    alone = np.concatenate([encoder.encode(Batch([chunk], chunk.n_tokens)) for chunk in chunks])
    order = list(range(len(chunks)))
    random.shuffle(order)
    together = encoder.encode(Batch([chunks[i] for i in order], length, len(chunks) + n_padding))
    assert np.abs(np.asarray(together) - alone[order]).max() <= TOLERANCE


class FakeDevice:
    """Stands for a device: has memory for so many tokens, and cannot compute some rows.

    Each vector is its chunk's name, so that rows that change places are seen.
    """

    def __init__(self, memory_tokens: float = float("inf"), bad: frozenset[int] = frozenset()) -> None:
        self.memory_tokens = memory_tokens
        self.bad = bad
        self.calls: list[tuple[int, int]] = []

    def encode(self, batch: Batch) -> np.ndarray:
        self.calls.append((batch.rows, batch.length))
        assert len(batch) <= batch.rows
        if batch.rows * batch.length > self.memory_tokens:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor\nmore")
        if bad := [chunk.document.id for chunk in batch if int(chunk.document.id) in self.bad]:
            raise tf.errors.InvalidArgumentError(None, None, f"indices[{bad[0]}] is not in [0, 1000)\nmore")
        return np.array([[float(chunk.document.id)] for chunk in batch], np.float32)

    def warm_up(self) -> int:
        return 1


def make_batch(n: int, length: int = 16, rows: int = 0) -> Batch:
    return Batch([make_chunk(i, length) for i in range(n)], length, rows)


@given(st.integers(1, 40), st.integers(0, 24), st.integers(16, 800), st.frozensets(st.integers(0, 39), max_size=5))
def test_whatever_fails_every_other_row_gets_its_own_vector(n, n_padding, memory_tokens, bad):
    batch = make_batch(n, rows=n + n_padding)
    encoded = LoadedEncoder(FakeDevice(memory_tokens, bad)).encode(batch)
    assert list(encoded.batch) == list(batch)
    assert len(encoded.vectors) == len(encoded.errors) == n
    for i, (vector, error) in enumerate(zip(encoded.vectors, encoded.errors, strict=True)):
        if i in bad:
            assert vector is None
            assert error == f"indices[{i}] is not in [0, 1000)"  # one line
        else:
            assert vector.tolist() == [i]
            assert error == ""


def test_batches_are_halved_when_memory_runs_out_and_stay_so():
    device = FakeDevice(memory_tokens=5 * 16)
    loaded = LoadedEncoder(device)
    assert all(vector is not None for vector in loaded.encode(make_batch(16)).vectors)
    assert device.calls[0] == (16, 16)
    device.calls.clear()
    loaded.encode(make_batch(16))
    assert all(rows * length <= device.memory_tokens for rows, length in device.calls), "it ran out of memory again"


def test_rows_that_fit_alone_are_encoded_alone_without_padding_rows():
    encoded = LoadedEncoder(FakeDevice(memory_tokens=16)).encode(make_batch(3, length=16))
    assert encoded.errors == ["", "", ""]


def test_an_input_that_does_not_fit_alone_costs_its_own_row_only():
    batch = Batch([make_chunk(i, 16) for i in range(3)], 16)
    encoded = LoadedEncoder(FakeDevice(memory_tokens=10)).encode(batch)
    assert encoded.vectors == [None] * 3
    assert all("does not fit into memory" in error for error in encoded.errors)


def test_a_bad_row_is_found_in_few_attempts():
    device = FakeDevice(bad=frozenset({37}))
    encoded = LoadedEncoder(device).encode(make_batch(64))
    assert [i for i, vector in enumerate(encoded.vectors) if vector is None] == [37]
    assert len(device.calls) <= 2 * 6 + 1


def test_a_bad_row_does_not_make_later_batches_smaller():
    device = FakeDevice(bad=frozenset({3}))
    loaded = LoadedEncoder(device)
    loaded.encode(make_batch(8))
    device.calls.clear()
    loaded.encode(Batch([make_chunk(i, 16) for i in range(10, 18)], 16))
    assert device.calls == [(8, 16)]


def test_a_broken_device_is_not_the_rows_fault():
    class BrokenDevice(FakeDevice):
        def encode(self, batch: Batch) -> np.ndarray:
            raise tf.errors.InternalError(None, None, "the device is gone")

    with pytest.raises(tf.errors.InternalError):
        LoadedEncoder(BrokenDevice()).encode(make_batch(4))


def test_a_batch_survives_pickling_with_its_shape():
    import pickle

    batch = pickle.loads(pickle.dumps(make_batch(3, length=16, rows=4)))
    assert (list(batch), batch.length, batch.rows) == (list(make_batch(3)), 16, 4)
