"""Plans the input: which files there are, in which order, and the pieces that workers read.

This happens before anything is encoded, so that mistakes are found in seconds: a glob that matches nothing, an unknown
format, two files whose ids would collide.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from apache_beam.io.filesystems import FileSystems

from pipeline.config import ReadConfig
from pipeline.errors import ConfigError, InputError
from pipeline.sources import SOURCES
from pipeline.sources.bigquery import materialize_query, measure_table, require_id_field
from pipeline.sources.bigquery_client import SCHEME, BigQueryName
from pipeline.sources.detection import detect_format, inspect_files
from pipeline.sources.heads import read_heads
from pipeline.sources.source import FileRange, InputFile


@dataclass(frozen=True)
class InputPlan:
    """What is read.

    Attributes:
      files: the files with content, sorted by path.
      empty_files: paths of files of size 0, which are not read.
      splits: what one worker reads at once: ranges of about `split_bytes` together, in order.
    """

    files: tuple[InputFile, ...]
    empty_files: tuple[str, ...]
    splits: tuple[tuple[FileRange, ...], ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


class FoundFile(NamedTuple):
    """A file that a glob matches."""

    path: str
    name: str
    size: int


def plan_input(config: ReadConfig) -> InputPlan:
    """Finds the files of the input and cuts them into splits.

    Args:
      config: globs, format, and the size of a split. With a limit there is one split, so that the limit is exact.

    Raises:
      InputError: if a glob matches nothing, a format is unknown, or ids of two files would collide.
      ConfigError: if fields are asked for that the format does not have.
    """
    patterns = [keep_query(config)] if config.query else config.input
    if not patterns:
        raise InputError("--input is missing; name a file or a glob, as in --input='shards/*.txt'")
    found = {file.path: file for pattern in reversed(patterns) for file in find_input(pattern, config)}
    ordered = sorted(found.values())
    named = [
        InputFile(index, file.path, file.name, file.size, *detect_format(file.path, config.input_format))
        for index, file in enumerate(file for file in ordered if file.size)
    ]
    paths = [file.path for file in named if not file.path.startswith(SCHEME)]
    files = inspect_files(named, dict(zip(paths, read_heads(paths), strict=True)), config)
    check_files(files, config)
    ranges = [r for file in files for r in SOURCES[file.format].split_file(file, config)]
    splits = [tuple(ranges)] if config.limit and ranges else group_ranges(ranges, config.split_bytes)
    return InputPlan(tuple(files), tuple(file.path for file in ordered if not file.size), tuple(splits))


def choose_id_field(plan: InputPlan, config: ReadConfig) -> ReadConfig:
    """The configuration with the id field of a format whose records have an id of their own, if none is named.

    Raises:
      InputError: if such files are read together with others.
    """
    if config.id_field:
        return config
    files = {SOURCES[file.format].id_field: file for file in plan.files}
    without = files.pop("", None)
    if not files:
        return config
    name, file = files.popitem()
    if without:
        raise InputError(
            f"{file.path} has ids of its own ({name}), and {without.path} has none; read them to two tables, or name a "
            "field that both have: --id_field"
        )
    return replace(config, id_field=name)


def plan_dead_letters(paths: Iterable[tuple[str, int]], config: ReadConfig) -> InputPlan:
    """Plans the retry of dead letters.

    Args:
      paths: the dead_letters' files and their sizes.
      config: for the size of a split.
    """
    files = [InputFile(i, path, path, size, "dead_letters") for i, (path, size) in enumerate(paths) if size]
    ranges = [FileRange.whole(file) for file in files]
    return InputPlan(tuple(files), (), tuple(group_ranges(ranges, config.split_bytes)))


def find_input(pattern: str, config: ReadConfig) -> list[FoundFile]:
    """The files of a glob, or the table of a name.

    Raises:
      InputError: if there are none, or they cannot be read.
      ConfigError: if a table's rows would have no ids.
    """
    if not pattern.startswith(SCHEME):
        return match_files(pattern)
    name = BigQueryName.parse(pattern, "input")
    require_id_field(pattern, config)
    return [FoundFile(pattern, name.table, measure_table(name, config))]


def keep_query(config: ReadConfig) -> str:
    """Runs the query of the input; returns the name of the table with its rows."""
    digest = hashlib.sha256(config.query.encode()).hexdigest()[:16]
    name = BigQueryName.parse(f"{SCHEME}{config.query_dataset}.embeam_query_{digest}", "query_dataset")
    materialize_query(config.query, name)
    return str(name)


def match_files(pattern: str) -> list[FoundFile]:
    """The files that a glob matches; local paths become absolute.

    Raises:
      InputError: if there are none, or the file system refuses.
    """
    given = pattern
    if "://" not in pattern:
        pattern = os.path.abspath(os.path.expanduser(pattern)) + ("/" if pattern.endswith("/") else "")
        if os.path.isdir(pattern) and not pattern.endswith("/"):
            raise InputError(f"--input={given} is a folder; name its files, as in --input='{given}/*'")
    if pattern.endswith("/"):
        pattern += "*"
    try:
        metadata = FileSystems.match([pattern])[0].metadata_list
        is_glob = _fixed_part(pattern) != pattern
        if not metadata and is_glob and FileSystems.exists(pattern):  # a file whose name holds * ? or [
            metadata, is_glob = [FileSystems.get_filesystem(pattern).metadata(pattern)], False
    except Exception as error:  # each file system raises its own exceptions
        raise InputError(f"--input={given} cannot be listed: {error}") from error
    if not metadata:
        raise InputError(f"--input={given} matches no file; check the path, and quote globs in the shell")
    folder = _fixed_part(pattern).rpartition("/")[0] if is_glob else pattern.rpartition("/")[0]
    return [FoundFile(m.path, m.path[len(folder) + 1 :], m.size_in_bytes) for m in metadata]


def check_files(files: Iterable[InputFile], config: ReadConfig) -> None:
    """Checks that the formats have the fields that are asked for, and that derived ids cannot collide.

    Raises:
      ConfigError: for --id_field, --pair_field or --keep_fields on text files.
      InputError: for two files of one name without --id_field.
    """
    by_name: dict[str, str] = {}
    asked = {"id_field": config.id_field, "pair_field": config.pair_field, "keep_fields": ",".join(config.keep_fields)}
    for file in files:
        if not SOURCES[file.format].has_fields:
            for flag, value in asked.items():
                if value:
                    raise ConfigError(
                        f"--{flag}={value}: {file.path} is plain text and has no fields; "
                        "use JSON lines or CSV, drop the flag, or set --input_format"
                    )
        other = by_name.setdefault(file.name, file.path)
        if other != file.path and not (config.id_field or SOURCES[file.format].id_field):
            raise InputError(
                f"{other} and {file.path} are both named {file.name!r}, so their documents' ids would collide; "
                "use one glob over their common folder, as in --input='folder/**', or --id_field"
            )


def group_ranges(ranges: Iterable[FileRange], split_bytes: int) -> list[tuple[FileRange, ...]]:
    """Groups consecutive ranges so that a group has at most `split_bytes`, or one range."""
    groups: list[list[FileRange]] = []
    size = 0
    for file_range in ranges:
        if not groups or size + file_range.n_bytes > split_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file_range)
        size += file_range.n_bytes
    return [tuple(group) for group in groups]


def _fixed_part(pattern: str) -> str:
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]
