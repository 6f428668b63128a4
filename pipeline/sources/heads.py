"""The first bytes of input files, by which planning tells what they really hold; their names may be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Union

from pipeline.sources.compression import DecodedFile, FileError, InputStream, RawFile

HEAD_BYTES = 4096
THREADS = 32  # object stores take some 50 ms for each file


def read_head(path: str, compression: str = "", max_window: int = 128) -> bytes:
    """The first bytes of a file, as it is stored or decompressed; fewer if it is shorter.

    Raises:
      FileError: if it cannot be opened, read or decompressed so far.
    """
    raw = RawFile(path)
    # A small buffer, so that not much more than the head is fetched.
    with InputStream(DecodedFile(raw, compression, max_window) if compression else raw, HEAD_BYTES) as stream:
        return stream.read(HEAD_BYTES)


def read_heads(paths: Iterable[str]) -> Iterator[Union[bytes, FileError]]:
    """The head of each file as it is stored, or the error that keeps it from being read, in the order of the paths."""
    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(_try_head, paths)


def _try_head(path: str) -> Union[bytes, FileError]:
    try:
        return read_head(path)
    except FileError as error:
        return error
