"""The one place where TensorFlow is imported for encoding."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

_LOGGER = logging.getLogger(__name__)


def load_tensorflow() -> Any:
    """Imports TensorFlow quietly, with the ops of tensorflow_text, and lets GPU memory grow.

    Memory growth can only be set before TensorFlow first touches the device; otherwise one process takes all of it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _silent_stderr() if "tensorflow" not in sys.modules else nullcontext():
        import tensorflow as tf
        import tensorflow_text  # noqa: F401  registers ops that encoders of strings use

        devices = tf.config.list_physical_devices("GPU")
    # Beam 2.77 says so of every load, wherever torch is not installed.
    if _is_news not in logging.getLogger().filters:
        logging.getLogger().addFilter(_is_news)
    for device in devices:
        try:
            tf.config.experimental.set_memory_growth(device, True)
        except RuntimeError:  # already in use: somebody else's choice stands
            _LOGGER.debug("the memory growth of %s was set elsewhere", device.name)
    return tf


def _is_news(record: logging.LogRecord) -> bool:
    return "Resource module is not available" not in record.getMessage()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what C++ prints about missing GPUs before its log level counts; a failing import still raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
