"""The verbs that write models: `embeam export-encoder` and `embeam export-preprocessor`."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.cli.flags import at_least_one, at_least_zero
from pipeline.encoders.architecture import (
    TALKING_HEADS,
    Architecture,
    canonical_names,
    infer_architecture,
    recognise_architecture,
    weight_shapes,
)
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.saved_model import describe_saved_model, read_flag, read_variables, resolve_handle
from pipeline.errors import ConfigError, EncoderError, first_line
from pipeline.files import absolute_path

if TYPE_CHECKING:
    import numpy as np

    from pipeline.cli.flags import Verbs

SIZES = {"layers": "layers", "hidden_size": "width", "heads": "heads", "positions": "positions"}  # flag to field
DESCRIPTION = (*SIZES, "seed", "vocab_file", "cased")  # flags that say what a new encoder is like
POSITIONS, SEED = 512, 0


class Content(NamedTuple):
    """What goes into an encoder's SavedModel."""

    weights: dict[str, np.ndarray]
    vocabulary: list[str]
    lower_case: bool


def add_export_verbs(verbs: Verbs) -> None:
    """Adds both verbs to the command's."""
    stray = "every setting is a flag, as in --output={}"
    encoder = verbs.add_parser(
        "export-encoder",
        help="write an encoder: the built-in one, a new one, or another's weights",
        description="Writes a talking-heads gated-GELU BERT as a SavedModel with the interface of TF Hub: the built-in "
        "encoder, a new untrained one of the given sizes, or the weights of another encoder.",
    )
    sizes: dict[str, Any] = {"type": at_least_one, "metavar": "N"}
    encoder.add_argument("--layers", help="number of layers", **sizes)
    encoder.add_argument("--hidden_size", help="size of a token's vector, a multiple of --heads", **sizes)
    encoder.add_argument("--heads", help="attention heads in each layer", **sizes)
    encoder.add_argument("--positions", help=f"the most tokens of an input (default: {POSITIONS})", **sizes)
    encoder.add_argument(
        "--seed", type=at_least_zero, metavar="N", help=f"seed of the initial weights (default: {SEED})"
    )
    encoder.add_argument(
        "--from_encoder", metavar="DIR", help="take weights and sizes from this encoder: a folder or hub handle"
    )
    encoder.set_defaults(run=run_export_encoder, parser=encoder, stray=stray)

    preprocessor = verbs.add_parser(
        "export-preprocessor",
        help="write a preprocessor for a vocabulary",
        description="Writes a SavedModel that turns strings into an encoder's inputs, with the interface of TF Hub.",
    )
    preprocessor.set_defaults(run=run_export_preprocessor, parser=preprocessor, stray=stray)

    for parser, whose in (
        (encoder, "the vocabulary of the encoder that is written"),
        (preprocessor, "the vocabulary of the built-in encoder"),
    ):
        parser.add_argument(
            "--vocab_file",
            metavar="FILE",
            help=f"word pieces in the order of their ids, one per line (default: {whose})",
        )
        parser.add_argument("--cased", action="store_true", help="the vocabulary distinguishes case and accents")
        parser.add_argument("--output", metavar="DIR", required=True, help="folder to create")


def run_export_encoder(known: argparse.Namespace) -> None:
    folder = check_output(known.output)
    if known.from_encoder is not None:
        kind, find = "", read_encoder
    elif any(getattr(known, flag) not in (None, known.parser.get_default(flag)) for flag in DESCRIPTION):
        kind, find = ", untrained", new_encoder
    else:
        kind, find = "", built_in_encoder
    weights, vocabulary, lower_case = find(known)
    with writing(known.output):
        from pipeline.encoders.export import export_encoder

        export_encoder(weights, vocabulary, folder, lower_case=lower_case)
    sizes = infer_architecture({name: weight.shape for name, weight in weights.items()})
    print(
        f"{known.output} holds an encoder of {count_parameters(sizes):,} parameters"
        f"{kind}: {sizes.layers} layers, width {sizes.width}, "
        f"{sizes.heads} heads, {len(vocabulary):,} {describe_case(lower_case)} pieces, up to {sizes.positions} tokens\n"
        f"next: embeam embed --input='corpus/*' --encoder={shlex.quote(known.output)} --output=table"
    )


