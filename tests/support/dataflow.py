"""A small Dataflow on this machine: what Beam's client asks of the real one, over HTTP.

It keeps every job as it was submitted, and either runs it here, as its workers would, or ends it as a test says.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from tests.support.paths import ROOT

RUNNING, DONE, FAILED, CANCELLED, CANCELLING = (
    f"JOB_STATE_{name}" for name in ("RUNNING", "DONE", "FAILED", "CANCELLED", "CANCELLING")
)
_CANCEL = (CANCELLED, 5)  # clients may send an enum as its number
_PATH = re.compile(
    r"/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs(/(?P<id>[^/]+)(/(?P<part>\w+))?)?"
)


class Ending(NamedTuple):
    """How a job ends: its last state, and the errors that are told of it before."""

    state: str = DONE
    errors: tuple[str, ...] = ()


class Refusal(NamedTuple):
    """An answer instead of what was asked for."""

    code: int
    status: str
    message: str


@dataclass
class Job:
    """A job that was submitted.

    Attributes:
      project: as the client named it.
      region: likewise.
      description: what the client sent.
      state: the current one.
      errors: with the times at which they were told.
      followed: set when the client first asks how it is.
      cancelled: set when the client asks for its end.
    """

    project: str
    region: str
    description: dict[str, Any]
    state: str = RUNNING
    errors: list[tuple[str, str]] = field(default_factory=list)
    followed: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def pipeline_url(self) -> str:
        return str(self.description["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"])

    @property
    def pool(self) -> dict[str, Any]:
        """What is said of the workers."""
        (pool,) = self.description["environment"]["workerPools"]
        return pool

    def end(self, ending: Ending) -> None:
        self.errors += [(_now(), error) for error in ending.errors]
        self.state = ending.state


Run = Callable[[Job], Ending]


class DataflowService:
    """Jobs by their ids, and what becomes of those that come.

    Attributes:
      url: where it listens; by the name that makes Beam's client speak HTTP.
      jobs: all that were submitted.
      run: what a job does, in a thread of its own.
      refuse: the answer to a method and part, such as ("POST", "") or ("GET", "messages"), if it is no proper one.
      cancel_seconds: how long a job takes to end that is cancelled.
    """

    def __init__(self) -> None:
        self.url = ""
        self.jobs: dict[str, Job] = {}
        self.refuse: dict[tuple[str, str], Refusal] = {}
        self.run: Run = lambda job: Ending()
        self.cancel_seconds = 0.0

    @property
    def job(self) -> Job:
        """The only job."""
        (job,) = self.jobs.values()
        return job

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """The status and body of one response."""
        found = _PATH.fullmatch(path)
        if not found:
            return _error(404, "NOT_FOUND", f"{method} {path} is not spoken here")
        job_id, part = found["id"] or "", found["part"] or ""
        if refusal := self.refuse.get((method, part)):
            return _error(*refusal)
        if method == "POST" and not job_id:
            return 200, self._create(found["project"], found["region"], body)
        job = self.jobs.get(job_id)
        if job is None:
            return _error(404, "NOT_FOUND", f"there is no job {job_id!r}")
        if method == "GET":
            job.followed.set()
        if method == "PUT" and body.get("requestedState") in _CANCEL:
            self._cancel(job)
        elif method != "GET" or part not in ("", "messages", "metrics"):
            return _error(404, "NOT_FOUND", f"{method} {path} is not spoken here")
        if part == "messages":
            return 200, {"jobMessages": _tell(job)}
        return 200, {} if part == "metrics" else self._describe(job_id)

    def _create(self, project: str, region: str, description: dict[str, Any]) -> dict[str, Any]:
        job, job_id = Job(project, region, description), f"job-{len(self.jobs)}"
        self.jobs[job_id] = job
        created = self._describe(job_id)  # before it can end: no answer of the real one is as late

        def work() -> None:
            ending = self.run(job)
            if not job.cancelled.is_set():
                job.end(ending)

        threading.Thread(target=work, name=job_id, daemon=True).start()
        return created

    def _cancel(self, job: Job) -> None:
        job.state = CANCELLING
        job.cancelled.set()
        threading.Timer(self.cancel_seconds, job.end, [Ending(CANCELLED)]).start()

    def _describe(self, job_id: str) -> dict[str, Any]:
        job = self.jobs[job_id]
        kept = {name: job.description[name] for name in ("name", "clientRequestId") if name in job.description}
        return {"id": job_id, "projectId": job.project, "location": job.region, "currentState": job.state} | kept


def run_staged(environment: dict[str, str], *arguments: str) -> Run:
    """Runs each job's staged graph in a process of its own; see `run_apart`."""
    return lambda job: run_apart(job.pipeline_url, environment, *arguments, cancelled=job.cancelled)


def run_apart(
    path: str, environment: dict[str, str], *arguments: str, cancelled: threading.Event | None = None
) -> Ending:
    """Runs a staged graph in a process of its own.

    Args:
      path: of the graph.
      environment: variables that its machines have.
      arguments: for `staged_job.py`.
      cancelled: ends it once it is set.
    """
    command = [sys.executable, str(ROOT / "tests/support/staged_job.py"), path, *arguments]
    variables = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) as process:
        if cancelled:
            threading.Thread(target=lambda: cancelled.wait() and process.kill(), daemon=True).start()
        _, log = process.communicate()
    if process.returncode == 0:
        return Ending()
    trace = log[log.rfind("Traceback (most recent call last)") :]
    return Ending(FAILED, (f"Error message from worker: {trace}",))


def wait_for_cancel(job: Job) -> Ending:
    """Runs until it is cancelled."""
    job.cancelled.wait()
    return Ending(CANCELLED)


@contextmanager
def start_dataflow() -> Iterator[DataflowService]:
    """Runs a service for as long as the context lasts; jobs that run then are cancelled."""
    service = DataflowService()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            status, answer = service.answer(self.command, unquote(urlsplit(self.path).path), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    service.url = f"http://localhost:{server.server_port}"
    try:
        yield service
    finally:
        for job in service.jobs.values():
            job.cancelled.set()
        server.shutdown()
        server.server_close()


def wait_until(reached: Callable[[], Any], seconds: float = 240.0) -> None:
    """Waits for something that another thread or process brings about."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def _tell(job: Job) -> list[dict[str, str]]:
    return [
        {"id": str(i), "time": when, "messageText": text, "messageImportance": "JOB_MESSAGE_ERROR"}
        for i, (when, text) in enumerate(job.errors)
    ]


def _error(code: int, status: str, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"error": {"code": code, "status": status, "message": message}}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
