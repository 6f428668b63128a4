"""The command `embeam`: verbs, and flags made from the configuration's fields."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from pipeline import __version__
from pipeline.config import STAGE_CONFIGS, EmbedConfig
from pipeline.errors import ConfigError, EmbeamError

EXIT_FAILED, EXIT_USAGE = 1, 2
_RUNNER_HELP = "local (in this process; DirectRunner means the same), or any Beam runner's name"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 the run failed, 2 wrong usage, 128 + N stopped by signal N."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    set_up_logging()
    verbs = {"embed": run_embed, "show": run_show, "query": run_query}
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    try:
        if given and given[0] == "embed":
            known, rest = parser.parse_known_args(given)
            known.beam_options = check_beam_flags(rest)
        else:
            known = parser.parse_args(given)
        if not known.verb:
            parser.print_help()
            sys.exit(EXIT_USAGE)
        verbs[known.verb](known)
    except ConfigError as error:
        sys.exit(_complain(error, EXIT_USAGE))
    except EmbeamError as error:
        sys.exit(_complain(error, EXIT_FAILED))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def set_up_logging() -> None:
    """Our own warnings in one line each; of Beam's only errors, since its workers repeat each warning per process."""
    logging.basicConfig(format="embeam: %(message)s", level=logging.WARNING)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    # Beam 2.77 says so of every load, wherever torch is not installed.
    logging.getLogger().addFilter(lambda record: "Resource module is not available" not in record.getMessage())


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="embeam", description="Turns a text corpus into an embedding table.")
    parser.add_argument("--version", action="version", version=f"embeam {__version__}")
    verbs = parser.add_subparsers(dest="verb", title="verbs", parser_class=_Parser)
    embed = verbs.add_parser(
        "embed",
        help="embed a corpus into a table",
        description="Reads a corpus, embeds it and publishes the table. Beam's own pipeline options may be given too.",
        allow_abbrev=False,
    )
    add_config_flags(embed)
    engine = embed.add_argument_group("Engine")
    engine.add_argument("--config", metavar="FILE.toml", help="read flags from a file; the command line wins")
    engine.add_argument("--runner", help=f"{_RUNNER_HELP} (default: local)")
    engine.add_argument(
        "--runner_option",
        action="append",
        metavar="NAME=VALUE",
        help="an option that only the runner itself knows; may be given several times",
    )
    show = verbs.add_parser("show", help="print what a table holds", allow_abbrev=False)
    show.add_argument("table", metavar="DIR", help="folder of the table")
    show.add_argument("--rows", type=int, default=3, help="how many rows to print (default: 3)")
    query = verbs.add_parser("query", help="print the rows nearest to a text", allow_abbrev=False)
    query.add_argument("table", metavar="DIR", help="folder of the table")
    query.add_argument("text", help="what to look for")
    query.add_argument("--pair", help="second segment, for a table of pairs")
    query.add_argument("--top", type=int, default=5, help="how many rows to print (default: 5)")
    return parser


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for every field of the configuration, in one group per stage."""
    for config in STAGE_CONFIGS:
        group = parser.add_argument_group(config.__doc__)
        for f in fields(config):
            assert f.default is not MISSING
            flag: dict[str, Any] = {"dest": f"flag_{f.name}", "help": f.metadata["help"], "default": None}
            if isinstance(f.default, bool):
                flag |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
            elif isinstance(f.default, tuple):
                flag |= {"action": "append", "metavar": f.metadata["metavar"] or "NAME"}
            elif f.metadata["choices"]:
                flag |= {"metavar": "|".join(f.metadata["choices"])}
            else:
                flag |= {"metavar": f.metadata["metavar"] or type(f.default).__name__.upper()}
            if f.default not in ("", (), False):
                shown = ",".join(f.default) if isinstance(f.default, tuple) else f.default
                flag["help"] += f" (default: {shown})"
            group.add_argument(f"--{f.name}", **flag)


def check_beam_flags(rest: Sequence[str]) -> list[str]:
    """Passes on the flags that Beam's Python options know and refuses all others.

    Raises:
      ConfigError: for a flag that nobody knows, naming the nearest one that there is.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    beam_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for options in _subclasses(PipelineOptions):
        if "_add_argparse_args" in vars(options):
            try:
                options._add_argparse_args(beam_parser)
            except argparse.ArgumentError:
                continue  # two classes of options share a flag
    own = {f.name for config in STAGE_CONFIGS for f in fields(config)} | {"config", "runner", "runner_option"}
    known = {flag for action in beam_parser._actions for flag in action.option_strings} | {f"--{name}" for name in own}
    for argument in rest:
        flag = argument.split("=")[0]
        if flag.startswith("-") and flag not in known and flag.replace("-", "_").replace("__", "--", 1) not in known:
            close = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, 1, 0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown flag {flag}{hint} A flag of the runner itself goes into --runner_option")
    for before, argument in zip(["=", *rest], rest, strict=False):
        if not argument.startswith("-") and "=" in before:  # else it is the value of the flag before it
            raise ConfigError(f"unexpected argument {argument!r}; every setting is a flag: --input={argument}")
    return list(rest)


