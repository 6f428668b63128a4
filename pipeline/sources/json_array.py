"""JSON files that hold one array: every element is a record. At most one element is held in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.read_config import ReadConfig
from pipeline.sources.compression import ByteReader, DamagedFile, TruncatedFile
from pipeline.sources.encoding import open_text
from pipeline.sources.jsonl import check_object, parse_int
from pipeline.sources.source import PREVIEW_BYTES, FileRange, Record, Source, describe_too_large
from pipeline.sources.text import explain_bytes, show_bytes

_READ_BYTES = 1 << 18
_BLANKS = re.compile(r"[ \t\r\n]*")
_IN_STRING, _OUTSIDE = re.compile(r'["\\]'), re.compile(r'["\[\]{},]')
_LONGEST_WORD = len("-Infinity")  # an error so near the end may be a word, number or escape that goes on behind it
_DECODER, _DECODER_OF_HUGE_INTS = json.JSONDecoder(), json.JSONDecoder(parse_int=parse_int)


class Element(NamedTuple):
    """One element: its value and its text, or what is wrong and the beginning of its text.

    Attributes:
      text: with bytes that are not UTF-8 as lone surrogates.
      value: what it holds.
      size: how many characters it has.
      error: why it cannot be parsed.
      is_too_large: whether it is over the limit.
    """

    text: str
    value: Any = None
    size: int = 0
    error: str = ""
    is_too_large: bool = False


class JsonArraySource(Source):
    """Files that hold one JSON array of objects; a file is read by one worker."""

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        file, limit = file_range.file, config.max_document_bytes
        with open_text(file, config) as stream:
            for number, element in enumerate(iterate_elements(stream, limit, file.path)):
                data = element.text.encode("utf-8", "surrogateescape")
                reason, message = "", element.error
                values: dict[str, Any] = {}
                try:
                    if element.is_too_large or len(data) > limit:
                        reason, message = "too_large", describe_too_large(max(element.size, len(data)), config)
                    elif message:
                        reason = "malformed_json"
                    else:
                        data.decode()
                        values = check_object(element.value)
                except UnicodeDecodeError as error:
                    reason, message = "invalid_utf8", explain_bytes(error, file)
                except ValueError as error:
                    reason, message = "malformed_json", str(error)
                if reason:
                    text = show_bytes(data[:PREVIEW_BYTES])
                    yield Record(number, stream.position, reason=reason, message=message, text=text)
                else:
                    yield Record(number, stream.position, values)


def iterate_elements(stream: ByteReader, limit: int, path: str) -> Iterator[Element]:
    """Yields the elements of the array that a stream holds; one that cannot be parsed does not end the reading.

    Args:
      stream: UTF-8.
      limit: characters that an element may have.
      path: for messages.

    Raises:
      DamagedFile: if it is not one array: another value, elements without a comma between them, more text behind it.
      TruncatedFile: if it ends within the array.
    """
    buffer = _Buffer(stream)
    if buffer.peek() != "[":
        raise DamagedFile(f"{path} does not begin with [; for one object a line add --input_format=jsonl")
    buffer.start += 1
    number = 0
    separator = "]" if buffer.peek() == "]" else ","
    while separator == ",":
        element = _take_element(buffer, limit)
        yield element
        separator = buffer.peek()
        if not separator:
            raise TruncatedFile(f"{path} is cut off: its array is not closed behind element {number}")
        if separator not in ",]":
            raise DamagedFile(f"{path} is damaged: there is no comma behind element {number} of its array")
        buffer.start += separator == ","
        number += 1
    buffer.start += 1
    if buffer.peek():
        raise DamagedFile(f"{path} is damaged: there is more behind its array")


class _Buffer:
    """The part of a stream that has been read and not been used: `text` from `start` on."""

    def __init__(self, stream: ByteReader) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.start, self.at_end = "", 0, False
        self.fill()
        self.text = self.text.removeprefix("\ufeff")

    def fill(self) -> bool:
        """Reads as much as is there already, so that a large element is copied a few times only; False at the end."""
        self.text, self.start = self.text[self.start :], 0
        data = self._stream.read(max(_READ_BYTES, len(self.text)))
        self.at_end = not data
        self.text += self._decode(data, self.at_end)
        return not self.at_end

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            match = _BLANKS.match(self.text, self.start)
            assert match is not None
            self.start = match.end()
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.fill():
                return ""


def _take_element(buffer: _Buffer, limit: int) -> Element:
    buffer.peek()
    decoder = _DECODER
    while True:
        try:
            value, end = decoder.raw_decode(buffer.text, buffer.start)
            # 1 may go on to 1.5, and is what is decoded of 1. and 1e+ too.
            is_cut = isinstance(value, (int, float)) and end >= len(buffer.text) - len("e+")
            if buffer.at_end or not is_cut:
                text, buffer.start = buffer.text[buffer.start : end], end
                return Element(text, value, len(text))
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated") or error.pos >= len(buffer.text) - _LONGEST_WORD
            if buffer.at_end or not is_cut:
                return _skip_element(buffer)._replace(error=f"not JSON: {error.msg}")
        except RecursionError:
            return _skip_element(buffer)._replace(error="not JSON: nested too deeply")
        except ValueError:  # Python's limit of digits
            decoder = _DECODER_OF_HUGE_INTS
            continue
        if len(buffer.text) - buffer.start > limit:
            return _skip_element(buffer)._replace(is_too_large=True)
        buffer.fill()


def _skip_element(buffer: _Buffer) -> Element:
    """Goes to the comma or bracket behind an element, by its strings and brackets alone."""
    begin = buffer.text[buffer.start : buffer.start + PREVIEW_BYTES]
    size = depth = 0
    in_string = False
    while True:
        match = (_IN_STRING if in_string else _OUTSIDE).search(buffer.text, buffer.start)
        if match is None or (match[0] == "\\" and match.end() == len(buffer.text)):
            stop = len(buffer.text) if match is None else match.start()
            size += stop - buffer.start
            buffer.start = stop
            if not buffer.fill():
                return Element(begin[:size], size=size)
            continue
        character = match[0]
        if not in_string and depth == 0 and character in ",]}":
            size += match.start() - buffer.start
            buffer.start = match.start()
            return Element(begin[:size], size=size)
        stop = match.end() + (character == "\\")
        size += stop - buffer.start
        buffer.start = stop
        if character == '"':
            in_string = not in_string
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
