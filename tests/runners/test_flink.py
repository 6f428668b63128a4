"""A Flink cluster on this machine: it starts, notices losses, talks to nobody else, and leaves nothing behind.

`make test-flink` runs these.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from runners.flink.cluster import Cluster, run_cluster, wait_for_task_managers
from runners.services import find_free_port, worker_pool
from tests.support.paths import ROOT

pytestmark = [pytest.mark.flink, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("flink")
    pool = worker_pool(find_free_port())
    with run_cluster(folder, task_managers=3, slots=1, restarts=3, log_dir=folder / "logs", others=[pool]) as cluster:
        yield cluster


def marked(value: str) -> list[psutil.Process]:
    """The processes that have the marker of a test in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("EMBEAM_TEST") == value:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_every_task_manager_reports(cluster):
    overview = cluster.ask("overview")
    assert (overview["taskmanagers"], overview["slots-total"], overview["slots-available"]) == (3, 3, 3)
    assert cluster.registered() == {"task_manager_0", "task_manager_1", "task_manager_2"}
    settings = {entry["key"]: entry["value"] for entry in cluster.ask("jobmanager/config")}
    assert settings["restart-strategy.type"] == "fixed-delay"
    assert settings["restart-strategy.fixed-delay.attempts"] == "3"


def test_a_task_manager_counts_once_its_slots_do():
    """The answers are those of a JobManager in the moment between, which no test can hold still."""
    slots = iter([0, 0, 1])

    class JobManager(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            count = next(slots)
            body = json.dumps({"taskmanagers": [{"id": "task_manager_0", "slotsNumber": count, "freeSlots": count}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_) -> None: ...

    with HTTPServer(("localhost", 0), JobManager) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
            cluster = Cluster(f"localhost:{server.server_port}", {"task_manager_0": process})
            wait_for_task_managers(cluster, Path())
            assert list(slots) == []
        finally:
            process.communicate()
            server.shutdown()


def test_everything_listens_on_loopback_only(cluster):
    children = psutil.Process().children(recursive=True)
    names = {" ".join(process.cmdline()) for process in children}
    assert sum("StandaloneSessionClusterEntrypoint" in name for name in names) == 1
    assert sum("runners.worker_pool" in name for name in names) == 1
    listening = [
        connection.laddr.ip
        for process in children
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 10
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_killed_task_manager_is_noticed_and_the_others_stay(cluster):
    killed = cluster.task_managers["task_manager_1"]
    os.killpg(killed.pid, signal.SIGKILL)
    while "task_manager_1" in cluster.registered():
        time.sleep(0.1)
    assert cluster.registered() == {"task_manager_0", "task_manager_2"}
    assert cluster.ask("overview")["slots-available"] == 2


def launcher(*arguments: str) -> list[str]:
    """A command of the launcher that never gets to use the job server."""
    return [sys.executable, "-m", "runners.flink", "--task_managers=1", f"--job_server_jar={__file__}", *arguments]


def test_the_launcher_says_where_a_job_goes_and_ends_with_all_it_started(tmp_path):
    environment = os.environ | {"EMBEAM_TEST": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = launcher("--slots=2", "--workers=2", "--worker_threads=1")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        flags = dict(flag.split("=", 1) for flag in process.stdout.readline().split())
        assert flags["--runner"] == "FlinkRunner" and flags["--environment_type"] == "EXTERNAL"
        assert flags["--parallelism"] == "2" and flags["--sdk_worker_parallelism"] == "2"
        started = marked(str(tmp_path))
        assert len(started) == 4  # the command, a JobManager, a TaskManager and the pool
        pools = [service for service in started if "runners.worker_pool" in service.cmdline()]
        assert [pool.environ()["TF_NUM_INTRAOP_THREADS"] for pool in pools] == ["1"]
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert marked(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_passes_on_the_exit_code():
    command = launcher(sys.executable, "-c", "import sys; sys.exit(7)")
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 7


def test_without_a_job_server_nothing_starts(tmp_path):
    command = [sys.executable, "-m", "runners.flink", f"--job_server_jar={tmp_path}/none.jar", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"--job_server_jar={tmp_path}/none.jar does not exist\n"
