"""What input files hold: their names tell the format, and their first bytes what names do not tell or tell wrongly."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Union

from pipeline.config import ReadConfig
from pipeline.errors import ConfigError, InputError
from pipeline.sources import SOURCES
from pipeline.sources.bigquery_client import SCHEME
from pipeline.sources.compression import FileError
from pipeline.sources.encoding import find_encoding, has_cr_line_ends, is_text
from pipeline.sources.heads import HEAD_BYTES, THREADS, read_head
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
    if not kind:
        raise InputError(
            f"{path}: the extension {extension or '(none)'} is not a known format ({', '.join(FORMATS)}, also under "
            f"{', '.join(COMPRESSIONS)}); say what it is, as in --input_format=text, or narrow --input"
        )
    if compression and not SOURCES[kind].reads_compressed:
        raise InputError(f"{path}: {kind} files are not read compressed as a whole; unpack it, or set --input_format")
    return kind, compression


def inspect_files(
    files: Iterable[InputFile], heads: Mapping[str, Union[bytes, FileError]], config: ReadConfig
) -> list[InputFile]:
    """Corrects by the first bytes of files what their names say; a file that cannot be read stays as it is.

    Args:
      files: with format and compression by their names.
      heads: path to what `read_heads` gives, for files.
      config: the encoding of text, and the dialect of CSV.

    Raises:
      ConfigError: if a dialect is given, and no file is CSV or TSV.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(lambda file: inspect_file(file, heads.get(file.path, b""), config), files))
    check_dialect(found, config)
    return found


def inspect_file(file: InputFile, head: Union[bytes, FileError], config: ReadConfig) -> InputFile:
    """Finds a file's compression and encoding, the kind of its line ends, and whether JSON is an array.

    Args:
      file: as its name says.
      head: its first bytes as they are stored.
      config: the encoding of text.

    Raises:
      ConfigError: if the setting of the encoding cannot be true.
    """
    source = SOURCES[file.format]
    if not source.reads_compressed or isinstance(head, FileError):
        return file
    compression = source.find_compression(head)
    # Without the magic bytes that its name promises a file is read as it is if it can be, else it is damaged.
    if compression or may_begin_with(head, source, config):
        file = file._replace(compression=compression)
    if file.compression:
        try:
            head = read_head(file.path, file.compression, config.max_window)
        except FileError:  # reading reports it
            return file
    if not source.is_text:
        return file
    encoding = find_encoding(head, config.encoding)
    if encoding.startswith(("utf-16", "utf-32")) and is_text(head, "") and len(head.split()) > 1:
        raise ConfigError(
            f"--encoding={config.encoding}: {file.path} is UTF-8; leave the flag out, since UTF-16 and UTF-32 are "
            "recognised without it"
        )
    text = head.decode(encoding or "utf-8", "replace")
    if file.format == "json" and not text.lstrip("\ufeff \t\r\n").startswith("["):
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
