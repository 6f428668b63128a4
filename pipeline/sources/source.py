"""The interface of a source: files, ranges of them, and the records that every format yields."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Optional, Protocol, Union

from pipeline.config import ReadConfig
from pipeline.records import DeadLetter, Document
from pipeline.sources.field_paths import name_fields, suggest_field

PREVIEW_BYTES = 1000
TO_THE_END = -1


class InputFile(NamedTuple):
    """One file of the input.

    Attributes:
      index: position in the plan's sorted list of files.
      path: where it is, on any Beam file system.
      name: the beginning of derived ids: the path below the fixed part of its glob.
      size: stored size in bytes, compressed if it is.
      format: a key of `SOURCES`.
      compression: a key of `compression.DECODERS`, or empty.
      encoding: of its text, a name that Python knows; empty for UTF-8.
      partition: fields that the names of its folders give, as pairs of name and value.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    path: str
    name: str
    size: int
    format: str
    compression: str = ""
    encoding: str = ""
    partition: tuple[tuple[str, str], ...] = ()


class FileRange(NamedTuple):
    """The part of a file that is read at once.

    Attributes:
      file: the file.
      start: first byte, or first row group of a Parquet file.
      end: the byte or row group after the last, or `TO_THE_END`.
      n_bytes: how many stored bytes of the file that is, about.
    """

    file: InputFile
    start: int
    end: int
    n_bytes: int

    @classmethod
    def whole(cls, file: InputFile) -> FileRange:
        return cls(file, 0, TO_THE_END, file.size)


class Record(NamedTuple):
    """One record as its format holds it, before it becomes a document; `reason` is set if it cannot.

    Attributes:
      position: byte offset in the file, or number from 0.
      n_read: stored bytes of the range that were read when the record was complete.
      values: field name to value.
      reason: a key of `records.REASONS`, or empty.
      message: what is wrong.
      text: the readable part of a bad record.
    """

    position: int
    n_read: int
    values: Mapping[str, Any] = {}
    reason: str = ""
    message: str = ""
    text: Optional[str] = None


class Source(Protocol):
    """One input format; implementations inherit the defaults."""

    has_fields: bool = True
    reads_compressed: bool = True  # whether the file may be gzip, bzip2 or zstd as a whole
    values_are_strings: bool = False  # kept fields are converted from strings
    has_byte_positions: bool = False  # uncompressed files are addressed by byte offset instead of record number

    def split_file(self, file: InputFile, config: ReadConfig) -> list[FileRange]:
        """Cuts a file into ranges of about `split_bytes`; together they hold every record once."""
        return [FileRange.whole(file)]

    def describe_fields(self, file: InputFile, config: ReadConfig) -> dict[str, str]:
        """The fields that a file says it has, by name or path, with the kind of their values; "" if that varies.

        Raises:
          FileError: if the file cannot be read.
        """
        return {}

    def restore(self, record: Record) -> Union[Document, DeadLetter, None]:
        """The document or dead letter that a record holds already; None for all other formats."""
        return None

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        """Yields the records of a range in order.

        Raises:
          FileError: after the last readable record, if the file is cut off, damaged or cannot be opened.
        """
        ...


def split_by_bytes(file: InputFile, split_bytes: int) -> list[FileRange]:
    """Cuts a file into equal byte ranges of at most `split_bytes`."""
    n = max(1, -(-file.size // split_bytes))
    bounds = [file.size * i // n for i in range(n + 1)]
    return [FileRange(file, start, end, end - start) for start, end in pairwise(bounds)]


def needed_fields(config: ReadConfig) -> list[str]:
    """Names or paths of all fields that a run looks at, each once."""
    names = [config.id_field, *config.text_field, config.pair_field, *(f.source for f in config.kept_fields())]
    return [name for name in dict.fromkeys(names) if name]


def explain_missing(columns: Sequence[str], config: ReadConfig, nested: Collection[str] = ()) -> str:
    """Says which of the id and text columns a file lacks; empty if it has them all.

    Args:
      columns: the names of the file's columns.
      config: the names of the needed ones.
      nested: paths of needed fields that are inside of columns.
    """
    for flag, names in (("id_field", [config.id_field]), ("text_field", config.text_field)):
        for name in names:
            if name and name not in columns and name not in nested:
                fix = suggest_field(flag, name, columns)
                return f"column {name!r} is missing, the file has {name_fields(columns)}; {fix}"
    return ""


def preview_bytes(data: bytes) -> str:
    """The first bytes of a record as text that can always be stored."""
    return data[:PREVIEW_BYTES].decode("utf-8", "backslashreplace")


def describe_too_large(size: int, config: ReadConfig) -> str:
    return (
        f"the record has {size} bytes, over --max_document_bytes={config.max_document_bytes}; raise it or cut the text"
    )
