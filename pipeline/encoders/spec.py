"""Describes an encoder before a run: its inputs, its outputs, and the hash of its weights."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config import EncoderConfig, VectorChoice
from pipeline.encoders.architecture import Architecture, canonical_names, recognise_architecture
from pipeline.encoders.cache import hash_file
from pipeline.encoders.default import default_encoder
from pipeline.encoders.parity import Parity, ParityCheck
from pipeline.encoders.runtime import Device, this_device
from pipeline.encoders.saved_model import (
    TOKEN_INPUTS,
    SavedModelSpec,
    Shape,
    describe_saved_model,
    read_variables,
    resolve_handle,
)
from pipeline.errors import ConfigError, EncoderError

_LOGGER = logging.getLogger(__name__)
DEFAULT_POSITIONS = 512  # if the SavedModel does not specify it


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder, ready to be loaded on a worker.

    Attributes:
      handle: what the user asked for; workers on other machines resolve it again.
      folder: the SavedModel on this machine.
      takes: `tokens` (the three int32 inputs) or `texts` (strings).
      choice: which output becomes the vector.
      dimension: D, or None if the SavedModel does not specify it.
      positions: the most tokens of one input.
      vocabulary_size: rows of the word embedding, or None where unknown.
      identity: what its vectors depend on, for the fingerprint.
      graph: `fast` or `published`.
      precision: of the dense layers' matmuls: float32, bfloat16 or float16.
      attention: of attention's, float32 or the same.
      native: whether the machine that planned the run multiplies in that precision natively.
      architecture: family and sizes, if they are known and the parity check succeeded.
      parity: how close the fast graph is to the published one, if it runs.
    """

    handle: str
    folder: str
    takes: str
    choice: VectorChoice
    dimension: int | None
    positions: int
    vocabulary_size: int | None
    identity: Mapping[str, object]
    graph: str = "published"
    precision: str = "float32"
    attention: str = "float32"
    native: bool = True
    architecture: Architecture | None = None
    parity: Parity | None = None


def describe_encoder(config: EncoderConfig, device: Device | None = None) -> tuple[EncoderSpec, SavedModelSpec]:
    """Resolves and inspects the configured encoder without loading it.

    Args:
      config: which encoder, and how it should run.
      device: what it will run on; by default this machine's.

    Raises:
      EncoderError: if there is no encoder, or it does not have the TF Hub text interface.
      ConfigError: if it does not have the requested output.
    """
    folder = resolve_handle(config.encoder) if config.encoder else default_encoder()
    model = describe_saved_model(folder, config.encoder)
    shown = config.encoder or "the built-in encoder"
    if set(TOKEN_INPUTS) == set(model.inputs):
        takes = "tokens"
    elif len(model.inputs) == 1 and model.input_dtypes == ("string",):
        takes = "texts"
    else:
        raise EncoderError(
            f"{shown} is not a text encoder: it takes {_list(model.inputs) or 'nothing'} instead of input_word_ids, "
            "input_mask and input_type_ids, or one tensor of strings; give another model"
        )
    if set(TOKEN_INPUTS) <= set(model.outputs):
        raise EncoderError(
            f"--encoder={config.encoder} is a preprocessor; give it as --preprocessor and name its encoder"
        )
    choice = choose_output(VectorChoice.parse(config.vector), model.outputs, shown, takes)
    shape = model.outputs[_output_key(choice)]
    positions, vocabulary_size = (
        _rows_of(model.variables, f"{name}/embeddings") for name in ("position_embedding", "word_embeddings")
    )
    weights_hash = hash_variables(folder, model)
    found: Architecture | str = (
        recognise_architecture(model.variables) if takes == "tokens" else "it takes strings and tokenises itself"
    )
    if isinstance(found, Architecture):
        check = ParityCheck(folder, found, weights_hash)
        parity = check.prove("float32")
        if not parity.holds:
            found = f"the fast graph does not give the same vectors ({parity})"
    spec = EncoderSpec(
        handle=config.encoder,
        folder=folder,
        takes=takes,
        choice=choice,
        dimension=shape[-1] if shape else None,
        positions=positions or DEFAULT_POSITIONS,
        vocabulary_size=vocabulary_size,
        identity=identify_encoder(folder, model, weights_hash, found),
    )
    if isinstance(found, Architecture):
        spec = replace(spec, architecture=found, parity=parity)
        return choose_graph(spec, config, check, device or this_device()), model
    refuse_fast_graph(config, shown, found)
    if takes == "tokens" and config.encoder_graph == "auto":
        _LOGGER.warning("%s runs in the published graph, not in the fast one: %s", shown, found)
    return spec, model


