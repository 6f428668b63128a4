"""A Flink session cluster on this machine: one JobManager and its TaskManagers, which talk over loopback only."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.flink.software import find_flink, find_java
from runners.services import START_SECONDS, Service, find_free_port, run_services

HEAP_MIB = 384  # the documents pass through on their way to the workers, who hold what is large
MANAGED_MIB = 128  # for each slot: what it sorts
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to loopback
_OPEN = (
    "lang",
    "lang.reflect",
    "net",
    "io",
    "nio",
    "text",
    "time",
    "util",
    "util.concurrent",
    "util.concurrent.atomic",
)
_LOG = """rootLogger.level = INFO
rootLogger.appenderRef.console.ref = Console
appender.console.name = Console
appender.console.type = CONSOLE
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %-5p %c{1} - %m%n
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
      master: host and port of the JobManager, for `--flink_master`.
      task_managers: their processes by their ids.
    """

    master: str
    task_managers: Mapping[str, subprocess.Popen[bytes]]

    def ask(self, path: str) -> Any:
        """What the JobManager's REST API answers."""
        with _HTTP.open(f"http://{self.master}/{path}", timeout=10) as response:
            return json.load(response)

    def registered(self) -> set[str]:
        """The ids of the TaskManagers with registered slots; none while the JobManager is starting."""
        try:
            managers = self.ask("taskmanagers")["taskmanagers"]
            return {manager["id"] for manager in managers if manager["slotsNumber"]}  # known a moment before its slots
        except OSError:  # it listens before it has taken the lead, and says so by status 503
            return set()


@contextmanager
def run_cluster(
    folder: Path, task_managers: int, slots: int, restarts: int, log_dir: Path, others: Sequence[Service] = ()
) -> Iterator[Cluster]:
    """Runs a cluster, and other services beside it, until the context ends.

    Args:
      folder: an empty one, for what the cluster writes.
      task_managers: how many.
      slots: of each TaskManager.
      restarts: how often a job starts again before it fails.
      log_dir: for a log of each process.
      others: are started at the same time.

    Raises:
      FileNotFoundError: if Flink or Java is missing.
      RuntimeError: if a process does not start, with the end of its log.
    """
    rest, names = find_free_port(), [f"task_manager_{i}" for i in range(task_managers)]
    write_settings(folder, rest, slots, restarts)
    services = [Service("job_manager", _command(folder, _JOB_MANAGER), rest)]
    for name in names:
        port = find_free_port()
        own = [f"-Dtaskmanager.resource-id={name}", f"-Dtaskmanager.rpc.port={port}"]
        services.append(Service(name, _command(folder, _TASK_MANAGER, own), port))
    with run_services([*services, *others], log_dir) as processes:
        cluster = Cluster(f"localhost:{rest}", {name: processes[name] for name in names})
        wait_for_task_managers(cluster, log_dir)
        yield cluster


_JOB_MANAGER = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
_TASK_MANAGER = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"


def _command(folder: Path, main: str, own: Sequence[str] = ()) -> list[str]:
    """The commands of Flink's start scripts, which its Python package lacks."""
    opens = [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in _OPEN]
    system = [f"-Djava.io.tmpdir={folder}", f"-Dlog4j.configurationFile={folder / 'log4j.properties'}"]
    java = [find_java(), f"-Xmx{HEAP_MIB + 64}m", "-XX:+UseSerialGC", *opens, *system]
    return [*java, "-cp", f"{find_flink()}/*", main, "--configDir", str(folder), *own]


def write_settings(folder: Path, rest: int, slots: int, restarts: int) -> None:
    """Writes Flink's configuration, with the values that its start scripts would compute."""
    settings = {
        "jobmanager.rpc.address": "localhost",
        "jobmanager.bind-host": "localhost",
        "jobmanager.rpc.port": find_free_port(),
        "blob.server.port": find_free_port(),
        "rest.address": "localhost",
        "rest.bind-address": "localhost",
        "rest.port": rest,
        "taskmanager.host": "localhost",
        "taskmanager.bind-host": "localhost",
        "taskmanager.numberOfTaskSlots": slots,
        "taskmanager.cpu.cores": float(slots),
        "taskmanager.memory.framework.heap.size": "64m",
        "taskmanager.memory.framework.off-heap.size": "64m",
        "taskmanager.memory.task.heap.size": f"{HEAP_MIB}m",
        "taskmanager.memory.task.off-heap.size": "0m",
        "taskmanager.memory.managed.size": f"{MANAGED_MIB * slots}m",
        "taskmanager.memory.network.min": "64m",
        "taskmanager.memory.network.max": "64m",
        "taskmanager.memory.jvm-metaspace.size": "256m",
        "taskmanager.memory.jvm-overhead.min": "128m",
        "taskmanager.memory.jvm-overhead.max": "128m",
        "io.tmp.dirs": folder,
        "web.tmpdir": folder,
        # A dead process refuses the connection, which is noticed within moments; a busy one has longer to answer.
        "heartbeat.interval": 1000,
        "heartbeat.rpc-failure-threshold": 2,
        "heartbeat.timeout": 20000,
        "restart-strategy.type": "fixed-delay" if restarts else "none",
        "restart-strategy.fixed-delay.attempts": max(restarts, 1),
        "restart-strategy.fixed-delay.delay": "1 s",
    }
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    (folder / "log4j.properties").write_text(_LOG)


def wait_for_task_managers(cluster: Cluster, log_dir: Path) -> None:
    """Returns once all slots are registered with the JobManager.

    Raises:
      RuntimeError: if one ends, or it takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while missing := set(cluster.task_managers) - cluster.registered():
        ended = [name for name in missing if cluster.task_managers[name].poll() is not None]
        if ended or time.monotonic() > deadline:
            name = sorted(ended or missing)[0]
            log = (log_dir / f"{name}.log").read_text(errors="replace")
            raise RuntimeError(f"{name} does not report to the JobManager; its log ends with:\n{log[-2000:]}")
        time.sleep(0.2)
