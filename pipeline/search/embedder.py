"""Embeds texts with the settings of a table, so that the table can be searched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import EmbeddingSpec, make_embedding_spec
from pipeline.encoders.handler import LoadedEncoder
from pipeline.encoders.load import load_encoder
from pipeline.errors import ConfigError, TableError
from pipeline.preprocess.batching import Batcher
from pipeline.preprocess.chunking import is_encodable
from pipeline.records import Chunk, DeadLetter, Document
from pipeline.report.summary import shorten_line
from pipeline.tables.read import open_live
from pipeline.vectors.finishing import ChunkAverager
from pipeline.vectors.storing import shape_vectors


class Embedder:
    """Embeds texts in memory by the rules of one spec; see `load_embedder`."""

    def __init__(self, spec: EmbeddingSpec) -> None:
        self.spec = spec
        self._splitter = spec.split.load()
        self._encoder = LoadedEncoder(load_encoder(spec.encoder))

    def embed(self, texts: Iterable[str], pairs: Iterable[str | None] | None = None) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: the texts, as a list, a tuple, a NumPy array or any other iterable of strings, but not one string; the
            table's text prefix is put before each.
          pairs: second segments, for a table of pairs; None for a text without one.

        Returns:
          float32 `[len(texts), D]`, cut and normalised as the table's, but not rounded to its dtype.

        Raises:
          ConfigError: if these are no texts, or one cannot be one vector of this table.
        """
        firsts = list_texts("texts", texts)
        seconds = [None] * len(firsts) if pairs is None else list_texts("pairs", pairs, or_none=True)
        if len(seconds) != len(firsts):
            raise ConfigError(f"{len(firsts)} texts have {len(seconds)} pairs; give one for each, or None")
        documents = [Document(str(i), text, pair) for i, (text, pair) in enumerate(zip(firsts, seconds, strict=True))]
        for document in documents:
            if not (is_encodable(document.text) and is_encodable(document.pair or "")):
                raise ConfigError(f"text {document.id} is not valid UTF-8: {document.text!r}; fix its encoding")
        batcher = Batcher(self.spec.buckets)
        batches = []
        for chunk in self._splitter.split(documents):
            if isinstance(chunk, DeadLetter):
                raise ConfigError(f"text {chunk.id}: {chunk.message}; shorten it")
            if chunk.n_chunks > 1 and not self.spec.vectors.average:
                raise ConfigError(
                    f"text {chunk.document.id} is longer than one chunk of this table, "
                    f"{self.spec.buckets.lengths[-1]} tokens; shorten it"
                )
            size = chunk.n_tokens if self.spec.vectors.counts_tokens else len(chunk.ids)
            if batch := batcher.add(chunk, size):
                batches.append(batch)
        assert self.spec.encoder.dimension is not None  # `make_embedding_spec` has measured it
        vectors = np.zeros((len(documents), self.spec.encoder.dimension), np.float32)
        averager = ChunkAverager()
        for batch in [*batches, *batcher.drain()]:
            encoded = self._encoder.encode(batch)
            for result in map(averager.add, zip(batch, encoded.vectors, encoded.errors, strict=True)):
                if result is not None:
                    self._store(vectors, *result)
        return shape_vectors(vectors, self.spec.vectors.vectors)

    @staticmethod
    def _store(vectors: np.ndarray, chunk: Chunk, vector: np.ndarray | None, error: str) -> None:
        if vector is None:
            raise ConfigError(f"text {chunk.document.id} cannot be encoded: {error}")
        vectors[int(chunk.document.id)] = vector


def list_texts(name: str, values: Any, or_none: bool = False) -> list[Any]:
    """Some texts as a list of str.

    Args:
      name: of the argument, for messages.
      values: what a caller has given.
      or_none: whether a text may be None.

    Raises:
      ConfigError: if they are not an iterable of strings.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ConfigError(f"{name} is {_describe(values)}, not a list of strings; write [text] for one text")
    texts = list(values)
    for i, text in enumerate(texts):
        if not (isinstance(text, str) or (or_none and text is None)):
            raise ConfigError(f"{name}[{i}] is {_describe(text)}, not a string; give strings only")
    return [None if text is None else str(text) for text in texts]  # NumPy's strings are a subclass


def drop_windows(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without the rules by which long texts are cut, where `Embedder` embeds no such text."""
    preprocessing = identity["preprocessing"]
    if preprocessing.get("on_long") != "chunk":
        return identity
    rules = ("windows", "chunk_by", "sentences")
    return identity | {"preprocessing": {key: value for key, value in preprocessing.items() if key not in rules}}


def _describe(value: Any) -> str:
    return f"{shorten_line(repr(value), 40)} ({type(value).__name__})"


def load_embedder(table: str) -> Embedder:
    """Loads the encoder, preprocessing and vector settings of a table.

    Raises:
      TableError: if there is no table, it holds token matrices, or its encoder has changed.
    """
    manifest, _ = open_live(table)
    if manifest.layout.tokens:
        raise TableError(f"{table} holds a matrix per text; it cannot be searched with one vector")
    spec = make_embedding_spec(EmbedConfig.from_flat(manifest.settings))
    ours, theirs = drop_windows(spec.identity), drop_windows(manifest.identity)
    if ours != theirs:
        changed = [key for key in ours if ours[key] != theirs.get(key)]
        raise TableError(
            f"{table} was made with another {' and '.join(changed)} than --encoder={manifest.settings['encoder']} has "
            "now; vectors of both cannot be compared; run embeam embed again"
        )
    return Embedder(spec)
