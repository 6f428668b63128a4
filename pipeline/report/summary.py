"""Formats what a run did and what a table holds as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from pipeline.encoders.parity import Parity
from pipeline.errors import as_line
from pipeline.records import KEPT_NULLS, REASONS, SkippedFile
from pipeline.report.progress_bar import format_seconds
from pipeline.tables.folder_table import FolderTable
from pipeline.tables.manifest import Manifest, snapshot_folder
from pipeline.tables.read import iter_table, open_live
from pipeline.tables.stores import find_table

SHOWN_FILES = 20
MOST_UNKNOWN = 0.1  # share of tokens that are [UNK]
UNKNOWN_WARNING = (
    "the encoder's vocabulary lacks the language or the script of these texts, so their vectors say little; use an "
    "encoder for it with --encoder, or a multilingual one, such as bert_multi_cased_L-12_H-768_A-12 of TF Hub with "
    "--preprocessor=bert_multi_cased_preprocess"
)


def format_summary(manifest: Manifest, table: str) -> str:
    """The report at the end of a run."""
    read, preprocess = manifest.counts.get("read", {}), manifest.counts.get("preprocess", {})
    batch, encode = manifest.counts.get("batch", {}), manifest.counts.get("encode", {})
    write = manifest.counts.get("write_embeddings", {})
    rate = manifest.rows / manifest.seconds if manifest.seconds else 0
    lines = [
        f"{table} is published: {manifest.rows:,} rows of {manifest.layout.dimension} x {manifest.layout.dtype}",
        f"  documents    {int(read.get('records', 0)):,} read in {format_seconds(manifest.seconds)}"
        f", {rate:,.0f} rows/s",
    ]
    if skipped := read.get("skipped_empty"):
        lines.append(f"  skipped      {int(skipped):,} blank texts")
    if manifest.layout.counts_tokens:
        tokens, cut = preprocess.get("tokens", 0), preprocess.get("truncated_tokens", 0)
        share = cut / (tokens + cut) if tokens + cut else 0
        lines.append(f"  tokens       {int(tokens):,} encoded, {int(cut):,} cut ({share:.2%})")
        lines += [f"  {line}" for line in describe_unknown(preprocess.get("unknown_tokens"), int(tokens))]
    if padded := batch.get("padded_tokens"):
        unit = "tokens" if manifest.layout.counts_tokens else "bytes"
        used = batch.get("used_tokens", 0) / padded
        lines.append(f"  batches      {int(batch.get('batches', 0)):,}, {used:.1%} of their {unit} are not padding")
    lines += describe_kept_nulls(manifest)
    lines += describe_changes(manifest)
    lines += describe_gone_files(manifest)
    n_dead = sum(manifest.dead_letters.values())
    lines.append(f"  dead letters {n_dead:,}" + (f", in {locate_dead_letters(manifest, table)}" if n_dead else ""))
    for reason, n in _by_count(manifest):
        lines.append(f"    {n:>9,} {reason}: {REASONS[reason]}")
    lines += [f"  {line}" for line in describe_bad_files(manifest.bad_files)]
    seconds = {
        "reading": read.get("read_seconds", 0),
        "tokenising": preprocess.get("tokenize_seconds", 0),
        "encoding": encode.get("encode_seconds", 0),
        "writing": write.get("write_seconds", 0),
    }
    lines.append("  seconds      " + ", ".join(f"{value:.1f} {name}" for name, value in seconds.items()))
    lines.append(f"  encoder      {describe_graph(manifest)}")
    return "\n".join(lines)


def describe_gone_files(manifest: Manifest) -> list[str]:
    """The input files that are no longer there, if documents were deleted with them."""
    n = int(manifest.counts.get("merge", {}).get("gone", 0))
    return [f"  gone         {n:,} documents deleted, of {manifest.gone_files}"] if n else []


def describe_bad_files(
    bad_files: Sequence[SkippedFile], what: str = "skipped, the table's rows from them stay"
) -> list[str]:
    """The input files that could not be read: how many, and the first of them."""
    if not bad_files:
        return []
    more = [f"  and {len(bad_files) - SHOWN_FILES:,} more"] if len(bad_files) > SHOWN_FILES else []
    shown = [f"  {as_line(str(bad))}" for bad in bad_files[:SHOWN_FILES]]
    return [f"bad files    {len(bad_files):,} {what}", *shown, *more]


def describe_unknown(n_unknown: float | None, n_tokens: int) -> list[str]:
    """How many of some tokens are [UNK], and a warning if the encoder does not know the language; empty if none are.

    Args:
      n_unknown: None where it is not known.
      n_tokens: all tokens.
    """
    if not n_unknown or not n_tokens:
        return []
    share = n_unknown / n_tokens
    lines = [f"unknown      {int(n_unknown):,} of {n_tokens:,} tokens are [UNK] ({share:.2%})"]
    if share > MOST_UNKNOWN:
        lines.append(f"warning      {UNKNOWN_WARNING}")
    return lines


def locate_dead_letters(manifest: Manifest, table: str) -> str:
    """A glob of a run's dead-letter files: below the table's folder as the user named it, else the full path."""
    found = find_table(table, manifest.settings.get("work_dir", ""))
    path = found.locate_dead_letters(manifest, "dead_letters-*")
    return path.replace(found.work, table, 1) if isinstance(found, FolderTable) else path


def summarize(manifest: Manifest | None, table: str) -> dict[str, Any]:
    """A run in numbers, for programs: the names are the same in every run, so that alerts can use them.

    Args:
      manifest: of what was published; None if the job was only staged.
      table: as the user named it.
    """
    if manifest is None:
        return {"status": "staged", "table": table}
    counts = {stage: manifest.counts.get(stage, {}) for stage in ("read", "preprocess", "batch", "encode", "merge")}
    padded, used = (counts["batch"].get(name, 0) for name in ("padded_tokens", "used_tokens"))
    tokens, unknown = (counts["preprocess"].get(name, 0) for name in ("tokens", "unknown_tokens"))
    return {
        "status": "published",
        "table": table,
        "snapshot": manifest.snapshot,
        "previous": manifest.previous,
        "rows": manifest.rows,
        "documents": int(counts["read"].get("records", 0)),
        "encoded_chunks": int(counts["encode"].get("chunks", 0)),
        "deleted": int(counts["merge"].get("deleted", 0)),
        "dead_letters": sum(manifest.dead_letters.values()),
        "dead_letter_reasons": manifest.dead_letters,
        "bad_files": [bad._asdict() for bad in manifest.bad_files],
        "gone_files": manifest.gone_files.n,
        "deleted_with_gone_files": int(counts["merge"].get("gone", 0)),
        "kept_nulls": {name: int(n) for name, n in manifest.counts.get(KEPT_NULLS, {}).items()},
        "tokens": int(tokens),
        "truncated_tokens": int(counts["preprocess"].get("truncated_tokens", 0)),
        "unknown_tokens": int(unknown),
        "unknown_share": round(unknown / tokens, 4) if tokens else 0.0,
        "padding_share": round(1 - used / padded, 4) if padded else 0.0,
        "encode_seconds": round(counts["encode"].get("encode_seconds", 0), 3),
        "seconds": manifest.seconds,
    }


def describe_kept_nulls(manifest: Manifest) -> list[str]:
    """The kept fields of which values did not fit and are null, and how to keep them."""
    lines = []
    for field in manifest.layout.kept:
        if n := int(manifest.counts.get(KEPT_NULLS, {}).get(field.name, 0)):
            wider = {"int": "float", "float": "string", "bool": "string"}.get(field.type)
            fix = f"; --keep_fields={field.source}:{wider} may hold them" if wider else ""
            what = "does" if n == 1 else "do"
            values = f"{n:,} value{'s' * (n != 1)} of {field.source} {what} not fit {field.type} and"
            lines.append(f"  kept fields  {values} {'is' if n == 1 else 'are'} null{fix}")
    return lines


def describe_changes(manifest: Manifest) -> list[str]:
    """The changes that a run found and the vectors that it reused; empty for a first run without equal texts."""
    reuse, merge = manifest.counts.get("reuse", {}), manifest.counts.get("merge", {})
    found = [
        f"{int(reuse[name]):,} {name}"
        for name in ("new", "changed", "updated", "remade", "unchanged")
        if reuse.get(name)
    ]
    found += [f"{int(merge[name]):,} {name}" for name in ("deleted", "kept", "stale", "lost") if merge.get(name)]
    known = [
        f"{int(reuse[name]):,} {what}"
        for name, what in (("reused", "reuse a vector"), ("same_text", "have the text of another"))
        if reuse.get(name)
    ]
    lines = [f"  changes      {', '.join(found)}"] if manifest.previous and found else []
    return lines + ([f"  not encoded  {', '.join(known)}"] if known else [])


def describe_graph(manifest: Manifest) -> str:
    """Which graph made the vectors, in which precision, and how close it is to the published one."""
    settings, parity = manifest.settings, manifest.parity
    line = f"{settings.get('encoder_graph', 'published')} graph, {settings.get('precision', 'float32')}"
    if not parity:
        return line
    return f"{line}; against the published one {Parity(**parity)}"


def format_table(table: str, n_rows: int) -> str:
    """What `embeam show` prints: a summary of the manifest, counts and the first rows."""
    manifest = open_live(table)[0]
    layout, preprocess = manifest.layout, manifest.counts.get("preprocess", {})
    n_bytes = sum(file.n_bytes for file in manifest.files)
    files = []
    if manifest.files:  # else a database holds the rows
        folder = snapshot_folder(table, manifest.snapshot)
        files.append(
            f"files        {len(manifest.files):,} of {manifest.file_format}, {format_bytes(n_bytes)}, in {folder}"
        )
    dead = ", ".join(f"{n:,} {reason}" for reason, n in _by_count(manifest)) or "none"
    lines = [
        f"table        {table}",
        f"snapshot     {manifest.snapshot}, published {manifest.created_at} by embeam {manifest.embeam}",
        f"rows         {manifest.rows:,} of {layout.dimension} x {layout.dtype}"
        + (" per token" if layout.tokens else ""),
        f"encoder      {manifest.settings['encoder'] or 'the built-in one'}, {manifest.identity['vector']}",
        f"graph        {describe_graph(manifest)}",
        f"fingerprint  {manifest.fingerprint}",
        *files,
        f"columns      {', '.join([*layout.columns(), 'embedding'])}",
        *(line.strip() for line in describe_kept_nulls(manifest)),
        *describe_unknown(preprocess.get("unknown_tokens"), int(preprocess.get("tokens", 0))),
        f"dead letters {dead}",
        *describe_bad_files(manifest.bad_files),
    ]
    for row in islice(iter_table(table), n_rows):
        lines.append("")
        lines += [f"  {name:<12} {_shorten(value)}" for name, value in row.items()]
    return "\n".join(lines)


def format_bytes(n: int) -> str:
    """Such as 512 bytes, 20.8 kB, 1.7 MB, 12.0 GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n} bytes"


def _by_count(manifest: Manifest) -> list[tuple[str, int]]:
    return sorted(manifest.dead_letters.items(), key=lambda item: -item[1])


def _shorten(value: Any) -> str:
    if isinstance(value, np.ndarray):
        shape = " x ".join(map(str, value.shape))
        return f"[{', '.join(f'{number:.4f}' for number in value.flat[:4])}, ...] ({shape})"
    return shorten_line(value) if isinstance(value, str) else repr(value)


def shorten_line(text: str, width: int = 90) -> str:
    """A text as one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
