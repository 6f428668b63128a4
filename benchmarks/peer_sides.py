"""The other sides of the benchmark `peers`, each at its best: sentence-transformers, OpenVINO and ONNX Runtime.

Runs in the environment of `peers.lock`, in children; it imports nothing of the product. `models` is the folder that
`peers.py` fills: `published`, the encoder as its authors gave it out, and `encoder.onnx`, the same in ONNX.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.child import BatchClock

Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [n, D], in the order of the texts
Tick = Callable[[int], None]  # called with the rows of every batch that has left the encoder

WARM_UP = 1024  # texts that are encoded before anything is measured, and those that settings are tried on
TRIES = 2


def read_texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def time_encoding(encode: Encode, source: str, output: str) -> dict[str, float]:
    """Encoding alone: from texts in memory to vectors in memory, by an encoder that is loaded and has run before.

    Args:
      encode: one side's way to do it, tokenising included.
      source: file with a text on each line.
      output: where the vectors are written afterwards, `.npy`.
    """
    texts = read_texts(source)
    encode(texts[:WARM_UP])
    begun = time.monotonic()
    vectors = encode(texts)
    seconds = time.monotonic() - begun
    np.save(output, vectors)
    return {"first_batch_at": begun, "items": len(texts), "steady_items": len(texts), "steady_seconds": seconds}


class Setting(NamedTuple):
    """What a peer can be given.

    Attributes:
      batch: texts at once.
      streams: batches at once, which share the cores.
    """

    batch: int
    streams: int = 1

    def __str__(self) -> str:
        return f"{self.streams} x {self.batch} texts"


def load_sentence_transformers(models: str, precision: str, setting: Setting, tick: Tick) -> Encode:
    """`SentenceTransformer.encode`, which sorts texts by their length itself."""
    import torch
    from sentence_transformers import SentenceTransformer

    dtype = getattr(torch, precision)
    model = SentenceTransformer(_published(models), device="cpu", model_kwargs={"dtype": dtype})
    model[-1].register_forward_hook(lambda module, inputs, outputs: tick(len(outputs["sentence_embedding"])))
    return lambda texts: model.encode(texts, batch_size=setting.batch, show_progress_bar=False).astype(np.float32)


def load_onnx_runtime(models: str, precision: str, setting: Setting, tick: Tick) -> Encode:
    """An inference session with all of ONNX Runtime's own optimisations, on all cores; float32 alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _count_cores()
    session = onnxruntime.InferenceSession(_exported(models), options, providers=["CPUExecutionProvider"])
    tokenizer = load_tokenizer(models)

    def encode(texts: list[str]) -> np.ndarray:
        vectors = np.empty((len(texts), session.get_outputs()[0].shape[-1]), np.float32)
        for places, inputs in make_batches(tokenizer, texts, setting.batch):
            vectors[places] = session.run(None, inputs)[0]
            tick(len(places))
        return vectors

    return encode


def load_openvino(models: str, precision: str, setting: Setting, tick: Tick) -> Encode:
    """A compiled model with a request for each stream and one that waits for the first stream to be free.

    Requests are waited for in their order: the callbacks of `AsyncInferQueue` can leave its end waiting for ever.
    """
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "NUM_STREAMS": setting.streams,
        "INFERENCE_NUM_THREADS": _count_cores(),
    }
    compiled = openvino.Core().compile_model(_exported(models), "CPU", hints)
    width = compiled.output(0).partial_shape[1].get_length()
    requests = [compiled.create_infer_request() for _ in range(setting.streams + 1)]
    tokenizer = load_tokenizer(models)

    def encode(texts: list[str]) -> np.ndarray:
        vectors = np.empty((len(texts), width), np.float32)
        free, running = list(requests), deque[tuple[np.ndarray, Any]]()

        def take_oldest() -> None:
            places, request = running.popleft()
            request.wait()
            vectors[places] = request.get_output_tensor(0).data
            free.append(request)
            tick(len(places))

        for places, inputs in make_batches(tokenizer, texts, setting.batch):
            if not free:
                take_oldest()
            request = free.pop()
            request.start_async(inputs)
            running.append((places, request))
        while running:
            take_oldest()
        return vectors

    return encode


class Peer(NamedTuple):
    """One that the product is compared with.

    Attributes:
      load: makes its encoder.
      settings: what is tried for it.
      precisions: that it has.
    """

    load: Callable[[str, str, Setting, Tick], Encode]
    settings: tuple[Setting, ...]
    precisions: tuple[str, ...] = ("float32", "bfloat16")


