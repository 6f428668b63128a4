"""Records of line files: lines, paragraphs and whole files, never more than one record in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Optional

from pipeline.read_config import ReadConfig
from pipeline.sources.compression import InputStream, TruncatedFile
from pipeline.sources.encoding import open_text
from pipeline.sources.source import PREVIEW_BYTES, TO_THE_END, FileRange

BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 1 << 20
_SLACK_BYTES = len(BOM) + len(b"\r\n")  # in addition to the largest record


class Line(NamedTuple):
    """One line, paragraph or file.

    Attributes:
      position: offset of its first byte, or its number from 0 in a file that is compressed or translated.
      data: its bytes without line end and byte-order mark; only the first 1000 if it is too large.
      size: how many bytes it has.
      too_large: whether that is over the limit.
      n_read: stored bytes of the range that were read when it was complete.
    """

    position: int
    data: bytes
    size: int
    too_large: bool = False
    n_read: int = 0


def iterate_lines(stream: BinaryIO, start: int, end: Optional[int], limit: int) -> Iterator[Line]:
    """Yields the lines whose first byte is in `[start, end)`, in time linear in what is read.

    Args:
      stream: buffered; at `start - 1`, or at 0 for the first range.
      start: first byte of the range.
      end: the byte after its last, or None for the end of the stream.
      limit: bytes that a line may have; larger ones are yielded as markers.

    Raises:
      TruncatedFile: if the stream ends before `end`.
    """
    # The byte before the range tells whether a line begins at its start; if not, the line belongs to the range before.
    offset = start - 1 + _skip_line(stream) if start else 0
    while end is None or offset < end:
        raw = stream.readline(limit + _SLACK_BYTES)
        if not raw:
            if end is not None:
                raise TruncatedFile(f"the file ends at byte {offset}, but had {end} when the run was planned")
            return
        size = len(raw)
        if size == limit + _SLACK_BYTES and not raw.endswith(b"\n"):
            size += _skip_line(stream)
        data = _strip_line(raw, offset)
        if len(data) > limit:
            yield Line(offset, data[:PREVIEW_BYTES], size, True, offset - start + size)
        else:
            yield Line(offset, data, len(data), False, offset - start + len(data))
        offset += size


def join_paragraphs(lines: Iterator[Line], limit: int) -> Iterator[Line]:
    """Joins lines to paragraphs, which blank lines separate; a paragraph has the position of its first line."""
    parts: list[bytes] = []
    first: Optional[Line] = None
    size = n_read = 0
    for line in lines:
        if not line.too_large and not line.data.strip():
            if first is not None:
                yield _join_paragraph(first, parts, size, limit, n_read)
            parts, first, size = [], None, 0
            continue
        if first is None:
            first = line
        else:
            size += 1
        if size <= limit:
            parts.append(line.data)
        size += line.size
        n_read = line.n_read
    if first is not None:
        yield _join_paragraph(first, parts, size, limit, n_read)


def read_whole(stream: BinaryIO, limit: int) -> Line:
    """Reads a whole stream as one record."""
    data = stream.read(limit + len(BOM) + 1)
    bom = len(BOM) if data.startswith(BOM) else 0
    size = len(data) - bom
    while skipped := len(stream.read(_SKIP_BYTES)):
        size += skipped
    data = data[bom:]
    return Line(0, data[:PREVIEW_BYTES], size, True) if size > limit else Line(0, data, size)


def read_lines(file_range: FileRange, mode: str, config: ReadConfig) -> Iterator[Line]:
    """Yields the records of a range of a line file.

    Args:
      file_range: bytes of a file that is stored as it is read, or a whole file.
      mode: `line`, `paragraph` or `file`.
      config: for the limit of bytes that a record may have.

    Raises:
      FileError: after the last complete record, if the file cannot be read to its end.
    """
    file, start, limit = file_range.file, file_range.start, config.max_document_bytes
    end = file_range.end if file.is_stored_text and file_range.end != TO_THE_END else None
    with open_text(file, config, max(start - 1, 0)) as stream:
        if mode == "file":
            yield read_whole(stream, limit)._replace(n_read=file_range.n_bytes)
            return
        lines = iterate_lines(stream, start, end, limit)
        if mode == "paragraph":
            lines = join_paragraphs(lines, limit)
        yield from lines if file.is_stored_text else _number_lines(lines, stream)


def _number_lines(lines: Iterator[Line], stream: InputStream) -> Iterator[Line]:
    for number, line in enumerate(lines):
        yield Line(number, line.data, line.size, line.too_large, stream.position)


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while piece := stream.readline(_SKIP_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _strip_line(raw: bytes, offset: int) -> bytes:
    if raw.endswith(b"\r\n"):
        raw = raw[:-2]
    elif raw.endswith(b"\n"):
        raw = raw[:-1]
    return raw[len(BOM) :] if not offset and raw.startswith(BOM) else raw


def _join_paragraph(first: Line, parts: list[bytes], size: int, limit: int, n_read: int) -> Line:
    data = b"\n".join(parts)
    too_large = size > limit
    return Line(first.position, data[:PREVIEW_BYTES] if too_large else data, size, too_large, n_read)
