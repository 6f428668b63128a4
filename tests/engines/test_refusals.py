"""What is said of a job that Dataflow refuses, whatever error its client raises."""

from __future__ import annotations

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from google.api_core import exceptions

from pipeline.engines.dataflow import explain_job

SHOWN = "POST https://dataflow.googleapis.com/v1b3/projects/p/locations/r/jobs: "


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            exceptions.Forbidden(f"{SHOWN}no right to create jobs"),
            "Dataflow refused the job: 403 no right to create jobs",
        ),
        (exceptions.from_http_status(418, f"{SHOWN}a teapot"), "Dataflow refused the job: 418 a teapot"),
        (exceptions.Cancelled("called off"), "Dataflow refused the job: 499 called off"),
        (exceptions.Unknown("no answer"), "Dataflow refused the job: no answer"),
        (ValueError("of somebody else"), ""),
    ],
)
def test_every_refusal_is_one_sentence(error: Exception, told: str):
    assert explain_job(error, PipelineOptions([])) == told
