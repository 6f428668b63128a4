"""Decoders of gzip members, zlib, bzip2 and xz streams and zstd frames, and the first bytes that tell them apart."""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Protocol

import zstandard

MIB = 1 << 20
# A zstd frame can expand 3 bytes to 128 KiB and its decoder takes no output limit, so it is fed in small pieces.
ZSTD_BITE_BYTES = 1 << 10
DECODE_ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError, EOFError)


class WindowTooLarge(Exception):
    """Data that can only be decoded with more memory than is allowed."""


class Decoder(Protocol):
    """Decodes one part of a compressed file, as `bz2.BZ2Decompressor` does."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class ZlibDecoder:
    """One gzip member (`wbits` 31) or zlib stream (15)."""

    def __init__(self, wbits: int) -> None:
        self._member = zlib.decompressobj(wbits=wbits)

    eof = property(lambda self: self._member.eof)
    needs_input = property(lambda self: not self._member.unconsumed_tail)
    unused_data = property(lambda self: self._member.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._member.decompress(self._member.unconsumed_tail + data, max_length)


class XzDecoder:
    """One xz stream."""

    def __init__(self, max_window: int) -> None:
        # The dictionary of xz is what the window is for zstd; the decoder itself takes less than 1 MiB.
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=(max_window + 1) * MIB)
        self._max_window = max_window

    eof = property(lambda self: self._stream.eof)
    needs_input = property(lambda self: self._stream.needs_input)
    unused_data = property(lambda self: self._stream.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._stream.decompress(data, max_length)
        except lzma.LZMAError as error:
            if "Memory usage limit" in str(error):
                raise WindowTooLarge(_explain_window("an xz dictionary", self._max_window)) from None
            raise


class ZstdDecoder:
    """One zstd frame; keeps the output of one piece of input, at most some 32 MiB."""

    def __init__(self, max_window: int) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=max_window * MIB).decompressobj()
        self._max_window = max_window
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
            try:
                self._output = memoryview(self._frame.decompress(bite))
            except zstandard.ZstdError as error:
                if "too much memory" in str(error):
                    raise WindowTooLarge(_explain_window("a zstd frame with a window", self._max_window)) from None
                raise
        piece, self._output = self._output[:max_length], self._output[max_length:]
        return bytes(piece)


# Each takes the largest window in MiB, which matters for some only.
DECODERS: dict[str, Callable[[int], Decoder]] = {
    "gzip": lambda max_window: ZlibDecoder(31),
    "zlib": lambda max_window: ZlibDecoder(15),
    "bzip2": lambda max_window: bz2.BZ2Decompressor(),
    "xz": XzDecoder,
    "zstd": ZstdDecoder,
}
# Zeros behind the last part: tapes and block devices leave them behind gzip, and the xz format allows them.
PADDED = ("gzip", "xz")
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one that is skipped
}


def find_compression(head: bytes) -> str:
    """The compression of a file that begins with these bytes, a key of `DECODERS`; empty if there is none.

    A zlib stream has no magic bytes; `TfrecordSource` tells them from TFRecords.
    """
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), "")


def _explain_window(what: str, max_window: int) -> str:
    fix = "raise it, to at most 2048, or compress the file again" if max_window < 2048 else "compress the file again"
    return f"{what} of more than --max_window={max_window} MiB; {fix}"
