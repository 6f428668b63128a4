"""The one place where TensorFlow is imported for encoding."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from pipeline.encoders.cache import cache_dir

_LOGGER = logging.getLogger(__name__)
_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def load_tensorflow(gpu_memory_mib: int = 0) -> Any:
    """Imports TensorFlow without its messages, with the ops of tensorflow_text, and limits its GPU memory.

    The limit can only be set before TensorFlow first uses the device.

    Args:
      gpu_memory_mib: the most GPU memory that this process may take; with 0 it grows as needed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # By default only the latest Intel processors use oneDNN's kernels; others become a quarter faster with them too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    if os.path.exists("/dev/nvidiactl"):
        _keep_compiled_programs()
    with _silent_stderr() if "tensorflow" not in sys.modules else nullcontext():
        import tensorflow as tf
        import tensorflow_text  # noqa: F401  registers ops that encoders of strings use

        devices = tf.config.list_physical_devices("GPU")
    # Beam 2.77 logs this at every load if torch is not installed.
    if _is_news not in logging.getLogger().filters:
        logging.getLogger().addFilter(_is_news)
    if devices:
        tf.config.experimental.enable_tensor_float_32_execution(False)  # --precision=float32 means it
    for device in devices:
        try:
            if gpu_memory_mib:
                tf.config.experimental.set_memory_growth(device, False)
                limit = tf.config.LogicalDeviceConfiguration(memory_limit=gpu_memory_mib)
                tf.config.set_logical_device_configuration(device, [limit])
            elif not tf.config.get_logical_device_configuration(device):
                tf.config.experimental.set_memory_growth(device, True)
        except RuntimeError:  # the device is in use already: its setting stays
            _LOGGER.debug("the memory growth of %s was set elsewhere", device.name)
    return tf


class Device(NamedTuple):
    """The device that an encoder runs on.

    Attributes:
      is_gpu: whether it is a GPU, or the processor.
      half_precision: the 16-bit type that it multiplies natively: bfloat16, float16 or "".
      batch_tokens: the budget of a batch that keeps it busy; 0 if that depends on the encoder.
    """

    is_gpu: bool
    half_precision: str = ""
    batch_tokens: int = 0


def this_device() -> Device:
    """The device of this machine."""
    return Device(has_gpu(), native_half_precision())


def has_gpu() -> bool:
    return bool(load_tensorflow().config.list_physical_devices("GPU"))


def native_half_precision() -> str:
    """The 16-bit type that this machine multiplies natively, a GPU before the processor: bfloat16, float16 or ""."""
    tf = load_tensorflow()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else ""
    return "bfloat16" if {"amx_bf16", "avx512_bf16"} & _cpu_flags() and not _is_held_back() else ""


def _is_held_back() -> bool:
    """Whether the environment limits oneDNN to instructions without bfloat16.

    TensorFlow checks only the processor, and a matmul in bfloat16 then ends the process.
    """
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BFLOAT16


def _cpu_flags() -> set[str]:
    """The processor's flags as Linux names them; empty if they are not listed."""
    return set(_read_cpuinfo().get("flags", "").split())


def describe_processor() -> str:
    """The processor's model, as part of a file's name; "unknown" if the system does not name it."""
    told = _read_cpuinfo()
    model = " ".join(told.get(key, "") for key in ("model name", "cpu family", "model", "stepping")).strip()
    return "".join(c if c.isalnum() else "-" for c in model) or "unknown"


def _read_cpuinfo() -> dict[str, str]:
    """What Linux lists for the first processor; empty on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            pairs = (line.partition(":") for line in file)
            return {key.strip(): value.strip() for key, _, value in pairs}
    except OSError:
        return {}


@functools.cache
def hear_onednn_out() -> None:
    """Hides the message that oneDNN prints once on a processor without bfloat16."""
    import tensorflow as tf

    if _is_held_back():
        return
    with _silent_stderr():
        tf.function(lambda x: tf.cast(x, tf.bfloat16) @ tf.cast(x, tf.bfloat16))(tf.ones([2, 2]))


def _keep_compiled_programs() -> None:
    """Makes XLA cache its GPU kernels on disk, because compiling them takes minutes in every new process."""
    folder = os.path.join(cache_dir(), "xla")
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if "persistent_cache_directory" not in flags:
        os.environ["TF_XLA_FLAGS"] = f"{flags} --tf_xla_persistent_cache_directory={folder}".strip()


def _is_news(record: logging.LogRecord) -> bool:
    return "Resource module is not available" not in record.getMessage()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides C++ messages about missing GPUs that come before the log level is set; a failing import still raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
