"""Cloud services on this machine, for tests: Google's own clients and Beam talk to emulators over loopback.

`make setup-emulators` installs them. A test that needs one fails without it: a skipped test says nothing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.paths import ROOT

EMULATORS = ROOT / ".emulators"
GCS_SERVER = EMULATORS / "fake-gcs-server" / "fake-gcs-server"
PRISM = EMULATORS / "prism" / "prism"
PROJECT = "embeam-test"
_LOOPBACK = "127.0.0.1"
_START_SECONDS = 20
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to loopback

# The shell ends the server when its input ends: when the test's process does, however that may be.
_UNTIL_PARENT_ENDS = 'exec 3<&0; "$@" </dev/null 3<&- & read -r _ <&3; kill $!; wait'


@dataclass(frozen=True)
class Gcs:
    """A running Cloud Storage.

    Attributes:
      url: where it listens.
      bucket: name of an empty bucket.
      environment: variables that make a process use it, with credentials that need no network.
    """

    url: str
    bucket: str
    environment: dict[str, str]

    def path(self, *names: str) -> str:
        return "/".join((f"gs://{self.bucket}", *names))

    def make_bucket(self, name: str) -> None:
        body = json.dumps({"name": name}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/storage/v1/b?project={PROJECT}", body, headers)
        with _HTTP.open(request, timeout=10):
            pass

    def objects(self, bucket: str = "") -> dict[str, dict[str, Any]]:
        """What the server says of each object, by name."""
        with _HTTP.open(f"{self.url}/storage/v1/b/{bucket or self.bucket}/o", timeout=10) as response:
            return {item["name"]: item for item in json.load(response).get("items", [])}

    @contextmanager
    def used_here(self) -> Iterator[None]:
        """Makes this process use it too: Beam looks for credentials once, and sets a time-out for all sockets."""
        from apache_beam.internal.gcp.auth import _Credentials

        timeout = socket.getdefaulttimeout()
        with (
            mock.patch.dict(os.environ, self.environment),
            mock.patch.multiple(_Credentials, _credentials_init=False, _credentials=None),
        ):
            try:
                yield
            finally:
                socket.setdefaulttimeout(timeout)


@contextmanager
def start_gcs() -> Iterator[Gcs]:
    """Runs a Cloud Storage with one bucket, in memory, for as long as the context lasts."""
    require(GCS_SERVER)
    port = free_port()
    url = f"http://{_LOOPBACK}:{port}"
    command = [str(GCS_SERVER), "-scheme=http", "-backend=memory", f"-host={_LOOPBACK}", f"-port={port}"]
    command += [f"-external-url={url}", f"-public-host={_LOOPBACK}:{port}", "-log-level=error"]
    with tempfile.TemporaryDirectory(prefix="gcs-") as folder:
        credentials = Path(folder, "credentials.json")
        credentials.write_text(json.dumps(make_credentials()))
        with run_server(command, f"{url}/_internal/healthcheck", Path(folder, "log")):
            loopback = f"{_LOOPBACK},localhost"
            environment = {
                "STORAGE_EMULATOR_HOST": url,
                "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
                "GOOGLE_CLOUD_PROJECT": PROJECT,
                "NO_PROXY": loopback,
                "no_proxy": loopback,
            }
            gcs = Gcs(url, f"bucket-{uuid.uuid4().hex[:8]}", environment)
            gcs.make_bucket(gcs.bucket)
            yield gcs


@contextmanager
def run_server(command: list[str], health_url: str, log: Path) -> Iterator[None]:
    """Runs a server until the context ends, or this process does; enters it once the health page answers."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            ["sh", "-c", _UNTIL_PARENT_ENDS, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    assert process.stdin is not None
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(health_url):
            if time.monotonic() > deadline:
                pytest.fail(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}", pytrace=False)
            time.sleep(0.05)
        yield
    finally:
        process.stdin.close()
        process.wait()


def make_credentials() -> dict[str, str]:
    """A user's credentials file whose token never needs renewal, so that nobody asks the network for one.

    Without credentials Beam asks a machine's metadata server for some, in vain and for over 20 seconds a process; with
    a service account's, Google's library looks up where that may be used.
    """
    names = ("token", "client_id", "client_secret", "refresh_token")
    return {"type": "authorized_user", "expiry": "2999-01-01T00:00:00Z"} | dict.fromkeys(names, "test")


def free_port() -> int:
    with socket.socket() as spot_check:
        spot_check.bind((_LOOPBACK, 0))
        return int(spot_check.getsockname()[1])


def require(program: Path) -> None:
    """Fails without a program that `make setup-emulators` installs."""
    if not program.exists():
        pytest.fail(f"{program} is missing: run `make setup-emulators`", pytrace=False)


def _answers(url: str) -> bool:
    try:
        with _HTTP.open(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False
