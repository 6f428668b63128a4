"""Raw streams over any Beam file system, with our own decompression of gzip, bzip2 and zstd.

Beam's own decompression returns the first part of a file that is cut off and reports no error; here everything that
can be decoded is delivered first, and then the error is raised. Memory is bounded whatever the compression ratio.
"""

from __future__ import annotations

import bz2
import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Optional, Protocol

import zstandard

from pipeline import files

BUFFER_BYTES = 1 << 18
CHUNK_BYTES = 1 << 16
# A zstd frame can expand 3 bytes to 128 KiB and its decoder takes no output limit, so it is fed in small pieces.
ZSTD_BITE_BYTES = 1 << 10


class FileError(Exception):
    """A file that cannot be read to its end; `reason` is a key of `records.REASONS`."""

    reason = "unreadable_file"


class UnreadableFile(FileError):
    """The file system refuses access: the file is gone, or may not be read."""


class DamagedFile(FileError):
    """The bytes do not fit the format."""


class TruncatedFile(FileError):
    """The file ends before the data does."""

    reason = "truncated_file"


class WrongColumns(FileError):
    """The file lacks a needed column, or has it twice."""

    reason = "missing_field"


class ByteReader(Protocol):
    """A stream that is read."""

    def read(self, size: int = -1, /) -> bytes: ...


class Decoder(Protocol):
    """Decodes one gzip member, bzip2 stream or zstd frame, as `bz2.BZ2Decompressor` does."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class GzipDecoder:
    """One gzip member."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    eof = property(lambda self: self._member.eof)
    needs_input = property(lambda self: not self._member.unconsumed_tail)
    unused_data = property(lambda self: self._member.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._member.decompress(self._member.unconsumed_tail + data, max_length)


class ZstdDecoder:
    """One zstd frame; keeps the output of one piece of input, at most some 32 MiB."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._input = memoryview(b"")
        self._output = memoryview(b"")

    eof = property(lambda self: self._frame.eof and not self._output)
    needs_input = property(lambda self: not self._input and not self._output)
    unused_data = property(lambda self: self._frame.unused_data + bytes(self._input))

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._input = memoryview(data)
        while not self._output and self._input and not self._frame.eof:
            bite, self._input = self._input[:ZSTD_BITE_BYTES], self._input[ZSTD_BITE_BYTES:]
            self._output = memoryview(self._frame.decompress(bite))
        piece, self._output = self._output[:max_length], self._output[max_length:]
        return bytes(piece)


DECODERS: dict[str, Callable[[], Decoder]] = {
    "gzip": GzipDecoder,
    "bzip2": bz2.BZ2Decompressor,
    "zstd": ZstdDecoder,
}
_DECODE_ERRORS = (zlib.error, zstandard.ZstdError, OSError, ValueError, EOFError)


class RawFile(io.RawIOBase):
    """A file of any Beam file system as a raw stream; every error of the file system becomes UnreadableFile."""

    _file: Optional[BinaryIO] = None  # Python also closes objects whose opening failed

    def __init__(self, path: str, start: int = 0) -> None:
        self.path = path
        self.position = start
        self._file = open_file(path)
        try:
            if start:
                self._file.seek(start)
        except Exception as error:  # as in open_file
            raise UnreadableFile(f"cannot read {path}: {error}") from error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert self._file is not None
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # as in open_file
            raise UnreadableFile(f"cannot read {self.path}: {error}") from error
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._file is not None:
                self._file.close()


class DecodedFile(io.RawIOBase):
    """The decompressed bytes of a raw file, one member, stream or frame after the other."""

    def __init__(self, raw: RawFile, compression: str) -> None:
        self._raw = raw
        self._compression = compression
        self._decoder: Decoder = DECODERS[compression]()
        self._next = b""  # read, and for the next decoder
        self._between = False  # whether the last decoder is finished and no other has begun

    @property
    def position(self) -> int:
        return self._raw.position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            chunk, at_end = b"", False
            if self._decoder.needs_input or self._between:
                chunk, self._next = self._next or self._raw.read(CHUNK_BYTES) or b"", b""
                at_end = not chunk
                if self._between and self._compression == "gzip":
                    chunk = self._skip_padding(chunk)
                if self._between and not chunk:
                    return 0
                if self._between:
                    self._decoder, self._between = DECODERS[self._compression](), False
            try:
                data = self._decoder.decompress(chunk, len(buffer))
            except _DECODE_ERRORS as error:
                raise DamagedFile(f"{self._raw.path} is damaged near byte {self.position}: {error}") from error
            if self._decoder.eof:
                self._next, self._between = self._decoder.unused_data, True
            elif at_end and not data:
                raise TruncatedFile(f"{self._raw.path} is cut off: its {self._compression} data ends too early")
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _skip_padding(self, chunk: bytes) -> bytes:
        """Drops the zeros that tapes and block devices leave behind the last gzip member."""
        chunk = chunk.lstrip(b"\0")
        while not chunk:
            more = self._raw.read(CHUNK_BYTES)
            if not more:
                return b""
            chunk = more.lstrip(b"\0")
        return chunk

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._raw.close()


class InputStream(io.BufferedReader):
    """A buffered stream that counts the stored bytes that were read for it."""

    @property
    def position(self) -> int:
        assert isinstance(self.raw, (RawFile, DecodedFile))
        return self.raw.position


def open_file(path: str) -> BinaryIO:
    """Opens a file as it is stored, seekable.

    Raises:
      UnreadableFile: if it cannot be opened.
    """
    try:
        return files.open_file(path)
    except Exception as error:  # each file system raises its own exceptions
        raise UnreadableFile(f"cannot open {path}: {error}") from error


def open_stream(path: str, compression: str = "", start: int = 0) -> InputStream:
    """Opens the decompressed bytes of a file.

    Args:
      path: on any Beam file system.
      compression: a key of `DECODERS`, or empty for a file that is read as it is stored.
      start: byte to begin at; 0 if the file is compressed.

    Raises:
      FileError: here or while reading; what could be decoded before is delivered first.
    """
    raw = RawFile(path, start)
    return InputStream(DecodedFile(raw, compression) if compression else raw, BUFFER_BYTES)
