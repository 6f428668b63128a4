"""The command `embeam`."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress

from pipeline import __version__
from pipeline.cli.export_verbs import add_export_verbs
from pipeline.cli.flags import (
    LOG_FORMATS,
    Parser,
    add_config_flags,
    at_least_one,
    check_beam_flags,
    given_settings,
    read_command_file,
    refuse,
)
from pipeline.cli.table_verbs import add_table_verbs
from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError
from pipeline.report.logs import report_error, set_up_logging
from pipeline.run.failures import describe_failure
from pipeline.signals import STOPPING, watch_signals

EXIT_FAILED, EXIT_USAGE = 1, 2
STAGED = "the job is staged and will publish {} when it runs; its lock on the table lasts for two hours"


def run() -> None:
    """The console command: `main`, without the second and a half that Python takes to tear TensorFlow and Beam down."""
    code = 0
    watch_signals()
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else EXIT_FAILED
    if STOPPING.is_set():  # the run failed because the signal ended its workers
        threading.Event().wait()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # its reader has closed the pipe
            pass
        except OSError as error:  # such as a file on a full disk
            code = code or EXIT_FAILED
            with suppress(OSError):
                os.write(2, f"embeam: {describe_failure(error)}\n".encode())
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 the run failed, 2 wrong usage, 128 + N stopped by signal N."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack some characters
    gc.set_threshold(50_000)  # importing TensorFlow and Beam makes millions of objects, none of them garbage
    parser, embed_parser = build_parsers()
    given = sys.argv[1:] if arguments is None else arguments
    known = argparse.Namespace(debug="--debug" in given, summary_json="--summary_json" in given)
    try:
        _, rest = parser.parse_known_args(given, known)
        if not known.verb:
            refuse(rest, parser.flags())
            raise ConfigError("name a verb, such as embeam embed; embeam --help lists them")
        set_up_logging(known.debug, getattr(known, "log_format", ""))
        if known.verb == "embed":
            run_embed(known, rest, embed_parser.flags())
        else:
            refuse(rest, known.parser.flags(), stray=known.stray)
            known.run(known)
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        sys.exit(report_failure(error, known))


def report_failure(error: Exception, known: argparse.Namespace) -> int:
    """Reports in one line why a command fails.

    Args:
      error: what it raised.
      known: its flags.

    Returns:
      The exit code.
    """
    code = EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    if STOPPING.is_set():  # a signal has ended its workers, which was reported already
        return code
    if known.debug:
        traceback.print_exception(error)
    message = describe_failure(error)
    report_error(message)
    if known.summary_json:
        print(json.dumps({"status": "failed", "exit_code": code, "error": message}))
    return code


def build_parsers() -> tuple[Parser, Parser]:
    """The command's parser, and the parser of the verb `embed`, whose flags correct unknown ones."""
    parser = Parser(prog="embeam", description="Turns a text corpus into an embedding table.")
    parser.add_argument("--version", action="version", version=f"embeam {__version__}")
    verbs = parser.add_subparsers(dest="verb", title="verbs", metavar="VERB", parser_class=Parser)
    embed = verbs.add_parser(
        "embed",
        help="embed a corpus into a table",
        description="Reads a corpus, embeds it and publishes the table. Beam's own pipeline options may be given too.",
    )
    add_config_flags(embed)
    engine = embed.add_argument_group("Engine")
    engine.add_argument(
        "--config", metavar="FILE.toml", help="read flags from a file; flags on the command line take precedence"
    )
    engine.add_argument(
        "--runner",
        help="local (in this process; DirectRunner means the same), or any Beam runner's name (default: local)",
    )
    engine.add_argument(
        "--runner_option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option that only the runner itself knows; may be given several times",
    )
    engine.add_argument(
        "--summary_json",
        action="store_true",
        help="print one line of JSON with the outcome at the end, also if the run fails",
    )
    engine.add_argument(
        "--log_format",
        choices=LOG_FORMATS,
        metavar="|".join(LOG_FORMATS),
        help="format of warnings, errors and progress on stderr: json writes one object per line, for log collectors "
        "(default: text)",
    )

    show = verbs.add_parser(
        "show",
        help="print what a table holds",
        description="Prints a summary of a table's manifest, and its first rows.",
    )
    show.add_argument("table", metavar="DIR", help="folder of the table")
    show.add_argument("--rows", type=at_least_one, default=3, metavar="N", help="how many rows to print (default: 3)")
    show.set_defaults(run=run_show, parser=show, stray="name one table")

    query = verbs.add_parser(
        "query",
        help="print the rows nearest to a text",
        description="Embeds a text with the settings that the table was made with, and prints the rows nearest to it.",
    )
    query.add_argument("table", metavar="DIR", help="folder of the table")
    query.add_argument("text", metavar="TEXT", help="the text to search for")
    query.add_argument("--pair", metavar="TEXT", help="second segment, for a table of pairs")
    query.add_argument("--top", type=at_least_one, default=5, metavar="N", help="how many rows to print (default: 5)")
    query.set_defaults(run=run_query, parser=query, stray="put a text of several words in quotes")
    add_export_verbs(verbs)
    add_table_verbs(verbs, embed.flags())
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", help="show Beam's log and the traceback of an error")
    return parser, embed


def run_embed(known: argparse.Namespace, rest: list[str], own: list[str]) -> None:
    beam_flags = check_beam_flags(rest, own)
    file = read_command_file(known.config, own)
    known.debug = known.debug or file.debug
    known.summary_json = known.summary_json or file.summary_json
    known.log_format = known.log_format or file.log_format
    set_up_logging(known.debug, known.log_format)
    runner = known.runner or file.runner or "local"
    config = EmbedConfig.from_flat(file.settings | given_settings(known))
    flags = [*file.beam_flags, *beam_flags]
    for option in [*file.runner_options, *known.runner_option]:
        name, equals, _ = option.partition("=")
        if not equals:
            raise ConfigError(f"--runner_option={option} has no value; write --runner_option={name}=VALUE")
        flags.append(f"--{option}")

    from apache_beam.options.pipeline_options import PipelineOptions

    from pipeline.engines.runner import is_local
    from pipeline.report.summary import format_summary, summarize
    from pipeline.run.job import build_table

    options = PipelineOptions([*flags, f"--runner={'FnApiRunner' if is_local(runner) else runner}"])
    manifest, output = build_table(config, options, show_progress=True), config.write.output
    print(format_summary(manifest, output) if manifest else STAGED.format(output))
    if known.summary_json:
        print(json.dumps(summarize(manifest, output)))


def run_show(known: argparse.Namespace) -> None:
    from pipeline.report.summary import format_table

    print(format_table(known.table, known.rows))


def run_query(known: argparse.Namespace) -> None:
    from pipeline.search.nearest import find_nearest, format_hits

    print(format_hits(known.text, find_nearest(known.table, known.text, known.top, known.pair)))
