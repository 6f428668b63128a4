"""What a job on Dataflow needs: found out before anything is staged, since the service would say so after minutes."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    WorkerOptions,
)

from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError
from pipeline.workers import count_threads

_NEEDED = {
    "project": "the Google Cloud project that pays for it",
    "region": "where the workers run, such as europe-west4",
    "temp_location": "a gs:// folder for the job's own files",
}
_ONE_PROCESS = "no_use_multiple_sdk_containers"
_PROVISIONING = {"spot": "worker_provisioning_model=SPOT", "flex-start": "worker_provisioning_model=FLEX_START"}
_JOB_NAME_LENGTH = 63


def prepare_dataflow(options: PipelineOptions, config: EmbedConfig) -> None:
    """Checks what Dataflow needs, and adds the options that the configuration stands for; the user's own ones win.

    Raises:
      ConfigError: if the job could not run.
    """
    cloud, workers = options.view_as(GoogleCloudOptions), config.workers
    for name, what in _NEEDED.items():
        if not getattr(cloud, name):
            raise ConfigError(f"--{name} is missing, and Dataflow needs it: {what}")
    if not cloud.temp_location.startswith("gs://"):
        raise ConfigError(f"--temp_location={cloud.temp_location} is not on Cloud Storage; give a gs:// folder")
    for flag, path in local_paths(config):
        raise ConfigError(f"--{flag}={path} is on this machine, which Dataflow's workers do not see; give a gs:// path")
    image, setup = options.view_as(WorkerOptions).sdk_container_image, options.view_as(SetupOptions)
    if not (image or setup.setup_file or setup.extra_packages):
        raise ConfigError(
            "Dataflow's workers need embeam: give --sdk_container_image, an image with it "
            "(runners/flex_template builds one), or --setup_file=./setup.py"
        )
    services = cloud.dataflow_service_options or []
    if workers.accelerator:
        if cloud.flexrs_goal:
            raise ConfigError(
                f"--flexrs_goal={cloud.flexrs_goal} has no GPUs; leave it out, or --accelerator={workers.accelerator}"
            )
        for service in services:
            if service.startswith("worker_accelerator"):
                raise ConfigError(
                    f"--dataflow_service_options={service} would give every worker a GPU; leave it out, as "
                    f"--accelerator={workers.accelerator} gives one to those that encode"
                )
    if model := _PROVISIONING.get(workers.provisioning):
        cloud.dataflow_service_options = [*services, model]
    if workers.accelerator:
        debug, machines = options.view_as(DebugOptions), options.view_as(WorkerOptions)
        if workers.encoder_processes == 1:
            debug.add_experiment(_ONE_PROCESS)
        if not debug.number_of_worker_harness_threads:
            debug.number_of_worker_harness_threads = count_threads(workers)
        if not machines.disk_size_gb:
            machines.disk_size_gb = 50  # an image with CUDA takes a dozen


def local_paths(config: EmbedConfig) -> Iterator[tuple[str, str]]:
    """The flags that name something on this machine."""
    named = [("input", path) for path in config.read.input]
    named += [("output", config.write.output), ("encoder", config.encoder.encoder)]
    named += [("preprocessor", config.preprocess.preprocessor), ("work_dir", config.write.work_dir)]
    for flag, path in named:
        if path and "://" not in path:
            yield flag, path


def name_job(output: str) -> str:
    """A name that says which table, and differs from run to run: embeam-notes-20261125-081500."""
    table = re.sub(r"[^a-z0-9]+", "-", output.rstrip("/").rpartition("/")[2].lower()).strip("-")
    now = datetime.datetime.now(datetime.UTC)
    stamp = f"{now:%Y%m%d-%H%M%S}"
    room = _JOB_NAME_LENGTH - len(f"embeam--{stamp}")
    return "-".join(filter(None, ["embeam", table[:room].strip("-"), stamp]))
