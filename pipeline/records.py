"""What flows between the stages: documents, chunks, batches, encoded batches, rows, dead letters, counts.

Everything is a NamedTuple with primitive fields (Beam's RowCoder moves those about ten times faster than arrays or
pickles), except `Batch`, which is a list because Beam takes `len()` of it for its batch-size metric.

Annotations are not postponed here and optional fields are `Optional[X]`: RowCoder silently pickles other types.
`coders.py` registers them with Beam, which is not imported here: that takes a second, also for readers of a table.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Optional

import numpy as np


class Origin(NamedTuple):
    """Where a document came from: a file and the place in it, in bytes or in rows."""

    path: str = ""
    position: int = -1
    unit: str = "row"  # "byte" where files can be split, else "row"


def pack_kept(values: Sequence[Any]) -> bytes:
    """The kept fields' values as `Document.kept` holds them: equal values give equal bytes."""
    return json.dumps(list(values), ensure_ascii=False, separators=(",", ":")).encode() if values else b""


class Document(NamedTuple):
    """One text to embed.

    Attributes:
      id: unique and deterministic; what a reader of the table looks up.
      text: the first (usually only) segment, before any prefix.
      pair: the second segment, or None; its tokens get type id 1.
      kept: JSON list of the kept fields' values, in the order of the table's kept fields; empty if there are none.
      origin: where the document came from, for dead letters.
      is_spot_check: whether it is only encoded to be compared with its row of the table, and gets no new row.
      shared: whether other documents with the same text and pair need its rows or its dead letters.
    """

    id: str
    text: str
    pair: Optional[str] = None
    kept: bytes = b""
    origin: Origin = Origin()
    is_spot_check: bool = False
    shared: bool = False


class Chunk(NamedTuple):
    """The token ids of one encoder input, or the text itself for an encoder that takes strings.

    Attributes:
      document: the document that the chunk is a window of.
      content_hash: hash over all of the document that reaches the encoder.
      number: of the chunk in its document, from 0.
      n_chunks: how many chunks the document has.
      ids: little-endian int32 token ids with [CLS] and [SEP], without padding; empty for text encoders.
      n_first: how many leading tokens have type id 0 (the rest have 1).
      n_content: tokens that are not [CLS] or [SEP]: the chunk's weight in an average.
      n_truncated: tokens of the document that reach no chunk; None where tokens are not counted.
      char_start: where its own text begins in the document's, in code points.
      char_end: where it ends; None where the chunk is not a window of a text.
      n_unknown: tokens that are [UNK]; None where that is not known.
    """

    document: Document
    content_hash: str
    number: int
    n_chunks: int
    ids: bytes
    n_first: int
    n_content: int
    n_truncated: Optional[int]
    char_start: Optional[int] = None
    char_end: Optional[int] = None
    n_unknown: Optional[int] = None

    @property
    def n_tokens(self) -> int:
        return len(self.ids) // 4


class Batch(list[Chunk]):
    """Chunks that are encoded together, padded to `length` tokens and to `rows` rows."""

    def __init__(self, chunks: Iterable[Chunk] = (), length: int = 0, rows: int = 0) -> None:
        super().__init__(chunks)
        self.length = length
        self.rows = rows or len(self)

    def __reduce__(self) -> tuple[type["Batch"], tuple[list[Chunk], int, int]]:  # else pickle loses the attributes
        return Batch, (list(self), self.length, self.rows)


class ElementGroup(list[Any]):
    """A few hundred elements that cross to another worker as one element, such as a chunk group."""


class Encoded(NamedTuple):
    """A batch after the encoder.

    Attributes:
      batch: what was encoded.
      vectors: one float32 array per chunk, `[D]` or `[n_tokens, D]`, or None where that chunk failed.
      errors: one message per chunk, empty where it did not fail.
      seconds: time in the encoder.
    """

    batch: Batch
    vectors: list[Optional[np.ndarray]]
    errors: list[str]
    seconds: float


