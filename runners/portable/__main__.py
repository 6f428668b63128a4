"""Starts Beam's own job service and a pool of workers on this machine, for runs through Beam's portable API.

    .venv/bin/python -m runners.portable embeam embed --input=corpus.jsonl --output=table

runs a command with the flags that send it there, and stops both when it ends. Without a command it prints the flags
and serves until it is interrupted:

    .venv/bin/python -m runners.portable
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

START_SECONDS = 60
STOP_SECONDS = 10
ROOT = str(Path(__file__).resolve().parents[2])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runners.portable", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--job_port", type=int, default=0, help="port of the job service (default: a free one)")
    parser.add_argument("--worker_port", type=int, default=0, help="port of the worker pool (default: a free one)")
    parser.add_argument("--log_dir", help="folder for both services' logs (default: a temporary one)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, such as: embeam embed --input=...")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with serve(options.job_port, options.worker_port, options.log_dir) as flags:
            if options.command:
                sys.exit(run_command([*options.command, *flags]))
            print(*flags, flush=True)
            signal.pause()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextmanager
def serve(job_port: int = 0, worker_port: int = 0, log_dir: str | None = None) -> Iterator[list[str]]:
    """Starts both services; on the way out, however that comes, they and their workers are killed.

    Yields:
      The flags with which a pipeline runs there.

    Raises:
      RuntimeError: if one does not start, with the end of its log.
    """
    job_port, worker_port = job_port or find_free_port(), worker_port or find_free_port()
    with ExitStack() as stack:
        folder = Path(log_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="embeam-portable-")))
        folder.mkdir(parents=True, exist_ok=True)
        services = {
            "runners.portability.local_job_service_main": (f"--port={job_port}", job_port),
            "runners.worker.worker_pool_main": (f"--service_port={worker_port}", worker_port),
        }
        started = [
            (stack.enter_context(run_service(f"apache_beam.{module}", flag, folder / f"{module}.log")), port)
            for module, (flag, port) in services.items()
        ]
        for (process, log), port in started:
            wait_for_port(process, port, log)
        yield [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{job_port}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{worker_port}",
        ]


@contextmanager
def run_service(module: str, flag: str, log: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Runs a module in a session of its own, so that it can be killed together with its children."""
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]  # the workers import our package
    folders = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]  # the pool starts plain `python`
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(folders)}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, flag],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process, log
        finally:
            stop_session(process)


def stop_session(process: subprocess.Popen) -> None:
    """Ends a process and all that it started: asks first, then kills what is left."""
    signal_session(process, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    signal_session(process, signal.SIGKILL)
    process.wait()


def signal_session(process: subprocess.Popen, number: signal.Signals) -> None:
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


def wait_for_port(process: subprocess.Popen, port: int, log: Path) -> None:
    """Returns once somebody listens on the port.

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
    raise RuntimeError(f"nobody listens on port {port}; the service's log ends with:\n{log.read_text()[-2000:]}")


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
