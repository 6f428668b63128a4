"""The first bytes of input files, by which planning tells what a file really holds; its name may be wrong."""

from __future__ import annotations

from pipeline.sources.compression import DecodedFile, InputStream, RawFile

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
