"""Groups by text on a distributed engine: documents with vectors before encoding, requests with vectors after it.

A text that a million documents share is one group of a million elements. Groups are read twice instead of being held:
once to look for a vector, once to decide about each document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam import coders
from apache_beam.pvalue import TaggedOutput

from pipeline.bundles import end_bundle
from pipeline.errors import RunError
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, DeadLetter, Document, Row
from pipeline.reuse.decide import DocumentAction, count_actions, decide_documents
from pipeline.reuse.requests import ReuseRequest
from pipeline.reuse.spot_checks import SpotCheckPicker
from pipeline.reuse.wire import CHECK, DOCUMENT, LIVE, MOVED, DocumentPacker, unpack_place

JOURNAL, UNSEEN = b"J", b"S"
VECTOR, DEAD, REQUEST = b"V", b"X", b"R"
BLOCK_DOCUMENTS = 1024
_ROWS, _DEAD_LETTERS = coders.registry.get_coder(Row), coders.registry.get_coder(DeadLetter)


class Waiting(NamedTuple):
    """A document whose action is not decided yet.

    Attributes:
      document: the document.
      content: its content hash.
      known: whether there are vectors of its text.
      first: whether it is the first with its text, which is encoded.
      shared: whether others have its text.
    """

    document: Document
    content: bytes
    known: bool
    first: bool
    shared: bool


class DecideTexts(beam.DoFn):
    """(content hash, documents and places of vectors) -> documents to encode, and under tags everything else.

    Outputs:
      main: documents to encode, those of spot checks among them.
      requests: (content hash, packed request).
      wanted: (file or path of a journal's segment, row), the vectors that requests need.
      moved: (digest of an id, MOVED) of documents that were not seen and whose text is reused.
      bundle_counts: BundleCounts.

    Args:
      inputs: paths of the input files.
      keep_text: rows have their document's text.
    """

    def __init__(self, inputs: Sequence[str], keep_text: bool) -> None:
        self._inputs = inputs
        self._keep_text = keep_text

    def setup(self) -> None:
        self._packer = DocumentPacker(self._inputs)

    def start_bundle(self) -> None:
        self._waiting: list[Waiting] = []
        self._counts: Counter[str] = Counter()
        self._spot_checks = SpotCheckPicker()

    def process(self, group: tuple[bytes, Iterable[bytes]]) -> Iterator[Any]:
        content, values = group
        known: dict[int, tuple[int | str, int]] = {}  # by chunk
        n_chunks, n_documents, first = 0, 0, None
        for value in values:
            if value[:1] == DOCUMENT:
                n_documents += 1
                place = self._packer.order(value)
                first = place if first is None else min(first, place)
            elif value[:1] in (LIVE, JOURNAL):
                where, row, chunk, n_chunks = unpack_known(value)
                if chunk not in known or _order(where, row) < _order(*known[chunk]):
                    known[chunk] = where, row
        if not n_documents:
            return
        is_known = bool(known) and len(known) == n_chunks
        if is_known:
            for known_place in known.values():
                yield TaggedOutput("wanted", known_place)
        for value in values:
            if value[:1] == DOCUMENT:
                is_first = self._packer.order(value) == first
                first = None if is_first else first  # several documents may have one place: retried dead letters
                document = self._packer.unpack(value)
                self._waiting.append(Waiting(document, content, is_known, is_first, n_documents > 1))
                if len(self._waiting) >= BLOCK_DOCUMENTS:
                    yield from self._flush()
            elif value[:1] == UNSEEN and is_known:
                yield TaggedOutput("moved", (value[1:], MOVED))

    def finish_bundle(self) -> Iterator[Any]:
        yield from end_bundle(self._flush())
        counts = {name: n for name, n in self._counts.items() if n}
        yield from end_bundle([TaggedOutput("bundle_counts", BundleCounts.of("reuse", counts))])

    def _flush(self) -> Iterator[Any]:
        block, self._waiting = self._waiting, []
        known, first = (np.array([getattr(one, name) for one in block], bool) for name in ("known", "first"))
        actions = decide_documents(np.zeros(len(block), bool), known, first)
        self._counts += count_actions(actions)
        for waiting, action in zip(block, actions.tolist(), strict=True):
            document, content = waiting.document, waiting.content
            is_checked = self._spot_checks.picks("encoded" if action == DocumentAction.ENCODE else "known")
            if action == DocumentAction.ENCODE:
                yield document._replace(shared=waiting.shared or is_checked)
            else:
                spare = document
                if action == DocumentAction.REUSE:  # else a dead letter may need the text
                    spare = document._replace(text=document.text if self._keep_text else "", pair=None)
                request = ReuseRequest(spare, content.hex()).to_line()
                yield TaggedOutput("requests", (content, REQUEST + request))
            if is_checked:
                yield document._replace(is_spot_check=True)
                yield TaggedOutput("requests", (content, CHECK))


def _order(where: int | str, row: int) -> tuple[str, int]:
    """Sort key of places, so that the choice does not depend on their order."""
    return str(where), row


class AnswerRequests(beam.DoFn):
    """(content hash, vectors, dead letters and requests) -> rows, and under tags samples and dead letters.

    Args:
      keep_text: rows have their document's text.
    """

    def __init__(self, keep_text: bool) -> None:
        self._keep_text = keep_text

    def process(self, group: tuple[bytes, Iterable[bytes]]) -> Iterator[Any]:
        rows: dict[int, Row] = {}
        dead: dict[tuple[str, str, str], None] = {}
        for value in group[1]:
            if value[:1] == VECTOR:
                row = _ROWS.decode(value[1:])
                rows[row.chunk] = row
            elif value[:1] == DEAD:
                dead_letter = _DEAD_LETTERS.decode(value[1:])
                dead[dead_letter.stage, dead_letter.reason, dead_letter.message] = None
        own = [rows[chunk] for chunk in sorted(rows)]
        for value in group[1]:
            if value[:1] == REQUEST:
                if not own and not dead:
                    raise RunError("a vector was lost between encoding and publishing; run the same command again")
                document, content_hash = ReuseRequest.from_line(value[1:])
                for row in own:
                    yield give_row(row, document, self._keep_text)
                for facts in dead:
                    dead_letter = DeadLetter.of(*facts, document, content_hash)
                    yield TaggedOutput("dead_letters", dead_letter)
            elif value[:1] == CHECK:
                for row in own:
                    yield TaggedOutput("samples", row)


def give_row(row: Row, document: Document, keep_text: bool) -> Row:
    """A document's row from the vector of one with the same text."""
    return row._replace(
        id=document.id,
        kept=document.kept,
        text=document.text if keep_text else None,
        source=document.origin.path,
        shared=False,
    )


def key_document(document: Document, prefix: str, packer: DocumentPacker) -> tuple[bytes, bytes]:
    """A document, as `DecideTexts` takes it."""
    return bytes.fromhex(hash_content(prefix + document.text, document.pair)), packer.pack(document)[1]


def key_vector(row: Row) -> tuple[bytes, bytes]:
    """A row whose vector other documents need, as `AnswerRequests` takes it."""
    return bytes.fromhex(row.content_hash), VECTOR + _ROWS.encode(row)


def key_dead_letter(dead_letter: DeadLetter) -> tuple[bytes, bytes]:
    """A dead letter whose text other documents have too, as `AnswerRequests` takes it."""
    value = DEAD + _DEAD_LETTERS.encode(dead_letter._replace(text=None, pair=None))
    return bytes.fromhex(dead_letter.content_hash or ""), value


def pack_journal_place(path: str, row: int, chunk: int, n_chunks: int) -> bytes:
    """A record of the journal as a place where a vector is."""
    return JOURNAL + b"".join(n.to_bytes(4, "little") for n in (row, chunk, n_chunks)) + path.encode()


def unpack_known(value: bytes) -> tuple[int | str, int, int, int]:
    """File of the live table or path of a segment, row, number of the chunk, number of chunks."""
    if value[:1] == LIVE:
        return unpack_place(value)
    row, chunk, n_chunks = (int.from_bytes(value[i : i + 4], "little") for i in (1, 5, 9))
    return value[13:].decode(), row, chunk, n_chunks
