"""Plain text: a line, a paragraph or a whole file is one document."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.read_config import ReadConfig
from pipeline.sources.encoding import BAD_BYTES
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

_BAD_BYTES = BAD_BYTES.encode("utf-8", "surrogatepass")


class TextSource(Source):
    """Text files; the text of a record is under the name of the configured text field."""

    has_fields = False
    has_byte_positions = True

    def split_file(self, file: InputFile, config: ReadConfig) -> list[FileRange]:
        if not file.is_stored_text or config.text_mode != "line":
            return [FileRange.whole(file)]
        return split_by_bytes(file, config.split_bytes)

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        name = config.text_field[0]
        for line in read_lines(file_range, config.text_mode, config):
            if line.too_large:
                yield reject_large(line, config)
                continue
            try:
                yield Record(line.position, line.n_read, {name: line.data.decode()})
            except UnicodeDecodeError as error:
                yield reject_bytes(line, error, file_range.file)


def reject_large(line: Line, config: ReadConfig) -> Record:
    """The record of a line that is over the limit."""
    message = describe_too_large(line.size, config)
    return Record(line.position, line.n_read, reason="too_large", message=message, text=preview_bytes(line.data))


def reject_bytes(line: Line, error: UnicodeDecodeError, file: InputFile) -> Record:
    """The record of a line with bytes that are not in the encoding of its file."""
    return Record(
        line.position,
        line.n_read,
        reason="invalid_utf8",
        message=explain_bytes(error, file),
        text=show_bytes(line.data),
    )


def explain_bytes(error: UnicodeDecodeError, file: InputFile) -> str:
    """What is wrong with a record that cannot be decoded, and the fix."""
    if file.encoding:
        return f"the record has bytes that are not {file.encoding}; give the encoding of the file by --encoding"
    return (
        f"byte {error.start} of the record is not valid UTF-8: {error.reason}; give the encoding of the file, as in "
        "--encoding=cp1252"
    )


def show_bytes(data: bytes) -> str:
    """A record that cannot be decoded, as text."""
    return data.replace(_BAD_BYTES, "\ufffd".encode()).decode("utf-8", "backslashreplace")
