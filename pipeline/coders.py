"""Coders by which Beam moves records between workers. Import this before a graph of records is built."""

from __future__ import annotations

import pickle
from concurrent.futures import Future

from apache_beam import coders

from pipeline.records import (
    BundleCounts,
    Chunk,
    DeadLetter,
    Document,
    ElementGroup,
    Encoded,
    Encoding,
    Origin,
    Row,
    SkippedFile,
)


class ElementGroupCoder(coders.Coder):
    """Pickles a group, in which chunks of one document share that document: a row coder would repeat its text."""

    def encode(self, value: ElementGroup) -> bytes:
        return pickle.dumps(list(value), pickle.HIGHEST_PROTOCOL)

    def decode(self, encoded: bytes) -> ElementGroup:
        return ElementGroup(pickle.loads(encoded))

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> type:
        return ElementGroup


class EncodingCoder(coders.Coder):
    """Waits for the batch, then encodes it. No engine sends one to another worker, but all ask for the size of some."""

    def encode(self, value: Encoding) -> bytes:
        return pickle.dumps(value.future.result(), pickle.HIGHEST_PROTOCOL)

    def decode(self, encoded: bytes) -> Encoding:
        future: Future[Encoded] = Future()
        future.set_result(pickle.loads(encoded))
        return Encoding(future)

    def estimate_size(self, value: Encoding) -> int:
        return 0  # else the first batches would be waited for, one by one

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> type:
        return Encoding


coders.registry.register_coder(ElementGroup, ElementGroupCoder)
coders.registry.register_coder(Encoding, EncodingCoder)
for _record in (Origin, Document, Chunk, Row, DeadLetter, SkippedFile, BundleCounts):
    coders.registry.register_coder(_record, coders.RowCoder)
