"""Embeds texts with the settings of a table, so that the table can be searched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import EmbeddingSpec, make_embedding_spec
from pipeline.encoders.handler import LoadedEncoder
from pipeline.encoders.load import load_encoder
from pipeline.errors import ConfigError, TableError
from pipeline.preprocess.batching import Batcher
from pipeline.preprocess.chunking import is_encodable
from pipeline.records import Chunk, DeadLetter, Document
from pipeline.tables.read import open_live
from pipeline.vectors.finishing import ChunkAverager
from pipeline.vectors.storing import shape_vectors


class Embedder:
    """Embeds texts in memory by the rules of one spec; see `load_embedder`."""

    def __init__(self, spec: EmbeddingSpec) -> None:
        self.spec = spec
        self._splitter = spec.split.load()
        self._encoder = LoadedEncoder(load_encoder(spec.encoder))

    def embed(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: the texts; the table's text prefix is put before each.
          pairs: second segments, for a table of pairs.

        Returns:
          float32 `[len(texts), D]`, cut and normalised as the table's, but not rounded to its dtype.

        Raises:
          ConfigError: if a text cannot be one vector of this table.
        """
        seconds = [None] * len(texts) if pairs is None else pairs
        if len(seconds) != len(texts):
            raise ConfigError(f"{len(texts)} texts have {len(seconds)} pairs; give one for each, or None")
        documents = [Document(str(i), text, pair) for i, (text, pair) in enumerate(zip(texts, seconds, strict=True))]
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
        vectors = np.zeros((len(texts), self.spec.encoder.dimension), np.float32)
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


def load_embedder(table: str) -> Embedder:
    """Loads the encoder, preprocessing and vector settings of a table.

    Raises:
      TableError: if there is no table, it holds token matrices, or its encoder has changed.
    """
    manifest, _ = open_live(table)
    if manifest.layout.tokens:
        raise TableError(f"{table} holds a matrix per text; it cannot be searched with one vector")
    spec = make_embedding_spec(EmbedConfig.from_flat(manifest.settings))
    if spec.fingerprint != manifest.fingerprint:
        changed = [key for key in spec.identity if spec.identity[key] != manifest.identity.get(key)]
        raise TableError(
            f"{table} was made with another {' and '.join(changed)} than --encoder={manifest.settings['encoder']} has "
            "now; vectors of both cannot be compared; run embeam embed again"
        )
    return Embedder(spec)
