"""embeam: batch text embedding on Apache Beam.

The names below are the public interface; they are imported when first used, so that `import pipeline` is quick and
loads neither TensorFlow nor Beam.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BatchConfig": "config",
    "EmbedConfig": "config",
    "EncoderConfig": "config",
    "PreprocessConfig": "config",
    "ReadConfig": "config",
    "VectorConfig": "config",
    "WriteConfig": "config",
    "DeadLetter": "coders",  # with what Beam has to know of records
    "Document": "coders",
    "Row": "coders",
    "EmbeamError": "errors",
    "EmbedDocuments": "embed",
    "build_table": "job",
    "Embedder": "tables.embedder",
    "iter_table": "tables.read",
    "load_embedder": "tables.embedder",
    "open_table": "tables.manifest",
    "read_table": "tables.read",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(f"pipeline.{_HOMES[name]}"), name)