def run_export_preprocessor(known: argparse.Namespace) -> None:
    folder = check_output(known.output)
    if known.vocab_file is not None:
        vocabulary = read_vocabulary(known.vocab_file, f"--vocab_file={known.vocab_file}")
    elif known.cased:
        raise ConfigError("--cased: the built-in encoder's vocabulary is uncased; name another with --vocab_file")
    else:
        from pipeline.encoders.default import default_vocabulary

        vocabulary = default_vocabulary()
    with writing(known.output):
        from pipeline.preprocess.export import export_preprocessor

        export_preprocessor(vocabulary, folder, lower_case=not known.cased)
    print(
        f"{known.output} holds a preprocessor: {len(vocabulary):,} {describe_case(not known.cased)} pieces\n"
        "next: embeam embed --input='corpus/*' --encoder=ENCODER "
        f"--preprocessor={shlex.quote(known.output)} --output=table"
    )


def built_in_encoder(known: argparse.Namespace) -> Content:
    from pipeline.encoders.default import default_vocabulary, default_weights

    return Content(default_weights(), default_vocabulary(), lower_case=True)


def new_encoder(known: argparse.Namespace) -> Content:
    """Seeded weights of the sizes that the flags give.

    Raises:
      ConfigError: if flags are missing or do not fit each other, the vocabulary or the memory.
    """
    missing = [f"--{flag}" for flag in ("layers", "hidden_size", "heads", "vocab_file") if not getattr(known, flag)]
    if missing:
        raise ConfigError(f"a new encoder needs {', '.join(missing)} too; add them, or give --from_encoder=DIR")
    layers, width, heads, positions = (getattr(known, flag) for flag in SIZES)
    positions = positions or POSITIONS
    if width % heads:
        raise ConfigError(f"--hidden_size={width} is not a multiple of --heads={heads}; use a multiple of {heads}")
    if positions < 3:
        raise ConfigError(f"--positions={positions} leaves no room between [CLS] and [SEP]; use 3 or more")
    vocabulary = read_vocabulary(known.vocab_file, f"--vocab_file={known.vocab_file}")
    sizes = Architecture(layers, width, heads, width // heads, 4 * width, len(vocabulary), positions)
    check_memory(count_parameters(sizes))
    from pipeline.encoders.export import initial_weights

    weights = initial_weights(layers, width, heads, len(vocabulary), positions, known.seed or SEED)
    return Content(weights, vocabulary, lower_case=not known.cased)


def read_encoder(known: argparse.Namespace) -> Content:
    """Another encoder's weights, with its own vocabulary or the given one.

    Raises:
      EncoderError: if there is none, or `export_encoder` would write another encoder.
      ConfigError: if flags contradict it.
    """
    load_tensorflow()  # first, because it silences TensorFlow's messages
    from pipeline.encoders.parity import ParityCheck
    from pipeline.encoders.spec import hash_variables

    shown = f"--from_encoder={known.from_encoder}"
    folder = resolve_handle(known.from_encoder)
    model = describe_saved_model(folder, shown)
    sizes = recognise_architecture(model.variables)
    if isinstance(sizes, str) or sizes.family != TALKING_HEADS.name:
        why = sizes if isinstance(sizes, str) else f"it is of the family {sizes.family}"
        raise EncoderError(f"{shown} is not a talking-heads gated-GELU BERT: {why}; name one that is")
    for flag, size in SIZES.items():
        if getattr(known, flag) not in (None, found := getattr(sizes, size)):
            raise ConfigError(f"--{flag}={getattr(known, flag)}: {shown} has {found}; leave it out")
    if known.seed is not None:
        raise ConfigError(f"--seed={known.seed}: the weights come from {shown}; leave it out")
    lower_case = read_flag(folder, "do_lower_case") if "do_lower_case" in model.methods else not known.cased
    if known.cased and lower_case:
        raise ConfigError(f"--cased: {shown} is uncased; leave it out")
    if known.vocab_file:
        path, name = known.vocab_file, f"--vocab_file={known.vocab_file}"
    elif len(own := [asset for asset in model.assets if asset.endswith(".txt")]) == 1:
        path, name = os.path.join(folder, own[0]), f"{shown}/{own[0]}"
    else:
        raise ConfigError(f"{shown} has no vocabulary; name its file with --vocab_file")
    vocabulary = read_vocabulary(path, name)
    if len(vocabulary) != sizes.vocabulary:
        raise ConfigError(
            f"{name} has {len(vocabulary):,} pieces and the encoder {sizes.vocabulary:,} word embeddings; "
            "name the file with one piece for each"
        )
    parity = ParityCheck(folder, sizes, hash_variables(folder, model)).prove("float32")
    if not parity.holds:
        raise EncoderError(
            f"{shown} does not give the same vectors as our graph ({parity}) and cannot be exported; "
            "give it to embeam embed as it is"
        )
    names = canonical_names(model.variables)
    weights = {names[name]: weight for name, weight in read_variables(folder, names)}
    return Content(weights, vocabulary, lower_case)


def read_vocabulary(path: str, shown: str) -> list[str]:
    """Reads word pieces, one a line.

    Raises:
      ConfigError: if they cannot be read, or are not a BERT vocabulary.
    """
    from pipeline.encoders.saving import check_vocabulary

    try:
        with open(absolute_path(path), "rb") as file:
            content = file.read()
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")  # no splitlines: a piece may be U+2028
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror}; name a file of word pieces") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{shown} is not UTF-8: see line {line}; save it as UTF-8") from error
    vocabulary = [line.removesuffix("\r") for line in lines]
    try:
        check_vocabulary(vocabulary)
    except EncoderError as error:
        raise ConfigError(f"{shown}: {error}") from error
    return vocabulary


