"""A batch in the encoder: Python goes on meanwhile, and gets the rows of all batches in their order."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from pipeline.coders import EncodingCoder
from pipeline.records import Batch, Chunk, Document, Encoded, Encoding
from pipeline.vectors.finishing import BATCHES_AHEAD, FinishVectors, VectorRule


def make_encoded(number: int) -> Encoded:
    chunk = Chunk(Document(f"d{number}", "a"), f"{number:032x}", 0, 1, bytes(12), 3, 1, 0)
    return Encoded(Batch([chunk], 4), [np.full(3, number, np.float32)], [""], 0.0)


def test_rows_are_made_while_the_next_batches_are_in_the_encoder():
    futures: list[Future[Encoded]] = [Future() for _ in range(BATCHES_AHEAD + 2)]
    step = FinishVectors(VectorRule())
    step.start_bundle()
    for future in futures[:BATCHES_AHEAD]:
        assert list(step.process(Encoding(future))) == []
    made = []
    for number, future in enumerate(futures[BATCHES_AHEAD:]):
        futures[number].set_result(make_encoded(number))
        made += [row.id for row in step.process(Encoding(future))]
    assert made == ["d0", "d1"]
    for number in (2, 3):
        futures[number].set_result(make_encoded(number))
    *rows, counted = step.finish_bundle()
    assert [row.value.id for row in rows] == ["d2", "d3"]
    assert b'"rows": 4' in counted.value.value.counts


def test_what_the_encoder_raises_is_raised_with_its_batch():
    future: Future[Encoded] = Future()
    future.set_exception(RuntimeError("the device is gone"))
    step = FinishVectors(VectorRule())
    step.start_bundle()
    assert list(step.process(Encoding(future))) == []
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(step.finish_bundle())


def test_a_batch_in_the_encoder_has_a_size_at_once_and_is_waited_for_only_to_be_sent():
    future: Future[Encoded] = Future()
    coder = EncodingCoder()
    assert coder.estimate_size(Encoding(future)) == 0
    future.set_result(make_encoded(7))
    encoded = coder.decode(coder.encode(Encoding(future))).future.result()
    assert encoded.batch[0].document.id == "d7" and (encoded.batch.length, encoded.batch.rows) == (4, 1)
    assert encoded.vectors[0] is not None and encoded.vectors[0].tolist() == [7.0] * 3
