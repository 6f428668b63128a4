"""The one place where TensorFlow is imported for encoding."""

from __future__ import annotations

import logging
import os
from typing import Any

_LOGGER = logging.getLogger(__name__)


def load_tensorflow() -> Any:
    """Imports TensorFlow quietly, with the ops of tensorflow_text, and lets GPU memory grow.

    Memory growth can only be set before TensorFlow first touches the device; otherwise one process takes all of it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    import tensorflow_text  # noqa: F401  registers ops that encoders of strings use

    for device in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(device, True)
        except RuntimeError:  # already in use: somebody else's choice stands
            _LOGGER.debug("the memory growth of %s was set elsewhere", device.name)
    return tf
