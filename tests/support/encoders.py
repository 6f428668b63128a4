"""One cache of loaded encoders for all tests of a process: a graph is traced once, not once for every run."""

from __future__ import annotations

from pathlib import Path

from pipeline.encoders import load
from pipeline.encoders.base import Encoder
from pipeline.encoders.spec import EncoderSpec

MOST = 24  # encoders that are kept; those of the tests are of a few megabytes
_load = load._load_and_measure
_loaded: dict[object, tuple[Encoder, int]] = {}


def load_once(spec: EncoderSpec) -> tuple[Encoder, int]:
    """As the function in whose place it stands, unless an encoder of the same files and settings is loaded already."""
    files = [path for path in Path(spec.folder).rglob("*") if path.is_file()]
    key = repr(spec), tuple(sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files))
    found = _loaded.pop(key, None) or _load(spec)
    _loaded[key] = found  # the last one used is the last one to go
    if len(_loaded) > MOST:
        del _loaded[next(iter(_loaded))]
    return found
