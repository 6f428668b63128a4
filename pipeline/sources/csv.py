"""CSV and TSV: a header row or the settings name the fields, quoted cells may hold line breaks."""

from __future__ import annotations

import _csv
import csv
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Optional

from pipeline.read_config import ReadConfig
from pipeline.settings import parse_character
from pipeline.sources.compression import DamagedFile, WrongColumns
from pipeline.sources.lines import Line, read_lines
from pipeline.sources.source import (
    PREVIEW_BYTES,
    FileRange,
    InputFile,
    Record,
    Source,
    describe_too_large,
    explain_missing,
    explain_repeated,
    needed_fields,
)
from pipeline.sources.text import explain_bytes, show_bytes

# A stray quote has opened a cell that holds so many lines which all look like rows. Lists and verses do not: their
# lines vary, or end with the delimiter.
SUSPICIOUS_LINES = 8


class Dialect(NamedTuple):
    """The characters between and around cells; `quote` is empty if quotes are text."""

    delimiter: str
    quote: str

    def choose(self, config: ReadConfig) -> Dialect:
        """The dialect that the settings ask for, and this one where they ask for nothing."""
        delimiter = parse_character("delimiter", config.delimiter) if config.delimiter else self.delimiter
        if config.quote == "none":
            return Dialect(delimiter, "")
        return Dialect(delimiter, parse_character("quote", config.quote) if config.quote else self.quote)


class Row(NamedTuple):
    """One row: its cells and lines, or what is wrong."""

    cells: list[str]
    lines: list[Line]
    reason: str = ""
    message: str = ""

    @property
    def text(self) -> str:
        return show_bytes(b"\n".join(line.data for line in self.lines)[:PREVIEW_BYTES])


class CsvSource(Source):
    """Delimited files; one file is read by one worker since a quote may span lines."""

    values_are_strings = True
    has_dialect = True

    def __init__(self, delimiter: str, quote: str) -> None:
        self.dialect = Dialect(delimiter, quote)

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        file = file_range.file
        rows = parse_rows(read_lines(file_range, "line", config), self.dialect.choose(config), file, config)
        first = next(rows, None)
        if first is None:
            return
        names, rows = name_columns(first, rows, file, config)
        for number, row in enumerate(rows):
            n_read = row.lines[-1].n_read
            cells = row.cells
            # Spreadsheets end rows with empty cells that no column belongs to.
            while len(cells) > len(names) and not cells[-1]:
                cells.pop()
            if row.reason:
                message = f"row {number}: {row.message}"
                yield Record(number, n_read, reason=row.reason, message=message, text=row.text)
            elif len(cells) != len(names):
                message = f"row {number} has {len(cells)} cells, but there are {len(names)} columns"
                yield Record(number, n_read, reason="malformed_csv", message=message, text=row.text)
            else:
                yield Record(number, n_read, dict(zip(names, cells, strict=True)))


def name_columns(
    first: Row, rest: Iterator[Row], file: InputFile, config: ReadConfig
) -> tuple[list[str], Iterator[Row]]:
    """The names of the columns, and the rows that hold values.

    Args:
      first: the first row.
      rest: the rows after it.
      file: for messages.
      config: `header` and `columns`.

    Raises:
      DamagedFile: if the row that tells the columns cannot be parsed.
      WrongColumns: if a needed column is missing or is there twice.
    """
    has_header = config.header == "first" or (config.header == "auto" and not config.columns)
    if first.reason and (has_header or not config.columns):
        raise DamagedFile(f"{file.path}: the first row, which tells the columns, cannot be read: {first.message}")
    names = list(config.columns)
    if names and not has_header and first.cells == names:
        raise WrongColumns(
            f"{file.path}: the first row holds the names of --columns; leave the flag out, or add --header=first"
        )
    if not names:
        names = first.cells if has_header else [str(i + 1) for i in range(len(first.cells))]
    if problem := explain_repeated(names, needed_fields(config)):
        raise WrongColumns(f"{file.path}: {problem}")
    if problem := explain_missing(names, config):
        raise WrongColumns(f"{file.path}: {problem}{_suggest_dialect(names, has_header)}")
    return names, rest if has_header else chain([first], rest)


def _suggest_dialect(names: Sequence[str], has_header: bool) -> str:
    """What else may be wrong where a column is missing: the delimiter, or that there is no header row."""
    delimiter = next((one for one in ";\t|," if one in names[0]), "") if len(names) == 1 else ""
    if delimiter:
        return f"; its only column holds {delimiter!r}, see --delimiter"
    return "; for a file without a header row add --columns=NAMES or --header=none" if has_header else ""


