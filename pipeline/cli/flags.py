"""Flags: ours from the configuration's fields, Beam's from its own options, both also from a TOML file."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.config import STAGE_CONFIGS
from pipeline.encoders.cache import remembered
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

    Verbs = argparse._SubParsersAction["Parser"]

LOG_FORMATS = ("text", "json")
_PREFIX = "flag_"  # marks our flags in argparse's result, apart from verbs and Beam's
RENAMED = {"--gate": "--validate"}  # flags of earlier versions
_FLAG = re.compile(r"(--\w[\w-]*)(=|$)")  # what argparse reads as a flag in any place


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, and accepts no abbreviated flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**(settings | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def at_least_one(text: str) -> int:
    return _whole_number(text, 1)


def at_least_zero(text: str) -> int:
    return _whole_number(text, 0)


def _whole_number(text: str, lowest: int) -> int:
    if not text.isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {lowest}")
    if int(text) > sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text} is too large; stay below 2^63")
    return int(text)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for every field of the configuration, in one group per stage."""
    for config in STAGE_CONFIGS:
        group = parser.add_argument_group(config.__doc__)
        for f in fields(config):
            flag: dict[str, Any] = {"dest": _PREFIX + f.name, "help": f.metadata["help"], "default": None}
            if isinstance(f.default, bool):
                flag |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
            elif isinstance(f.default, tuple):
                flag |= {"action": "append", "metavar": f.metadata["metavar"] or "NAME"}
            elif f.metadata["choices"]:
                flag |= {"metavar": f.metadata["metavar"] or "|".join(f.metadata["choices"])}
            else:
                flag |= {"metavar": f.metadata["metavar"] or type(f.default).__name__.upper()}
            if f.default not in ("", (), False):
                shown = ",".join(f.default) if isinstance(f.default, tuple) else f.default
                flag["help"] += f" (default: {shown})"
            group.add_argument(f"--{f.name}", **flag)


def given_settings(known: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, from parsed arguments."""
    values = vars(known).items()
    return {
        name.removeprefix(_PREFIX): value for name, value in values if name.startswith(_PREFIX) and value is not None
    }


def check_beam_flags(rest: Sequence[str], own: Sequence[str]) -> list[str]:
    """Checks that all other flags are options of Beam.

    Args:
      rest: arguments that are not ours.
      own: our flags.

    Raises:
      ConfigError: for an unknown flag, naming the nearest known one, or for a stray argument.
    """
    if not rest:
        return []
    # Importing Beam takes a second, and the names of its flags are enough to find most wrong flags.
    names = remembered(f"flags-of-beam-{version('apache-beam')}", lambda: _beam_parser().flags(), _are_names)
    unknown = list(rest[:1])  # it is not the value of a flag
    if rest[0].startswith("-"):
        unknown = [argument for argument in rest if (flag := _FLAG.match(argument)) and flag[1] not in names]
        unknown = unknown or _beam_parser().parse_known_args(list(rest))[1]
    refuse(
        unknown,
        [*own, *names],
        advice="; an option of the runner itself goes into --runner_option=NAME=VALUE",
        stray="every setting is a flag, and a glob needs quotes: --input={}",
    )
    return list(rest)


def _beam_parser() -> Parser:
    from apache_beam.options.pipeline_options import PipelineOptions

    parser = Parser(prog="embeam", add_help=False, conflict_handler="resolve")  # classes of options share flags
    for options in _subclasses(PipelineOptions):
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(parser)  # type: ignore[arg-type]  # Beam's own parser can do more than is asked
    return parser


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def refuse(rest: Sequence[str], flags: Iterable[str], advice: str = "", stray: str = "leave it out") -> None:
    """Raises ConfigError for the first of the arguments that were not parsed.

    Args:
      rest: the arguments.
      flags: all known flags; the message names the nearest one.
      advice: what to do where no flag is near.
      stray: what to do about an argument that is not a flag; `{}` stands for it.
    """
    for argument in rest:
        if not argument.startswith("-"):
            raise ConfigError(f"unexpected argument {argument!r}; {stray.format(argument)}")
        flag = argument.split("=")[0]
        if flag in RENAMED:
            raise ConfigError(f"{flag} is called {RENAMED[flag]} now; use that")
        close = difflib.get_close_matches(flag.lower().replace("-", "_").replace("__", "--", 1), list(flags), 1, 0.6)
        raise ConfigError(f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else advice))


@dataclass(frozen=True)
class CommandFile:
    """What `--config` names: settings of the run, flags of the command itself, and options of the engine.

    Attributes:
      settings: name to value.
      debug: as the flag.
      summary_json: as the flag.
      log_format: as the flag; "" if it is not given.
      runner: as the flag; "" if it is not given.
      runner_options: as the flag.
      beam_flags: Beam's own.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    debug: bool = False
    summary_json: bool = False
    log_format: str = ""
    runner: str = ""
    runner_options: list[str] = field(default_factory=list)
    beam_flags: list[str] = field(default_factory=list)


def read_command_file(path: str | None, own: Sequence[str]) -> CommandFile:
    """Reads the file that `--config` names.

    Args:
      path: of a TOML file; None or "" for no file.
      own: the flags of `embeam embed`, with which unknown names are compared.

    Raises:
      ConfigError: if the file cannot be read, or a name or value in it is wrong.
    """
    if not path:
        return CommandFile()
    settings, rest = read_config_file(path)
    switches = {name: _read_switch(name, rest.pop(name, False)) for name in ("debug", "summary_json")}
    log_format = rest.pop("log_format", "")
    if log_format not in ("", *LOG_FORMATS):
        raise ConfigError(f"--log_format={log_format} is not one of {', '.join(LOG_FORMATS)}")
    runner, options = rest.pop("runner", ""), rest.pop("runner_option", [])
    if not isinstance(runner, str):
        raise ConfigError(f"--runner={runner} is not text; write the name of a runner")
    options = [str(option) for option in (options if isinstance(options, list) else [options])]
    beam_flags = check_beam_flags(engine_flags(rest), own)
    return CommandFile(
        settings, **switches, log_format=log_format, runner=runner, runner_options=options, beam_flags=beam_flags
    )


def _read_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"--{name}={value} is not true or false")
    return value


def read_config_file(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a TOML file of settings, flat or in one level of tables.

    Returns:
      Our settings, and the rest, which is for the engine.

    Raises:
      ConfigError: if the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            values = tomllib.loads(f.read())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config={path} cannot be read: {error}") from error
    own = {f.name for config in STAGE_CONFIGS for f in fields(config)}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(value if isinstance(value, dict) and name not in own else {name: value})
    for name, value in flat.items():
        if isinstance(value, dict) or name in ("config", "help"):
            raise ConfigError(f"--config={path}: {name!r} is not a setting; embeam embed --help lists them all")
    return {k: v for k, v in flat.items() if k in own}, {k: v for k, v in flat.items() if k not in own}


def engine_flags(engine: dict[str, Any]) -> list[str]:
    """A file's settings for the engine as flags: true is a bare flag, false none, a list repeats its flag."""
    flags = []
    for name, value in engine.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not False:
                flags.append(f"--{name}" if item is True else f"--{name}={item}")
    return flags


def _subclasses(kind: type[PipelineOptions]) -> list[type[PipelineOptions]]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child))]
