"""CSV and TSV: the header row names the fields, quoted fields may hold line breaks."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.config import ReadConfig
from pipeline.sources.compression import DamagedFile
from pipeline.sources.lines import Line, read_lines
from pipeline.sources.source import FileRange, Record, Source, describe_too_large, explain_missing, preview_bytes


class Row(NamedTuple):
    """One row: its cells and lines, or an error message."""

    cells: list[str]
    lines: list[Line]
    reason: str = ""
    message: str = ""

    @property
    def text(self) -> str:
        return preview_bytes(b"\n".join(line.data for line in self.lines))


class CsvSource(Source):
    """Delimited files; one file is read by one worker since a quote may span lines."""

    values_are_strings = True

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        lines = read_lines(file_range, "line", config.max_document_bytes)
        rows = parse_rows(lines, self.delimiter, config)
        header = next(rows, None)
        if header is None:
            return
        if header.reason:
            raise DamagedFile(f"{file_range.file.path} has no header row: {header.message}")
        names = header.cells
        if missing := explain_missing(names, config):
            yield Record(0, file_range.n_bytes, reason="missing_field", message=missing)
            return
        for number, row in enumerate(rows):
            n_read = row.lines[-1].n_read
            if row.reason:
                message = f"row {number}: {row.message}"
                yield Record(number, n_read, reason=row.reason, message=message, text=row.text)
            elif len(row.cells) != len(names):
                message = f"row {number} has {len(row.cells)} columns, the header {len(names)}"
                yield Record(number, n_read, reason="malformed_csv", message=message, text=row.text)
            else:
                yield Record(number, n_read, dict(zip(names, row.cells, strict=True)))


def parse_rows(lines: Iterator[Line], delimiter: str, config: ReadConfig) -> Iterator[Row]:
    """Yields the rows that lines hold, blank lines left out.

    A row that cannot be parsed is bad, and parsing goes on at the line after its first: so a quote that is never closed
    costs one row, not the rest of the file. No row takes more than `max_document_bytes`.
    """
    # The module's own limit of 128 KiB a field is global to the process, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), config.max_document_bytes))
    feed = _Feed(lines, config)
    parser = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.taken.clear()
        try:
            cells = next(parser)
        except StopIteration:
            return
        except _TooLarge as error:
            yield Row([], list(feed.taken), "too_large", str(error))
            continue
        except csv.Error as error:
            first = feed.taken[0]
            feed.return_lines()
            yield Row([], [first], "malformed_csv", str(error))
            parser = csv.reader(feed, delimiter=delimiter, strict=True)
            continue
        if feed.has_bad_bytes():
            yield Row([], list(feed.taken), "invalid_utf8", "not valid UTF-8; convert the file to UTF-8")
        elif cells:
            yield Row(cells, list(feed.taken))


class _TooLarge(Exception):
    """A single line over the limit."""


class _Feed:
    """Passes lines to the parser and keeps those of the current row."""

    def __init__(self, lines: Iterator[Line], config: ReadConfig) -> None:
        self.taken: list[Line] = []
        self._returned: deque[Line] = deque()
        self._lines = lines
        self._config = config
        self._size = 0
        self._bad = False

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._lines)
        if not self.taken:
            self._size, self._bad = 0, False
        self.taken.append(line)
        if line.too_large and len(self.taken) == 1:
            raise _TooLarge(describe_too_large(line.size, self._config))
        self._size += line.size
        if self._size > self._config.max_document_bytes:
            raise csv.Error(f"a quote is not closed within --max_document_bytes={self._config.max_document_bytes}")
        try:
            return line.data.decode() + "\n"
        except UnicodeDecodeError:
            self._bad = True
            return line.data.decode("utf-8", "backslashreplace") + "\n"

    def has_bad_bytes(self) -> bool:
        return self._bad

    def return_lines(self) -> None:
        """Puts back all lines of the row except its first."""
        self._returned.extendleft(reversed(self.taken[1:]))
