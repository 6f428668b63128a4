"""From notes to rows: what a run takes over of the live table, the journal and its own equal texts. The local back end.

Every file with vectors is read once, in order, and only if something is wanted of it: rows that stay are copied as they
are stored, wishes are granted with the vectors that pass by. A file of which everything stays is linked whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO, Optional

import numpy as np

from pipeline.config import KeptField
from pipeline.records import Row, pack_kept
from pipeline.reuse.actions import Fates
from pipeline.reuse.index import KnownVectors
from pipeline.reuse.look_up import Wish
from pipeline.reuse.requests import Wishes
from pipeline.sinks.index import Index
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.readers import ROWS, Stored, VectorFile, VectorReader
from pipeline.sinks.writing import RowFormat, Shard, ShardWriter, write_index

MAX_SMALL_FILES = 16  # unchanged files below a quarter of --shard_bytes, before they are merged


class Carrier:
    """The second pass of a run: grants wishes, copies rows.

    Args:
      known: the index of known vectors.
      readers: how to read files of kind ROWS (the live table's), SEGMENT and FRESH (this run's own).
      form: how rows are written.
      folder: where to.
      shard_bytes: size at which a new file is begun.

    Attributes:
      counts: rows by what became of them.
    """

    def __init__(
        self,
        known: KnownVectors,
        readers: dict[str, VectorReader],
        form: RowFormat,
        folder: str,
        shard_bytes: int,
    ) -> None:
        self.known = known
        self.readers = readers
        self.form = form
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.counts: Counter[str] = Counter()
        self._writer = ShardWriter(folder, form, shard_bytes)
        self._linked: list[Shard] = []

    def carry(
        self, carried: np.ndarray, fates: Fates, wishes: Wishes, live: dict[str, tuple[int, str]], copies: bool
    ) -> list[Shard]:
        """Writes all rows that are not fresh.

        Args:
          carried: which live rows `[n_live]` are written again; none where they stay in a database.
          fates: of the live rows.
          wishes: for rows from known vectors.
          live: size and checksum of each file of the live table, by path.
          copies: whether live rows can be copied as they are stored.

        Returns:
          Shards with the carried rows.
        """
        small = self._find_small(carried, live) if copies else set()
        wants = wishes.wants
        with ExitStack() as stack:
            streams = [stack.enter_context(open(path, "rb")) for path in wishes.paths]
            for file in [*self.known.files, *wishes.fresh]:
                end = file.first + file.rows
                low, high = np.searchsorted(wants["row"], [file.first, end])
                keeps = carried[file.first : end] if file.kind == ROWS else np.zeros(0, bool)
                if low == high and copies and len(keeps) and keeps.all() and file.path not in small:
                    self._link(file, fates, live)
                elif low < high or keeps.any():
                    self._stream(file, keeps, wants[low:high], streams, fates, copies)
        return [*self._linked, *self._writer.finish()]

    def _find_small(self, carried: np.ndarray, live: dict[str, tuple[int, str]]) -> set[str]:
        """Unchanged files that are merged, because there are too many small ones."""
        small = {
            file.path
            for file in self.known.files
            if file.kind == ROWS
            and live[file.path][0] < self.shard_bytes // 4
            and carried[file.first : file.first + file.rows].all()
        }
        return small if len(small) > MAX_SMALL_FILES else set()

    def _link(self, file: VectorFile, fates: Fates, live: dict[str, tuple[int, str]]) -> None:
        index = write_index(self.folder, self._index(file, np.arange(file.rows), fates))
        n_bytes, sha256 = live[file.path]
        first = self.known.entries["id"][file.first].hex()
        form = self.form
        self._linked.append(
            Shard(file.path, form.kind, form.suffix, file.rows, n_bytes, sha256, first, *index, linked=True)
        )
        self.counts["linked_files"] += 1
        self.counts["linked_rows"] += file.rows

    def _index(self, file: VectorFile, positions: np.ndarray, fates: Fates) -> Index:
        entries = self.known.entries[file.first + positions]
        entries["source"] = fates.source[file.first + positions]
        return Index(entries, fates.sources)

    def _stream(
        self,
        file: VectorFile,
        keeps: np.ndarray,
        wants: np.ndarray,
        wishes: Sequence[BinaryIO],
        fates: Fates,
        copies: bool,
    ) -> None:
        reader = self.readers[file.kind]
        for stored in reader.read(file, np.unique(wants["row"])):
            if len(keeps):
                self._keep(reader, file, stored, np.flatnonzero(keeps[stored.numbers - file.first]), fates, copies)
            low, high = np.searchsorted(wants["row"], [stored.numbers[0], stored.numbers[-1] + 1])
            if low < high:
                self._grant(reader, stored, wants[low:high], wishes)

    def _keep(
        self,
        reader: VectorReader,
        file: VectorFile,
        stored: Stored,
        positions: np.ndarray,
        fates: Fates,
        copies: bool,
    ) -> None:
        """Writes rows of the live table again, as they are or under other columns."""
        if not len(positions):
            return
        index = self._index(file, stored.numbers[positions] - file.first, fates)
        if copies:
            self._writer.write_stored(reader.select(stored, positions), index)
            self.counts["copied_rows"] += len(positions)
        else:
            columns = reader.columns(stored, positions) | {"n_chunks": index.entries["n_chunks"].tolist()}
            sources = [index.sources[number] for number in index.entries["source"]]
            self._writer.write(convert_rows(columns, sources, reader.layout, self.form.layout))
            self.counts["converted_rows"] += len(positions)

    def _grant(self, reader: VectorReader, stored: Stored, wants: np.ndarray, wishes: Sequence[BinaryIO]) -> None:
        numbers, which = np.unique(wants["row"], return_inverse=True)
        columns = reader.columns(stored, np.searchsorted(stored.numbers, numbers))
        rows = []
        for want, i in zip(wants, which.tolist(), strict=True):
            stream = wishes[want["file"]]
            stream.seek(int(want["offset"]))
            wish = Wish.from_line(stream.readline())
            rows.append(build_row(columns, i, wish, self.form.layout))
        for start in range(0, len(rows), 1024):
            self._writer.write(rows[start : start + 1024])
        self.counts["reused_rows"] += len(rows)


def build_row(columns: Columns, i: int, wish: Wish, layout: TableLayout) -> Row:
    """The row of a document from the vector of an equal text."""
    document = wish.document

    def value(name: str, otherwise: Any) -> Any:
        return columns[name][i] if name in columns else otherwise

    return Row(
        id=document.id,
        chunk=value("chunk", 0),
        vector=columns["embedding"][i],
        scale=value("scale", 0.0),
        n_tokens=value("n_tokens", None),
        n_truncated=value("n_truncated", None),
        content_hash=wish.content_hash,
        kept=document.kept,
        text=document.text if layout.keep_text else None,
        n_chunks=value("n_chunks", 1),
        source=document.origin.path,
    )


def convert_rows(columns: Columns, sources: list[str], old: TableLayout, new: TableLayout) -> list[Row]:
    """Rows of a table with other columns: a kept field that it did not have is null."""
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
            )
        )
    return rows


def _kept_value(columns: Columns, i: int, field: KeptField, types: dict[str, str]) -> Optional[Any]:
    return columns[field.name][i] if types.get(field.name) == field.type else None
