"""The first bytes of input files, by which planning tells what a file really holds; its name may be wrong."""

from __future__ import annotations

from pipeline.sources.compression import RawFile, open_stream

HEAD_BYTES = 4096
THREADS = 32  # object stores take some 50 ms for each file


def read_head(path: str, compression: str = "", max_window: int = 128) -> bytes:
    """The first bytes of a file, as it is stored or decompressed; fewer if it is shorter.

    Raises:
      FileError: if it cannot be opened, read or decompressed so far.
    """
    if compression:
        with open_stream(path, compression, max_window=max_window) as stream:
            return stream.read(HEAD_BYTES)
    with RawFile(path) as file:  # without a buffer: nothing more than this is fetched
        return file.read(HEAD_BYTES) or b""
