"""Fields that the names of a file's folders give to all its records: Hive's `year=2026/lang=en/part.parquet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.read_config import KeptField
from pipeline.sources.kept import Misfit, convert_kept
from pipeline.sources.names import NULL_PARTITION
from pipeline.sources.source import InputFile, Record
from pipeline.sources.spelling import parse_spelling


def read_partition(file: InputFile, kept_fields: Sequence[KeptField], as_strings: bool = False) -> dict[str, Any]:
    """The fields of a file's folders, for `add_partition`.

    Args:
      file: the file.
      kept_fields: the fields to keep, with their types; the values of other fields stay as they are spelled.
      as_strings: whether the format's own values are strings, which are converted later.
    """
    kinds = {} if as_strings else {field.source: field.type for field in kept_fields}
    fields: dict[str, Any] = {}
    for name, value in file.partition:
        fields[name] = None if value == NULL_PARTITION else _convert(value, kinds.get(name, "string"))
    return fields


def add_partition(record: Record, folders: Mapping[str, Any]) -> Record:
    """A record with the fields of its file's folders; a field of its own with the same name takes precedence."""
    return record._replace(values={**folders, **record.values}) if folders else record


def _convert(value: str, kind: str) -> Any:
    try:
        return convert_kept(value, kind, from_strings=True)
    except Misfit:  # it is told where all kept fields are checked
        return value


def infer_partition(file: InputFile) -> dict[str, Any]:
    """The fields of a file's folders with the types that their spelling suggests."""
    return {name: None if value == NULL_PARTITION else parse_spelling(value) for name, value in file.partition}
