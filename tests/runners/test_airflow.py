"""The DAG, read and started by a real Airflow, whose answers come from nobody: `make test-airflow` runs these."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from pipeline.tables.lock import LEASE_SECONDS
from tests.support.paths import ROOT
from tests.support.schedules import LAUNCH, SCHEDULE, check_request, read_request

PYTHON = ROOT / ".airflow" / "venv" / "bin" / "python"
DAG = SCHEDULE / "airflow" / "embeam_dag.py"
NAMES = {"PROJECT": "my-project", "REGION": "europe-west4", "BUCKET": "my-bucket", "TAG": "17"}
pytestmark = pytest.mark.airflow


def read_dag(path, home):
    """What Airflow makes of a DAG's file."""
    assert PYTHON.exists(), "run: make test-airflow"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "PYTHON"))}
    environment |= {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT": "google-cloud-platform://",
    }
    command = [str(PYTHON), str(ROOT / "tests" / "support" / "read_dag.py"), str(path)]
    result = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_dag_starts_the_template_that_the_other_schedules_start(tmp_path):
    told = read_dag(DAG, tmp_path)
    assert told["errors"] == {}
    (dag,) = told["dags"]
    assert (dag["id"], dag["schedule"], dag["catchup"], dag["max_active_runs"]) == ("embeam", "0 3 * * *", False, 1)
    (task,) = dag["tasks"]
    assert task["operator"] == "DataflowStartFlexTemplateOperator" and task["trigger"] == "TemplateJobStartTrigger"
    assert task["retries"] == 2 and task["retry_seconds"] > LEASE_SECONDS  # sooner, it would be refused
    (request,) = task["requests"]
    assert (request["method"], request["uri"].partition("?")[0]) == ("POST", LAUNCH.format(**NAMES))
    assert request["body"] == read_request(NAMES)
    check_request(request["body"])


def test_a_dag_that_airflow_cannot_read_would_be_seen(tmp_path):
    broken = tmp_path / "broken_dag.py"
    broken.write_text(DAG.read_text().replace("append_job_name=", "append_name="))
    (error,) = read_dag(broken, tmp_path)["errors"].values()
    assert "append_name" in error