class Encoding:
    """A batch in the encoder, where another thread runs it.

    Attributes:
      future: gives the batch as it comes out, or raises what the encoder raised.
    """

    def __init__(self, future: Future[Encoded]) -> None:
        self.future = future


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      id: of the document.
      chunk: number of the chunk in its document, from 0.
      vector: little-endian bytes of the table's dtype.
      scale: int8 only: value = scale * stored integer; 0 elsewhere.
      n_tokens: tokens that were encoded; None where tokens are not counted.
      n_truncated: tokens that were cut; None where that is not known.
      content_hash: hash over all of the document that reaches the encoder.
      kept: JSON list of the kept fields' values.
      text: of the chunk, if the table keeps it: `cut_own_text`.
      n_chunks: how many rows the document has when it is whole.
      source: path of the file that the document came from.
      shared: as in `Document`.
      char_start: as in `Chunk`.
      char_end: as in `Chunk`.
      n_unknown: as in `Chunk`.
    """

    id: str
    chunk: int
    vector: bytes
    scale: float
    n_tokens: Optional[int]
    n_truncated: Optional[int]
    content_hash: str
    kept: bytes
    text: Optional[str]
    n_chunks: int = 1
    source: str = ""
    shared: bool = False
    char_start: Optional[int] = None
    char_end: Optional[int] = None
    n_unknown: Optional[int] = None


def cut_own_text(text: str, char_start: Optional[int], char_end: Optional[int]) -> str:
    """The text of a chunk, from the text of its document; all of it where the chunk is not a window."""
    return text if char_end is None else text[char_start:char_end]


class DeadLetter(NamedTuple):
    """A document that could not be embedded, with stage, reason and where it came from.

    Attributes:
      stage: read, preprocess or encode.
      reason: a key of REASONS.
      message: what is wrong.
      origin: where the document came from.
      id: of the document, or None if it could not be read.
      text: of the document, or what can be shown of it.
      content_hash: as in a row; None if the document was not read that far.
      pair: the document's second segment.
      kept: the document's kept fields.
      shared: as in `Document`.
    """

    stage: str
    reason: str
    message: str
    origin: Origin
    id: Optional[str] = None
    text: Optional[str] = None
    content_hash: Optional[str] = None
    pair: Optional[str] = None
    kept: bytes = b""
    shared: bool = False

    @classmethod
    def of(cls, stage: str, reason: str, message: str, document: Document, content_hash: str = "") -> "DeadLetter":
        """The dead letter of a document that was read, with all its fields, so that it can be retried."""
        d = document
        return cls(stage, reason, message, d.origin, d.id, d.text, content_hash or None, d.pair, d.kept, d.shared)


class SkippedFile(NamedTuple):
    """An input file that could not be read to its end: nothing is known of the documents that were not read.

    Attributes:
      file: its name in tables.
      reason: a key of REASONS.
      message: what is wrong.
    """

    file: str
    reason: str
    message: str

    @classmethod
    def of(cls, file: str, error: Exception) -> "SkippedFile":
        """The file of an error that says its reason, with the error's first line as text that can be stored."""
        message = (str(error) or type(error).__name__).splitlines()[0].encode("utf-8", "backslashreplace").decode()
        return cls(file, getattr(error, "reason", "unreadable_file"), message)

    def __str__(self) -> str:
        """Its name and what is wrong; many messages hold the name."""
        return self.message if self.file in self.message else f"{self.file}: {self.message}"


class BundleCounts(NamedTuple):
    """The counts of one bundle of one stage; their sum over a run is in the manifest."""

    stage: str
    counts: bytes  # JSON object of numbers

    @classmethod
    def of(cls, stage: str, counts: Mapping[str, float]) -> "BundleCounts":
        return cls(stage, json.dumps(dict(counts)).encode())


def digest_id(document_id: str) -> bytes:
    """16 bytes of BLAKE2b: of a billion ids, two collide with a probability under 1e-20."""
    return hashlib.blake2b(document_id.encode(), digest_size=16).digest()


KEPT_NULLS = "kept_nulls"  # the stage of the counts, by kept field, of values that do not fit and are null

REASONS = {
    "invalid_utf8": "the bytes are not valid UTF-8, or not in the encoding of the file (see --encoding)",
    "binary_text": "the text is mostly NULs or other control characters (see --encoding)",
    "not_text": "the WARC record holds a page as it was fetched, not its text",
    "empty_text": "the text is empty or blank (see --on_empty)",
    "too_large": "the record is larger than --max_document_bytes",
    "malformed_json": "the line or element is not a JSON object",
    "malformed_csv": "the row does not fit the header or the quoting",
    "malformed_example": "the record is not a tf.Example",
    "missing_field": "the record lacks the id or text field",
    "wrong_type": "a field's value is not of the expected type",
    "duplicate_id": "another document earlier in the input has the same id",
    "truncated_file": "the file ends too early; records before that point were read",
    "unreadable_file": "the file cannot be read or is damaged; records before that point were read",
    "bad_checksum": "a TFRecord fails its checksum",
    "too_long": "the text has more tokens than --max_tokens and --on_long=reject",
    "other_words": "the text cannot be cut, because the tokeniser makes other words of it than of its parts",
    "encoder_error": "the encoder fails on this row",
    "not_finite": "the vector holds NaN or infinity",
}
