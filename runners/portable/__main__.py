"""Starts a job service and a pool of workers on this machine, for runs through Beam's portable API.

    .venv/bin/python -m runners.portable embeam embed --input=corpus.jsonl --output=table

runs a command with the flags that send it there, and stops both when it ends. Without a command it prints the flags
and serves until it is interrupted:

    .venv/bin/python -m runners.portable

The job service is Beam's own in Python, or Prism, which is an engine of its own:

    .venv/bin/python -m runners.portable --prism=.emulators/prism/prism embeam embed ...
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runners.services import Service, ended_by_signals, find_free_port, run_or_serve, run_services, worker_pool


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runners.portable", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--job_port", type=int, default=0, help="port of the job service (default: a free one)")
    parser.add_argument("--worker_port", type=int, default=0, help="port of the worker pool (default: a free one)")
    parser.add_argument("--prism", metavar="PROGRAM", help="job service: Prism's program, instead of Beam's in Python")
    parser.add_argument("--log_dir", help="folder for both services' logs (default: a temporary one)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, such as: embeam embed --input=...")
    options = parser.parse_args()
    with (
        ended_by_signals(),
        serve(options.job_port, options.worker_port, options.log_dir, options.prism) as flags,
    ):
        run_or_serve(options.command, flags)


@contextmanager
def serve(
    job_port: int = 0, worker_port: int = 0, log_dir: str | None = None, prism: str | None = None
) -> Iterator[list[str]]:
    """Starts both services; kills them and their workers when the block ends in any way.

    Yields:
      The flags with which a pipeline runs there.

    Raises:
      RuntimeError: if one does not start, with the end of its log.
    """
    job_port, worker_port = job_port or find_free_port(), worker_port or find_free_port()
    python = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port={job_port}"]
    command = [prism, f"-job_port={job_port}", "-serve_http=false", "-log_level=warn"] if prism else python
    services = [Service("job_service", command, job_port), worker_pool(worker_port)]
    with ExitStack() as stack:
        folder = log_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="embeam-portable-"))
        stack.enter_context(run_services(services, Path(folder)))
        yield [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{job_port}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{worker_port}",
        ]


if __name__ == "__main__":
    main()
