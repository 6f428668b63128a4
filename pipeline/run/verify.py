"""Whether a table is true: its files against its manifest, its rows against their index, all of it against the input.

Everything streams. What is said about ids goes through an index of digests on a local disk, as in a run, so memory
stays at some 40 bytes a row whatever the table holds.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from apache_beam.pvalue import TaggedOutput

from pipeline.config import EmbedConfig, KeptField, ReadConfig
from pipeline.errors import ConfigError, InputError, ValidationError
from pipeline.files import join, list_files, list_folders, open_file, read_checksum
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, DeadLetter, Document, Row, digest_id, pack_kept
from pipeline.reuse.index import VectorIndex, build_index
from pipeline.sinks.index import ENTRY, Index, digest_kept, read_index, whole_digest
from pipeline.sinks.readers import ROWS, FileReader, Stored, VectorFile
from pipeline.sources.duplicates import ScanToFile, merge_scans
from pipeline.sources.planning import InputPlan, plan_input
from pipeline.sources.read import ReadSplit
from pipeline.tables.manifest import MANIFEST, TableFile, open_table
from pipeline.tables.validation import compare_row, restore_row
from pipeline.vectors.storing import STORED_DTYPES, quantize_vectors

if TYPE_CHECKING:
    from pipeline.search.embedder import Embedder

BLOCK = 1024
NONE = np.zeros(0, np.int64)
SAMPLE_BATCH = 64  # texts that are encoded in one go
KINDS = {
    "missing_file": "the manifest lists a file that is not there",
    "surplus_file": "the snapshot's folder holds something that the manifest does not list",
    "wrong_size": "a file has not the size that the manifest says",
    "wrong_checksum": "a file has not the sha256 that the manifest says",
    "damaged_file": "a file, or rows of it, cannot be read",
    "wrong_count": "the manifest's own numbers do not add up",
    "wrong_index": "the index of a file does not agree with its rows",
    "wrong_row": "a row contradicts itself",
    "duplicate_row": "two rows have one id and chunk",
    "missing_chunk": "a document has not all of its chunks",
    "wrong_dimension": "a vector has not the table's size",
    "not_finite": "a vector holds NaN or infinity",
    "missing_document": "a document of the input has no row",
    "stale_row": "a document has changed since its row was made",
    "surplus_row": "a row belongs to no document of the input",
    "wrong_vector": "a text, encoded again, gives another vector",
}


class Finding(NamedTuple):
    """One thing that is not as it should be: a key of KINDS, which file, row or document, and what is wrong."""

    kind: str
    what: str
    message: str


def verify_table(table: str, input_globs: Sequence[str] = (), sample: int = 0) -> list[Finding]:
    """Reconciles the live snapshot of a table with its manifest, and with an input.

    Args:
      table: the table's folder.
      input_globs: files to compare with, read by the settings that the table was made with; none: no comparison.
      sample: how many rows to encode again and compare.

    Returns:
      What is wrong; nothing if the table is true.

    Raises:
      TableError: if there is no table, or its encoder is no longer what it was and a sample is asked for.
      ConfigError: if a glob matches nothing, or there are no texts for the sample.
    """
    findings: list[Finding] = []
    Verification(table, findings.append).run(input_globs, sample)
    return findings


def read_outcomes(
    found: InputPlan, config: ReadConfig, kept: Sequence[KeptField], work: str
) -> Iterator[Document | DeadLetter | BundleCounts]:
    """Reads a planned input in this process as a run would: documents, dead letters, and a counted for each split.

    Args:
      found: from `plan_input`.
      config: as for `ReadDocuments`.
      kept: the kept fields with their types.
      work: local folder for the search for duplicate ids.
    """
    read = ReadSplit(config, kept)
    losers = None
    if config.id_field:
        scan = ScanToFile(read.list_ids, work)
        losers = merge_scans(None, [path for split in found.splits for path in scan.process(split)], work)
    for split in found.splits:
        for output in read.process(split, losers):
            yield output.value if isinstance(output, TaggedOutput) else output


class Accounts(NamedTuple):
    """What dead letters account for: digests of documents' ids, and files of which not every record could be told."""

    ids: set[bytes]
    incomplete: set[str]

    def add(self, document_id: str | None, reason: str, path: str) -> None:
        if document_id is None:
            self.incomplete.add(path)
        elif reason != "duplicate_id":  # another document has the id, and counts
            self.ids.add(digest_id(document_id).rstrip(b"\0"))  # as NumPy gives it


