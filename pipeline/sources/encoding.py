"""Encodings of text files: how they are recognised, and a stream that gives any of them as UTF-8 with \\n at line ends.

So the formats read UTF-8 only. A file that is translated is read by one worker, and its records have numbers.
"""

from __future__ import annotations

import codecs
import io
from typing import Any, Optional

from pipeline.read_config import ReadConfig
from pipeline.sources.compression import BUFFER_BYTES, CHUNK_BYTES, InputStream, RawStream, open_stream
from pipeline.sources.source import InputFile

# What stands for bytes that cannot be decoded: a lone surrogate, which is not valid in UTF-8, so that exactly the
# records that hold it are rejected.
BAD_BYTES = "\udcff"
_BOMS = {
    codecs.BOM_UTF8: "",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_CONTROLS = bytes(b for b in range(32) if b not in b"\t\n\v\f\r") + b"\x7f"
_BINARY_SHARE = 0.5
_SAMPLE_CHARACTERS = 64

codecs.register_error("embeam-mark", lambda error: (BAD_BYTES, error.end))  # type: ignore[attr-defined]


def find_encoding(head: bytes, encoding: str) -> str:
    """The encoding of a text file: its byte-order mark decides, then the setting, then the pattern of its NULs.

    Args:
      head: the first bytes of the file, decompressed.
      encoding: from the settings. UTF-8 is the default, so UTF-16 and UTF-32 are recognised without the setting.

    Returns:
      A name that Python knows; empty for UTF-8.
    """
    for bom, name in _BOMS.items():
        if head.startswith(bom):
            return name
    name = codecs.lookup(encoding).name
    if name in ("utf-8", "utf-8-sig"):
        return _find_wide(head)
    if name in ("utf-16", "utf-32"):  # without a byte-order mark
        wide = _find_wide(head)
        return wide if wide.startswith(name) else f"{name}-le"
    return name


def has_cr_line_ends(text: str, is_whole: bool) -> bool:
    """Whether lines end with a carriage return alone, as on the first Macintosh.

    Args:
      text: the beginning of a file.
      is_whole: whether that is all of it; else a line feed may follow.
    """
    if "\n" in text:
        return False
    return "\r" in text if is_whole else text[:-2].count("\r") > 1  # one alone may stand within a long first line


def is_text(head: bytes, encoding: str) -> bool:
    """Whether these first bytes of a file are text in an encoding, from `find_encoding`: one byte of nine in random
    data is a control character.
    """
    text = _decode(head, encoding or "utf-8")
    return text is not None and _count_controls(text) <= len(text) / 20


def is_binary_text(text: str) -> bool:
    """Whether half of a text or more is NULs and other control characters: it is binary, or wrongly decoded."""
    # This runs for every document, so a long text is first judged by some characters of it; an odd distance between
    # them meets the NULs of UTF-16 too.
    sample = text if len(text) <= _SAMPLE_CHARACTERS else text[:: len(text) // _SAMPLE_CHARACTERS | 1]
    if sample.isprintable() or _count_controls(sample) <= _BINARY_SHARE / 2 * len(sample):
        return False
    return _count_controls(text) >= _BINARY_SHARE * len(text)


def _count_controls(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return len(data) - len(data.translate(None, _CONTROLS))


class TranslatedText(RawStream):
    """The text of a stream as UTF-8.

    Args:
      stream: the stored text.
      encoding: of it.
      cr_line_ends: whether carriage returns become line feeds.
    """

    def __init__(self, stream: InputStream, encoding: str, cr_line_ends: bool) -> None:
        self._stream = stream
        decoder = codecs.getincrementaldecoder(encoding)("embeam-mark")
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True) if cr_line_ends else decoder
        self._output = memoryview(b"")
        self._at_end = False

    @property
    def position(self) -> int:
        return self._stream.position

    def readinto(self, buffer: Any) -> int:
        while not self._output and not self._at_end:
            data = self._stream.read1(CHUNK_BYTES)
            self._at_end = not data
            text = self._decoder.decode(data, self._at_end)
            self._output = memoryview(text.encode("utf-8", "surrogatepass"))
        piece, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.close()


def open_text(file: InputFile, config: ReadConfig, start: int = 0) -> InputStream:
    """Opens a text file as UTF-8, decompressed.

    Args:
      file: with its compression and encoding.
      config: for `--max_window`.
      start: byte to begin at; 0 if the file is compressed or translated.

    Raises:
      FileError: as `open_stream`.
    """
    stream = open_stream(file.path, file.compression, start, config.max_window)
    if not file.encoding and not file.cr_line_ends:
        return stream
    return InputStream(TranslatedText(stream, file.encoding or "utf-8", file.cr_line_ends), BUFFER_BYTES)


def _find_wide(head: bytes) -> str:
    """UTF-16 or UTF-32 by the pattern of bytes; empty if it is neither."""
    head = head[: len(head) // 2 * 2]
    if 0 not in head or not any(head):
        return ""
    for name, zeros, small in (("utf-32-le", head[3::4], head[2::4]), ("utf-32-be", head[0::4], head[1::4])):
        if len(head) >= 8 and not any(zeros) and max(small) <= 0x10 and _decode(head, name) is not None:
            return name
    # The upper bytes of alphabets are small numbers.
    for name, upper, lower in (("utf-16-le", head[1::2], head[0::2]), ("utf-16-be", head[0::2], head[1::2])):
        n_nuls, n_small = upper.count(0), len(upper) - len(upper.translate(None, _CONTROLS))
        if n_nuls >= 2 and lower.count(0) <= n_nuls / 2 and n_small >= len(upper) / 2:
            return name
    # Other scripts have NULs at blanks and line ends only, and are not UTF-8.
    if _decode(head, "utf-8") is None:
        texts = {name: _decode(head, name) or "" for name in ("utf-16-le", "utf-16-be")}
        n_blanks = {name: text.count(" ") + text.count("\n") for name, text in texts.items()}
        best = max(n_blanks, key=n_blanks.__getitem__)
        if n_blanks[best] > min(n_blanks.values()) and not is_binary_text(texts[best]):
            return best
    return ""


def _decode(head: bytes, encoding: str) -> Optional[str]:
    """The text of the first bytes of a file, which may end within a character; None if it has another encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeError:
        return None
