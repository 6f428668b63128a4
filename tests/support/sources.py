"""Reads one file as a run reads it, and shows what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.read_config import KeptField, ReadConfig
from pipeline.records import REASONS, DeadLetter, Document, SkippedFile
from pipeline.sources.planning import choose_id_field, plan_input
from pipeline.sources.read import read_range
from pipeline.sources.sampling import infer_kept_fields, sample_input

Outcome = Document | DeadLetter | SkippedFile | None


def read_file(
    path: Path, data: bytes | str, kept_fields: Sequence[KeptField] | None = None, **settings: Any
) -> list[Outcome]:
    """Writes a file and reads it; a file that cannot be read to its end is skipped, unless the settings differ."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    config = ReadConfig(input=(str(path),), **{"on_bad_file": "skip", **settings})
    plan = plan_input(config)
    config = choose_id_field(plan, config)
    if kept_fields is None:
        kept_fields = infer_kept_fields(sample_input(plan, config).fields, config) if config.keep_fields else ()
    read = [item.outcome for split in plan.splits for r in split for item in read_range(r, config, kept_fields)]
    return [*plan.bad_files, *read]


def summarize(outcomes: Iterable[Outcome]) -> list[Any]:
    """Texts of documents, (reason, position) of dead letters, (reason,) of a file that cannot be read to its end."""
    return [summarize_one(outcome) for outcome in outcomes]


def summarize_one(outcome: Outcome) -> Any:
    if isinstance(outcome, DeadLetter):
        assert outcome.reason in REASONS and outcome.message and outcome.stage == "read"
        return outcome.reason, outcome.origin.position
    if isinstance(outcome, SkippedFile):
        assert outcome.reason in REASONS and outcome.message
        return (outcome.reason,)
    return outcome.text if outcome is not None else None
