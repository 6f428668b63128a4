"""BigQuery on this machine, for tests: `start_bigquery` runs an emulator that loads files from `start_gcs`.

Run as a program, by the emulators' own Python, this file is the emulator. As such it finds no pytest, and so imports
what else the tests have only where it is needed.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from tests.support.emulators import Gcs

_LOOPBACK = "127.0.0.1"
_START_SECONDS = 20
_MESSAGE_BYTES = (1 << 30) - 1  # the service would split large answers of the read API, the emulator does not


@dataclass(frozen=True)
class BigQueryEmulator:
    """A running BigQuery, without any dataset.

    Attributes:
      gcs: the Cloud Storage that it loads files from.
      project: a name for one; any other would do.
      environment: variables that make a process use it, and the Cloud Storage.
    """

    gcs: Gcs
    project: str
    environment: dict[str, str]

    @contextmanager
    def used_here(self) -> Iterator[None]:
        """Makes this process use it too."""
        from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2

        url = f"{self.environment['BIGQUERY_EMULATOR_HOST']}/bigquery/v2/"
        with (
            self.gcs.used_here(),
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(BigqueryV2, "BASE_URL", url),
        ):
            yield


@contextmanager
def start_bigquery(gcs: Gcs) -> Iterator[BigQueryEmulator]:
    """Runs a BigQuery, in memory, for as long as the context lasts."""
    import pytest

    from tests.support.emulators import EMULATORS, PROJECT, free_port, run_server

    python = EMULATORS / "venv" / "bin" / "python"
    if not (python.parent / "bqemulator").exists():
        pytest.fail(f"{python.parent / 'bqemulator'} is missing: run `make setup-emulators`", pytrace=False)
    home = EMULATORS / "home"
    home.mkdir(exist_ok=True)
    rest, grpc = free_port(), free_port()
    url = f"http://{_LOOPBACK}:{rest}"
    variables = {
        "HOME": str(home),  # DuckDB's extensions go below it
        "STORAGE_EMULATOR_HOST": gcs.url,
        "BQEMU_WRITE_API_MAX_REQUEST_BYTES": str(_MESSAGE_BYTES),
        "BQEMU_LOG_LEVEL": "warning",
        "BQEMU_LOG_FORMAT": "console",
    }
    with tempfile.TemporaryDirectory(prefix="bigquery-") as folder:
        command = ["env", *(f"{name}={value}" for name, value in variables.items())]
        command += [str(python), __file__, str(rest), str(grpc), folder]
        with run_server(command, f"{url}/readyz", Path(folder, "log")):
            _wait_for_port(grpc)
            own = {"BIGQUERY_EMULATOR_HOST": url, "BIGQUERY_STORAGE_EMULATOR_HOST": f"{_LOOPBACK}:{grpc}"}
            yield BigQueryEmulator(gcs, PROJECT, {**gcs.environment, **own})


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection((_LOOPBACK, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def serve(rest_port: int, grpc_port: int, folder: str) -> None:
    """Runs the emulator in this process: bqemulator, which is taught to fetch from a Cloud Storage emulator."""
    from bqemulator.config import Settings
    from bqemulator.jobs import executor
    from bqemulator.server import run_forever
    from duckdb_extensions import import_extension

    for name in ("spatial", "avro"):
        import_extension(name)
    find_local_file = executor._resolve_uri

    def find_file(uri: str, context: Any) -> str:
        return download(uri, folder) if uri.startswith("gs://") else find_local_file(uri, context)

    executor._resolve_uri = find_file
    run_forever(Settings(rest_host=_LOOPBACK, rest_port=rest_port, grpc_host=_LOOPBACK, grpc_port=grpc_port))


def download(uri: str, folder: str) -> str:
    """Copies an object of Cloud Storage to a file in a folder and returns its path."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media"
    path = Path(folder, uuid.uuid4().hex)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as response:
        path.write_bytes(response.read())
    return str(path)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
