"""From notes to rows: what a run takes over of the live table, the journal and its own equal texts. The local back end.

Every file with vectors is read once, in order, and only if something is wanted of it: rows that stay are copied as they
are stored, wishes are granted with the vectors that pass by. A file of which everything stays is linked whole.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np
from apache_beam.io.filesystems import FileSystems

from pipeline.config import KeptField
from pipeline.errors import RunError, TableError
from pipeline.records import DeadLetter, Row, digest_id
from pipeline.runtime import load_tensorflow
from pipeline.sinks import SINKS
from pipeline.sinks.index import Index, read_bytes, read_index, unpack_records
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.writing import RowFormat, Shard, ShardWriter, write_index
from pipeline.tables.journal import read_segment
from pipeline.tables.known import ROWS, KnownVectors, VectorFile
from pipeline.tables.recall import MARK, STAYS, Note, Wish

UNSEEN, STALE, KEPT, GONE = 0, 3, 4, 5  # besides STAYS and SUPERSEDED
CARRIED = (STAYS, STALE, KEPT)
WANT = np.dtype([("row", "<u8"), ("file", "<u4"), ("offset", "<u8")])
FRESH = "fresh"
MAX_SMALL_FILES = 16  # unchanged files below a quarter of --shard_bytes, before they are merged


class Letters(NamedTuple):
    """What the dead letters of a run say of documents.

    Attributes:
      ids: digests of the documents' ids, sorted, `[n]` of S16.
      blind: files of which not every record could be told: they prove of no document that it is gone.
      by_content: content hash to the letters of documents that were read.
    """

    ids: np.ndarray
    blind: set[str]
    by_content: dict[str, list[dict[str, Any]]]


def read_letters(shards: Iterable[Shard]) -> Letters:
    """Reads the dead letters that a run has written."""
    ids, blind, by_content = [], set(), defaultdict(list)
    for shard in shards:
        with FileSystems.open(shard.path, compression_type="uncompressed") as stream:
            for line in stream:
                letter = json.loads(line)
                if letter["id"] is None:
                    blind.add(letter["file"])
                elif letter["reason"] != "duplicate_id":  # another document has the id, and counts
                    ids.append(digest_id(letter["id"]))
                if "content_hash" in letter:
                    by_content[letter["content_hash"]].append(letter)
    return Letters(np.unique(np.array(ids, "S16")), blind, dict(by_content))


class Fates(NamedTuple):
    """What becomes of the live rows.

    Attributes:
      fate: `[n_live]`: STAYS, SUPERSEDED, STALE, KEPT or GONE.
      source: `[n_live]` number of the file that each row's document comes from now.
      sources: the files.
      counts: documents by fate.
    """

    fate: np.ndarray
    source: np.ndarray
    sources: list[str]
    counts: dict[str, int]


def decide_fates(
    known: KnownVectors, notes: Iterable[Note], letters: Letters, fresh_ids: np.ndarray, keeps_deleted: bool
) -> Fates:
    """Decides about every live row.

    A row is gone if nothing was seen of its document in an input that was read to the end. It is stale if that cannot
    be said, or if the document's new version is a dead letter: then the old vector is better than none.

    Args:
      known: the index of known vectors.
      notes: of the run.
      letters: the run's dead letters.
      fresh_ids: digests of the ids of all new rows, `[n]` of S16.
      keeps_deleted: whether rows of documents that are gone are kept.
    """
    n = known.n_live
    fate = np.zeros(n, "u1")
    source = known.entries["source"][:n].copy()
    sources = list(known.sources)
    for note in notes:
        if note.kind == "marks":
            marks, names = unpack_records(read_bytes(note.path), MARK)
            fate[marks["row"]] = marks["fate"]
            source[marks["row"]] = marks["source"] + len(sources)
            sources += names
    ids = known.entries["id"][:n]
    is_dead = np.isin(ids, letters.ids[~np.isin(letters.ids, fresh_ids)])
    blind = np.array([i for i, path in enumerate(sources) if path in letters.blind])
    unseen = fate == UNSEEN
    fate[unseen] = KEPT if keeps_deleted else GONE
    fate[(unseen & np.isin(source, blind)) | (is_dead & (fate != STAYS))] = STALE
    names = {STALE: "stale", KEPT: "kept", GONE: "deleted", STAYS: "unchanged"}
    counts = {name: len(np.unique(ids[fate == value])) for value, name in names.items()}
    return Fates(fate, source, sources, counts)


def check_deletes(n_deleted: int, n_live: int, max_fraction: float) -> None:
    """Raises RunError if so many documents are gone that the input must be wrong."""
    if n_live and n_deleted / n_live > max_fraction:
        raise RunError(
            f"{n_deleted:,} of the table's {n_live:,} documents are gone from the input, more than "
            f"--max_delete_fraction={max_fraction:g} allows; check --input, or raise it, or use --deletes=keep (what "
            "was encoded is kept for the next run)"
        )


class Stored(NamedTuple):
    """Some rows as they are stored, and their numbers `[n]`, ascending."""

    numbers: np.ndarray
    rows: Any


class VectorReader(Protocol):
    """Reads rows with vectors, file by file.

    Attributes:
      layout: of the rows.
    """

    layout: TableLayout

    def read(self, file: VectorFile, wanted: np.ndarray) -> Iterator[Stored]:
        """Yields rows of a file in order: all of them, or those among `wanted` at least.

        Args:
          file: the file.
          wanted: ascending numbers of rows `[m]`.

        Raises:
          TableError: if it is damaged.
        """

    def select(self, stored: Stored, positions: np.ndarray) -> Any:
        """Some rows as they are stored; only for files with rows."""

    def columns(self, stored: Stored, positions: np.ndarray) -> dict[str, list]:
        """Some rows, column by column; `embedding` is stored bytes."""


@dataclass(frozen=True)
class FileReader:
    """Reads a table's files.

    Attributes:
      file_format: a key of `SINKS`.
      layout: of the rows.
      compression: none or gzip.
    """

    file_format: str
    layout: TableLayout
    compression: str

    def read(self, file: VectorFile, wanted: np.ndarray) -> Iterator[Stored]:
        first = file.first
        load_tensorflow()  # tfx-bsl would import it with all its noise
        try:
            with FileSystems.open(file.path, compression_type="uncompressed") as raw:
                stream = gzip.GzipFile(fileobj=raw) if self.compression == "gzip" else raw
                for rows in SINKS[self.file_format].read(stream, self.layout):
                    yield Stored(np.arange(first, first + len(rows)), rows)
                    first += len(rows)
        except Exception as error:  # every format and file system has its own
            raise damaged(file.path, str(error)) from error
        if first != file.first + file.rows:
            raise damaged(file.path, f"it has {first - file.first} rows instead of {file.rows}")

    def select(self, stored: Stored, positions: np.ndarray) -> Any:
        return SINKS[self.file_format].select(stored.rows, positions)

    def columns(self, stored: Stored, positions: np.ndarray) -> dict[str, list]:
        return SINKS[self.file_format].decode(self.select(stored, positions), self.layout)


@dataclass(frozen=True)
class SegmentReader:
    """Reads segments of the journal.

    Attributes:
      layout: of the rows that are made from them.
    """

    layout: TableLayout

    def read(self, file: VectorFile, wanted: np.ndarray) -> Iterator[Stored]:
        segment = read_segment(file.path)
        if segment is None:
            raise TableError(f"{file.path} has vanished or is damaged; run the same command again")
        yield Stored(np.arange(file.first, file.first + file.rows), segment)

    def select(self, stored: Stored, positions: np.ndarray) -> Any:
        raise NotImplementedError("the journal has no rows to copy, only vectors")

    def columns(self, stored: Stored, positions: np.ndarray) -> dict[str, list]:
        columns: dict[str, list] = stored.rows.columns(positions.tolist())
        return columns


def damaged(path: str, why: str) -> TableError:
    """The error for a part of the live table that cannot be read."""
    return TableError(f"{path} is damaged: {why}; run embeam embed again with --verify_live, which makes its rows anew")


class Carrier:
    """The second pass of a run: grants wishes, copies rows.

    Args:
      known: the index of known vectors.
      readers: how to read files of kind ROWS (the live table's), SEGMENT and FRESH (this run's own).
      fresh: the files of new rows.
      form: how rows are written.
      folder: where to.
      shard_bytes: size at which a new file is begun.

    Attributes:
      counts: rows by what became of them.
      dead: dead letters of documents whose text is equal to one that could not be encoded.
    """

    def __init__(
        self,
        known: KnownVectors,
        readers: dict[str, VectorReader],
        fresh: Sequence[Shard],
        form: RowFormat,
        folder: str,
        shard_bytes: int,
    ) -> None:
        self.known = known
        self.readers = readers
        self.fresh = fresh
        self.form = form
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.counts: Counter[str] = Counter()
        self.dead: list[DeadLetter] = []
        self._writer = ShardWriter(folder, form, shard_bytes)
        self._linked: list[Shard] = []

    def carry(
        self,
        carried: np.ndarray,
        fates: Fates,
        notes: Sequence[Note],
        letters: Letters,
        live: dict[str, tuple[int, str]],
        copies: bool,
    ) -> list[Shard]:
        """Writes all rows that are not fresh.

        Args:
          carried: which live rows `[n_live]` are written again; none where they stay in a database.
          fates: of the live rows.
          notes: of the run.
          letters: the run's dead letters.
          live: size and checksum of each file of the live table, by path.
          copies: whether live rows can be copied as they are stored.

        Returns:
          Shards with the carried rows.
        """
        paths = [note.path for note in notes if note.kind == "wishes"]
        fresh_files = number_files(self.fresh, len(self.known.entries))
        wants = self._plan_wishes(paths, letters, fresh_files)
        small = self._find_small(carried, live) if copies else set()
        wishes = [open(path, "rb") for path in paths]  # noqa: SIM115  closed below
        try:
            for file in [*self.known.files, *fresh_files]:
                end = file.first + file.rows
                low, high = np.searchsorted(wants["row"], [file.first, end])
                keeps = carried[file.first : end] if file.kind == ROWS else np.zeros(0, bool)
                if low == high and copies and len(keeps) and keeps.all() and file.path not in small:
                    self._link(file, fates, live)
                elif low < high or keeps.any():
                    self._stream(file, keeps, wants[low:high], wishes, fates, copies)
        finally:
            for stream in wishes:
                stream.close()
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

    def _plan_wishes(self, paths: Sequence[str], letters: Letters, fresh_files: Sequence[VectorFile]) -> np.ndarray:
        """All (row, wish) pairs, sorted by row; wishes for texts that could not be encoded become dead letters."""
        wants: list[np.ndarray] = []
        equal: list[tuple[bytes, int, int]] = []
        for number, path in enumerate(paths):
            block: list[tuple[int, int, int]] = []
            with open(path, "rb") as lines:
                offset = 0
                for line in lines:
                    wish = Wish.from_line(line)
                    if wish.rows is None:
                        equal.append((bytes.fromhex(wish.content_hash), number, offset))
                        self._follow_letters(wish, letters)
                    else:
                        block += [(row, number, offset) for row in wish.rows]
                    offset += len(line)
                    if len(block) >= 1 << 16:
                        wants.append(np.array(block, WANT))
                        block = []
            wants.append(np.array(block, WANT))
        wants.append(self._find_equal(equal, letters, fresh_files))
        joined = np.concatenate(wants)
        return joined[np.argsort(joined["row"], kind="stable")]

    def _follow_letters(self, wish: Wish, letters: Letters) -> None:
        for letter in letters.by_content.get(wish.content_hash, ()):
            facts = letter["stage"], letter["reason"], letter["message"]
            self.dead.append(DeadLetter.of(*facts, wish.document, wish.content_hash))

    def _find_equal(
        self, equal: list[tuple[bytes, int, int]], letters: Letters, fresh_files: Sequence[VectorFile]
    ) -> np.ndarray:
        """The rows of this run for texts that were equal to one that was encoded."""
        if not equal:
            return np.empty(0, WANT)
        waiting = np.array(equal, [("content", "S16"), ("file", "<u4"), ("offset", "<u8")])
        wanted = np.unique(waiting["content"])
        found = [np.empty(0, [("content", "S16"), ("chunk", "<u4"), ("row", "<u8")])]
        for file, shard in zip(fresh_files, self.fresh, strict=True):
            entries = read_index(shard.index).entries
            hits = np.flatnonzero(np.isin(entries["content"], wanted))
            block = np.empty(len(hits), found[0].dtype)
            block["content"], block["chunk"] = entries["content"][hits], entries["chunk"][hits]
            block["row"] = hits + file.first
            found.append(block)
        rows = np.concatenate(found)
        _, first = np.unique(rows[["content", "chunk"]], return_index=True)
        rows = rows[first]
        low, high = (np.searchsorted(rows["content"], waiting["content"], side) for side in ("left", "right"))
        for content in np.unique(waiting["content"][low == high]):
            if content.ljust(16, b"\0").hex() not in letters.by_content:
                raise RunError("a vector was lost between encoding and publishing; run the same command again")
        n = high - low
        wants = np.empty(int(n.sum()), WANT)
        wants["file"], wants["offset"] = np.repeat(waiting["file"], n), np.repeat(waiting["offset"], n)
        begins = np.repeat(low - np.concatenate([[0], np.cumsum(n)[:-1]]), n)
        wants["row"] = rows["row"][np.arange(len(wants)) + begins]
        return wants

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
        wishes: Sequence[Any],
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

    def _grant(self, reader: VectorReader, stored: Stored, wants: np.ndarray, wishes: Sequence[Any]) -> None:
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
        self.counts["granted_rows"] += len(rows)


def number_files(fresh: Sequence[Shard], first: int) -> list[VectorFile]:
    """The files of new rows, numbered on from the known ones."""
    files = []
    for shard in fresh:
        files.append(VectorFile(shard.path, FRESH, first, shard.rows))
        first += shard.rows
    return files


def build_row(columns: dict[str, list], i: int, wish: Wish, layout: TableLayout) -> Row:
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


def convert_rows(columns: dict[str, list], sources: list[str], old: TableLayout, new: TableLayout) -> list[Row]:
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
                kept=json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode() if new.kept else b"",
                text=(columns["text"][i] if "text" in columns else "") if new.keep_text else None,
                n_chunks=columns["n_chunks"][i],
                source=source,
            )
        )
    return rows


def _kept_value(columns: dict[str, list], i: int, field: KeptField, types: dict[str, str]) -> Optional[Any]:
    return columns[field.name][i] if types.get(field.name) == field.type else None
