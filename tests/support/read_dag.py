"""Run by Airflow's own Python: reads a DAG as Airflow does, starts its tasks against nobody, prints both as JSON.

.airflow/venv/bin/python tests/support/read_dag.py runners/schedule/airflow/embeam_dag.py
"""

import json
import sys
from unittest import mock

import httplib2
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.google.cloud.hooks.dataflow import DataflowHook
from airflow.sdk.exceptions import TaskDeferred
from googleapiclient.discovery import build

VARIABLES = {"var": {"value": {"embeam_tag": "17"}}}


class Recorder:
    """Answers as Dataflow does that has begun a job, and keeps the requests."""

    def __init__(self):
        self.requests = []

    def request(self, uri, method="GET", body=None, headers=None, **others):
        self.requests.append({"method": method, "uri": uri, "body": json.loads(body)})
        return httplib2.Response({"status": "200"}), b'{"job": {"id": "a-job", "projectId": "a-project"}}'


def start(task):
    """Renders a task's templates and starts it; returns the requests, and whether it then waits without a worker."""
    recorder = Recorder()
    task.render_template_fields(VARIABLES)
    with mock.patch.object(DataflowHook, "get_conn", lambda hook: build("dataflow", "v1b3", http=recorder)):
        try:
            task.execute(mock.MagicMock())
        except TaskDeferred as deferred:
            return recorder.requests, type(deferred.trigger).__name__
    return recorder.requests, None


def describe(dag):
    tasks = []
    for task in dag.tasks:
        requests, trigger = start(task)
        tasks.append(
            {
                "id": task.task_id,
                "operator": task.task_type,
                "retries": task.retries,
                "retry_seconds": task.retry_delay.total_seconds(),
                "requests": requests,
                "trigger": trigger,
            }
        )
    return {
        "id": dag.dag_id,
        "schedule": dag.timetable.expression,
        "catchup": dag.catchup,
        "max_active_runs": dag.max_active_runs,
        "tasks": tasks,
    }


if __name__ == "__main__":
    bag = DagBag(sys.argv[1])
    print(json.dumps({"errors": bag.import_errors, "dags": [describe(dag) for dag in bag.dags.values()]}))