def run_embed(known: argparse.Namespace) -> None:
    given = {
        name[len("flag_") :]: value
        for name, value in vars(known).items()
        if name.startswith("flag_") and value is not None
    }
    settings, engine = read_config_file(known.config) if known.config else ({}, {})
    config = EmbedConfig.from_flat(settings | given)
    beam_flags = [f"--{name}={value}" for name, value in engine.items() if name != "runner"]
    beam_flags += check_beam_flags(beam_flags) and []
    beam_flags += known.beam_options
    runner = known.runner or engine.get("runner") or "local"
    for option in known.runner_option or []:
        name, equals, _ = option.partition("=")
        if not equals:
            raise ConfigError(f"--runner_option={option} has no value; write --runner_option={name}=VALUE")
        beam_flags.append(f"--{option}")

    from apache_beam.options.pipeline_options import PipelineOptions

    from pipeline.engine import is_local
    from pipeline.job import embed
    from pipeline.report.summary import format_summary
    from pipeline.runtime import load_tensorflow

    _stop_cleanly()
    load_tensorflow()
    options = PipelineOptions([*beam_flags, f"--runner={'FnApiRunner' if is_local(runner) else runner}"])
    try:
        manifest = embed(config, options, show_progress=True)
    except EmbeamError:
        raise
    except KeyboardInterrupt:
        print("embeam: stopped; nothing was published and the table is what it was; run it again", file=sys.stderr)
        sys.stderr.flush()
        os._exit(128 + _stopped_by)
    except Exception as error:
        sys.exit(_complain(explain_failure(error), EXIT_FAILED))
    print(format_summary(manifest, config.write.output))


def read_config_file(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a TOML file of settings, with tables or without.

    Returns:
      Our settings, and the rest, which is for Beam.

    Raises:
      ConfigError: if the file cannot be read.
    """
    import tomllib

    try:
        with open(path, "rb") as f:
            values = tomllib.load(f)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config={path} cannot be read: {error}") from error
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    own = {f.name for config in STAGE_CONFIGS for f in fields(config)}
    return {k: v for k, v in flat.items() if k in own}, {k: v for k, v in flat.items() if k not in own}


def run_show(known: argparse.Namespace) -> None:
    from pipeline.report.summary import format_table
    from pipeline.runtime import load_tensorflow

    load_tensorflow()
    print(format_table(known.table, known.rows))


def run_query(known: argparse.Namespace) -> None:
    from pipeline.report.query import find_nearest, format_hits
    from pipeline.runtime import load_tensorflow

    load_tensorflow()
    print(format_hits(known.text, find_nearest(known.table, known.text, known.top, known.pair)))


def explain_failure(error: BaseException) -> str:
    """One sentence for an exception that crossed Beam, which wraps the original one and its traceback into text."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for cause in chain:
        if isinstance(cause, EmbeamError):
            return str(cause)
    text = str(error)
    for line in reversed(text.splitlines()):
        kind, colon, message = line.strip().partition(": ")
        if colon and kind.startswith("pipeline.errors."):
            return message.split(" [while running")[0]
    if "No space left on device" in text:
        return "the disk is full; free some space and run again; the table is what it was"
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return f"the run failed: {lines[-1].strip()}"


_stopped_by = signal.SIGINT


def _stop_cleanly() -> None:
    """Lets Ctrl-C and SIGTERM unwind the run; if the engine does not end in time, the process does."""

    def stop(number: int, frame: Any) -> None:
        global _stopped_by
        _stopped_by = signal.Signals(number)
        watchdog = threading.Timer(5, os._exit, [128 + number])
        watchdog.daemon = True
        watchdog.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as all others."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**(settings | {"allow_abbrev": False}))

    def error(self, message: str) -> Any:
        self.exit(EXIT_USAGE, f"embeam: {message}\n")


def _complain(error: object, code: int) -> int:
    print(f"embeam: {error}", file=sys.stderr)
    return code


def _subclasses(kind: type) -> list[type]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child))]


if __name__ == "__main__":
    main()
