"""Services that a run needs beside it, as processes of this machine that end with the process that started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 60
STOP_SECONDS = 10
ROOT = str(Path(__file__).resolve().parents[1])


class Service(NamedTuple):
    """A process that listens on a port.

    Attributes:
      name: of its log file.
      command: what is run.
      port: where it listens once it is ready.
      environment: variables of its own.
    """

    name: str
    command: Sequence[str]
    port: int
    environment: Mapping[str, str] = {}


def worker_pool(port: int, environment: Mapping[str, str] = {}) -> Service:
    """A pool that starts a Beam worker process on each request."""
    command = [sys.executable, "-m", "runners.worker_pool", f"--port={port}"]
    return Service("worker_pool", command, port, environment)


@contextmanager
def run_services(services: Sequence[Service], log_dir: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Starts all services and waits until they listen; kills them and their children when the block ends in any way.

    Yields:
      The processes by their names.

    Raises:
      RuntimeError: if one does not start, with the end of its log.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        started = {}
        for service in services:
            started[service.name] = stack.enter_context(run_service(service, log_dir / f"{service.name}.log"))
        for service in services:
            wait_for_port(started[service.name], service.port, log_dir / f"{service.name}.log")
        yield started


@contextmanager
def run_service(service: Service, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a service in a session of its own, so that it can be killed together with its children."""
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]  # the workers import our package
    folders = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]  # the pool starts plain `python`
    own = {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(folders), **service.environment}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            list(service.command),
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            stop_session(process)


def stop_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children: first with SIGTERM, then with SIGKILL."""
    signal_session(process, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    signal_session(process, signal.SIGKILL)
    process.wait()


def signal_session(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def run_command(command: Sequence[str]) -> int:
    """Runs a command to its end and returns its exit code."""
    folders = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]  # where `embeam` is, too
    try:
        process = subprocess.Popen(command, env=os.environ | {"PATH": os.pathsep.join(folders)})
    except OSError as error:
        print(f"{command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def run_or_serve(command: Sequence[str], flags: Sequence[str]) -> None:
    """Runs a command with flags behind it and exits as it does; without one, prints the flags and waits."""
    if command:
        sys.exit(run_command([*command, *flags]))
    print(*flags, flush=True)
    signal.pause()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C leave the block as its end does, with the exit codes of a shell."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Returns once a process listens on the port.

    Raises:
      RuntimeError: if the process ends or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("localhost", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"no process listens on port {port}; the service's log ends with:\n{log.read_text()[-2000:]}")


def find_free_port() -> int:
    with socket.socket() as spot_check:
        spot_check.bind(("localhost", 0))
        return int(spot_check.getsockname()[1])