class Verification:
    """One pass over a table.

    Args:
      table: the table's folder.
      report: called with each finding as it comes.

    Attributes:
      counts: what was looked at, and what dead letters account for.
    """

    def __init__(self, table: str, report: Callable[[Finding], object]) -> None:
        self.table = table
        self.manifest, self.folder = open_table(table)
        self.counts: Counter[str] = Counter()
        self._report = report
        self._layout = self.manifest.layout
        self._reader = FileReader(self.manifest.file_format, self._layout, self.manifest.compression)
        self._letters = Accounts(set(), set())
        # tf.Example has no numbers of 64 bits: what went into the digest is not what comes out of the table.
        rounds = self.manifest.file_format == "tfrecord" and any(f.type == "float" for f in self._layout.kept)
        self._redigests = bool(self._layout.kept) and not rounds
        self._compares_kept = True
        may_be_null = {"n_truncated", *(field.name for field in self._layout.kept)}
        self._required = [column for column in self._layout.columns() if column not in may_be_null]

    def run(self, input_globs: Sequence[str] = (), sample: int = 0) -> None:
        """Checks everything that is asked for; see `verify_table`."""
        embedder = self._prepare_sample(input_globs) if sample else None
        plan = self._plan_input(input_globs) if input_globs else None
        there = self.check_files()
        self.check_dead_letters(there)
        with tempfile.TemporaryDirectory(prefix="embeam-verify-") as scratch:
            build_index(scratch, self.check_rows(there), [], True)
            known = VectorIndex(scratch)
            self.check_ids(known)
            wanted = _spread(np.flatnonzero(known.entries["n_chunks"] == 1), sample)
            texts = self.check_input(known, *plan, scratch, wanted) if plan else None
            if embedder:
                self.check_sample(known, embedder, wanted, texts)

    def check_files(self) -> dict[str, str]:
        """Compares the folder with the manifest; returns the files that are there, by name."""
        manifest = self.manifest
        there = {os.path.basename(path): path for path in list_files(self.folder)}
        listed = {file.name: file for file in (*manifest.files, *manifest.index_files, *manifest.dead_letter_files)}
        ours = {*listed, MANIFEST, *(["schema.pbtxt"] if manifest.file_format == "tfrecord" else [])}
        for name in sorted(ours - set(there)):
            cure = "embeam rollback returns to an older snapshot"
            self._find("missing_file", name, f"it is not in {self.folder}; {cure}")
        for name in sorted({*there, *list_folders(self.folder)} - ours):
            if not name.startswith("."):  # what file managers leave behind
                self._find("surplus_file", name, f"the manifest does not know it; remove it from {self.folder}")
        for name in sorted(set(listed) & set(there)):
            self._check_file(listed[name], there[name])
        n_rows = sum(file.rows for file in manifest.files)
        if n_rows != manifest.rows:
            self._find("wrong_count", MANIFEST, f"it says {manifest.rows:,} rows, and its files have {n_rows:,}")
        return there

    def _check_file(self, file: TableFile, path: str) -> None:
        try:
            sha256, size = read_checksum(path)
        except Exception as error:  # every file system has exceptions of its own
            self._find("damaged_file", file.name, f"it cannot be read: {error}")
            return
        self.counts["files"] += 1
        self.counts["bytes"] += size
        if size != file.n_bytes:
            self._find("wrong_size", file.name, f"it has {size:,} bytes instead of {file.n_bytes:,}")
        elif sha256 != file.sha256:
            self._find("wrong_checksum", file.name, f"its sha256 is {sha256[:12]}..., not that of the run")

    def check_dead_letters(self, there: dict[str, str]) -> None:
        """Reads the dead letters: whose they are, and whether all are there."""
        n = 0
        for file in self.manifest.dead_letter_files:
            if file.name not in there:
                continue
            n_lines = 0
            try:
                with open_file(there[file.name]) as stream:
                    for line in stream:
                        dead_letter = json.loads(line)
                        self._letters.add(dead_letter["id"], dead_letter["reason"], dead_letter["file"])
                        n_lines += 1
            except Exception as error:
                self._find("damaged_file", file.name, f"its line {n_lines + 1} cannot be read: {error}")
            else:
                if n_lines != file.rows:
                    self._find("damaged_file", file.name, f"it has {n_lines:,} lines instead of {file.rows:,}")
            n += file.rows
        self.counts["dead_letters"] = n
        if all(file.name in there for file in self.manifest.dead_letter_files):
            counted = sum(self.manifest.dead_letters.values())
            if counted != n:
                self._find("wrong_count", MANIFEST, f"it counts {counted:,} dead letters, and its files have {n:,}")

    def check_rows(self, there: dict[str, str]) -> Iterator[tuple[str, Index]]:
        """Checks every row by itself and against its index; yields what the rows themselves say, file by file."""
        for file, index_file in zip(self.manifest.files, self.manifest.index_files, strict=True):
            index = self._read_index(file, index_file) if index_file.name in there else None
            entries = np.zeros(file.rows, ENTRY)
            if index is not None:  # what cannot be read counts as there
                size = min(file.rows, len(index.entries))
                entries[:size] = index.entries[:size]
            elif self._layout.kept and not self._redigests:
                self._compares_kept = False
            if file.name in there:
                self._read_rows(file, index, entries)
            yield join(self.folder, file.name), Index(entries, index.sources if index else [])

    def _read_index(self, file: TableFile, index_file: TableFile) -> Index | None:
        try:
            index = read_index(join(self.folder, index_file.name))
            if len(index.sources) <= index.entries["source"].max(initial=0) and len(index.entries):
                raise ValueError("it names an input file that it does not list")
        except Exception as error:
            self._find("damaged_file", index_file.name, f"it cannot be read: {error}")
            return None
        if len(index.entries) != file.rows:
            message = f"it has {len(index.entries):,} entries for {file.rows:,} rows of {file.name}"
            self._find("wrong_index", index_file.name, message)
        return index

    def _read_rows(self, file: TableFile, index: Index | None, entries: np.ndarray) -> None:
        start = 0
        try:
            for stored in self._reader.read(VectorFile(join(self.folder, file.name), ROWS, 0, file.rows), NONE):
                rows = [(i, self._check_row(f"{file.name} row {i}", row)) for i, row in self._decode(file, stored)]
                positions = np.array([i for i, own in rows if own and i < file.rows], int)
                block = np.array([own for i, own in rows if own and i < file.rows], ENTRY)
                if index is not None:
                    self._compare_index(file, positions, block, index)
                fields = ["id", "content", "chunk", "n_chunks", *(["kept"] if self._redigests else [])]
                for field in fields:
                    entries[field][positions] = block[field]
                start += len(stored.numbers)
        except Exception as error:  # TableError says what; a reader of damaged bytes may raise anything else
            why = str(error).removeprefix(f"{join(self.folder, file.name)} is damaged: ")
            self._find("damaged_file", file.name, f"after {start:,} of {file.rows:,} rows: {why}")
        self.counts["rows"] += start

    def _compare_index(self, file: TableFile, positions: np.ndarray, block: np.ndarray, index: Index) -> None:
        there = positions < len(index.entries)
        positions, block = positions[there], block[there]
        said = index.entries[positions]
        fields = ["id", "content", "chunk", "n_chunks", *(["kept"] if self._redigests else [])]
        differs = {field: block[field] != said[field] for field in fields}
        for i in np.flatnonzero(np.any(list(differs.values()), 0)).tolist():
            names = ", ".join(field for field in fields if differs[field][i])
            self._find("wrong_index", f"{file.name} row {positions[i]}", f"its index has another {names}")

    def _decode(self, file: TableFile, stored: Stored) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a block, one by one if it cannot be decoded as a whole."""
        try:
            blocks = [(int(stored.numbers[0]), self._reader.columns(stored, np.arange(len(stored.numbers))))]
        except Exception:
            blocks = []
            for i, number in enumerate(stored.numbers.tolist()):
                try:
                    blocks.append((number, self._reader.columns(stored, np.array([i]))))
                except Exception as error:
                    self._find("damaged_file", f"{file.name} row {number}", f"it cannot be decoded: {error}")
        for first, columns in blocks:
            for i in range(len(columns["id"])):
                yield first + i, {name: values[i] for name, values in columns.items()}

    def _check_row(self, name: str, row: dict[str, Any]) -> tuple[bytes, bytes, int, int, int, int] | None:
        """Checks one row by itself; returns its ENTRY, without a source, or None if it has no identity."""
        layout = self._layout
        absent = [column for column in self._required if row[column] is None]
        if absent:
            self._find("wrong_row", name, f"it has no {', '.join(absent)}")
            return None
        try:
            content = bytes.fromhex(row["content_hash"])
        except ValueError:
            content = b""
        if len(content) != 16:
            self._find("wrong_row", name, f"its content hash {row['content_hash']!r} is none")
            return None
        n_chunks = row["n_chunks"] if layout.chunked else 1
        if not 0 <= row["chunk"] < n_chunks:
            self._find("wrong_row", name, f"it is chunk {row['chunk']} of {n_chunks}")
            return None
        settings = self.manifest.settings
        if layout.keep_text and not settings["pair_field"]:
            text_hash = hash_content(settings["text_prefix"] + row["text"], None)
            if text_hash != row["content_hash"]:
                self._find("wrong_row", name, f"{row['id']!r} has a text that is not the one of its content hash")
        self._check_vector(name, row)
        kept = 0
        if self._redigests:
            kept = digest_kept(pack_kept([row[field.name] for field in layout.kept]))
        return digest_id(row["id"]), content, kept, row["chunk"], n_chunks, 0

    def _check_vector(self, name: str, row: dict[str, Any]) -> None:
        layout = self._layout
        numbers = layout.dimension * (row["n_tokens"] if layout.tokens else 1)
        wanted = -(-numbers // 8) if layout.dtype == "binary" else numbers
        found = len(row["embedding"]) // np.dtype(STORED_DTYPES[layout.dtype]).itemsize
        if found != wanted:
            self._find("wrong_dimension", name, f"{row['id']!r} has {found:,} stored numbers instead of {wanted:,}")
            return
        if layout.dtype == "binary":
            return
        is_int = layout.dtype == "int8"
        if not np.isfinite(
            row["scale"] if is_int else np.frombuffer(row["embedding"], STORED_DTYPES[layout.dtype])
        ).all():
            self._find("not_finite", name, f"the vector of {row['id']!r} holds NaN or infinity")

    def check_ids(self, known: VectorIndex) -> None:
        """Finds rows that are there twice, and documents of which chunks are missing."""
        ids = known.live_ids()
        is_first = np.ones(len(ids), bool)
        is_first[1:] = ids[1:] != ids[:-1]
        self.counts["documents"] = int(is_first.sum())
        firsts = np.flatnonzero(is_first)
        if not self._layout.chunked:  # only what is there more than once can be wrong
            firsts = firsts[np.diff(firsts, append=len(ids)) > 1]
        twice, partial = [np.empty(0, np.int64)], np.empty(0, [("row", "<u8"), ("n", "<u4"), ("n_chunks", "<u4")])
        for start in range(0, len(firsts), BLOCK):
            some = ids[firsts[start : start + BLOCK]]
            short = []
            for digest, rows in zip(some, known.find_ids(some), strict=True):
                if not digest:  # a row that cannot be read
                    continue
                entries = known.entries[rows]
                chunks, at = np.unique(entries["chunk"], return_index=True)
                if len(chunks) < len(rows):
                    twice.append(np.delete(rows, at).astype(np.int64))
                if len(chunks) < entries["n_chunks"].max() and digest not in self._letters.ids:
                    short.append((int(rows[0]), len(chunks), int(entries["n_chunks"].max())))
            partial = np.concatenate([partial, np.array(short, partial.dtype)])
        for _, place, row in self.read_rows(known, np.sort(np.concatenate(twice))):
            self._find("duplicate_row", row["id"], f"{place} repeats its chunk {row['chunk']}")
        partial.sort(order="row")
        for (_, n, n_chunks), (_, _, row) in zip(partial, self.read_rows(known, partial["row"]), strict=True):
            self._find("missing_chunk", row["id"], f"{n:,} of its {n_chunks:,} chunks are there")

    def check_input(
        self, known: VectorIndex, found: InputPlan, config: ReadConfig, scratch: str, wanted: np.ndarray
    ) -> dict[int, tuple[str, str | None]]:
        """Compares the rows with the documents of an input.

        Args:
          known: the index of the rows.
          found: the input.
          config: how it is read.
          scratch: a local folder.
          wanted: numbers of rows whose texts are wanted, ascending.

        Returns:
          Text and second segment by number of row, for those rows that are up to date.
        """
        seen = np.zeros(known.n_live, bool)
        unread = Accounts(set(), set())
        texts: dict[int, tuple[str, str | None]] = {}
        wanted_rows = set(wanted.tolist())
        block: list[Document] = []

        def compare() -> None:
            rows = known.find_ids(np.array([digest_id(document.id) for document in block], "S16"))
            for document, own in zip(block, rows, strict=True):
                seen[own] = True
                if self._is_current(document, known.entries[own]) and int(own[0]) in wanted_rows:
                    texts[int(own[0])] = document.text, document.pair
            block.clear()

        for outcome in read_outcomes(found, config, self._layout.kept, scratch):
            if isinstance(outcome, Document):
                self.counts["input_documents"] += 1
                block.append(outcome)
                if len(block) == BLOCK:
                    compare()
            elif isinstance(outcome, DeadLetter):
                unread.add(outcome.id, outcome.reason, outcome.origin.path)
        compare()
        self._check_surplus(known, seen, unread)
        return texts

    def _is_current(self, document: Document, entries: np.ndarray) -> bool:
        """Whether a document's rows are what it says now; reports if not."""
        origin = document.origin
        place = f"{origin.path} {origin.unit} {origin.position}"
        is_dead = digest_id(document.id).rstrip(b"\0") in self._letters.ids
        if not len(entries):
            self.counts["dead_documents"] += is_dead
            if not is_dead:
                self._find("missing_document", document.id, f"{place} has no row; embeam embed makes it")
            return False
        prefix = self.manifest.settings["text_prefix"]
        content = bytes.fromhex(hash_content(prefix + document.text, document.pair))
        same_text = bool((entries["content"] == np.array(content, "S16")).all())
        same_kept = not self._compares_kept or bool((entries["kept"] == digest_kept(document.kept)).all())
        if same_text and same_kept:
            return True
        self.counts["stale_documents"] += is_dead
        if not is_dead:
            what = "another text" if not same_text else "other kept fields"
            self._find("stale_row", document.id, f"{place} has {what} now; embeam embed mends it")
        return same_text

    def _check_surplus(self, known: VectorIndex, seen: np.ndarray, unread: Accounts) -> None:
        incomplete = self._letters.incomplete | unread.incomplete
        is_incomplete = np.array([source in incomplete for source in known.sources] or [False])
        keeps = self.manifest.settings.get("deletes") == "keep"
        surplus = [np.empty(0, np.int64)]
        for start in range(0, known.n_live, BLOCK):
            entries = known.entries[start : start + BLOCK]
            gone = np.flatnonzero(~seen[start : start + BLOCK] & (entries["id"] != b""))
            some = entries[gone]
            is_dead = [digest in self._letters.ids or digest in unread.ids for digest in some["id"]]
            unproven = np.array(is_dead, bool) | is_incomplete[some["source"]]
            self.counts["unproven_rows"] += int(unproven.sum())
            self.counts["kept_rows"] += int((~unproven).sum()) if keeps else 0
            surplus.append(start + gone[~unproven] if not keeps else surplus[0])
        for _, place, row in self.read_rows(known, np.concatenate(surplus)):
            self._find("surplus_row", row["id"], f"{place} is of no document of the input; embeam embed drops it")

    def check_sample(
        self,
        known: VectorIndex,
        embedder: Embedder,
        wanted: np.ndarray,
        texts: dict[int, tuple[str, str | None]] | None,
    ) -> None:
        """Encodes the texts of some rows again; their own texts where none are given."""
        numbers = wanted if texts is None else np.array(sorted(texts), np.int64)
        rows = (read for read in self.read_rows(known, numbers) if "embedding" in read[2])
        while batch := list(islice(rows, SAMPLE_BATCH)):
            pairs = [texts[number] if texts is not None else (row["text"], None) for number, _, row in batch]
            try:
                vectors = embedder.embed([text for text, _ in pairs], [pair for _, pair in pairs])
            except ConfigError as error:
                self._find("wrong_vector", batch[0][1], f"of {len(batch)} rows from it on one has none now: {error}")
                continue
            for (_, place, row), again, scale in zip(
                batch, *quantize_vectors(vectors, self._layout.dtype), strict=True
            ):
                self.counts["sampled"] += 1
                spot_check = Row(row["id"], row["chunk"], again.tobytes(), float(scale), None, None, "", b"", None)
                columns = {name: [value] for name, value in row.items()}
                try:
                    if np.isfinite(restore_row(columns, 0, self._layout)).all():  # else it was reported
                        compare_row(spot_check, columns, self._layout, place)
                except (ValidationError, ValueError) as error:
                    self._find("wrong_vector", row["id"], str(error))

    def read_rows(self, known: VectorIndex, numbers: np.ndarray) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yields number, place and columns of some rows; of one that cannot be read only its id's digest as the id.

        Args:
          known: the index of the rows.
          numbers: which rows, ascending.
        """
        for file in known.files:
            low, high = np.searchsorted(numbers, [file.first, file.first + file.rows])
            left = numbers[low:high]
            name = os.path.basename(file.path)
            try:
                for stored in self._reader.read(file, left) if len(left) else ():
                    here, left = np.split(left, np.searchsorted(left, [stored.numbers[-1] + 1]))
                    if len(here):
                        try:
                            columns = self._reader.columns(stored, np.searchsorted(stored.numbers, here))
                        except Exception:
                            left = np.concatenate([here, left])
                            raise
                        for i, number in enumerate(here.tolist()):
                            row = {column: values[i] for column, values in columns.items()}
                            yield number, f"{name} row {number - file.first}", row
                    if not len(left):
                        break
            except Exception:  # it was reported when all rows were read
                pass
            for number in left.tolist():
                digest = whole_digest(known.entries["id"][number]).hex()
                row = {"id": f"digest {digest}", "chunk": int(known.entries["chunk"][number])}
                yield number, f"{name} row {number - file.first}", row

    def _plan_input(self, input_globs: Sequence[str]) -> tuple[InputPlan, ReadConfig]:
        config = EmbedConfig.from_flat(self.manifest.settings | {"input": list(input_globs)}).read
        try:
            return plan_input(config), config
        except InputError as error:
            raise ConfigError(str(error)) from error

    def _prepare_sample(self, input_globs: Sequence[str]) -> Embedder:
        if self._layout.tokens:
            raise ConfigError(f"--sample: {self.table} holds a matrix per text, which is not compared; leave it out")
        if not input_globs and (not self._layout.keep_text or self.manifest.settings["pair_field"]):
            raise ConfigError(
                f"--sample: {self.table} keeps no texts to encode again; say where they are with --input=GLOB"
            )
        from pipeline.search.embedder import load_embedder

        return load_embedder(self.table)

    def _find(self, kind: str, what: str, message: str) -> None:
        self._report(Finding(kind, what, message))


def _spread(numbers: np.ndarray, n: int) -> np.ndarray:
    """At most n of some ascending numbers, evenly."""
    if len(numbers) <= n:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, n).astype(np.int64)] if n else numbers[:0]
