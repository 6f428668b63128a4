"""Verifies that a table is consistent: files with manifest, rows with their index, and all of it with the input.

Everything streams. Checks of ids use an index of digests on a local disk, as a run does, so memory stays at some
40 bytes per row for any table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError, InputError
from pipeline.read_config import ReadConfig
from pipeline.reuse.index import VectorIndex, build_index
from pipeline.run.checked_table import CheckedTable, Finding
from pipeline.run.verify_input import check_input, check_sample
from pipeline.run.verify_rows import check_dead_letters, check_files, check_ids, check_rows
from pipeline.sources.planning import InputPlan, plan_input
from pipeline.sources.stdin import removing_copy

if TYPE_CHECKING:
    from pipeline.search.embedder import Embedder


def verify_table(table: str, input_globs: Sequence[str] = (), sample: int = 0) -> list[Finding]:
    """Compares the live snapshot of a table with its manifest, and with an input.

    Args:
      table: the table's folder.
      input_globs: files to compare with, read with the settings of the table; without any, no input is compared.
      sample: how many rows to encode again and compare.

    Returns:
      The findings; empty if the table is consistent.

    Raises:
      TableError: if there is no table, or a sample is asked for and the table's encoder has changed.
      ConfigError: if a glob matches nothing, or there are no texts for the sample.
    """
    findings: list[Finding] = []
    check_table(CheckedTable(table, findings.append), input_globs, sample)
    return findings


@removing_copy()
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
        return plan_input(config, table.name), config
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
