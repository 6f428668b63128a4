"""WARC files with the text of pages, as Common Crawl's WET files are; warcio parses the headers of records."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.read_config import ReadConfig
from pipeline.sources.compression import DamagedFile, InputStream, TruncatedFile, open_stream, skip_bytes
from pipeline.sources.source import FileRange, Record, Source, describe_too_large
from pipeline.sources.text import explain_bytes, show_bytes

_MAGIC = b"WARC/"
_LINE_BYTES = 1 << 16
_WITHOUT_DOCUMENTS = ("warcinfo", "request", "metadata", "revisit")
_WITH_TEXT = ("conversion", "resource")


class WarcSource(Source):
    """WARC files; the fields of a record are its headers, and `text`.

    Records of plain text are documents: of type `conversion`, as in WET files, or `resource`. Pages as they were
    fetched are dead letters, because vectors of markup and scripts are of no use. Other records hold no documents.
    """

    is_text = False
    values_are_strings = True
    id_field = "WARC-Target-URI"

    def may_begin_with(self, head: bytes) -> bool:
        return head.lstrip(b"\r\n").startswith(_MAGIC)

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        from warcio.exceptions import ArchiveLoadFailed
        from warcio.recordloader import ArcWarcRecordLoader

        file, loader = file_range.file, ArcWarcRecordLoader()
        with open_stream(file.path, file.compression, max_window=config.max_window) as stream:
            number = -1
            while version := _find_record(stream):
                number += 1
                try:
                    headers = loader.parse_record_stream(stream, version, "warc", no_record_parse=True).rec_headers
                except ArchiveLoadFailed as error:
                    raise DamagedFile(f"{file.path} is damaged at record {number}: {str(error)[:200]}") from error
                length = headers.get_header("Content-Length", "")
                if not length.isdecimal():
                    raise DamagedFile(f"{file.path} is damaged: record {number} has no Content-Length")
                kind, size = headers.get_header("WARC-Type", ""), int(length)
                reason, message = find_problem(kind, headers.get_header("Content-Type", ""), size, config)
                is_read = not reason and kind not in _WITHOUT_DOCUMENTS
                data = stream.read(size) if is_read else b""
                if (len(data) if is_read else skip_bytes(stream, size)) < size:
                    raise TruncatedFile(f"{file.path} is cut off within record {number}")
                if stream.peek(1)[:1] not in (b"\r", b"\n", b""):
                    raise DamagedFile(f"{file.path} is damaged: record {number} does not end where its header says")
                if reason:
                    yield Record(number, stream.position, reason=reason, message=message)
                elif is_read:
                    try:
                        values = {**dict(headers.headers), "text": data.decode()}
                        yield Record(number, stream.position, values)
                    except UnicodeDecodeError as error:
                        message, text = explain_bytes(error, file), show_bytes(data)
                        yield Record(number, stream.position, reason="invalid_utf8", message=message, text=text)


def find_problem(kind: str, content_type: str, size: int, config: ReadConfig) -> tuple[str, str]:
    """Why a record with a document cannot be read.

    Args:
      kind: the type of the record.
      content_type: of its content.
      size: of its content in bytes.
      config: for the limit of bytes.

    Returns:
      A key of `records.REASONS` and a message; both empty if it can, or holds no document.
    """
    if kind in _WITHOUT_DOCUMENTS:
        return "", ""
    media_type = content_type.partition(";")[0].strip().lower()
    if kind not in _WITH_TEXT or media_type not in ("", "text/plain"):
        what = f"type {kind or '(none)'} with {media_type or 'content of no type'}"
        return "not_text", f"a record of {what} holds no plain text; extract it first, or read the WET file"
    return ("too_large", describe_too_large(size, config)) if size > config.max_document_bytes else ("", "")


def _find_record(stream: InputStream) -> bytes:
    """The first line of the next record; empty at the end."""
    while line := stream.readline(_LINE_BYTES):
        if line.strip():
            return line
    return b""
