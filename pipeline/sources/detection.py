"""What input files hold: their names tell the format, and their first bytes what names do not tell or tell wrongly."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Union

from pipeline.errors import ConfigError, InputError
from pipeline.read_config import ReadConfig
from pipeline.records import SkippedFile
from pipeline.sources import SOURCES
from pipeline.sources.bigquery_client import SCHEME
from pipeline.sources.compression import FileError
from pipeline.sources.encoding import find_encoding, has_cr_line_ends, is_text
from pipeline.sources.globs import FoundFile
from pipeline.sources.heads import HEAD_BYTES, THREADS, read_head
from pipeline.sources.names import parse_partition, show_name
from pipeline.sources.source import InputFile, Source

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",  # an array, or lines: its first character tells
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".warc": "warc",
    ".wet": "warc",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
SHOWN_FILES = 4  # of those with the same error
_SHARD = re.compile(r"-\d+-of-\d+")  # TensorFlow's and Beam's names may have it behind the extension


def detect_format(path: str, input_format: str = "auto") -> tuple[str, str]:
    """Format and compression of a file, from its name.

    Args:
      path: such as `a.jsonl.gz` or `train.tfrecord-00000-of-00010`.
      input_format: a key of `SOURCES`, or auto to go by the extension.

    Raises:
      InputError: if the extension is unknown, or files of the format cannot be compressed as a whole.
    """
    if path.startswith(SCHEME):
        return "bigquery", ""
    stem, extension = os.path.splitext(_SHARD.sub("", path.rpartition("/")[2]).lower())
    compression = COMPRESSIONS.get(extension, "")
    if compression:
        extension = os.path.splitext(stem)[1]
    kind = FORMATS.get(extension, "") if input_format == "auto" else input_format
    shown = show_name(path)
    if not kind:
        raise InputError(
            f"{shown}: the extension {extension or '(none)'} is not a known format ({', '.join(FORMATS)}, also under "
            f"{', '.join(COMPRESSIONS)}); say what it is, as in --input_format=text, or leave it out, as in "
            f"--exclude='*{extension or shown.rpartition('/')[2]}'"
        )
    if compression and not SOURCES[kind].reads_compressed:
        raise InputError(f"{shown}: {kind} files are not read compressed as a whole; unpack it, or set --input_format")
    return kind, compression


def detect_formats(found: Iterable[FoundFile], config: ReadConfig) -> list[InputFile]:
    """The files with their formats.

    Raises:
      InputError: if formats are unknown.
    """
    files: list[InputFile] = []
    refused: list[tuple[str, InputError]] = []
    for file in found:
        try:
            kind, compression = detect_format(file.path, config.input_format)
        except InputError as error:
            refused.append((file.path, error))
            continue
        folders, place = parse_partition(file.path), (len(files), file.path, file.name, file.size)
        files.append(InputFile(*place, kind, compression, partition=folders, source=file.source))
    if refused:
        names = ", ".join(show_name(path) for path, _ in refused[1:SHOWN_FILES])
        names += ", ..." if len(refused) > SHOWN_FILES else ""
        others = f"; {len(refused) - 1:,} other files are refused too: {names}" if names else ""
        raise InputError(f"{refused[0][1]}{others}")
    return files


def inspect_files(files: Sequence[InputFile], config: ReadConfig) -> tuple[list[InputFile], list[SkippedFile]]:
    """Corrects by the first bytes of files what their names say.

    Args:
      files: with format and compression by their names.
      config: the encoding of text, and the dialect of CSV.

    Returns:
      The files, and those that cannot be opened.

    Raises:
      ConfigError: if a dialect is given, and no file is CSV or TSV.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        inspected = list(threads.map(partial(_try_inspection, config=config), files))
    bad = [one for one in inspected if isinstance(one, SkippedFile)]
    good = [one for one in inspected if isinstance(one, InputFile)]
    check_dialect(good, config)
    return [file._replace(index=index) for index, file in enumerate(good)], bad


def _try_inspection(file: InputFile, config: ReadConfig) -> Union[InputFile, SkippedFile]:
    try:
        return inspect_file(file, config)
    except FileError as error:
        return SkippedFile.of(file.source, error)


def inspect_file(file: InputFile, config: ReadConfig) -> InputFile:
    """Finds a file's compression and encoding, the kind of its line ends, and whether JSON is an array.

    Raises:
      FileError: if it cannot be opened.
      ConfigError: if the setting of the encoding cannot be true.
    """
    if file.format == "bigquery":
        return file
    source, head = SOURCES[file.format], read_head(file.path)
    if not source.reads_compressed:
        return file
    compression = source.find_compression(head)
    # Without the magic bytes that its name promises a file is read as it is if it can be, else it is damaged.
    if compression or may_begin_with(head, source, config):
        file = file._replace(compression=compression)
    if file.compression:
        try:
            head = read_head(file.path, file.compression, config.max_window)
        except FileError:  # reading gives what comes before the damage, and reports it
            return file
    if not source.is_text:
        return file
    encoding = find_encoding(head, config.encoding)
    if encoding.startswith(("utf-16", "utf-32")) and is_text(head, "") and len(head.split()) > 1:
        raise ConfigError(
            f"--encoding={config.encoding}: {show_name(file.path)} is UTF-8; leave the flag out, since UTF-16 and "
            "UTF-32 are recognised without it"
        )
    text = head.decode(encoding or "utf-8", "replace")
    first = text.lstrip("\ufeff \t\r\n")[:1]
    if file.format == "json" and first != "[" and (first or len(head) < HEAD_BYTES):
        file = file._replace(format="jsonl")
    return file._replace(encoding=encoding, cr_line_ends=has_cr_line_ends(text, is_whole=len(head) < HEAD_BYTES))


def may_begin_with(head: bytes, source: Source, config: ReadConfig) -> bool:
    """Whether an uncompressed file of a format may begin with these bytes."""
    return is_text(head, find_encoding(head, config.encoding)) if source.is_text else source.may_begin_with(head)


def check_dialect(files: Iterable[InputFile], config: ReadConfig) -> None:
    """Raises ConfigError if a setting for CSV and TSV is given, and no file is of that kind."""
    names = [name for name in ("delimiter", "quote", "columns") if getattr(config, name)]
    names += ["header"] if config.header != "auto" else []
    formats = sorted({file.format for file in files})
    if names and formats and not any(SOURCES[name].has_dialect for name in formats):
        raise ConfigError(
            f"--{names[0]} is for CSV and TSV files, and the input is {', '.join(formats)}; leave it out, or add "
            "--input_format=csv"
        )
