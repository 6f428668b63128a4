"""Access to BigQuery: names of tables, clients, and an emulator in place of the service.

Two environment variables, which every process of a run must have, select an emulator:
`BIGQUERY_EMULATOR_HOST`, a URL that Google's client knows too, and `BIGQUERY_STORAGE_EMULATOR_HOST`, host:port of the
read API. Without them nothing here differs from Google's defaults.

Google's clients are imported by the functions that need them: they take a second.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from google.cloud.bigquery import Client
    from google.cloud.bigquery_storage_v1 import BigQueryReadClient

SCHEME = "bq://"
API_VARIABLE = "BIGQUERY_EMULATOR_HOST"
READ_API_VARIABLE = "BIGQUERY_STORAGE_EMULATOR_HOST"

# A project of a domain has the domain before a colon. The dataset and the table end at a dot, so neither may hold one.
_NAME = re.compile(r"((?:[\w.-]+:)?[A-Za-z0-9][A-Za-z0-9-]*)\.(\w+)\.([\w-]+)")

_NO_CREDENTIALS = (
    "there are no credentials for BigQuery; run `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account"
)


class BigQueryName(NamedTuple):
    """A table of BigQuery; as text `bq://project.dataset.table`."""

    project: str
    dataset: str
    table: str

    @classmethod
    def parse(cls, text: str, flag: str = "") -> BigQueryName:
        """Reads a name.

        Args:
          text: such as `bq://my-project.my_dataset.my_table`, or `bq://example.com:my-project.my_dataset.my_table`.
          flag: of the command line, for the error.

        Raises:
          ConfigError: if the text is not such a name.
        """
        given = f"--{flag}={text}" if flag else text
        found = _NAME.fullmatch(text.removeprefix(SCHEME))
        if not text.startswith(SCHEME) or not found:
            raise ConfigError(
                f"{given} is not a table name: it must be bq://PROJECT.DATASET.TABLE of letters, digits and _, "
                "with - also in the project and the table; write bq://my-project.my_dataset.my_table"
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{SCHEME}{self.plain}"

    @property
    def plain(self) -> str:
        """As Google's client takes it."""
        return ".".join(self)

    @property
    def sql(self) -> str:
        """As a query takes it."""
        return f"`{self.plain}`"

    @property
    def beam(self) -> str:
        """As Beam's `WriteToBigQuery` takes it."""
        return f"{self.project}:{self.dataset}.{self.table}"

    @property
    def resource(self) -> str:
        """As the read API takes it."""
        return f"projects/{self.project}/datasets/{self.dataset}/tables/{self.table}"


def client(project: str = "") -> Client:
    """A client of BigQuery.

    Args:
      project: that jobs run in and are billed to; by default the environment's, as Google's clients find it.

    Raises:
      ConfigError: if there are no credentials.
    """
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import bigquery

    credentials = AnonymousCredentials() if os.environ.get(API_VARIABLE) else None
    try:
        return bigquery.Client(project=project or None, credentials=credentials)
    except DefaultCredentialsError as error:
        raise ConfigError(_NO_CREDENTIALS) from error


def billing_project(name: BigQueryName) -> str:
    """The project that reading a table is billed to: the environment's if it names one, else the table's own.

    Anybody may read a public table, but its project does not pay for that.
    """
    if os.environ.get(API_VARIABLE):
        return os.environ.get("GOOGLE_CLOUD_PROJECT") or name.project
    try:
        return client().project
    except OSError:  # Google's client raises this if there is none
        return name.project


def read_client() -> BigQueryReadClient:
    """The process's `BigQueryReadClient`, which all its threads share."""
    return _make_read_client(os.environ.get(READ_API_VARIABLE, ""))


@functools.lru_cache(maxsize=1)
def _make_read_client(emulator: str) -> BigQueryReadClient:
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud.bigquery_storage_v1 import BigQueryReadClient

    if not emulator:
        try:
            return BigQueryReadClient()
        except DefaultCredentialsError as error:
            raise ConfigError(_NO_CREDENTIALS) from error
    import grpc
    from google.cloud.bigquery_storage_v1.services.big_query_read.transports import BigQueryReadGrpcTransport

    channel = grpc.insecure_channel(emulator, options=[("grpc.max_receive_message_length", -1)])
    return BigQueryReadClient(transport=BigQueryReadGrpcTransport(channel=channel))


def use_emulator() -> None:
    """Makes Beam's own client for BigQuery use `BIGQUERY_EMULATOR_HOST`, which it does not support by itself."""
    if host := os.environ.get(API_VARIABLE):
        from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2

        BigqueryV2.BASE_URL = f"{host.rstrip('/')}/bigquery/v2/"


@dataclass(frozen=True)
class LoadParameters:
    """`additional_bq_parameters` of a `WriteToBigQuery`: the same for every destination.

    Beam keeps them in the very step that starts load jobs, so whatever process that step runs in first unpickles them,
    and with that calls `use_emulator`.

    Attributes:
      parameters: of the load job, such as {"clustering": {"fields": ["id"]}}.
    """

    parameters: dict[str, Any] = field(default_factory=dict)

    def __call__(self, destination: Any) -> dict[str, Any]:
        return self.parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        use_emulator()


use_emulator()  # so that naming this module as a Beam plugin is enough
