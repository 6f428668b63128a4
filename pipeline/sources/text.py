"""Plain text: a line, a paragraph or a whole file is one document."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import ReadConfig
from pipeline.sources.lines import Line, read_lines
from pipeline.sources.source import (
    FileRange,
    InputFile,
    Record,
    Source,
    describe_too_large,
    preview_bytes,
    split_by_bytes,
)


class TextSource(Source):
    """Text files; the text of a record is under the name of the configured text field."""

    has_fields = False
    has_byte_positions = True

    def split_file(self, file: InputFile, config: ReadConfig) -> list[FileRange]:
        if file.compression or config.text_mode != "line":
            return [FileRange.whole(file)]
        return split_by_bytes(file, config.split_bytes)

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        name = config.text_field[0]
        for line in read_lines(file_range, config.text_mode, config.max_document_bytes):
            if line.too_large:
                yield reject_large(line, config)
                continue
            try:
                yield Record(line.position, line.n_read, {name: line.data.decode()})
            except UnicodeDecodeError as error:
                yield reject_bytes(line, error)


def reject_large(line: Line, config: ReadConfig) -> Record:
    """The record of a line that is over the limit."""
    message = describe_too_large(line.size, config)
    return Record(line.position, line.n_read, reason="too_large", message=message, text=preview_bytes(line.data))


def reject_bytes(line: Line, error: UnicodeDecodeError) -> Record:
    """The record of a line that is not UTF-8."""
    message = f"byte {error.start} of the record is not valid UTF-8: {error.reason}; convert the file to UTF-8"
    text = line.data.decode("utf-8", "backslashreplace")
    return Record(line.position, line.n_read, reason="invalid_utf8", message=message, text=text)
