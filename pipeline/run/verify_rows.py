"""Checks a table by itself: files against the manifest, rows against their index and against each other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.files import join, list_files, list_folders, open_file, read_checksum
from pipeline.preprocess.chunking import hash_content
from pipeline.records import digest_id, pack_kept
from pipeline.reuse.index import VectorIndex
from pipeline.run.checked_table import CheckedTable
from pipeline.sinks.index import ENTRY, Index, digest_kept, read_index
from pipeline.sinks.readers import ROWS, Stored, VectorFile
from pipeline.table_folders import MANIFEST
from pipeline.tables.manifest import TableFile
from pipeline.vectors.storing import STORED_DTYPES

BLOCK = 1024
NONE = np.zeros(0, np.int64)


def check_files(table: CheckedTable) -> dict[str, str]:
    """Compares the folder with the manifest; returns the files that are there, by name."""
    manifest = table.manifest
    there = {os.path.basename(path): path for path in list_files(table.folder)}
    listed = {file.name: file for file in (*manifest.files, *manifest.index_files, *manifest.dead_letter_files)}
    ours = {*listed, MANIFEST, *(["schema.pbtxt"] if manifest.file_format == "tfrecord" else [])}
    for name in sorted(ours - set(there)):
        fix = "embeam rollback returns to an older snapshot"
        table.find("missing_file", name, f"it is not in {table.folder}; {fix}")
    for name in sorted({*there, *list_folders(table.folder)} - ours):
        if not name.startswith("."):  # files of file managers
            table.find("surplus_file", name, f"the manifest does not list it; remove it from {table.folder}")
    for name in sorted(set(listed) & set(there)):
        _check_file(table, listed[name], there[name])
    n_rows = sum(file.rows for file in manifest.files)
    if n_rows != manifest.rows:
        table.find("wrong_count", MANIFEST, f"it says {manifest.rows:,} rows, and its files have {n_rows:,}")
    return there


def _check_file(table: CheckedTable, file: TableFile, path: str) -> None:
    try:
        sha256, size = read_checksum(path)
    except Exception as error:  # each file system raises its own exceptions
        table.find("damaged_file", file.name, f"it cannot be read: {error}")
        return
    table.counts["files"] += 1
    table.counts["bytes"] += size
    if size != file.n_bytes:
        table.find("wrong_size", file.name, f"it has {size:,} bytes instead of {file.n_bytes:,}")
    elif sha256 != file.sha256:
        table.find("wrong_checksum", file.name, f"its sha256 is {sha256[:12]}..., not that of the run")


def check_dead_letters(table: CheckedTable, there: dict[str, str]) -> None:
    """Reads the dead letters, records which documents they belong to, and checks their number."""
    n = 0
    for file in table.manifest.dead_letter_files:
        if file.name not in there:
            continue
        n_lines = 0
        try:
            with open_file(there[file.name]) as stream:
                for line in stream:
                    dead_letter = json.loads(line)
                    table.dead_letters.add(dead_letter["id"], dead_letter["reason"], dead_letter["file"])
                    n_lines += 1
        except Exception as error:
            table.find("damaged_file", file.name, f"its line {n_lines + 1} cannot be read: {error}")
        else:
            if n_lines != file.rows:
                table.find("damaged_file", file.name, f"it has {n_lines:,} lines instead of {file.rows:,}")
        n += file.rows
    table.counts["dead_letters"] = n
    if all(file.name in there for file in table.manifest.dead_letter_files):
        counted = sum(table.manifest.dead_letters.values())
        if counted != n:
            table.find("wrong_count", MANIFEST, f"it counts {counted:,} dead letters, and its files have {n:,}")


def check_rows(table: CheckedTable, there: dict[str, str]) -> Iterator[tuple[str, Index]]:
    """Checks every row by itself and against its index; yields the entries made from the rows, file by file."""
    for file, index_file in zip(table.manifest.files, table.manifest.index_files, strict=True):
        index = _read_index(table, file, index_file) if index_file.name in there else None
        entries = np.zeros(file.rows, ENTRY)
        if index is not None:  # a row that cannot be read counts as present
            size = min(file.rows, len(index.entries))
            entries[:size] = index.entries[:size]
        elif table.layout.kept and not table.redigests:
            table.compares_kept = False
        if file.name in there:
            _read_rows(table, file, index, entries)
        yield join(table.folder, file.name), Index(entries, index.sources if index else [])


def _read_index(table: CheckedTable, file: TableFile, index_file: TableFile) -> Index | None:
    try:
        index = read_index(join(table.folder, index_file.name))
        if len(index.sources) <= index.entries["source"].max(initial=0) and len(index.entries):
            raise ValueError("it names an input file that it does not list")
    except Exception as error:
        table.find("damaged_file", index_file.name, f"it cannot be read: {error}")
        return None
    if len(index.entries) != file.rows:
        message = f"it has {len(index.entries):,} entries for {file.rows:,} rows of {file.name}"
        table.find("wrong_index", index_file.name, message)
    return index


def _read_rows(table: CheckedTable, file: TableFile, index: Index | None, entries: np.ndarray) -> None:
    start, before = 0, None
    try:
        for stored in table.reader.read(VectorFile(join(table.folder, file.name), ROWS, 0, file.rows), NONE):
            rows = []
            for i, row in _decode(table, file, stored):
                rows.append((i, _check_row(table, f"{file.name} row {i}", row)))
                if table.layout.has_offsets and before:
                    _check_order(table, f"{file.name} row {i}", before, row)
                before = row
            positions = np.array([i for i, own in rows if own and i < file.rows], int)
            block = np.array([own for i, own in rows if own and i < file.rows], ENTRY)
            if index is not None:
                _compare_index(table, file, positions, block, index)
            fields = ["id", "content", "chunk", "n_chunks", *(["kept"] if table.redigests else [])]
            for field in fields:
                entries[field][positions] = block[field]
            start += len(stored.numbers)
    except Exception as error:  # TableError says what; a reader of damaged bytes may raise anything else
        why = str(error).removeprefix(f"{join(table.folder, file.name)} is damaged: ")
        table.find("damaged_file", file.name, f"after {start:,} of {file.rows:,} rows: {why}")
    table.counts["rows"] += start


def _compare_index(
    table: CheckedTable, file: TableFile, positions: np.ndarray, block: np.ndarray, index: Index
) -> None:
    there = positions < len(index.entries)
    positions, block = positions[there], block[there]
    said = index.entries[positions]
    fields = ["id", "content", "chunk", "n_chunks", *(["kept"] if table.redigests else [])]
    differs = {field: block[field] != said[field] for field in fields}
    for i in np.flatnonzero(np.any(list(differs.values()), 0)).tolist():
        names = ", ".join(field for field in fields if differs[field][i])
        table.find("wrong_index", f"{file.name} row {positions[i]}", f"its index has another {names}")


def _decode(table: CheckedTable, file: TableFile, stored: Stored) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a block, one by one if it cannot be decoded as a whole."""
    try:
        blocks = [(int(stored.numbers[0]), table.reader.columns(stored, np.arange(len(stored.numbers))))]
    except Exception:
        blocks = []
        for i, number in enumerate(stored.numbers.tolist()):
            try:
                blocks.append((number, table.reader.columns(stored, np.array([i]))))
            except Exception as error:
                table.find("damaged_file", f"{file.name} row {number}", f"it cannot be decoded: {error}")
    for first, columns in blocks:
        for i in range(len(columns["id"])):
            yield first + i, {name: values[i] for name, values in columns.items()}


