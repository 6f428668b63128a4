"""The interface of a source: files, ranges of them, and the records that every format yields."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Optional, Protocol, Union

from pipeline.read_config import ReadConfig
from pipeline.records import DeadLetter, Document
from pipeline.sources.decoders import find_compression
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
      cr_line_ends: whether its lines end with a carriage return alone.
      source: its name in tables, which can always be stored.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    path: str
    name: str
    size: int
    format: str
    compression: str = ""
    encoding: str = ""
    partition: tuple[tuple[str, str], ...] = ()
    cr_line_ends: bool = False
    source: str = ""

    @property
    def is_stored_text(self) -> bool:
        """Whether its stored bytes are what the formats read: neither compressed nor translated."""
        return not (self.compression or self.encoding or self.cr_line_ends)


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
    reads_compressed: bool = True  # whether the file may be compressed as a whole
    has_dialect: bool = False  # whether --delimiter, --quote, --header and --columns apply
    is_text: bool = True  # whether the file is text in some encoding
    values_are_strings: bool = False  # kept fields are converted from strings
    has_byte_positions: bool = False  # files that are stored as they are read are addressed by byte, not by record
    id_field: str = ""  # that holds the id if the settings name none

    def split_file(self, file: InputFile, config: ReadConfig) -> list[FileRange]:
        """Cuts a file into ranges of about `split_bytes`; together they hold every record once."""
        return [FileRange.whole(file)]

    def find_compression(self, head: bytes) -> str:
        """The compression of a file that begins with these stored bytes, a key of `DECODERS`; empty for none."""
        return find_compression(head)

    def may_begin_with(self, head: bytes) -> bool:
        """Whether a file of this format that is no text may begin with these bytes."""
        return True

    def position_unit(self, file: InputFile) -> str:
        """What positions in a file count: `byte` or `row`."""
        is_row = file.compression or file.encoding or file.cr_line_ends or not self.has_byte_positions
        return "row" if is_row else "byte"

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


def explain_repeated(columns: Sequence[str], needed: Iterable[str]) -> str:
    """Says which of the needed columns a file has more than once; empty if there are none."""
    repeated = [name for name in needed if columns.count(name) > 1]
    if not repeated:
        return ""
    names = " and ".join(map(repr, repeated))
    return f"there are several columns with the name {names}: {', '.join(columns)}; give each a name of its own"


def preview_bytes(data: bytes) -> str:
    """The first bytes of a record as text that can always be stored."""
    return data[:PREVIEW_BYTES].decode("utf-8", "backslashreplace")


def describe_too_large(size: int, config: ReadConfig) -> str:
    return (
        f"the record has {size} bytes, over --max_document_bytes={config.max_document_bytes}; raise it or cut the text"
    )
