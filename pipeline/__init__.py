"""embeam: batch text embedding on Apache Beam.

The names below are the public interface; they are imported when first used, so that `import pipeline` is quick and
loads neither TensorFlow nor Beam.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "BatchConfig",
    "ConfigError",
    "DeadLetter",
    "Document",
    "EmbeamError",
    "EmbedConfig",
    "EmbedDocuments",
    "Embedder",
    "EncoderConfig",
    "EncoderError",
    "InputError",
    "PreprocessConfig",
    "ReadConfig",
    "ReindexConfig",
    "Row",
    "RunError",
    "TableError",
    "ValidationError",
    "VectorConfig",
    "WorkerConfig",
    "WriteConfig",
    "__version__",
    "build_table",
    "iter_table",
    "load_embedder",
    "open_table",
    "read_table",
]
_HOMES = {
    "BatchConfig": "config",
    "EmbedConfig": "config",
    "EncoderConfig": "config",
    "PreprocessConfig": "config",
    "ReadConfig": "read_config",
    "ReindexConfig": "config",
    "VectorConfig": "config",
    "WorkerConfig": "config",
    "WriteConfig": "config",
    "DeadLetter": "coders",  # with what Beam has to know of records
    "Document": "coders",
    "Row": "coders",
    "ConfigError": "errors",
    "EmbeamError": "errors",
    "EncoderError": "errors",
    "InputError": "errors",
    "RunError": "errors",
    "TableError": "errors",
    "ValidationError": "errors",
    "EmbedDocuments": "embed",
    "build_table": "run.job",
    "Embedder": "search.embedder",
    "iter_table": "tables.read",
    "load_embedder": "search.embedder",
    "open_table": "tables.manifest",
    "read_table": "tables.read",
}

if TYPE_CHECKING:  # a type checker would take every name for one that `__getattr__` gives
    from pipeline.config import (
        BatchConfig,
        EmbedConfig,
        EncoderConfig,
        PreprocessConfig,
        ReindexConfig,
        VectorConfig,
        WorkerConfig,
        WriteConfig,
    )
    from pipeline.embed import EmbedDocuments
    from pipeline.errors import (
        ConfigError,
        EmbeamError,
        EncoderError,
        InputError,
        RunError,
        TableError,
        ValidationError,
    )
    from pipeline.read_config import ReadConfig
    from pipeline.records import DeadLetter, Document, Row
    from pipeline.run.job import build_table
    from pipeline.search.embedder import Embedder, load_embedder
    from pipeline.tables.manifest import open_table
    from pipeline.tables.read import iter_table, read_table
else:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
        return getattr(import_module(f"pipeline.{_HOMES[name]}"), name)
