"""Common parts of tables in databases: columns, the index made from a query, and the changes of a commit.

A table in a database holds only the live state. A second table, NAME_runs, holds the manifest of every run; the last
one describes the live state.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from pipeline.config import EmbedConfig, VectorChoice
from pipeline.errors import ConfigError, TableError
from pipeline.files import delete_folder, join, make_folder
from pipeline.read_config import FIELD_TYPES
from pipeline.records import digest_id, pack_kept
from pipeline.reuse.index import open_index
from pipeline.sinks.index import ENTRY, Index, SourceNumbers, digest_kept, whole_digest
from pipeline.sinks.layout import Columns, TableLayout
from pipeline.sinks.readers import Stored, VectorFile, damaged
from pipeline.sinks.table_format import StoredRows
from pipeline.sinks.writing import DEAD_LETTERS, ROWS, RowFormat, Shard
from pipeline.tables.commit import (
    LocalCompletion,
    check_any_rows,
    complete_local,
    find_examples_in,
    validate_snapshot,
)
from pipeline.tables.manifest import Manifest
from pipeline.tables.publish import build_manifest
from pipeline.tables.store import CommitPlan, Results

RUNS_SUFFIX = "_runs"
RUN_COLUMNS = {"fingerprint": "string", "run_id": "string", "embedded_at": "timestamp"}
DESCRIPTIONS = {
    "id": "The document's id",
    "chunk": "Number of the chunk in its document, from 0",
    "n_chunks": "How many chunks the document has",
    "char_start": "Where the chunk's text begins in the document's, in characters",
    "char_end": "Where it ends",
    "embedding": "The vector",
    "n_tokens": "Tokens that were encoded, [CLS] and [SEP] included",
    "n_truncated": "Tokens that were cut; null where that is not known",
    "n_unknown": "Tokens that are [UNK]; null where that is not known",
    "content_hash": "Hash over all of the document that reaches the encoder",
    "source": "File or table that the document came from",
    "text": "The row's text: the chunk's own, or the document's",
    "fingerprint": "Hash over everything that changes a vector",
    "run_id": "The run that wrote the row; NAME_runs has its manifest",
    "embedded_at": "When that run began to write",
}
KEPT_DESCRIPTION = "Field of the input that was copied"
_IDS = "ids.jsonl"
_FETCHED_ROWS = 1000
_FETCHED = ("content_hash", "chunk", "n_chunks", "char_start", "char_end", "n_tokens", "n_truncated", "n_unknown")


def check_database_config(config: EmbedConfig) -> None:
    """Raises ConfigError for settings that a database's table cannot hold."""
    output = config.write.output
    if config.vectors.dtype != "float32":
        raise ConfigError(f"--dtype={config.vectors.dtype}: {output} holds float32 vectors only; leave it out")
    if VectorChoice.parse(config.encoder.vector).pooling == "tokens":
        raise ConfigError(f"--vector={config.encoder.vector}: {output} holds one vector a row; use :mean, :max or :cls")
    taken = {name.lower(): f"the table's own column {name!r}" for name in DESCRIPTIONS}
    for field in config.read.kept_fields():
        if other := taken.get(field.name.lower()):
            raise ConfigError(
                f"--keep_fields={field.source} would collide with {other}, since names in databases ignore case; "
                "rename the field in the input"
            )
        taken[field.name.lower()] = f"the field {field.source!r}"


def check_columns(
    table: object, there: Mapping[str, str], types: Mapping[str, str], layout: TableLayout, own: Collection[str] = ()
) -> None:
    """Checks that the columns that a database's table has already can hold what a run writes to them.

    Args:
      table: as messages show it.
      there: the table's columns, with the types of the database.
      types: string, int, float, bool and timestamp to the types of the database.
      layout: of the rows.
      own: names of columns whose types may change.

    Raises:
      TableError: if a column has another type than is needed, or is spelt otherwise.
    """
    kept = {field.name: field.source for field in layout.kept}
    ours = {types[kind]: kind for kind in FIELD_TYPES}
    spelt = {name.lower(): name for name in there}
    for name, kind in database_columns(layout).items():
        old = spelt.get(name.lower(), name)
        found, wanted = there.get(old, types[kind]), types[kind]
        fix = "rename the field in the input, or give another --output"
        if name not in kept:
            fix = "rename that column in the database"
        elif old == name and found in ours:
            fix = f"keep the type with --keep_fields={kept[name]}:{ours[found]}, or give another --output"
        if old != name:
            raise TableError(f"{table} has a column {old!r}, and in databases {name!r} is the same name; {fix}")
        if found != wanted and name not in own:
            raise TableError(f"{table} has a column {name!r} of type {found}, but {wanted} is needed; {fix}")


