"""JSON lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Union

from pipeline.read_config import ReadConfig
from pipeline.sources.kept import name_kind
from pipeline.sources.lines import read_lines
from pipeline.sources.source import FileRange, InputFile, Record, Source, split_by_bytes
from pipeline.sources.text import reject_bytes, reject_large

_MAX_DIGITS = 4000  # Python refuses to parse whole numbers of more than 4300 digits


class JsonlSource(Source):
    """JSON lines files; blank lines are ignored, but count as lines."""

    has_byte_positions = True

    def split_file(self, file: InputFile, config: ReadConfig) -> list[FileRange]:
        return split_by_bytes(file, config.split_bytes) if file.is_stored_text else [FileRange.whole(file)]

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        for line in read_lines(file_range, "line", config):
            if line.too_large:
                yield reject_large(line, config)
                continue
            if not line.data.strip():
                continue
            text = ""
            try:
                text = line.data.decode()
                yield Record(line.position, line.n_read, parse_object(text))
            except UnicodeDecodeError as error:
                yield reject_bytes(line, error, file_range.file)
            except ValueError as error:
                yield Record(line.position, line.n_read, reason="malformed_json", message=str(error), text=text)


def parse_object(text: str) -> dict[str, Any]:
    """Parses one JSON object; NaN and infinities are let through, whole numbers beyond 4000 digits stay strings.

    Raises:
      ValueError: if it is not JSON, not an object, or nested too deeply to parse.
    """
    try:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
        except ValueError:
            value = json.loads(text, parse_int=parse_int)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    return check_object(value)


def check_object(value: Any) -> dict[str, Any]:
    """A JSON value if it is an object.

    Raises:
      ValueError: if it is not.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name_kind(value)}, not an object; write every document as an object")
    return value


def parse_int(digits: str) -> Union[int, str]:
    """A whole number, as a string if it is too long for Python."""
    return int(digits) if len(digits) <= _MAX_DIGITS else digits