PEERS = {
    "sentence-transformers": Peer(load_sentence_transformers, (Setting(32), Setting(64))),
    "OpenVINO": Peer(load_openvino, (Setting(32), Setting(64), Setting(32, streams=2), Setting(64, streams=2))),
    "ONNX Runtime": Peer(load_onnx_runtime, (Setting(32), Setting(64)), ("float32",)),
}


def load_tokenizer(models: str) -> Any:
    """The tokeniser of `tokenizers`, which takes many texts at once, on all cores; long ones are cut as published."""
    from tokenizers import Tokenizer

    with open(os.path.join(_published(models), "sentence_bert_config.json"), encoding="utf-8") as file:
        max_tokens = json.load(file)["max_seq_length"]
    tokenizer = Tokenizer.from_file(os.path.join(_published(models), "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def make_batches(tokenizer: Any, texts: list[str], rows: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Batches of texts sorted by their number of tokens, longest first, padded to the longest of each.

    Yields:
      The places of the texts, and int64 `[rows, L]` by the names of the encoder's inputs.
    """
    encodings = tokenizer.encode_batch_fast(texts)
    order = np.argsort([-len(encoding) for encoding in encodings], kind="stable")
    for start in range(0, len(order), rows):
        places = order[start : start + rows]
        ids = np.zeros((len(places), len(encodings[places[0]])), np.int64)
        mask = np.zeros_like(ids)
        for row, place in enumerate(places):
            found = encodings[place].ids
            ids[row, : len(found)], mask[row, : len(found)] = found, 1
        yield places, {"input_ids": ids, "attention_mask": mask}


def export_onnx(models: str) -> dict[str, str]:
    """Writes sentence-transformers' module, tokeniser apart, as ONNX. Runs in a child."""
    import torch
    from sentence_transformers import SentenceTransformer

    class TokensToVectors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            attention = {"attn_implementation": "eager"}  # plain matmuls, which every converter knows
            self.model = SentenceTransformer(_published(models), device="cpu", model_kwargs=attention)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]

    example = torch.ones([2, 8], dtype=torch.int64)
    path, axes = _exported(models), {0: "rows", 1: "length"}
    torch.onnx.export(
        TokensToVectors().eval(),
        (example, example),
        path + ".unfinished",
        dynamo=False,  # the newer exporter needs more packages
        input_names=["input_ids", "attention_mask"],
        output_names=["vectors"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes},
    )
    os.replace(path + ".unfinished", path)
    return {}


def describe_versions() -> dict[str, dict[str, str]]:
    """Runs in a child."""
    packages = ("sentence-transformers", "torch", "transformers", "tokenizers", "openvino", "onnxruntime")
    return {"versions": {name: importlib.metadata.version(name) for name in packages}}


def choose_setting(peer: str, models: str, precision: str, source: str) -> dict[str, Any]:
    """The setting with the best rate on the first texts, after one warm-up run of each. Runs in a child."""
    texts = read_texts(source)[:WARM_UP]
    rates: dict[Setting, float] = {}
    for setting in PEERS[peer].settings:
        encode = PEERS[peer].load(models, precision, setting, lambda rows: None)
        encode(texts)
        for _ in range(TRIES):
            begun = time.monotonic()
            encode(texts)
            rates[setting] = max(rates.get(setting, 0.0), len(texts) / (time.monotonic() - begun))
    best = max(rates, key=lambda setting: rates[setting])
    return {"setting": list(best), "rates": {str(setting): rate for setting, rate in rates.items()}}


def encode_alone(
    peer: str, models: str, precision: str, setting: list[int], source: str, output: str
) -> dict[str, float]:
    """Encoding alone, in a child."""
    encode = PEERS[peer].load(models, precision, Setting(*setting), lambda rows: None)
    return time_encoding(encode, source, output)


def embed_file(
    peer: str, models: str, precision: str, setting: list[int], source: str, output: str
) -> dict[str, float]:
    """The whole process, in a child: from a file of texts to a file of vectors."""
    clock = BatchClock()
    encode = PEERS[peer].load(models, precision, Setting(*setting), clock.tick)
    np.save(output, encode(read_texts(source)))
    return clock.stop()


def _published(models: str) -> str:
    return os.path.join(models, "published")


def _exported(models: str) -> str:
    return os.path.join(models, "encoder.onnx")


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
