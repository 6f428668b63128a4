"""How Beam moves records between workers. Whoever builds a graph of them imports this first."""

from __future__ import annotations

import pickle

from apache_beam import coders

from pipeline.records import Chunk, DeadLetter, Document, Origin, Pack, Row, Tally


class PackCoder(coders.Coder):
    """Pickles a pack, in which chunks of one document share that document: a row coder would repeat its text."""

    def encode(self, value: Pack) -> bytes:
        return pickle.dumps(list(value), pickle.HIGHEST_PROTOCOL)

    def decode(self, encoded: bytes) -> Pack:
        return Pack(pickle.loads(encoded))

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> type:
        return Pack


coders.registry.register_coder(Pack, PackCoder)
for _record in (Origin, Document, Chunk, Row, DeadLetter, Tally):
    coders.registry.register_coder(_record, coders.RowCoder)
