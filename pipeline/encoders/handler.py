"""The RunInference stage: one model per process; batches are halved when memory runs out; bad rows are isolated."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import ModelHandler, RunInference

from pipeline.encoders.base import Encoder
from pipeline.encoders.default import default_encoder
from pipeline.encoders.load import load_encoder
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.saved_model import resolve_handle
from pipeline.encoders.spec import EncoderSpec
from pipeline.errors import first_line
from pipeline.records import Batch, Encoded, Encoding

_LOGGER = logging.getLogger(__name__)


class _Helper(threading.local):
    """One helper thread for each calling thread, so that each caller has one batch in the encoder at a time."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, "embeam-encoder")


class LoadedEncoder:
    """An encoder and the batch size that is known to fit into this machine's memory."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._helper = _Helper()
        self.most_tokens: float = float("inf")  # rows x length that is known to fit, after a batch did not

    def start(self, batch: Batch) -> Encoding:
        """Encodes a batch in the background, after the batches that the caller has started before."""
        return Encoding(self._helper.executor.submit(self.encode, batch))

    def encode(self, batch: Batch) -> Encoded:
        """Encodes a batch, in parts if necessary; a row that fails by itself gets an error and no vector.

        Errors of the device are raised, because they are not caused by the rows.
        """
        begun = time.perf_counter()
        vectors, errors = self._encode_parts(batch)
        return Encoded(batch, vectors, errors, time.perf_counter() - begun)

    def _encode_parts(self, batch: Batch) -> tuple[list[np.ndarray | None], list[str]]:
        if batch.rows > 1 and batch.rows * batch.length > self.most_tokens:
            return self._encode_halves(batch)
        import tensorflow as tf

        try:
            return list(self.encoder.encode(batch)), [""] * len(batch)
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            if batch.rows == 1:
                return [None], [f"one input of {batch.length} tokens does not fit into memory: {first_line(error)}"]
            self.most_tokens = min(self.most_tokens, batch.rows * batch.length / 2)
            _LOGGER.warning("out of memory at %d x %d tokens; batches are halved", batch.rows, batch.length)
        except (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError, ValueError, IndexError) as error:
            if len(batch) == 1:
                return [None], [first_line(error)]
        return self._encode_halves(batch)

    def _encode_halves(self, batch: Batch) -> tuple[list[np.ndarray | None], list[str]]:
        middle = (len(batch) + 1) // 2
        rows = max(middle, batch.rows // 2)
        vectors, errors = self._encode_parts(Batch(batch[:middle], batch.length, rows))
        if middle < len(batch):  # one chunk among padding rows has no second half
            more_vectors, more_errors = self._encode_parts(Batch(batch[middle:], batch.length, rows))
            vectors, errors = vectors + more_vectors, errors + more_errors
        return vectors, errors


class EncoderHandler(ModelHandler[Batch, Encoding, LoadedEncoder]):
    """Beam's model handler for an encoder; its elements are whole batches.

    A batch is only started here, so that Python works while the encoder does. Beam's own inference latency therefore
    does not include the encoding; `Encoded.seconds` is the time of a batch.
    """

    def __init__(self, spec: EncoderSpec, shapes: Sequence[tuple[int, int]] = (), gpu_memory_mib: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.shapes = shapes
        self.gpu_memory_mib = gpu_memory_mib

    def load_model(self) -> LoadedEncoder:
        spec = self.spec
        load_tensorflow(self.gpu_memory_mib)
        if spec.handle:  # this may be another machine than the one that inspected the encoder
            spec = replace(spec, folder=resolve_handle(spec.handle))
        elif not os.path.isdir(spec.folder):
            spec = replace(spec, folder=default_encoder())
        loaded = load_encoder(spec)
        loaded.compile_shapes(self.shapes)
        encoder = LoadedEncoder(loaded)
        gc.collect()
        gc.freeze()  # else every full collection walks the heaps of TensorFlow and Beam: 0.3 s each
        return encoder

    def run_inference(
        self, batch: Sequence[Any], model: LoadedEncoder, inference_args: dict[str, Any] | None = None
    ) -> list[Encoding]:
        assert isinstance(batch, Batch)
        return [model.start(batch)]

    def get_metrics_namespace(self) -> str:
        return "embeam"

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        return sum(len(chunk.ids) for chunk in batch)


@dataclass
class Encode(beam.PTransform):
    """PCollection[Batch] -> PCollection[Encoding].

    Attributes:
      spec: what is loaded.
      shapes: rows and length of full batches, which a compiled graph is compiled for before the first one comes.
      gpu_memory_mib: the GPU memory that a process may take if it shares the GPU; 0 if it does not.
    """

    spec: EncoderSpec
    shapes: Sequence[tuple[int, int]] = ()
    gpu_memory_mib: int = 0

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        handler = EncoderHandler(self.spec, self.shapes, self.gpu_memory_mib)
        return batches | "RunInference" >> RunInference(handler.with_no_batching()).with_output_types(Encoding)
