"""Starts a Flink cluster and a pool of workers on this machine, for runs through Beam's runner for Flink.

    .venv/bin/python -m runners.flink embeam embed --input=corpus.jsonl --output=table

runs a command with the flags that send it there, and stops everything when it ends. Without a command it prints the
flags and serves until it is interrupted:

    .venv/bin/python -m runners.flink --task_managers=4

`make setup-flink` brings Flink; Beam's job server for it is a jar of its own (see README.md here).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runners.flink.cluster import run_cluster
from runners.flink.software import FLINK_MINOR, find_java, find_job_server
from runners.services import ended_by_signals, find_free_port, run_or_serve, worker_pool


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runners.flink", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task_managers", type=int, default=2, help="number of TaskManagers (default: 2)")
    parser.add_argument("--slots", type=int, default=1, help="slots of each TaskManager (default: 1)")
    parser.add_argument("--parallelism", type=int, default=0, help="slots that a job takes (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes that each TaskManager starts (default: 1)")
    parser.add_argument(
        "--worker_threads", type=int, default=0, help="TensorFlow threads in each worker (default: all cores)"
    )
    parser.add_argument("--restarts", type=int, default=3, help="restarts of a job before it fails (default: 3)")
    parser.add_argument("--job_server_jar", help="Beam's job server for Flink (default: the one in Beam's cache)")
    parser.add_argument("--log_dir", help="folder for the logs of all processes (default: a temporary one)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, such as: embeam embed --input=...")
    options = parser.parse_args()
    with ended_by_signals():
        try:
            jar = Path(options.job_server_jar) if options.job_server_jar else find_job_server()
            if not jar.exists():
                raise FileNotFoundError(f"--job_server_jar={jar} does not exist")
            with serve(options, jar) as flags:
                run_or_serve(options.command, flags)
        except FileNotFoundError as error:
            sys.exit(str(error))


@contextmanager
def serve(options: argparse.Namespace, job_server: Path) -> Iterator[list[str]]:
    """Starts all services; kills them and their workers when the block ends in any way.

    Yields:
      The flags with which a pipeline runs there.

    Raises:
      FileNotFoundError: if Flink or Java is missing.
      RuntimeError: if a service does not start, with the end of its log.
    """
    threads = str(options.worker_threads)
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    pool = worker_pool(find_free_port(), dict.fromkeys(names, threads) if options.worker_threads else {})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embeam-flink-")))
        log_dir = Path(options.log_dir or folder / "logs")
        running = run_cluster(folder, options.task_managers, options.slots, options.restarts, log_dir, [pool])
        cluster = stack.enter_context(running)
        yield [
            "--runner=FlinkRunner",
            f"--flink_version={FLINK_MINOR}",
            f"--flink_master={cluster.master}",
            f"--flink_job_server_jar={job_server}",
            f"--job_server_java_launcher={find_java()}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{pool.port}",
            f"--sdk_worker_parallelism={options.workers}",
            f"--parallelism={options.parallelism or options.task_managers * options.slots}",
        ]


if __name__ == "__main__":
    main()
