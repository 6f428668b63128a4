"""What the tests of schedules share: how embeam reads a command line, and Dataflow a request."""

from __future__ import annotations

import json
import re
from string import Template
from typing import Any, NamedTuple

from apache_beam.options.pipeline_options import PipelineOptions
from google.cloud.dataflow_v1beta3.types import LaunchFlexTemplateRequest
from google.protobuf import json_format

from pipeline.cli.flags import check_beam_flags, given_settings
from pipeline.cli.main import build_parsers
from pipeline.config import EmbedConfig
from pipeline.engines.dataflow import prepare_dataflow
from runners.flex_template.metadata import make_metadata
from tests.support.paths import ROOT

SCHEDULE = ROOT / "runners" / "schedule"
REQUEST = SCHEDULE / "cloud_scheduler" / "request.json"
LAUNCH = "https://dataflow.googleapis.com/v1b3/projects/{PROJECT}/locations/{REGION}/flexTemplates:launch"
NAMES = {"PROJECT": "a-project", "REGION": "europe-west1", "BUCKET": "a-bucket", "TAG": "17"}


class Command(NamedTuple):
    """What `embeam embed` makes of its command line."""

    config: EmbedConfig
    options: PipelineOptions
    summary_json: bool
    log_format: str


def read_command(arguments: list[str]) -> Command:
    """Reads a command line as embeam does.

    Raises:
      ConfigError: if it would refuse it.
    """
    parser, embed = build_parsers()
    known, rest = parser.parse_known_args(arguments)
    assert known.verb == "embed" and not known.config and not known.runner_option
    flags = check_beam_flags(rest, embed.flags())
    options = PipelineOptions([*flags, f"--runner={known.runner or 'local'}"])
    return Command(EmbedConfig.from_flat(given_settings(known)), options, known.summary_json, known.log_format)


def read_request(names: dict[str, str]) -> dict[str, Any]:
    """The body that is sent to Dataflow, with the names filled in."""
    return json.loads(Template(REQUEST.read_text()).substitute(names))


def check_request(body: dict[str, Any]) -> Command:
    """Reads a body as Dataflow's API does, and its parameters as the template and the program that it launches do."""
    launch = json_format.ParseDict(body, LaunchFlexTemplateRequest.pb()()).launch_parameter
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", launch.job_name)
    patterns = {parameter["name"]: parameter.get("regexes", []) for parameter in make_metadata()["parameters"]}
    for name, value in launch.parameters.items():
        if name != "sdk_container_image":  # of Beam, and for every template
            assert all(re.fullmatch(pattern, value) for pattern in patterns[name]), name
    environment = launch.environment
    command = read_command(
        [
            *("embed", "--runner=DataflowRunner", "--project=a-project", "--region=europe-west1"),
            f"--job_name={launch.job_name}",
            f"--staging_location={environment.staging_location}",
            f"--temp_location={environment.temp_location}",
            f"--service_account_email={environment.service_account_email}",
            f"--max_num_workers={environment.max_workers}",
            *(f"--{name}={value}" for name, value in launch.parameters.items()),
        ]
    )
    prepare_dataflow(command.options, command.config)
    return command
