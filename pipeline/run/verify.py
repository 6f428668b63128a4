"""Whether a table is consistent: files with manifest, rows with their index, and all of it with the input.

Everything streams. What is said about ids goes through an index of digests on a local disk, as in a run, so memory
stays at some 40 bytes a row whatever the table holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import EmbedConfig, ReadConfig
from pipeline.errors import ConfigError, InputError
from pipeline.reuse.index import VectorIndex, build_index
from pipeline.run.checked_table import CheckedTable, Finding
from pipeline.run.verify_input import check_input, check_sample
from pipeline.run.verify_rows import check_dead_letters, check_files, check_ids, check_rows
from pipeline.sources.planning import InputPlan, plan_input

if TYPE_CHECKING:
    from pipeline.search.embedder import Embedder


def verify_table(table: str, input_globs: Sequence[str] = (), sample: int = 0) -> list[Finding]:
    """Reconciles the live snapshot of a table with its manifest, and with an input.

    Args:
      table: the table's folder.
      input_globs: files to compare with, read by the settings that the table was made with; none: no comparison.
      sample: how many rows to encode again and compare.

    Returns:
      What is wrong; nothing if the table is consistent.

    Raises:
      TableError: if there is no table, or its encoder is no longer what it was and a sample is asked for.
      ConfigError: if a glob matches nothing, or there are no texts for the sample.
    """
    findings: list[Finding] = []
    check_table(CheckedTable(table, findings.append), input_globs, sample)
    return findings


def check_table(table: CheckedTable, input_globs: Sequence[str] = (), sample: int = 0) -> None:
    """Checks everything that is asked for; see `verify_table`."""
    embedder = _prepare_sample(table, input_globs) if sample else None
    plan = _plan_input(table, input_globs) if input_globs else None
    there = check_files(table)
    check_dead_letters(table, there)
    with tempfile.TemporaryDirectory(prefix="embeam-verify-") as scratch:
        build_index(scratch, check_rows(table, there), [], True)
        index = VectorIndex(scratch)
        check_ids(table, index)
        wanted = _spread(np.flatnonzero(index.entries["n_chunks"] == 1), sample)
        texts = check_input(table, index, *plan, scratch, wanted) if plan else None
        if embedder:
            check_sample(table, index, embedder, wanted, texts)


def _plan_input(table: CheckedTable, input_globs: Sequence[str]) -> tuple[InputPlan, ReadConfig]:
    config = EmbedConfig.from_flat(table.manifest.settings | {"input": list(input_globs)}).read
    try:
        return plan_input(config), config
    except InputError as error:
        raise ConfigError(str(error)) from error


def _prepare_sample(table: CheckedTable, input_globs: Sequence[str]) -> Embedder:
    if table.layout.tokens:
        raise ConfigError(f"--sample: {table.name} holds a matrix per text, which is not compared; leave it out")
    if not input_globs and (not table.layout.keep_text or table.manifest.settings["pair_field"]):
        raise ConfigError(f"--sample: {table.name} keeps no texts to encode again; name the input with --input=GLOB")
    from pipeline.search.embedder import load_embedder

    return load_embedder(table.name)


def _spread(numbers: np.ndarray, n: int) -> np.ndarray:
    """At most n of some ascending numbers, evenly."""
    if len(numbers) <= n:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, n).astype(np.int64)] if n else numbers[:0]
