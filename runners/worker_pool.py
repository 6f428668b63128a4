"""A pool of workers for this machine alone: it starts a Beam worker process for each request on loopback.

    .venv/bin/python -m runners.worker_pool --port=50000

Beam's own pool listens on every network of the machine, although a worker runs whatever code it is sent, and keeps the
pipeline's options from its workers.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
from typing import Any

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.utils import thread_pool_executor

STOP_SECONDS = 10


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """What runners talk to."""

    def __init__(self) -> None:
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def StartWorker(self, request: Any, context: Any) -> Any:
        command = [
            *(sys.executable, "-m", "runners.worker", f"--id={request.worker_id}"),
            f"--control_endpoint={request.control_endpoint.url}",
            f"--logging_endpoint={request.logging_endpoint.url}",
            f"--provision_endpoint={request.provision_endpoint.url}",
        ]
        print("Starting worker with command", *command, flush=True)
        try:
            worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        except OSError as error:
            return beam_fn_api_pb2.StartWorkerResponse(error=str(error))
        with self._lock:
            self._workers[request.worker_id] = worker
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: Any) -> Any:
        with self._lock:
            worker = self._workers.pop(request.worker_id, None)
        if worker:
            end_process(worker)
        return beam_fn_api_pb2.StopWorkerResponse()

    def stop(self) -> None:
        """Ends all workers."""
        with self._lock:
            workers = list(self._workers.values())
            self._workers.clear()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            end_process(worker)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with SIGTERM, and kills it if it does not end."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runners.worker_pool", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    server, pool = grpc.server(thread_pool_executor.shared_unbounded_instance()), WorkerPool()
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(f"localhost:{options.port}")
    server.start()
    try:
        server.wait_for_termination()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        pool.stop()


if __name__ == "__main__":
    main()