def _check_row(table: CheckedTable, name: str, row: dict[str, Any]) -> tuple[bytes, bytes, int, int, int, int] | None:
    """Checks one row by itself; returns its ENTRY, without a source, or None if it has no valid id or content hash."""
    layout = table.layout
    absent = [column for column in table.required if row[column] is None]
    if absent:
        table.find("wrong_row", name, f"it has no {', '.join(absent)}")
        return None
    try:
        content = bytes.fromhex(row["content_hash"])
    except ValueError:
        content = b""
    if len(content) != 16:
        table.find("wrong_row", name, f"its content hash {row['content_hash']!r} is not 32 hexadecimal digits")
        return None
    n_chunks = row["n_chunks"] if layout.chunked else 1
    if not 0 <= row["chunk"] < n_chunks:
        table.find("wrong_row", name, f"it is chunk {row['chunk']} of {n_chunks}")
        return None
    settings = table.manifest.settings
    start, end = (row["char_start"], row["char_end"]) if layout.has_offsets else (None, None)
    if start is not None and end is not None and not 0 <= start <= end:
        table.find("wrong_row", name, f"it has the characters {start} to {end} of its document")
        return None
    if layout.keep_text and end is not None and len(row["text"]) != end - start:
        message = f"it has {len(row['text']):,} characters of text, and says that they are {start} to {end}"
        table.find("wrong_row", name, message)
    elif layout.keep_text and not settings["pair_field"] and (n_chunks == 1 or not layout.has_offsets):
        text_hash = hash_content(settings["text_prefix"] + row["text"], None)
        if text_hash != row["content_hash"]:
            table.find("wrong_row", name, f"{row['id']!r} has a text that is not the one of its content hash")
    _check_vector(table, name, row)
    kept = 0
    if table.redigests:
        source = row["source"] if layout.sourced else ""
        kept = digest_kept(pack_kept([row[field.name] for field in layout.kept]), source)
    return digest_id(row["id"]), content, kept, row["chunk"], n_chunks, 0


