"""What the benchmark `peers` gives the others and when it takes two sides' work for the same; without the others."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.__main__ import BENCHMARKS, ON_REQUEST
from benchmarks.measure import BenchmarkError
from benchmarks.peer_sides import make_batches
from benchmarks.peers import LOCK, check_vectors


class Encoding(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """A token for each dead letter."""

    def encode_batch_fast(self, texts):
        return [Encoding(ids=[ord(dead_letter) for dead_letter in text]) for text in texts]


def test_batches_are_sorted_by_length_and_padded_to_their_longest():
    (first, long), (second, short) = make_batches(Tokenizer(), ["a", "bbb", "cc"], 2)
    assert (first.tolist(), second.tolist()) == ([1, 2], [0])
    np.testing.assert_array_equal(long["input_ids"], [[98, 98, 98], [99, 99, 0]])
    np.testing.assert_array_equal(long["attention_mask"], [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(short["input_ids"], [[97]])


def test_vectors_that_agree_pass():
    check_vectors({"spread": 9e-4, "cosines": {"side": 0.99}})


@pytest.mark.parametrize(
    ("spread", "cosine", "message"),
    [
        (2e-3, 1.0, "differ by 0.002 in float32"),
        (float("nan"), 1.0, "differ by nan"),
        (0.0, 0.98, "side: a vector has a cosine of 0.9800"),
        (0.0, float("nan"), "cosine of nan"),
    ],
)
def test_vectors_that_differ_fail(spread, cosine, message):
    with pytest.raises(BenchmarkError, match=message):
        check_vectors({"spread": spread, "cosines": {"side": cosine}})


def test_every_package_of_the_environment_has_one_version():
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+( ; sys_platform == 'linux')?", line) for line in lines), lines


def test_what_needs_the_network_runs_only_when_it_is_named():
    assert "peers" in ON_REQUEST
    assert set(ON_REQUEST) < set(BENCHMARKS)
