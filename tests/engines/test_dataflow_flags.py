"""Flags that no job on Dataflow can have are refused before anything is read, staged or submitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.paths import ENCODER
from tests.support.processes import Call, assert_one_line

FLAGS = {
    "runner": "DataflowRunner",
    "project": "a-project",
    "region": "europe-west4",
    "temp_location": "gs://a-bucket/tmp",
    "sdk_container_image": "europe-west4-docker.pkg.dev/a-project/images/embeam:7",
    "no_auth": "",
    "encoder": "gs://a-bucket/encoder",
    "input": "gs://a-bucket/corpus/*.jsonl",
    "output": "gs://a-bucket/table",
}


class Accepted(BaseException):  # the command reports any other exception
    """The flags have been accepted: next Beam would look at them, and ask Cloud Storage about the bucket."""


@pytest.fixture
def refused(call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command with some flags replaced or, if they are None, left out: flags -> the one line that is said."""

    def accept(*_: object) -> None:
        raise Accepted

    monkeypatch.setattr("pipeline.run.job.validate_options", accept)

    def run(**others: Any) -> str:
        flags = FLAGS | others
        given = [f"--{name}={value}".removesuffix("=") for name, value in flags.items() if value is not None]
        code, out, err = call("embed", *given)
        assert (code, out) == (2, "")
        return assert_one_line(err)

    return run


def test_flags_that_can_work_are_accepted(refused):
    for flags in ({}, {"accelerator": "nvidia-l4"}, {"sdk_container_image": None, "setup_file": "./setup.py"}):
        with pytest.raises(Accepted):
            refused(**flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"project": None}, "--project is missing, and Dataflow needs it: the Google Cloud project"),
        ({"region": None}, "--region is missing, and Dataflow needs it: the region of the workers"),
        ({"temp_location": None}, "--temp_location is missing, and Dataflow needs it: a gs:// folder"),
        ({"temp_location": "/tmp"}, "--temp_location=/tmp is not on Cloud Storage; give a gs:// folder"),
        ({"input": "corpus/*.jsonl"}, "--input=corpus/*.jsonl is on this machine"),
        ({"output": "table"}, "--output=table is on this machine"),
        ({"encoder": ENCODER}, f"--encoder={ENCODER} is on this machine"),
        ({"sdk_container_image": None}, "Dataflow's workers need embeam: give --sdk_container_image"),
        ({"runner": "DataflowRuner"}, "--runner=DataflowRuner is not a Beam runner"),
        ({"runner": "DataflowRuner"}, "did you mean DataflowRunner"),
        ({"dry_run": "true"}, "--dry_run"),
        ({"streaming": ""}, "--streaming is for unbounded input; leave it out"),
        ({"update": ""}, "--update is for streaming jobs; leave it out"),
        ({"accelerator": "nvidia-l4", "flexrs_goal": "COST_OPTIMIZED"}, "--flexrs_goal=COST_OPTIMIZED has no GPUs"),
        (
            {"accelerator": "nvidia-l4", "dataflow_service_options": "worker_accelerator=type:nvidia-l4"},
            "would give every worker a GPU",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_flags_that_cannot_work(refused, flags, told):
    assert told in refused(**flags)
