"""Raw streams over any Beam file system, with our own decompression.

Beam's own decompression returns the first part of a file that is cut off and reports no error; here everything that
can be decoded is delivered first, and then the error is raised. Memory is bounded whatever the compression ratio.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import Any, BinaryIO, Optional, Protocol

from pipeline import files
from pipeline.sources.decoders import DECODE_ERRORS, DECODERS, PADDED, WindowTooLarge

BUFFER_BYTES = 1 << 18
CHUNK_BYTES = 1 << 16
_SKIP_BYTES = 1 << 20


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
    """The columns of the file are not those that the settings ask for: one is missing, or a name is there twice."""

    reason = "missing_field"


class ByteReader(Protocol):
    """A stream that is read."""

    def read(self, size: int = -1, /) -> bytes: ...


class RawStream(io.RawIOBase):
    """A raw stream that counts the stored bytes that were read for it."""

    @property
    @abstractmethod
    def position(self) -> int: ...

    def readable(self) -> bool:
        return True


class RawFile(RawStream):
    """A file of any Beam file system as a raw stream; every error of the file system becomes UnreadableFile."""

    _file: Optional[BinaryIO] = None  # Python also closes objects whose opening failed

    def __init__(self, path: str, start: int = 0) -> None:
        self.path = path
        self._position = start
        self._file = open_file(path)
        try:
            if start:
                self._file.seek(start)
        except Exception as error:  # as in open_file
            raise UnreadableFile(f"cannot read {path}: {error}") from error

    @property
    def position(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        assert self._file is not None
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # as in open_file
            raise UnreadableFile(f"cannot read {self.path}: {error}") from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._file is not None:
                self._file.close()


class DecodedFile(RawStream):
    """The decompressed bytes of a raw file, one member, stream or frame after the other."""

    def __init__(self, raw: RawFile, compression: str, max_window: int) -> None:
        self._raw = raw
        self._compression = compression
        self._max_window = max_window
        self._decoder = DECODERS[compression](max_window)
        self._next = b""  # read, and for the next decoder
        self._between = False  # whether the last decoder is finished and no other has begun

    @property
    def position(self) -> int:
        return self._raw.position

    def readinto(self, buffer: Any) -> int:
        while True:
            chunk, at_end = b"", False
            if self._decoder.needs_input or self._between:
                chunk, self._next = self._next or self._raw.read(CHUNK_BYTES) or b"", b""
                at_end = not chunk
                if self._between and self._compression in PADDED:
                    chunk = self._skip_padding(chunk)
                if self._between and not chunk:
                    return 0
                if self._between:
                    self._decoder, self._between = DECODERS[self._compression](self._max_window), False
            try:
                data = self._decoder.decompress(chunk, len(buffer))
            except WindowTooLarge as error:
                raise UnreadableFile(f"{self._raw.path} has {error}") from None
            except DECODE_ERRORS as error:
                raise DamagedFile(f"{self._raw.path} is damaged near byte {self.position}: {error}") from error
            if self._decoder.eof:
                self._next, self._between = self._decoder.unused_data, True
            elif at_end and not data:
                raise TruncatedFile(f"{self._raw.path} is cut off: its {self._compression} data ends too early")
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _skip_padding(self, chunk: bytes) -> bytes:
        """Drops the zeros behind a part."""
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
        assert isinstance(self.raw, RawStream)
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


def open_stream(path: str, compression: str = "", start: int = 0, max_window: int = 128) -> InputStream:
    """Opens the decompressed bytes of a file.

    Args:
      path: on any Beam file system.
      compression: a key of `DECODERS`, or empty for a file that is read as it is stored.
      start: byte to begin at; 0 if the file is compressed.
      max_window: MiB that a zstd frame or an xz stream may need.

    Raises:
      FileError: here or while reading; what could be decoded before is delivered first.
    """
    raw = RawFile(path, start)
    return InputStream(DecodedFile(raw, compression, max_window) if compression else raw, BUFFER_BYTES)


def skip_bytes(stream: ByteReader, n_bytes: int) -> int:
    """Skips bytes of a stream without holding them; returns how many there were, which are fewer at its end."""
    n_left = n_bytes
    while n_left and (skipped := len(stream.read(min(n_left, _SKIP_BYTES)))):
        n_left -= skipped
    return n_bytes - n_left
