"""The first bytes of input files, by which planning tells what a file really holds; its name may be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Union

from pipeline.sources.compression import FileError, RawFile

HEAD_BYTES = 4096
_THREADS = 32  # object stores take some 50 ms for each file


def read_head(path: str) -> bytes:
    """The first bytes of a file as it is stored; fewer if it is shorter.

    Raises:
      FileError: if it cannot be opened or read.
    """
    with RawFile(path) as file:
        return file.read(HEAD_BYTES) or b""


def read_heads(paths: Iterable[str]) -> Iterator[Union[bytes, FileError]]:
    """The head of each file, or the error that keeps it from being read, in the order of the paths."""
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(_try_head, paths)


def _try_head(path: str) -> Union[bytes, FileError]:
    try:
        return read_head(path)
    except FileError as error:
        return error
