"""The rows of a table that are nearest to a text."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.report.summary import shorten_line
from pipeline.search.embedder import load_embedder
from pipeline.sources.fields import is_blank
from pipeline.tables.read import iter_columns


class Hit(NamedTuple):
    """A row and its cosine similarity to the query."""

    score: float
    id: str
    chunk: int
    text: str | None


def find_nearest(table: str, text: str, top: int = 5, pair: str | None = None) -> list[Hit]:
    """Compares a text with every row of a table.

    Args:
      table: the table's folder.
      text: the query; the table's text prefix is put before it.
      top: how many rows to return.
      pair: second segment, for a table of pairs.

    Returns:
      The nearest rows by cosine similarity, nearest first; ties in the order of the table.

    Raises:
      ConfigError: if the text is blank.
    """
    if is_blank(text):
        raise ConfigError(f"the query is {text!r}, a blank text; name the words to search for")
    query = load_embedder(table).embed([text], [pair])[0].astype(np.float64)
    query /= np.linalg.norm(query) or 1
    best: list[tuple[float, int, dict[str, Any]]] = []
    n_seen = 0
    for columns, vectors in iter_columns(table):
        assert vectors is not None
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        scores = vectors @ query / np.where(norms > 0, norms, 1)  # [B]
        for i in np.argsort(-scores, kind="stable")[:top]:
            best.append((-float(scores[i]), n_seen + int(i), {name: values[i] for name, values in columns.items()}))
        best = sorted(best, key=lambda entry: entry[:2])[:top]
        n_seen += len(scores)
    return [Hit(-negative, row["id"], row["chunk"], row.get("text")) for negative, _, row in best]


def format_hits(text: str, hits: list[Hit]) -> str:
    """What `embeam query` prints."""
    lines = [f'nearest to "{shorten_line(text)}":']
    names = [hit.id + (f" chunk {hit.chunk}" if hit.chunk else "") for hit in hits]
    width = max(map(len, names), default=0)
    for hit, name in zip(hits, names, strict=True):
        lines.append(f"  {hit.score:6.3f}  {name:<{width}}  {shorten_line(hit.text or '')}".rstrip())
    return "\n".join(lines)
