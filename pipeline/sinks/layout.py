"""The columns of a table, whatever file format holds them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from pipeline.read_config import KeptField
from pipeline.records import Row
from pipeline.vectors.storing import restore_vectors

Columns = dict[str, list[Any]]  # some rows as column name to values


@dataclass(frozen=True)
class TableLayout:
    """What the rows of a table look like.

    Attributes:
      dtype: how vectors are stored: float32, float16, int8 or binary.
      dimension: D, numbers per vector (per token for token matrices).
      tokens: a row holds `n_tokens` x D numbers instead of D.
      counts_tokens: rows have n_tokens and n_truncated.
      keep_text: rows have their text.
      chunked: a document may have several rows, and each says how many.
      sourced: rows name the file that their document came from.
      kept: the kept fields, all with a type.
      has_offsets: rows say which characters of their document they hold. (Older tables with chunks have no such
        columns, and in each row the text of the whole document.)
      keep_unknown: rows have n_unknown.
    """

    dtype: str
    dimension: int
    tokens: bool = False
    counts_tokens: bool = True
    keep_text: bool = False
    chunked: bool = False
    sourced: bool = False
    kept: tuple[KeptField, ...] = ()
    has_offsets: bool = False
    keep_unknown: bool = False

    def to_json(self) -> dict[str, Any]:
        kept = [list(field) if field.path else list(field[:2]) for field in self.kept]
        return asdict(self) | {"kept": kept}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TableLayout:
        return cls(**(values | {"kept": tuple(KeptField(*field) for field in values["kept"])}))

    def columns(self) -> dict[str, str]:
        """All columns but the vector: name to string, int, float or bool."""
        columns = {"id": "string", "chunk": "int"}
        if self.chunked:
            columns["n_chunks"] = "int"
        if self.has_offsets:
            columns |= {"char_start": "int", "char_end": "int"}
        if self.dtype == "int8":
            columns["scale"] = "float"
        if self.counts_tokens:
            columns |= {"n_tokens": "int", "n_truncated": "int"}
        if self.keep_unknown:
            columns["n_unknown"] = "int"
        columns["content_hash"] = "string"
        if self.sourced:
            columns["source"] = "string"
        columns |= {field.name: field.type for field in self.kept}
        if self.keep_text:
            columns["text"] = "string"
        return columns

    def values(self, rows: list[Row]) -> Columns:
        """The values of `columns()` for some rows, column by column."""
        kept = [json.loads(row.kept) for row in rows] if self.kept else []
        position = {field.name: i for i, field in enumerate(self.kept)}
        return {
            name: [values[position[name]] for values in kept] if name in position else list(map(attrgetter(name), rows))
            for name in self.columns()
        }

    def restore(self, stored: bytes, n_rows: int, scales: list[float] | None) -> np.ndarray:
        """Float32 `[n_rows, D]` from the joined stored bytes of rows."""
        given = np.zeros(n_rows) if scales is None else np.asarray(scales)
        return restore_vectors(stored, given, self.dtype, self.dimension)

    def restore_tokens(self, stored: bytes, n_tokens: int, scales: list[float] | None) -> np.ndarray:
        """Float32 `[n_tokens, D]` from the stored bytes of one row of a table of token matrices."""
        given = np.zeros(1) if scales is None else np.asarray(scales)
        return restore_vectors(stored, given, self.dtype, n_tokens * self.dimension).reshape(n_tokens, -1)
