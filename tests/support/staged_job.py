"""A job as it was staged for Dataflow: its graph looked into, and run on this machine.

`python tests/support/staged_job.py gs://bucket/tmp/job/pipeline.pb` does what the service's machines would do with it:
the workers know nothing but the staged graph and what lies on Cloud Storage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns, python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.runner import PipelineState

PIPELINE_FILE = "pipeline.pb"
_WORKER = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
_RESHUFFLES = (common_urns.composites.RESHUFFLE.urn, common_urns.primitives.GROUP_BY_KEY.urn)


@dataclass(frozen=True)
class StagedJob:
    """A staged pipeline, for questions about its steps.

    Attributes:
      path: where it lies.
      proto: what lies there.
    """

    path: str
    proto: beam_runner_api_pb2.Pipeline

    @classmethod
    def load(cls, path: str) -> StagedJob:
        with FileSystems.open(path, compression_type="uncompressed") as stream:
            return cls(path, beam_runner_api_pb2.Pipeline.FromString(stream.read()))

    @classmethod
    def find(cls, folder: str) -> StagedJob:
        """The one job that was staged below a folder; there must be no other."""
        paths = [found.path for found in FileSystems.match([f"{folder}/**"])[0].metadata_list]
        (path,) = (path for path in paths if path.endswith(f"/{PIPELINE_FILE}"))
        return cls.load(path)

    def steps(self) -> Iterator[beam_runner_api_pb2.PTransform]:
        """The transforms that run in a worker's Python."""
        for transform in self.proto.components.transforms.values():
            if not transform.subtransforms and transform.environment_id:
                yield transform

    def names(self, prefix: str = "") -> set[str]:
        """The steps whose names begin so."""
        return {step.unique_name for step in self.steps() if step.unique_name.startswith(prefix)}

    def images(self) -> dict[str, str]:
        """Container image of every step, by its name."""
        images = {}
        for step in self.steps():
            environment = self.proto.components.environments[step.environment_id]
            assert environment.urn == common_urns.environments.DOCKER.urn, environment.urn
            payload = beam_runner_api_pb2.DockerPayload.FromString(environment.payload)
            images[step.unique_name] = payload.container_image
        return images

    def artifacts(self) -> set[str]:
        """Paths of what workers install before they begin."""
        environments = self.proto.components.environments.values()
        files = [artifact for environment in environments for artifact in environment.dependencies]
        return {beam_runner_api_pb2.ArtifactUrlPayload.FromString(file.type_payload).url for file in files}

    def hints(self) -> dict[str, dict[str, str]]:
        """Resource hints of every step, by its name; hints by the last part of their URN but the version."""
        environments = self.proto.components.environments
        return {
            step.unique_name: {
                urn.split(":")[-2]: value.decode()
                for urn, value in environments[step.environment_id].resource_hints.items()
            }
            for step in self.steps()
        }

    def shuffles(self) -> dict[str, list[str]]:
        """Every reshuffle and grouping with the coders, from the outside in, of what goes into it."""
        return {
            transform.unique_name: [
                name for collection in transform.inputs.values() for name in self._spell(collection)
            ]
            for transform in self.proto.components.transforms.values()
            if transform.spec.urn in _RESHUFFLES
        }

    def _spell(self, collection: str) -> Iterator[str]:
        components = self.proto.components
        waiting = [components.pcollections[collection].coder_id]
        while waiting:
            coder = components.coders[waiting.pop()]
            yield f"{coder.spec.urn} {coder.spec.payload.decode('latin1')}".strip()
            waiting += reversed(coder.component_coder_ids)

    def fused_with(self, names: set[str]) -> set[str]:
        """All steps that may end up on one kind of machine with some: Dataflow merges the hints of what it fuses.

        Steps fuse along elements that go from one to the other, but not across a shuffle, nor into a side input. What
        comes together in a Flatten goes on with either producer, and so does not tie them to each other.
        """
        leaves = {t.unique_name: t for t in self.proto.components.transforms.values() if not t.subtransforms}
        shuffles = {name for name, t in leaves.items() if t.spec.urn == common_urns.primitives.GROUP_BY_KEY.urn}
        makers = {collection: name for name, t in leaves.items() for collection in t.outputs.values()}
        takers: dict[str, set[str]] = {name: set() for name in leaves}
        for name, transform in leaves.items():
            for collection in _main_inputs(transform):
                takers[makers[collection]].add(name)
        found, waiting = set(names), list(names)
        while waiting:
            name = waiting.pop()
            near = set(takers[name])
            if leaves[name].spec.urn != common_urns.primitives.FLATTEN.urn:
                near |= {makers[collection] for collection in _main_inputs(leaves[name])}
            near -= shuffles | found
            found |= near
            waiting += near
        return found

    def run(self, processes: bool = False) -> None:
        """Runs it on this machine.

        Args:
          processes: one worker process for each environment, as machines with and without a GPU would be; else all in
            this process.

        Raises:
          RuntimeError: if it fails.
        """
        local = beam_runner_api_pb2.Pipeline()
        local.CopyFrom(self.proto)
        for environment in local.components.environments.values():
            environment.urn = python_urns.SUBPROCESS_SDK if processes else python_urns.EMBEDDED_PYTHON
            environment.payload = _WORKER.encode() if processes else b""
            del environment.dependencies[:]  # what an image lacks; here everything is installed
        result = fn_runner.FnApiRunner().run_via_runner_api(local, PipelineOptions([]))
        if result.wait_until_finish() != PipelineState.DONE:
            raise RuntimeError(f"the job ended as {result.state}")


def _main_inputs(transform: beam_runner_api_pb2.PTransform) -> list[str]:
    """What a transform takes element by element."""
    sides: set[str] = set()
    if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
        sides = set(beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload).side_inputs)
    return [collection for tag, collection in transform.inputs.items() if tag not in sides]


if __name__ == "__main__":
    StagedJob.load(sys.argv[1]).run("--processes" in sys.argv[2:])