def check_identifier(name: str, output: str) -> str:
    """Returns a table's name if it can stand in a query unquoted.

    Raises:
      ConfigError: if it cannot.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(f"--output={output}: {name!r} is not a table name; use letters, digits and _")
    return name


def database_columns(layout: TableLayout) -> dict[str, str]:
    """All columns but the vector: name to string, int, float, bool or timestamp."""
    return layout.columns() | RUN_COLUMNS


def index_columns(layout: TableLayout) -> list[str]:
    """The columns that `build_indexes` needs."""
    own = ["id", "chunk", "content_hash", "source", *(["n_chunks"] if layout.chunked else [])]
    return [*own, *(field.name for field in layout.kept)]


def build_indexes(rows: Iterable[dict[str, Any]], layout: TableLayout, folder: str) -> Iterator[tuple[str, Index]]:
    """Makes the index of a table from its rows, and writes their ids to a file for the commit.

    Args:
      rows: mappings of `index_columns`.
      layout: of the table.
      folder: local, for the notes.
    """
    with open(os.path.join(folder, _IDS), "w", encoding="utf-8") as ids:
        waiting = iter(rows)
        while block := list(islice(waiting, 1 << 14)):
            sources = SourceNumbers()
            entries = []
            for row in block:
                path = row["source"] or ""
                kept = digest_kept(pack_kept([row[field.name] for field in layout.kept]), path)
                content = bytes.fromhex(row["content_hash"])
                source = sources.number(path)
                n_chunks = row["n_chunks"] if layout.chunked else 1
                entries.append((digest_id(row["id"]), content, kept, row["chunk"], n_chunks, source))
                ids.write(json.dumps(row["id"]) + "\n")
            yield "", Index(np.array(entries, ENTRY), list(sources.paths))


def list_removed(completion: LocalCompletion) -> Iterator[str]:
    """Yields the ids of documents whose rows are deleted or replaced; each once, in any order."""
    rows = completion.removed_rows()
    # One row of each document is enough, because only its id is needed.
    _, first = np.unique(completion.index.entries["id"][rows], return_index=True)
    wanted = iter(np.sort(rows[first]).tolist())
    number = next(wanted, None)
    if number is None:
        return
    with open(os.path.join(completion.index.folder, _IDS), encoding="utf-8") as ids:
        for i, line in enumerate(ids):
            if i == number:
                yield json.loads(line)
                number = next(wanted, None)


class DatabaseStore:
    """The common part of databases as a `Store`: live rows stay in the database, not in files."""

    work: str

    def find_damaged(self, live: Manifest, by_checksum: bool) -> set[str]:
        return set()

    def can_copy(self, live: Manifest, form: RowFormat) -> bool:
        return live.layout == form.layout

    def live_files(self, live: Manifest) -> dict[str, tuple[int, str]]:
        return {}

    def locate_dead_letters(self, live: Manifest, name: str) -> str:
        return join(self.work, DEAD_LETTERS, name)

    def choose_form(self, config: EmbedConfig, layout: TableLayout) -> RowFormat:
        return RowFormat("parquet", replace(layout, sourced=True))


@dataclass(frozen=True)
class DatabaseReader:
    """Reads the vectors of live rows by their content hash.

    Attributes:
      layout: of the table.
      folder: of the vector index.
    """

    layout: TableLayout
    folder: str

    @property
    def fetched(self) -> list[str]:
        """The columns that `fetch` reads, besides the vector."""
        return [name for name in _FETCHED if name in self.layout.columns()]

    def fetch(self, contents: Sequence[str]) -> list[dict[str, Any]]:
        """The rows with some content hashes, `embedding` as little-endian float32 bytes."""
        raise NotImplementedError

    def read(self, file: VectorFile, wanted: np.ndarray) -> Iterator[Stored]:
        entries = open_index(self.folder).entries
        for start in range(0, len(wanted), _FETCHED_ROWS):
            numbers = wanted[start : start + _FETCHED_ROWS].astype(np.int64)
            keys = [(whole_digest(entry["content"]).hex(), int(entry["chunk"])) for entry in entries[numbers]]
            found = {(row["content_hash"], row["chunk"]): row for row in self.fetch(sorted({key[0] for key in keys}))}
            if missing := [key for key in keys if key not in found]:
                raise damaged("the table", f"rows with the content hash {missing[0][0]} were deleted during the run")
            yield Stored(numbers, [found[key] for key in keys])

    def select(self, stored: Stored, positions: np.ndarray) -> StoredRows:
        raise NotImplementedError("rows of a database stay where they are")

    def columns(self, stored: Stored, positions: np.ndarray) -> Columns:
        rows = [stored.rows[i] for i in positions.tolist()]
        return {name: [row[name] for row in rows] for name in rows[0]}


def complete_changes(plan: CommitPlan, results: Results) -> LocalCompletion:
    """Completes and validates the changes of a run on a database.

    Raises:
      RunError: if they must not be published; new rows that failed validation are kept in a folder.
    """
    completion = complete_local(plan, results, whole=False)
    if not plan.publication.previous:
        check_any_rows(completion.shards, completion.counts, find_examples_in(completion.shards))
    validate_snapshot(completion, "the new rows failed validation and are kept", "them")
    return completion


def describe_run(completion: LocalCompletion) -> tuple[Manifest, list[Shard]]:
    """The manifest of a run on a database, and the files of its dead letters."""
    dead_letters = [shard for shard in completion.shards if shard.kind == DEAD_LETTERS]
    manifest = build_manifest(completion.plan.publication, dead_letters, completion.counts, completion.bad_files)
    n_new = sum(shard.rows for shard in completion.shards if shard.kind == ROWS)
    return replace(manifest, rows=completion.index.n_live - len(completion.removed_rows()) + n_new), dead_letters


def keep_dead_letters(work: str, manifest: Manifest, dead_letters: Sequence[Shard]) -> None:
    """Replaces the last run's dead-letter files by those of this run."""
    from apache_beam.io.filesystems import FileSystems

    folder = join(work, DEAD_LETTERS)
    delete_folder(folder)
    if dead_letters:
        make_folder(folder)
        ordered = sorted(dead_letters, key=lambda shard: (shard.first, shard.path))
        targets = [join(folder, file.name) for file in manifest.dead_letter_files]
        FileSystems.rename([shard.path for shard in ordered], targets)
