"""Plans the input: which files there are, in which order, and the pieces that workers read.

This happens before anything is encoded, so that mistakes are found in seconds: a glob that matches nothing, an unknown
format, a file that cannot be opened, two files whose ids would collide.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.errors import ConfigError, InputError
from pipeline.read_config import ReadConfig
from pipeline.records import SkippedFile
from pipeline.sources import SOURCES
from pipeline.sources.bigquery import materialize_query, measure_table, require_id_field
from pipeline.sources.bigquery_client import SCHEME, BigQueryName
from pipeline.sources.compression import FileError
from pipeline.sources.detection import detect_formats, inspect_files
from pipeline.sources.globs import Exclusions, FoundFile, find_files
from pipeline.sources.names import show_name
from pipeline.sources.source import FileRange, InputFile
from pipeline.sources.stdin import STDIN, find_stdin

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputPlan:
    """What is read.

    Attributes:
      files: the files with content, sorted by path.
      empty_files: names of files of size 0, which are not read.
      splits: what one worker reads at once: ranges of about `split_bytes` together, in order.
      bad_files: those that cannot be opened.
    """

    files: tuple[InputFile, ...]
    empty_files: tuple[str, ...]
    splits: tuple[tuple[FileRange, ...], ...]
    bad_files: tuple[SkippedFile, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of all files that there are, as tables have them: by the files' numbers, then the others."""
        return (*(file.source for file in self.files), *self.empty_files, *(bad.file for bad in self.bad_files))


def plan_input(config: ReadConfig, own_table: str = "") -> InputPlan:
    """Finds the files of the input and cuts them into splits.

    Args:
      config: globs, format, and the size of a split. With a limit there is one split, so that the limit is exact.
      own_table: the folder of the run's own table, whose files are no input.

    Raises:
      InputError: if a glob matches nothing, a format is unknown, or ids of two files would collide.
      ConfigError: if fields are asked for that the format does not have.
    """
    found = find_inputs(config, own_table)
    bad = [SkippedFile(file.source, FileError.reason, file.error) for file in found if file.error]
    files, unreadable = inspect_files(detect_formats([file for file in found if file.size], config), config)
    bad += unreadable
    check_files(files, config)
    ranges = [r for file in files for r in SOURCES[file.format].split_file(file, config)]
    splits = [tuple(ranges)] if config.limit and ranges else group_ranges(ranges, config.split_bytes)
    empty = tuple(file.source for file in found if not file.size and not file.error)
    return InputPlan(tuple(files), empty, tuple(splits), tuple(sorted(bad)))


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
            f"{show_name(file.path)} has ids of its own ({name}), and {show_name(without.path)} has none; read them to "
            "two tables, or name a field that both have: --id_field"
        )
    return replace(config, id_field=name)


def plan_dead_letters(
    paths: Iterable[tuple[str, int]], config: ReadConfig, bad_files: Iterable[SkippedFile] = ()
) -> InputPlan:
    """Plans the retry of dead letters.

    Args:
      paths: the dead_letters' files and their sizes.
      config: for the size of a split.
      bad_files: those that the table's run has skipped, and that are not read now either.
    """
    files = [
        InputFile(i, path, path, size, "dead_letters", source=path) for i, (path, size) in enumerate(paths) if size
    ]
    ranges = [FileRange.whole(file) for file in files]
    return InputPlan(tuple(files), (), tuple(group_ranges(ranges, config.split_bytes)), tuple(bad_files))


def find_inputs(config: ReadConfig, own_table: str) -> list[FoundFile]:
    """The files of all inputs, sorted by path; what two of them name has its name by the first.

    Raises:
      InputError: if there are none, or the file system refuses.
      ConfigError: if a table's rows would have no ids.
    """
    patterns = [keep_query(config)] if config.query else config.input
    if not patterns:
        raise InputError("--input is missing; name a file or a glob, as in --input='shards/*.txt'")
    exclusions = Exclusions(config.exclude)
    found: dict[str, FoundFile] = {}
    for pattern in patterns:
        for file in find_input(pattern, config, exclusions, own_table):
            found.setdefault(file.path, file)
    for glob in exclusions.unused:
        _LOGGER.warning("--exclude=%s leaves out nothing; check it", show_name(glob))
    return sorted(found.values())


def find_input(pattern: str, config: ReadConfig, exclusions: Exclusions, own_table: str) -> list[FoundFile]:
    """The files of a glob, the table of a name, or standard input.

    Raises:
      InputError: if there are none, or they cannot be read.
      ConfigError: if a table's rows would have no ids.
    """
    if pattern == STDIN:
        return [find_stdin(config.input_format)]
    if not pattern.startswith(SCHEME):
        return find_files(pattern, exclusions, own_table)
    name = BigQueryName.parse(pattern, "input")
    require_id_field(pattern, config)
    return [FoundFile(pattern, name.table, measure_table(name, config), source=pattern)]


def keep_query(config: ReadConfig) -> str:
    """Runs the query of the input; returns the name of the table with its rows."""
    digest = hashlib.sha256(config.query.encode()).hexdigest()[:16]
    name = BigQueryName.parse(f"{SCHEME}{config.query_dataset}.embeam_query_{digest}", "query_dataset")
    materialize_query(config.query, name)
    return str(name)


def check_files(files: Iterable[InputFile], config: ReadConfig) -> None:
    """Checks that the formats have the fields that are asked for, and that derived ids cannot collide.

    Raises:
      ConfigError: for --id_field, --pair_field or --keep_fields on text files whose folders do not give them.
      InputError: for two files of one name without --id_field.
    """
    by_name: dict[str, str] = {}
    asked = [("id_field", config.id_field), ("pair_field", config.pair_field)]
    asked += [("keep_fields", field.source) for field in config.kept_fields()]
    for file in files:
        if not SOURCES[file.format].has_fields:
            for flag, value in asked:
                if value and value not in dict(file.partition):
                    raise ConfigError(
                        f"--{flag}={value}: {show_name(file.path)} is plain text and has no fields; "
                        "use JSON lines or CSV, drop the flag, or set --input_format"
                    )
        other = by_name.setdefault(file.name, file.path)
        if other != file.path and not (config.id_field or SOURCES[file.format].id_field):
            raise InputError(
                f"{show_name(other)} and {show_name(file.path)} are both named {file.name!r}, so their documents' ids "
                "would collide; use one glob over their common folder, as in --input='folder/**', or --id_field"
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
