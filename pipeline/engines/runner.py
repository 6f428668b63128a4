"""Chooses the Beam engine of a pipeline: our own set-up of the local engine, or a runner by its name."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, StandardOptions

from pipeline.config import EmbedConfig, WorkerConfig
from pipeline.engines.dataflow import name_job, prepare_dataflow
from pipeline.errors import ConfigError

KNOWN_RUNNERS = ("DataflowRunner", "FlinkRunner", "PortableRunner", "PrismRunner", "SparkRunner")
LOCAL_NAMES = ("", "local", "directrunner", "fnapirunner", "bundlebaseddirectrunner", "switchingdirectrunner")


def is_local(runner: str) -> bool:
    """Whether a runner's name, in any letter case and with or without its module, means the local engine."""
    return _plain_name(runner) in LOCAL_NAMES


def _plain_name(runner: str) -> str:
    return runner.rpartition(".")[2].lower()


def prepare_options(options: PipelineOptions, config: EmbedConfig) -> None:
    """Checks that an engine supports the configuration, and sets the engine's own options.

    Raises:
      ConfigError: if it cannot.
    """
    name = options.view_as(StandardOptions).runner or ""
    if is_local(name):
        if config.workers != WorkerConfig():
            changed = next(f for f in fields(WorkerConfig) if getattr(config.workers, f.name) != f.default)
            raise ConfigError(
                f"--{changed.name}={getattr(config.workers, changed.name)} is for workers of a distributed engine; the "
                "local engine uses the GPU of this machine: leave it out"
            )
    elif _plain_name(name) == "dataflowrunner":
        prepare_dataflow(options, config)
    cloud = options.view_as(GoogleCloudOptions)
    cloud.job_name = cloud.job_name or name_job(config.write.output)


def make_runner(options: PipelineOptions) -> Any:
    """The runner that the options ask for.

    Beam's own `DirectRunner` first tries to download another engine, so that results depend on the network; here it is
    always the local engine, FnApiRunner. Created by name, that passes no options to its worker processes; so it is
    created here with them.

    Raises:
      ConfigError: for an engine that loses data.
    """
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle
    from apache_beam.runners.runner import create_runner

    name = options.view_as(StandardOptions).runner or ""
    if _plain_name(name) == "daskrunner":
        raise ConfigError(
            "--runner=DaskRunner silently loses results of inference stages in Beam 2.77; use --runner=local, "
            "DataflowRunner or FlinkRunner"
        )
    if not is_local(name):
        try:
            return create_runner(name)
        except (ValueError, ImportError, AttributeError) as error:
            close = difflib.get_close_matches(name, KNOWN_RUNNERS, 1)
            fix = f"did you mean {close[0]}?" if close else f"use local, or one of {', '.join(KNOWN_RUNNERS)}"
            raise ConfigError(f"--runner={name} is not a Beam runner; {fix}") from error
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options(drop_default=True))
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded, retrieval_token="unused")
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(info))