def check_output(output: str) -> str:
    """The full path of a folder to create.

    Raises:
      ConfigError: if it exists or cannot be one.
    """
    if not output or "://" in output:
        raise ConfigError(f"--output={output} is not a local folder; name a local folder, and copy it from there")
    folder = absolute_path(output)
    if os.path.lexists(folder):
        raise ConfigError(f"--output={output} exists already; remove it or name another folder")
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--output={output} is not UTF-8, which TensorFlow needs; name another folder") from None
    return folder


@contextlib.contextmanager
def writing(output: str) -> Iterator[None]:
    """Raises ConfigError with the folder's name if the system or TensorFlow cannot write it."""
    tf = load_tensorflow()
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise ConfigError(
            f"--output={output} cannot be written: {first_line(error)}; name a folder that can"
        ) from error


def count_parameters(sizes: Architecture) -> int:
    """Counts all numbers in the weights without listing the layers, of which there may be any number."""
    none, one = (sum(map(math.prod, weight_shapes(sizes._replace(layers=n)).values())) for n in (0, 1))
    return none + sizes.layers * (one - none)


def check_memory(parameters: int) -> None:
    """Raises ConfigError if the weights do not fit into memory, where the kernel would kill the process."""
    import psutil

    needed = parameters * 4 * 2  # float32, once as arrays and once as TensorFlow's variables
    if needed > (free := psutil.virtual_memory().available):
        raise ConfigError(
            f"{parameters:,} parameters need {needed / 2**30:,.0f} GB of memory and {free / 2**30:,.0f} GB are free; "
            "lower --hidden_size, --layers or --positions"
        )


def describe_case(lower_case: bool) -> str:
    return "uncased" if lower_case else "cased"
