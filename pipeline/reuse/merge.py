"""Merge: writes kept and reused rows to the files of one snapshot.

Each file with vectors is read at most once, in order, and only if some of its rows are needed: rows that stay are
copied as they are stored, and requests get their vectors during the same pass. A file whose rows all stay is linked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from pipeline.read_config import KeptField
from pipeline.records import Row, cut_own_text, pack_kept
from pipeline.reuse.complete import LiveDecisions, RequestPlan
from pipeline.reuse.index import VectorIndex
from pipeline.reuse.journal import Segment
from pipeline.reuse.requests import RequestLines, ReuseRequest
from pipeline.sinks.index import Index, whole_digest
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.readers import ROWS, Stored, VectorFile, VectorReader
from pipeline.sinks.writing import RowFormat, Shard, ShardWriter, write_index
from pipeline.sources.kept import Misfit, convert_kept

WRITTEN_ROWS = 1024
MAX_SMALL_FILES = 16  # unchanged files below a quarter of --shard_bytes, before they are merged


class Merger:
    """Writes rows that are kept, and rows for requests.

    Args:
      index: the vector index.
      readers: how to read files of kind ROWS (the live table's), SEGMENT and FRESH (this run's own).
      form: how rows are written.
      folder: where files are written.
      shard_bytes: size at which a new file is started.
      copies: whether live rows can be copied as they are stored.

    Attributes:
      counts: rows by how they were written.
    """

    def __init__(
        self,
        index: VectorIndex,
        readers: dict[str, VectorReader],
        form: RowFormat,
        folder: str,
        shard_bytes: int,
        copies: bool,
    ) -> None:
        self.index = index
        self.readers = readers
        self.form = form
        self.shard_bytes = shard_bytes
        self.copies = copies
        self.counts: Counter[str] = Counter()
        self._writer = ShardWriter(folder, form, shard_bytes)
        self._kept = KeptRows(readers[ROWS], self._writer, form.layout, self.counts, copies)
        self._linked: list[Shard] = []

    def merge(
        self,
        kept: np.ndarray,
        decisions: LiveDecisions,
        requests: RequestPlan,
        fresh: Sequence[VectorFile],
        live: dict[str, tuple[int, str]],
    ) -> list[Shard]:
        """Writes all rows that are not fresh.

        Args:
          kept: which live rows `[n_live]` are written again; none where they stay in a database.
          decisions: about the live rows.
          requests: for rows from vectors of the index or of this run.
          fresh: this run's own files, numbered after the rows of the vector index.
          live: size and checksum of each file of the live table, by path.

        Returns:
          Shards with the rows.
        """
        small = self._find_small(kept, live) if self.copies else set()
        with RequestLines(requests.lines) as lines:
            for file in [*self.index.files, *fresh]:
                end = file.first + file.rows
                wanted = requests.wanted.read(file.first, end)
                keeps = kept[file.first : end] if file.kind == ROWS else np.zeros(0, bool)
                if not len(wanted) and self.copies and len(keeps) and keeps.all() and file.path not in small:
                    index = self._index(file, np.arange(file.rows), decisions)
                    self._linked.append(self._kept.link(file, index, *live[file.path]))
                elif len(wanted) or keeps.any():
                    self._stream(file, keeps, wanted, lines, decisions)
        return [*self._linked, *self._writer.finish()]

    def _find_small(self, kept: np.ndarray, live: dict[str, tuple[int, str]]) -> set[str]:
        """Unchanged files that are merged, because there are too many small ones."""
        small = {
            file.path
            for file in self.index.files
            if file.kind == ROWS
            and live[file.path][0] < self.shard_bytes // 4
            and kept[file.first : file.first + file.rows].all()
        }
        return small if len(small) > MAX_SMALL_FILES else set()

    def _index(self, file: VectorFile, positions: np.ndarray, decisions: LiveDecisions) -> Index:
        entries = self.index.entries[file.first + positions]
        entries["source"] = decisions.source[file.first + positions]
        return Index(entries, decisions.sources)

    def _stream(
        self,
        file: VectorFile,
        keeps: np.ndarray,
        wanted: np.ndarray,
        lines: RequestLines,
        decisions: LiveDecisions,
    ) -> None:
        reader = self.readers[file.kind]
        for stored in reader.read(file, np.unique(wanted["row"])):
            if len(keeps):
                positions = np.flatnonzero(keeps[stored.numbers - file.first])
                self._kept.write(
                    stored, positions, self._index(file, stored.numbers[positions] - file.first, decisions)
                )
            low, high = np.searchsorted(wanted["row"], [stored.numbers[0], stored.numbers[-1] + 1])
            if low < high:
                self._answer(reader, stored, wanted[low:high], lines)

    def _answer(self, reader: VectorReader, stored: Stored, wanted: np.ndarray, lines: RequestLines) -> None:
        """Writes the rows for requests whose vectors are among some stored rows."""
        for start in range(0, len(wanted), WRITTEN_ROWS):
            block = wanted[start : start + WRITTEN_ROWS]
            numbers, which = np.unique(block["row"], return_inverse=True)
            columns = reader.columns(stored, np.searchsorted(stored.numbers, numbers))
            rows = [
                build_row(columns, i, lines.read(int(one["file"]), int(one["offset"])), self.form.layout)
                for one, i in zip(block, which.tolist(), strict=True)
            ]
            self._writer.write(rows)
        self.counts["reused_rows"] += len(wanted)


class KeptRows:
    """Writes rows of the live table that stay.

    Args:
      reader: of the live table's files.
      writer: of the new snapshot's files.
      layout: of their rows.
      counts: rows by how they were written; updated.
      copies: whether rows can be copied as they are stored; else they are written with other columns.
    """

    def __init__(
        self, reader: VectorReader, writer: ShardWriter, layout: TableLayout, counts: Counter[str], copies: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._layout = layout
        self._counts = counts
        self._copies = copies

    def write(self, stored: Stored, positions: np.ndarray, index: Index) -> None:
        """Writes some of the rows in `stored`; `index` has their entries."""
        if not len(positions):
            return
        if self._copies:
            self._writer.write_stored(self._reader.select(stored, positions), index)
            self._counts["copied_rows"] += len(positions)
        else:
            columns = self._reader.columns(stored, positions) | {"n_chunks": index.entries["n_chunks"].tolist()}
            sources = [index.sources[number] for number in index.entries["source"]]
            self._writer.write(convert_rows(columns, sources, self._reader.layout, self._layout))
            self._counts["converted_rows"] += len(positions)

    def link(self, file: VectorFile, index: Index, n_bytes: int, sha256: str) -> Shard:
        """Links a whole file that stays, with a new index."""
        written, form = write_index(self._writer.folder, index), self._writer.form
        first = index.entries["id"][0].hex()
        self._counts["linked_files"] += 1
        self._counts["linked_rows"] += file.rows
        return Shard(file.path, form.kind, form.suffix, file.rows, n_bytes, sha256, first, *written, linked=True)


def build_row(columns: Columns, i: int, request: ReuseRequest, layout: TableLayout) -> Row:
    """The row of a document from the vector of a document with the same text."""
    document = request.document

    def value(name: str, otherwise: Any) -> Any:
        return columns[name][i] if name in columns else otherwise

    offsets = value("char_start", None), value("char_end", None)
    return Row(
        id=document.id,
        chunk=value("chunk", 0),
        vector=columns["embedding"][i],
        scale=value("scale", 0.0),
        n_tokens=value("n_tokens", None),
        n_truncated=value("n_truncated", None),
        content_hash=request.content_hash,
        kept=document.kept,
        text=cut_own_text(document.text, *offsets) if layout.keep_text else None,
        n_chunks=value("n_chunks", 1),
        source=document.origin.path,
        char_start=offsets[0],
        char_end=offsets[1],
        n_unknown=value("n_unknown", None),
    )


def convert_rows(columns: Columns, sources: list[str], old: TableLayout, new: TableLayout) -> list[Row]:
    """Rows of a table with other columns: a kept field that it did not have, or that does not fit its type, is null."""
    rows = []
    types = {field.name: field.type for field in old.kept}
    for i, source in enumerate(sources):
        kept = [_kept_value(columns, i, field, types) for field in new.kept]
        rows.append(
            Row(
                id=columns["id"][i],
                chunk=columns["chunk"][i],
                vector=columns["embedding"][i],
                scale=columns["scale"][i] if "scale" in columns else 0.0,
                n_tokens=columns["n_tokens"][i] if "n_tokens" in columns else None,
                n_truncated=columns["n_truncated"][i] if "n_truncated" in columns else None,
                content_hash=columns["content_hash"][i],
                kept=pack_kept(kept),
                text=(columns["text"][i] if "text" in columns else "") if new.keep_text else None,
                n_chunks=columns["n_chunks"][i],
                source=source,
                **{name: columns[name][i] for name in ("char_start", "char_end", "n_unknown") if name in columns},
            )
        )
    return rows


def _kept_value(columns: Columns, i: int, field: KeptField, types: dict[str, str]) -> Optional[Any]:
    if field.name not in types:
        return None
    try:
        return convert_kept(columns[field.name][i], field.type)
    except Misfit:
        return None


def bare_rows(segment: Segment, positions: np.ndarray) -> list[Row]:
    """Some rows of a segment of the journal, which have no id."""
    columns = segment.columns(positions.tolist())
    names = ("chunk", "scale", "n_tokens", "n_truncated", "n_chunks", "char_start", "char_end", "n_unknown")
    content = segment.records["content"][positions]
    return [
        Row(
            id="",
            vector=columns["embedding"][i],
            content_hash=whole_digest(content[i]).hex(),
            kept=b"",
            text=None,
            **{name: columns[name][i] for name in names},
        )
        for i in range(len(positions))
    ]