def _check_order(table: CheckedTable, name: str, before: dict[str, Any], row: dict[str, Any]) -> None:
    """Checks that a row which holds the next chunk of the row before holds later characters of the document."""
    (start, end), (first, last) = ((one["char_start"], one["char_end"]) for one in (before, row))
    if (row["id"], row["chunk"]) != (before["id"], (before["chunk"] or 0) + 1) or None in (start, end, first, last):
        return
    earliest = start if table.manifest.settings.get("chunk_overlap") else end
    if first < earliest or last < end:
        message = f"it has the characters {first} to {last} of its document, and the chunk before {start} to {end}"
        table.find("wrong_row", name, message)


def _check_vector(table: CheckedTable, name: str, row: dict[str, Any]) -> None:
    layout = table.layout
    numbers = layout.dimension * (row["n_tokens"] if layout.tokens else 1)
    wanted = -(-numbers // 8) if layout.dtype == "binary" else numbers
    found = len(row["embedding"]) // np.dtype(STORED_DTYPES[layout.dtype]).itemsize
    if found != wanted:
        table.find("wrong_dimension", name, f"{row['id']!r} has {found:,} stored numbers instead of {wanted:,}")
        return
    if layout.dtype == "binary":
        return
    is_int = layout.dtype == "int8"
    if not np.isfinite(row["scale"] if is_int else np.frombuffer(row["embedding"], STORED_DTYPES[layout.dtype])).all():
        table.find("not_finite", name, f"the vector of {row['id']!r} holds NaN or infinity")


def check_ids(table: CheckedTable, index: VectorIndex) -> None:
    """Finds duplicate rows, and documents with missing chunks."""
    ids = index.live_ids()
    is_first = np.ones(len(ids), bool)
    is_first[1:] = ids[1:] != ids[:-1]
    table.counts["documents"] = int(is_first.sum())
    firsts = np.flatnonzero(is_first)
    if not table.layout.chunked:  # only ids with several rows can be wrong
        firsts = firsts[np.diff(firsts, append=len(ids)) > 1]
    twice, partial = [np.empty(0, np.int64)], np.empty(0, [("row", "<u8"), ("n", "<u4"), ("n_chunks", "<u4")])
    for start in range(0, len(firsts), BLOCK):
        some = ids[firsts[start : start + BLOCK]]
        short = []
        for digest, rows in zip(some, index.find_ids(some), strict=True):
            if not digest:  # a row that cannot be read
                continue
            entries = index.entries[rows]
            chunks, at = np.unique(entries["chunk"], return_index=True)
            if len(chunks) < len(rows):
                twice.append(np.delete(rows, at).astype(np.int64))
            if len(chunks) < entries["n_chunks"].max() and digest not in table.dead_letters.ids:
                short.append((int(rows[0]), len(chunks), int(entries["n_chunks"].max())))
        partial = np.concatenate([partial, np.array(short, partial.dtype)])
    for _, place, row in table.read_rows(index, np.sort(np.concatenate(twice))):
        table.find("duplicate_row", row["id"], f"{place} repeats its chunk {row['chunk']}")
    partial.sort(order="row")
    for (_, n, n_chunks), (_, _, row) in zip(partial, table.read_rows(index, partial["row"]), strict=True):
        table.find("missing_chunk", row["id"], f"{n:,} of its {n_chunks:,} chunks are there")
