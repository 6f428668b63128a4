"""Checks what a job on Dataflow needs before anything is staged, because the service reports it minutes later."""

from __future__ import annotations

import datetime
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    TestOptions,
    WorkerOptions,
)
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners.dataflow.dataflow_runner import DataflowRuntimeException
from apache_beam.runners.runner import PipelineState
from google.api_core.exceptions import GoogleAPICallError

from pipeline.config import EmbedConfig, WorkerConfig
from pipeline.engines.presets import check_processes, count_threads
from pipeline.errors import ConfigError

_LOGGER = logging.getLogger(__name__)
_NEEDED = {
    "project": "the Google Cloud project that pays for it",
    "region": "the region of the workers, such as europe-west4",
    "temp_location": "a gs:// folder for the job's own files",
}
_ONE_PROCESS = "no_use_multiple_sdk_containers"
_DISK_GB = 50
_JOB_NAME_LENGTH = 63
_CANCEL_SECONDS = 10.0


def prepare_dataflow(options: PipelineOptions, config: EmbedConfig) -> None:
    """Checks what Dataflow needs, and adds options for the configuration; the user's own options take precedence.

    Raises:
      ConfigError: if the job cannot run.
    """
    check_needs(options, config)
    if config.workers.accelerator:
        check_gpus(options, config.workers)
        add_gpu_options(options, config.workers)


def check_needs(options: PipelineOptions, config: EmbedConfig) -> None:
    """Raises ConfigError for missing options, and for options that our jobs do not support."""
    cloud = options.view_as(GoogleCloudOptions)
    for name, what in _NEEDED.items():
        if not getattr(cloud, name):
            raise ConfigError(f"--{name} is missing, and Dataflow needs it: {what}")
    if not cloud.temp_location.startswith("gs://"):
        raise ConfigError(f"--temp_location={cloud.temp_location} is not on Cloud Storage; give a gs:// folder")
    for flag, path in local_paths(config):
        raise ConfigError(
            f"--{flag}={path} is on this machine, where Dataflow's workers cannot read it; give a gs:// path"
        )
    image, setup = options.view_as(WorkerOptions).sdk_container_image, options.view_as(SetupOptions)
    if not (image or setup.setup_file or setup.extra_packages):
        raise ConfigError(
            "Dataflow's workers need embeam: give --sdk_container_image, an image with it "
            "(runners/flex_template builds one), or --setup_file=./setup.py"
        )
    if options.view_as(TestOptions).dry_run:
        raise ConfigError("--dry_run runs nothing and publishes nothing; use embeam plan for a dry run")
    if options.view_as(StandardOptions).streaming:
        raise ConfigError("--streaming is for unbounded input; leave it out")
    if cloud.update:
        raise ConfigError("--update is for streaming jobs; leave it out: the next run reuses the vectors of this one")


def check_gpus(options: PipelineOptions, workers: WorkerConfig) -> None:
    """Raises ConfigError for options that do not work with GPUs for the encoder only."""
    check_processes(workers)
    cloud = options.view_as(GoogleCloudOptions)
    if cloud.flexrs_goal:
        raise ConfigError(
            f"--flexrs_goal={cloud.flexrs_goal} has no GPUs; leave it out, or --accelerator={workers.accelerator}"
        )
    for service in cloud.dataflow_service_options or []:
        if service.startswith("worker_accelerator"):
            raise ConfigError(
                f"--dataflow_service_options={service} would give every worker a GPU; leave it out, as "
                f"--accelerator={workers.accelerator} gives one to those that encode"
            )


def add_gpu_options(options: PipelineOptions, workers: WorkerConfig) -> None:
    """Options for a GPU: one process with some threads, or several processes; and disk space for an image with CUDA."""
    debug, machines = options.view_as(DebugOptions), options.view_as(WorkerOptions)
    if workers.encoder_processes == 1:
        debug.add_experiment(_ONE_PROCESS)
        debug.number_of_worker_harness_threads = debug.number_of_worker_harness_threads or count_threads(workers)
    if not machines.disk_size_gb:
        machines.disk_size_gb = _DISK_GB


def validate_options(options: PipelineOptions, runner: Any) -> None:
    """Lets Beam check the options before everything else is ready.

    Raises:
      ConfigError: with its first message.
    """
    for problem in PipelineOptionsValidator(options, runner).validate():
        raise ConfigError(f"--runner={type(runner).__name__}: {problem.strip()}")


def explain_job(error: BaseException, options: PipelineOptions) -> str:
    """Dataflow's message about a job that it refused or that has failed; "" for other errors."""
    if isinstance(error, GoogleAPICallError):
        code = "" if error.code is None else f"{int(error.code)} "
        return f"Dataflow refused the job: {code}{error.message.rpartition(': ')[2]}"
    if not isinstance(error, DataflowRuntimeException):
        return ""
    ended = error.result
    why = str(error).partition("Error:")[2].strip()
    reason = f"{why.splitlines()[-1]}; more" if why and why != "None" else "why"
    return f"the Dataflow job {ended.job_id()} ended as {ended.state}: {reason} is in {link_job(ended, options)}"


def link_job(running: Any, options: PipelineOptions) -> str:
    """The page on a job in Google's console; "" for anything else."""
    if not getattr(running, "has_job", False):
        return ""
    cloud = options.view_as(GoogleCloudOptions)
    return f"https://console.cloud.google.com/dataflow/jobs/{cloud.region}/{running.job_id()}?project={cloud.project}"


def job_lives(running: Any) -> bool:
    """Whether a job may still run and write after this process stopped waiting for it: only Dataflow's can."""
    if not getattr(running, "has_job", False):
        return False
    try:
        return not PipelineState.is_terminal(running.state)
    except Exception:  # no network or no login
        return True


def cancel_job(running: Any, seconds: float = _CANCEL_SECONDS) -> bool:
    """Cancels a job; returns whether it ended in time, so that it writes nothing any more."""
    try:
        running.cancel()
    except Exception as error:
        _LOGGER.debug("the job could not be cancelled: %s", error)
    deadline = time.monotonic() + seconds
    while job_lives(running):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def describe_job(running: Any, options: PipelineOptions) -> str:
    """Describes a job that continues after this process, and how to stop it."""
    cloud, job = options.view_as(GoogleCloudOptions), running.job_id()
    return (
        f"the Dataflow job {job}, which continues and publishes the table; to stop it: "
        f"gcloud dataflow jobs cancel {job} --region={cloud.region} --project={cloud.project}"
    )


def local_paths(config: EmbedConfig) -> Iterator[tuple[str, str]]:
    """The flags that name something on this machine."""
    named = [("input", path) for path in config.read.input]
    named += [("output", config.write.output), ("encoder", config.encoder.encoder)]
    named += [("preprocessor", config.preprocess.preprocessor), ("work_dir", config.write.work_dir)]
    for flag, path in named:
        if path and "://" not in path:
            yield flag, path


def name_job(output: str) -> str:
    """A name with the table's name that is unique per run: embeam-notes-20261125-081500."""
    table = re.sub(r"[^a-z0-9]+", "-", output.rstrip("/").rpartition("/")[2].lower()).strip("-")
    now = datetime.datetime.now(datetime.UTC)
    stamp = f"{now:%Y%m%d-%H%M%S}"
    room = _JOB_NAME_LENGTH - len(f"embeam--{stamp}")
    return "-".join(filter(None, ["embeam", table[:room].strip("-"), stamp]))