def choose_graph(spec: EncoderSpec, config: EncoderConfig, check: ParityCheck, device: Device) -> EncoderSpec:
    """Resolves graph and precision of an encoder of a known family, once for all workers.

    Raises:
      EncoderError: if the requested precision is too inaccurate.
    """
    if config.encoder_graph == "published":
        return replace(spec, parity=None)
    native = device.half_precision
    precision = (native or "float32") if config.precision == "auto" else config.precision
    spec = replace(spec, graph="fast")
    if precision == "float32":
        return spec
    if precision != native:
        _LOGGER.warning(
            "--precision=%s: the device does not support it natively: no faster than float32, with the same rounding",
            precision,
        )
    parity = check.prove(precision)
    if parity.holds:
        return replace(spec, precision=precision, attention=parity.attention, native=precision == native, parity=parity)
    if config.precision == "auto":
        _LOGGER.warning(
            "float32 is used instead of %s, which is too inaccurate for this encoder: %s", precision, parity
        )
        return spec
    raise EncoderError(f"--precision={precision} is too inaccurate for this encoder ({parity}); use float32")


def refuse_fast_graph(config: EncoderConfig, shown: str, why: str) -> None:
    """Raises EncoderError if a setting needs the fast graph."""
    if config.encoder_graph == "fast":
        raise EncoderError(f"--encoder_graph=fast: {shown} has no fast graph: {why}; leave it out")
    if config.precision in ("bfloat16", "float16"):
        raise EncoderError(
            f"--precision={config.precision} needs the fast graph, and {shown} has none: {why}; leave it out"
        )


def choose_output(choice: VectorChoice, outputs: Mapping[str, Shape], shown: str, takes: str) -> VectorChoice:
    """Checks a vector choice against the encoder's outputs; negative layers count from the end.

    Returns:
      The choice with its layer from 0; its output is "" for an encoder that gives one unnamed tensor.

    Raises:
      ConfigError: if the encoder has no such output.
    """
    names = sorted({name.split("/")[0] for name in outputs})
    if takes == "texts":
        if choice.pooling or choice.layer is not None:
            raise ConfigError(f"--vector={choice}: {shown} takes strings and gives one vector a text; drop the pooling")
        for name in (choice.output, "default", ""):
            if name in outputs:
                return VectorChoice(name)
    if choice.layer is not None:
        layers = sum(name.startswith(choice.output + "/") for name in outputs)
        if not -layers <= choice.layer < layers:
            has = f"{layers} layers (0 to {layers - 1})" if layers else "no such output"
            raise ConfigError(f"--vector={choice}: {shown} has {has}; name one of {_list(names)}")
        return replace(choice, layer=choice.layer % layers)
    if choice.output not in outputs:
        raise ConfigError(f"--vector={choice}: {shown} has no output {choice.output!r}; it gives {_list(names)}")
    rank = len(outputs[choice.output])
    if choice.pooling and rank == 2:
        raise ConfigError(f"--vector={choice}: {choice.output} is one vector already; drop ':{choice.pooling}'")
    return choice


def hash_variables(folder: str, model: SavedModelSpec) -> str:
    """The sha256 over the sorted official names and the values of a SavedModel's variables."""
    names = canonical_names(model.variables)
    digest = hashlib.sha256()
    for name, value in read_variables(folder, sorted(names, key=names.__getitem__)):
        digest.update(f"{names[name]} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def identify_encoder(
    folder: str, model: SavedModelSpec, weights_hash: str, found: Architecture | str
) -> dict[str, object]:
    """Everything about an encoder that its vectors depend on, and nothing else.

    If the parity check shows that the SavedModel computes a known family, the sizes identify its graph; else its own
    bytes and assets do. The folder's name and its fingerprint.pb are left out: they change with every copy or export.
    """
    if isinstance(found, Architecture):
        graph: dict[str, object] = found._asdict()
    else:
        files = ("saved_model.pb", *model.assets)
        graph = {"files": [hash_file(os.path.join(folder, name)) for name in files]}
    return {**graph, "weights": weights_hash}


def _output_key(choice: VectorChoice) -> str:
    return choice.output if choice.layer is None else f"{choice.output}/{choice.layer}"


def _rows_of(variables: Mapping[str, Shape], name: str) -> int | None:
    return variables[name][0] if name in variables else None


def _list(names: Iterable[str]) -> str:
    return ", ".join(name or "an unnamed tensor" for name in names)
