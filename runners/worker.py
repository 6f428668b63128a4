"""One worker process of Beam, as a runner that starts it through a pool of workers wants it.

It asks the runner for the pipeline's options first, as Beam's containers do. The workers that Beam's own pool starts do
not: there a file system's or a plug-in's options have no effect.
"""

from __future__ import annotations

import argparse
import os
import sys

import grpc
from apache_beam.portability.api import beam_provision_api_pb2, beam_provision_api_pb2_grpc, endpoints_pb2
from apache_beam.runners.worker import sdk_worker_main
from apache_beam.runners.worker.worker_id_interceptor import WorkerIdInterceptor
from google.protobuf import json_format, text_format


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runners.worker", description=(__doc__ or "").split("\n")[0])
    for name in ("id", "control_endpoint", "logging_endpoint", "provision_endpoint"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    information = ask_runner(given.provision_endpoint, given.id)
    os.environ |= {
        "WORKER_ID": given.id,
        "PIPELINE_OPTIONS": json_format.MessageToJson(information.pipeline_options),
        "RUNNER_CAPABILITIES": " ".join(information.runner_capabilities),
        "CONTROL_API_SERVICE_DESCRIPTOR": describe_endpoint(given.control_endpoint),
        "LOGGING_API_SERVICE_DESCRIPTOR": describe_endpoint(given.logging_endpoint),
    }
    sdk_worker_main.main(sys.argv)


def ask_runner(endpoint: str, worker: str) -> beam_provision_api_pb2.ProvisionInfo:
    """What the runner tells a worker about its job."""
    with grpc.insecure_channel(endpoint) as channel:
        as_worker = grpc.intercept_channel(channel, WorkerIdInterceptor(worker))
        service = beam_provision_api_pb2_grpc.ProvisionServiceStub(as_worker)
        return service.GetProvisionInfo(beam_provision_api_pb2.GetProvisionInfoRequest(), timeout=60).info


def describe_endpoint(url: str) -> str:
    return text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=url))


if __name__ == "__main__":
    main()
