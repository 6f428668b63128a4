"""The verbs around a table: `embeam plan` before a run, `verify`, `rollback` and `sql` after it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.cli.flags import add_config_flags, at_least_zero, given_settings, read_command_file
from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError, EmbeamError
from pipeline.files import absolute_path
from pipeline.report.logs import set_up_logging

if TYPE_CHECKING:
    from pipeline.cli.flags import Verbs
    from pipeline.run.checked_table import CheckedTable, Finding
    from pipeline.run.dry_run import DryRun

SHOWN_FINDINGS = 20  # of each kind
EXIT_FOUND = 1


def add_table_verbs(verbs: Verbs, embed_flags: Sequence[str]) -> None:
    """Adds the verbs to the command's.

    Args:
      verbs: of the command.
      embed_flags: the flags of `embeam embed`, which a file for `embeam plan` may set too.
    """
    plan = verbs.add_parser(
        "plan",
        help="print what embed would do, without running it",
        description="Takes the flags of embeam embed, reads the whole input and prints what a run would embed, drop "
        "and keep, how long it would take and what would stop it. Encodes and writes nothing.",
    )
    add_config_flags(plan)
    plan.add_argument(
        "--config", metavar="FILE.toml", help="read flags from a file; flags on the command line take precedence"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object instead")
    plan.set_defaults(
        run=run_plan,
        embed_flags=embed_flags,
        parser=plan,
        stray="every setting is a flag, and a glob needs quotes: --input={}",
    )

    verify = verbs.add_parser(
        "verify",
        help="check a table against its files and its input",
        description="Reads a table's live snapshot and says whether files, rows and manifest agree, and, with --input, "
        "whether each document has the rows that it should have. Exits with 0 if it is consistent, with 1 if not.",
    )
    verify.add_argument("table", metavar="DIR", help="folder of the table")
    verify.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="GLOB",
        help="compare with these files, read as the table's run did; may be given several times",
    )
    verify.add_argument(
        "--sample", type=at_least_zero, default=0, metavar="N", help="encode N texts again and compare (default: 0)"
    )
    verify.add_argument("--all", action="store_true", help=f"list all findings, not only {SHOWN_FINDINGS} of each kind")
    verify.add_argument("--json", action="store_true", help="print the findings as JSON lines instead")
    verify.set_defaults(run=run_verify, parser=verify, stray="name one table; a glob goes into --input={}")

    rollback = verbs.add_parser(
        "rollback",
        help="make an older snapshot of a table live again",
        description="Makes the previous snapshot, or another one that still exists, the live snapshot again.",
    )
    rollback.add_argument("table", metavar="DIR", help="folder of the table")
    choice = rollback.add_mutually_exclusive_group()
    choice.add_argument("--to", default="", metavar="NAME", help="the snapshot to return to")
    choice.add_argument("--list", action="store_true", help="list the snapshots and change nothing")
    sql = verbs.add_parser(
        "sql",
        help="print the statements that search a table in BigQuery",
        description="Prints the statement that makes a table's vector index, and a query for its nearest rows.",
    )
    sql.add_argument("table", metavar="bq://PROJECT.DATASET.TABLE", help="the table")
    sql.add_argument(
        "--dimensions",
        type=at_least_zero,
        default=0,
        metavar="N",
        help="dimensions of the vectors; default: read from the table",
    )
    sql.set_defaults(run=run_sql, parser=sql, stray="name one table")
    rollback.set_defaults(run=run_rollback, parser=rollback, stray="name one table; a snapshot goes into --to={}")


def run_sql(known: argparse.Namespace) -> None:
    from pipeline.sources.bigquery_client import BigQueryName
    from pipeline.tables.bigquery_sql import make_index_statement, make_search_query
    from pipeline.tables.read import open_live

    name = BigQueryName.parse(known.table)
    dimension = known.dimensions or open_live(known.table)[0].layout.dimension
    print(f"{make_index_statement(name)};\n\n{make_search_query(name, dimension)};")


def run_plan(known: argparse.Namespace) -> None:
    file = read_command_file(known.config, known.embed_flags)  # the runner makes no difference to a dry run
    known.debug = known.debug or file.debug
    set_up_logging(known.debug, file.log_format)
    config = EmbedConfig.from_flat(file.settings | given_settings(known))

    from dataclasses import asdict

    from pipeline.run.dry_run import make_dry_run

    dry_run = make_dry_run(config)
    print(json.dumps(asdict(dry_run), indent=1) if known.json else format_plan(dry_run, config.write.output))


def format_plan(dry_run: DryRun, output: str) -> str:
    """What `embeam plan` prints."""
    from pipeline.records import REASONS, SkippedFile
    from pipeline.report.summary import describe_bad_files, describe_unknown, format_bytes
    from pipeline.tables.manifest import GoneFiles

    f = dry_run
    about = "about " if f.is_sampled else ""
    lines = [
        f"{output} would have {about}{f.rows:,} rows, about {format_bytes(f.bytes)}",
        f"  documents    {f.documents:,} read: {f.new:,} new, {f.changed:,} changed, {f.updated:,} updated (their text "
        f"is the same), {f.unchanged:,} unchanged" + (f", {f.remade:,} remade" if f.remade else ""),
        f"  gone         {f.deleted:,} deleted"
        + "".join(f", {n:,} {what}" for n, what in ((f.kept, "kept"), (f.stale, "stale"), (f.lost, "lost")) if n),
        f"  to encode    {f.to_encode:,} texts; {f.reused:,} reuse a vector, {f.same_text:,} have the text of another",
    ]
    if f.to_encode:
        if f.tokens is not None and f.cut_tokens is not None:
            share = f.cut_tokens / (f.tokens + f.cut_tokens or 1)
            lines.append(f"  tokens       {about}{f.tokens:,}, and {f.cut_tokens:,} cut ({share:.2%})")
            lines += [f"  {line}" for line in describe_unknown(f.unknown_tokens, f.tokens)]
        lines.append(f"  batches      {about}{f.padding:.1%} padding in {f.chunks:,} inputs of the encoder")
        lines.append(f"  time         {describe_time(f)}")
    if f.skipped_empty:
        lines.append(f"  skipped      {f.skipped_empty:,} blank texts")
    lines += [
        f"  kept fields  {n:,} values of {name} do not fit its type and become null" for name, n in f.kept_nulls.items()
    ]
    lines.append(f"  dead letters {sum(f.dead_letters.values()):,}")
    lines += [f"    {n:>9,} {reason}: {REASONS[reason]}" for reason, n in f.dead_letters.items()]
    if f.gone:
        gone = GoneFiles(f.n_gone_files, tuple(f.gone_files))
        lines.append(f"  gone files   {f.gone:,} of the deleted documents come from {gone}")
    bad_files = [SkippedFile(**bad) for bad in f.bad_files]
    lines += [f"  {line}" for line in describe_bad_files(bad_files, "cannot be read to their ends")]
    if f.changes:
        lines.append(
            "  model        everything is embedded again, because the table was made with other settings: "
            + "; ".join(f.changes)
        )
    lines += [f"  a run stops  {message}" for message in f.stops]
    lines.append("nothing was encoded or written; run embeam embed with the same flags to do it")
    return "\n".join(lines)


def describe_time(dry_run: DryRun) -> str:
    """How long encoding takes, and the source of the estimate."""
    from pipeline.report.progress_bar import format_seconds

    if dry_run.seconds is None:
        return "unknown: the encoder's architecture is not known, and no earlier run has measured its speed"
    spent = f"about {format_seconds(dry_run.seconds)} in the encoder, on one worker"
    if dry_run.speed == "measured":
        return f"{spent}, at the speed of the run of {dry_run.speed_source}"
    if dry_run.speed_source:
        return f"{spent}; a rough estimate from the short run of {dry_run.speed_source}"
    return f"{spent}; a rough estimate from this machine's speed" if dry_run.speed == "rough" else spent


def run_verify(known: argparse.Namespace) -> None:
    from pipeline.run.checked_table import CheckedTable
    from pipeline.run.verify import check_table

    found: Counter[str] = Counter()
    shown: dict[str, list[Finding]] = defaultdict(list)

    def report(finding: Finding) -> None:
        found[finding.kind] += 1
        if known.json:
            print(json.dumps(finding._asdict()))
        elif known.all:
            print(format_finding(finding))
        elif found[finding.kind] <= SHOWN_FINDINGS:
            shown[finding.kind].append(finding)

    check_folder_table(known.table)
    table = CheckedTable(absolute_path(known.table), report)
    check_table(table, known.input, known.sample)
    if not known.json:
        print(format_verification(known.table, table, found, shown, bool(known.input)))
    if found:
        sys.exit(EXIT_FOUND)


def format_verification(
    name: str, table: CheckedTable, found: Counter[str], shown: dict[str, list[Finding]], has_input: bool
) -> str:
    """What `embeam verify` prints.

    Args:
      name: of the table as it was given.
      table: after it was checked.
      found: how many findings there are of each kind.
      shown: the findings to list.
      has_input: whether the table was compared with an input.
    """
    from pipeline.report.summary import format_bytes
    from pipeline.run.checked_table import KINDS

    counts, n = table.counts, sum(found.values())
    lines = [f"{name} is not consistent: {n:,} finding{'s' if n > 1 else ''}" if n else f"{name} is consistent"]
    lines += [
        f"  snapshot     {table.manifest.snapshot}, published {table.manifest.created_at}",
        f"  files        {counts['files']:,} read, {format_bytes(counts['bytes'])}",
        f"  rows         {counts['rows']:,} of {counts['documents']:,} documents",
        f"  dead letters {counts['dead_letters']:,}",
    ]
    if has_input:
        dead, stale, unproven = (counts[name] for name in ("dead_documents", "stale_documents", "unproven_rows"))
        lines += [
            f"  input        {counts['input_documents']:,} documents",
            f"  tolerated    because of dead letters and bad files: {dead:,} documents without rows, {stale:,} with "
            f"rows of an older text, {unproven:,} rows whose documents cannot be read",
        ]
        if kept := counts["kept_rows"]:
            lines.append(
                f"  kept         {kept:,} rows of documents that are gone from the input, kept by --deletes=keep"
            )
    if counts["sampled"]:
        lines.append(f"  encoded      {counts['sampled']:,} texts again")
    for kind, number in sorted(found.items(), key=lambda item: list(KINDS).index(item[0])):
        lines.append(f"  {kind} {number:,}: {KINDS[kind]}")
        lines += [f"    {finding.what}: {finding.message}" for finding in shown.get(kind, ())]
        if (more := number - len(shown[kind])) and shown[kind]:
            lines.append(f"    and {more:,} more; --all lists them")
    return "\n".join(lines)


def format_finding(finding: Finding) -> str:
    return f"{finding.kind} {finding.what}: {finding.message}"


def check_folder_table(table: str) -> None:
    """Raises ConfigError if the table is not a folder of snapshots."""
    from pipeline.tables.folder_table import FolderTable
    from pipeline.tables.stores import find_table

    if not isinstance(find_table(table), FolderTable):
        raise ConfigError(f"{table} is a table in a database and has no snapshots; name a folder")


def run_rollback(known: argparse.Namespace) -> None:
    from pipeline.tables.manifest import open_table
    from pipeline.tables.retention import roll_back

    table = absolute_path(known.table)
    check_folder_table(known.table)
    before, _ = open_table(table)
    if known.list:
        print(format_snapshots(table, before.snapshot))
        return
    now = roll_back(table, known.to)
    print(
        f"{known.table} is {now.snapshot} again: {now.rows:,} rows, published {now.created_at}\n"
        f"before that it was {before.snapshot}: {before.rows:,} rows, published {before.created_at}\n"
        f"undo: embeam rollback {known.table} --to={before.snapshot}"
    )


def format_snapshots(table: str, live: str) -> str:
    """One line for each snapshot, oldest first."""
    from pipeline.tables.manifest import read_manifest
    from pipeline.tables.retention import list_snapshots

    lines = []
    for name in list_snapshots(table):
        marker = "live" if name == live else ""
        try:
            manifest = read_manifest(table, name)
            lines.append(f"{name}  published {manifest.created_at}  {manifest.rows:>12,} rows  {marker}".rstrip())
        except EmbeamError as error:
            lines.append(f"{name}  {error}  {marker}".rstrip())
    return "\n".join(lines)
