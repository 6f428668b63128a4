"""Manifests of format version 2: the same facts under the names that version 3 replaced."""

from __future__ import annotations

from typing import Any

VERSION = 2
_SETTINGS = {"gate": "validate"}
_STAGES = {"recall": "reuse", "carry": "merge"}
_COUNTS = {"recalled": "reused", "equal_texts": "same_text", "granted_rows": "reused_rows", "probes": "spot_checks"}


def upgrade_manifest(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 2, as JSON values, under the names of version 3."""
    counts = {_STAGES.get(stage, stage): _rename(numbers, _COUNTS) for stage, numbers in values["counts"].items()}
    counts.get("merge", {}).pop("unchanged", None)  # counts["reuse"] has it
    settings = _rename(values["settings"], _SETTINGS)
    return values | {"settings": settings, "counts": counts, "format_version": VERSION + 1}


def _rename(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
