"""Where the elements of a pipeline are held, shuffled or merged."""

from __future__ import annotations

from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2

PAR_DO = common_urns.primitives.PAR_DO.urn
CROSSING = {
    common_urns.primitives.GROUP_BY_KEY.urn: "GroupByKey",
    common_urns.primitives.FLATTEN.urn: "Flatten",
    common_urns.composites.RESHUFFLE.urn: "Reshuffle",
}


def find_producers(proto: beam_runner_api_pb2.Pipeline) -> dict[str, str]:
    """PCollection -> `transform.tag`, the primitive one that makes it."""
    return {
        collection: f"{transform.unique_name}.{tag}"
        for transform in proto.components.transforms.values()
        if not transform.subtransforms
        for tag, collection in transform.outputs.items()
    }


def list_side_inputs(transform: beam_runner_api_pb2.PTransform) -> list[str]:
    """The PCollections that a ParDo takes as a whole."""
    if transform.spec.urn != PAR_DO:
        return []
    payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
    return [transform.inputs[tag] for tag in payload.side_inputs]


def find_crossings(proto: beam_runner_api_pb2.Pipeline) -> set[tuple[str, str]]:
    """All (producer, kind of crossing) at which a PCollection is held, shuffled or merged."""
    producers = find_producers(proto)
    crossings = set()
    for transform in proto.components.transforms.values():
        if kind := CROSSING.get(transform.spec.urn):
            crossings |= {(producers[collection], kind) for collection in transform.inputs.values()}
        crossings |= {(producers[collection], "side input") for collection in list_side_inputs(transform)}
    return crossings
