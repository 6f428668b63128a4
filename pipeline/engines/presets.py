"""Presets for GPUs on the workers of a distributed engine, and the resource hints that request them."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.config import WorkerConfig
from pipeline.encoders.runtime import Device
from pipeline.errors import ConfigError


class Preset(NamedTuple):
    """Good settings for one kind of GPU.

    Attributes:
      machine_type: the smallest of Google's machines that has one.
      memory_gb: of the GPU.
      batch_tokens: the budget of one batch.
      threads: batches at a time in one process: while one is computed, another is made ready.
      half_precision: what `--precision=auto` means.
    """

    machine_type: str
    memory_gb: int
    batch_tokens: int
    threads: int
    half_precision: str


PRESETS = {
    #                           machine type       memory  batch tokens  threads  16-bit precision
    "nvidia-l4": Preset("g2-standard-8", 24, 16384, 2, "bfloat16"),
    "nvidia-tesla-t4": Preset("n1-standard-8", 16, 8192, 2, "float16"),
    "nvidia-tesla-a100": Preset("a2-highgpu-1g", 40, 32768, 3, "bfloat16"),
    "nvidia-a100-80gb": Preset("a2-ultragpu-1g", 80, 32768, 3, "bfloat16"),
    "nvidia-h100-80gb": Preset("a3-highgpu-1g", 80, 32768, 4, "bfloat16"),
}

_DRIVER, _SHARED = "install-nvidia-driver", "use_nvidia_mps"


def find_device(config: WorkerConfig) -> Device | None:
    """The device that the workers encode on; None if it is this machine's."""
    if not config.accelerator:
        return None
    preset = PRESETS[config.accelerator]
    return Device(True, preset.half_precision, preset.batch_tokens // config.encoder_processes)


def resource_hints(config: WorkerConfig) -> dict[str, Any]:
    """Requirements of a worker that encodes, as Beam's resource hints; engines other than Dataflow ignore them."""
    hints: dict[str, Any] = {}
    if config.accelerator:
        machine = config.encoder_machine or PRESETS[config.accelerator].machine_type
        parts = [f"type:{config.accelerator}", "count:1", f"machine_type:{machine}", _DRIVER]
        if config.encoder_processes > 1:
            parts.append(_SHARED)
        if config.provisioning != "standard":
            parts.append(f"provisioning_model:{config.provisioning.upper().replace('-', '_')}")
        hints["accelerator"] = ";".join(parts)
    if config.encoder_memory:
        hints["min_ram"] = config.encoder_memory
    return hints


def count_threads(config: WorkerConfig) -> int:
    """Batches at a time in the process of a worker with a GPU."""
    return config.encoder_threads or PRESETS[config.accelerator].threads


def check_processes(config: WorkerConfig) -> None:
    """Raises ConfigError if Dataflow would start another number of processes: it starts one for each vCPU."""
    machine = config.encoder_machine or PRESETS[config.accelerator].machine_type
    cpus = machine.rpartition("-")[2]
    if config.encoder_processes > 1 and cpus.isdecimal() and int(cpus) != config.encoder_processes:
        other = f"{machine.rpartition('-')[0]}-{config.encoder_processes}"
        raise ConfigError(
            f"--encoder_processes={config.encoder_processes}: Dataflow starts one for each of the {cpus} vCPUs of "
            f"{machine}; use --encoder_processes={cpus}, or --encoder_machine={other} if there is one"
        )
    if config.encoder_processes > 1 and config.encoder_threads:
        raise ConfigError(
            f"--encoder_threads={config.encoder_threads} is for one process on a GPU; leave it out, or "
            f"--encoder_processes={config.encoder_processes}"
        )


def share_memory(config: WorkerConfig) -> int:
    """MiB of a GPU's memory that one process may take; 0 if it does not share the GPU.

    A tenth stays free for the processes' contexts and the libraries' own workspaces.
    """
    if config.encoder_processes == 1:
        return 0
    return PRESETS[config.accelerator].memory_gb * 1024 * 9 // 10 // config.encoder_processes