def parse_rows(lines: Iterator[Line], dialect: Dialect, file: InputFile, config: ReadConfig) -> Iterator[Row]:
    """Yields the rows that lines hold, blank lines left out.

    A row that cannot be parsed is bad, and parsing goes on at the line after its first: so a quote that is never closed
    costs one row, not the rest of the file. No row takes more than `max_document_bytes`.
    """
    # The module's own limit of 128 KiB a cell is global to the process, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), config.max_document_bytes))
    delimiter, quote = dialect.delimiter, dialect.quote.encode()
    parser_dialect = csv.reader((), delimiter=delimiter, quotechar=dialect.quote or None, strict=True).dialect
    feed = _Feed(lines)
    n_columns = 0
    while (line := feed.take()) is not None:
        if line.too_large:
            yield Row([], [line], "too_large", describe_too_large(line.size, config))
            continue
        if not line.data:
            continue
        try:
            if not quote or quote not in line.data:
                row = Row(line.data.decode().split(delimiter), [line])
            else:
                row = _parse_quoted(line, feed, parser_dialect, n_columns, file, config)
        except UnicodeDecodeError as error:
            row = Row([], [line], "invalid_utf8", explain_bytes(error, file))
        n_columns = n_columns or len(row.cells)
        yield row


class _Feed:
    """Lines that can be put back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._returned: deque[Line] = deque()

    def take(self) -> Optional[Line]:
        return self._returned.popleft() if self._returned else next(self._lines, None)

    def put_back(self, lines: Sequence[Line]) -> None:
        self._returned.extendleft(reversed(lines))


def _parse_quoted(
    first: Line, feed: _Feed, dialect: _csv.Dialect, n_columns: int, file: InputFile, config: ReadConfig
) -> Row:
    """The row that begins with a line with quotes."""
    if first.data.count((dialect.quotechar or "").encode()) % 2 == 0:  # it most likely ends with this line
        try:
            return Row(next(csv.reader((first.data.decode(),), dialect)), [first])
        except csv.Error:
            pass
    taken, errors = [first], list[UnicodeDecodeError]()
    lines = _decode_lines(taken, errors, feed, config)
    try:
        cells = next(csv.reader(lines, dialect))
        if config.max_quoted_lines and _look_like_rows(taken[1:-1], dialect.delimiter.encode(), n_columns):
            raise csv.Error(
                f"a quoted cell holds {len(taken) - 2} lines that look like rows, as if its quote were a stray one; "
                "see --quote=none and --max_quoted_lines=0"
            )
    except csv.Error as error:
        feed.put_back(taken[1:])
        return Row([], [first], "malformed_csv", str(error))
    if errors:
        return Row([], taken, "invalid_utf8", explain_bytes(errors[0], file))
    return Row(cells, taken)


def _decode_lines(
    taken: list[Line], errors: list[UnicodeDecodeError], feed: _Feed, config: ReadConfig
) -> Iterator[str]:
    """Passes the lines of one row to the parser, and notes what was taken and could not be decoded."""
    size = 0
    line: Optional[Line] = taken[0]
    while line is not None:
        size += line.size
        if size > config.max_document_bytes:
            raise csv.Error(f"a quote is not closed within --max_document_bytes={config.max_document_bytes}")
        if 0 < config.max_quoted_lines < len(taken):
            raise csv.Error(f"a quote is not closed within --max_quoted_lines={config.max_quoted_lines}")
        try:
            yield line.data.decode() + "\n"
        except UnicodeDecodeError as error:
            errors.append(error)
            yield line.data.decode("utf-8", "backslashreplace") + "\n"
        line = feed.take()
        if line is not None:
            taken.append(line)


def _look_like_rows(lines: Sequence[Line], delimiter: bytes, n_columns: int) -> bool:
    """Whether every line has as many cells as there are columns, none of them empty.

    In prose and lists a blank follows the delimiter; rows hardly ever have it there.
    """
    if n_columns < 2 or len(lines) < SUSPICIOUS_LINES:
        return False
    return all(
        line.data.count(delimiter) == n_columns - 1
        and delimiter + b" " not in line.data
        and all(cell.strip() for cell in line.data.split(delimiter))
        for line in lines
    )
