"""Compares a table with its input: documents without rows, rows without documents, and changed vectors."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ConfigError, ValidationError, as_line
from pipeline.preprocess.chunking import hash_content
from pipeline.read_config import ReadConfig
from pipeline.records import DeadLetter, Document, Row, SkippedFile, digest_id
from pipeline.reuse.index import VectorIndex
from pipeline.run.checked_table import CheckedTable
from pipeline.run.read_input import Accounts, read_outcomes
from pipeline.sinks.index import digest_kept
from pipeline.sources.planning import InputPlan
from pipeline.tables.validation import compare_row, restore_row
from pipeline.vectors.storing import quantize_vectors

if TYPE_CHECKING:
    from pipeline.search.embedder import Embedder

BLOCK = 1024
SAMPLE_BATCH = 64  # texts that are encoded at once


def check_input(
    table: CheckedTable, index: VectorIndex, found: InputPlan, config: ReadConfig, scratch: str, wanted: np.ndarray
) -> dict[int, tuple[str, str | None]]:
    """Compares the rows with the documents of an input.

    Args:
      index: the index of the rows.
      found: the input.
      config: how it is read.
      scratch: a local folder.
      wanted: numbers of rows whose texts are wanted, ascending.

    Returns:
      Text and second segment by number of row, for those rows that are up to date.
    """
    seen = np.zeros(index.n_live, bool)
    unread = Accounts(set(), set())
    texts: dict[int, tuple[str, str | None]] = {}
    wanted_rows = set(wanted.tolist())
    block: list[Document] = []
    bad_files: dict[str, SkippedFile] = {}

    def compare() -> None:
        rows = index.find_ids(np.array([digest_id(document.id) for document in block], "S16"))
        for document, own in zip(block, rows, strict=True):
            seen[own] = True
            if _is_current(table, document, index.entries[own]) and int(own[0]) in wanted_rows:
                texts[int(own[0])] = document.text, document.pair
        block.clear()

    for outcome in read_outcomes(found, config, table.layout.kept, scratch):
        if isinstance(outcome, Document):
            table.counts["input_documents"] += 1
            block.append(outcome)
            if len(block) == BLOCK:
                compare()
        elif isinstance(outcome, DeadLetter):
            unread.add(outcome.id, outcome.reason, outcome.origin.path)
        elif isinstance(outcome, SkippedFile):
            unread.incomplete_files.add(outcome.file)
            bad_files.setdefault(outcome.file, outcome)
    compare()
    skipped = {bad.file for bad in table.manifest.bad_files}
    for bad in sorted(bad_files.values()):
        if bad.file not in skipped:
            table.find("unreadable_input", as_line(bad.file), f"{as_line(str(bad))}; its documents are not compared")
    _check_surplus(table, index, seen, unread)
    return texts


def _is_current(table: CheckedTable, document: Document, entries: np.ndarray) -> bool:
    """Whether a document's rows match its current text and kept fields; reports a finding if not."""
    origin = document.origin
    place = f"{origin.path} {origin.unit} {origin.position}"
    is_dead = digest_id(document.id).rstrip(b"\0") in table.dead_letters.ids
    if not len(entries):
        table.counts["dead_documents"] += is_dead
        if not is_dead:
            table.find("missing_document", document.id, f"{place} has no row; embeam embed makes it")
        return False
    prefix = table.manifest.settings["text_prefix"]
    content = bytes.fromhex(hash_content(prefix + document.text, document.pair))
    same_text = bool((entries["content"] == np.array(content, "S16")).all())
    kept = digest_kept(document.kept, origin.path if table.layout.sourced else "")
    same_kept = not table.compares_kept or bool((entries["kept"] == kept).all())
    if same_text and same_kept:
        return True
    table.counts["stale_documents"] += is_dead
    if not is_dead:
        what = "another text" if not same_text else "other kept fields" + " or another file" * table.layout.sourced
        table.find("stale_row", document.id, f"{place} has {what} now; embeam embed replaces it")
    return same_text


def _check_surplus(table: CheckedTable, index: VectorIndex, seen: np.ndarray, unread: Accounts) -> None:
    incomplete = table.dead_letters.incomplete_files | unread.incomplete_files
    is_incomplete = np.array([source in incomplete for source in index.sources] or [False])
    keeps = table.manifest.settings.get("deletes") == "keep"
    surplus = [np.empty(0, np.int64)]
    for start in range(0, index.n_live, BLOCK):
        entries = index.entries[start : start + BLOCK]
        gone = np.flatnonzero(~seen[start : start + BLOCK] & (entries["id"] != b""))
        some = entries[gone]
        is_dead = [digest in table.dead_letters.ids or digest in unread.ids for digest in some["id"]]
        unproven = np.array(is_dead, bool) | is_incomplete[some["source"]]
        table.counts["unproven_rows"] += int(unproven.sum())
        table.counts["kept_rows"] += int((~unproven).sum()) if keeps else 0
        surplus.append(start + gone[~unproven] if not keeps else surplus[0])
    for _, place, row in table.read_rows(index, np.concatenate(surplus)):
        table.find("surplus_row", row["id"], f"{place} belongs to no document of the input; embeam embed drops it")


def check_sample(
    table: CheckedTable,
    index: VectorIndex,
    embedder: Embedder,
    wanted: np.ndarray,
    texts: dict[int, tuple[str, str | None]] | None,
) -> None:
    """Encodes the texts of some rows again: the given texts, or else the table's own."""
    numbers = wanted if texts is None else np.array(sorted(texts), np.int64)
    rows = (read for read in table.read_rows(index, numbers) if "embedding" in read[2])
    while batch := list(islice(rows, SAMPLE_BATCH)):
        pairs = [texts[number] if texts is not None else (row["text"], None) for number, _, row in batch]
        try:
            vectors = embedder.embed([text for text, _ in pairs], [pair for _, pair in pairs])
        except ConfigError as error:
            table.find(
                "wrong_vector", batch[0][1], f"one of {len(batch)} rows from here on can no longer be encoded: {error}"
            )
            continue
        for (_, place, row), again, scale in zip(batch, *quantize_vectors(vectors, table.layout.dtype), strict=True):
            table.counts["sampled"] += 1
            spot_check = Row(row["id"], row["chunk"], again.tobytes(), float(scale), None, None, "", b"", None)
            columns = {name: [value] for name, value in row.items()}
            try:
                if np.isfinite(restore_row(columns, 0, table.layout)).all():  # else it was reported
                    compare_row(spot_check, columns, table.layout, place)
            except (ValidationError, ValueError) as error:
                table.find("wrong_vector", row["id"], str(error))
