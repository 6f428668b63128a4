"""The pool that starts workers for engines outside this process."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from runners.services import find_free_port, run_services, worker_pool
from tests.support.paths import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
PROGRAM = """
import sys
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

def tell(path):
    import json
    from apache_beam.io.filesystems import FileSystems
    print("x" * 1_000_000)  # more than a pipe holds
    with open(path, "w") as file:
        json.dump(FileSystems._pipeline_options.get_all_options(drop_default=True), file)

with beam.Pipeline(options=PipelineOptions(sys.argv[2:])) as pipeline:
    pipeline | beam.Create([sys.argv[1]]) | beam.Map(tell)
"""


def test_workers_know_the_options_and_may_print(tmp_path):
    told = tmp_path / "options.json"
    command = [sys.executable, "-m", "runners.portable", f"--log_dir={tmp_path}", sys.executable, "-c", PROGRAM]
    command += [str(told), "--s3_endpoint_url=http://localhost:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(told.read_text())["s3_endpoint_url"] == "http://localhost:1"


def test_nobody_else_can_reach_the_pool(tmp_path):
    port = find_free_port()
    with run_services([worker_pool(port)], tmp_path) as services:
        process = psutil.Process(services["worker_pool"].pid)
        listening = {connection.laddr for connection in process.net_connections() if not connection.raddr}
    assert {address.port for address in listening} == {port}
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
