"""The RunInference stage: one model per process, batches halved when memory runs out, bad rows singled out."""

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
    """A second thread for each that calls the encoder, so that each has one batch in it at a time."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, "embeam-encoder")


class LoadedEncoder:
    """An encoder with what was learned about the memory of this machine."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._helper = _Helper()
        self.most_tokens: float = float("inf")  # rows x length that is known to fit, once something did not

    def start(self, batch: Batch) -> Encoding:
        """Encodes a batch while the caller goes on, after those that the caller has started before."""
        return Encoding(self._helper.executor.submit(self.encode, batch))

    def encode(self, batch: Batch) -> Encoded:
        """Encodes a batch, in parts where it must be; a row that fails alone gets an error and no vector.

        A worker that is broken altogether is not the rows' fault: errors of the device are raised.
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

    A batch only begins here, so that Python works while the encoder does. Beam's own latency of inference is therefore
    that of handing it over; how long a batch took is in `Encoded.seconds`.
    """

    def __init__(self, spec: EncoderSpec, shapes: Sequence[tuple[int, int]] = (), gpu_memory_mib: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.shapes = shapes
        self.gpu_memory_mib = gpu_memory_mib

    def load_model(self) -> LoadedEncoder:
        spec = self.spec
        load_tensorflow(self.gpu_memory_mib)
        if spec.handle:  # this machine may not be the one that inspected it
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
      gpu_memory_mib: what a process may take of a GPU that it shares; 0 for one to itself.
    """

    spec: EncoderSpec
    shapes: Sequence[tuple[int, int]] = ()
    gpu_memory_mib: int = 0

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        handler = EncoderHandler(self.spec, self.shapes, self.gpu_memory_mib)
        return batches | "RunInference" >> RunInference(handler.with_no_batching()).with_output_types(Encoding)
