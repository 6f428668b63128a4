"""Reads the interface of a SavedModel from its files without loading it, and resolves a handle to a folder.

Reading the protocol buffer takes milliseconds; loading takes seconds and a second copy of the weights. So everything
that is checked before a run is checked here. TensorFlow is imported inside the functions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from pipeline.encoders.cache import cached_folder
from pipeline.errors import EncoderError, first_line
from pipeline.files import absolute_path

TOKEN_INPUTS = ("input_word_ids", "input_mask", "input_type_ids")
Shape = tuple[Optional[int], ...]


@dataclass(frozen=True)
class SavedModelSpec:
    """The interface of a SavedModel.

    Attributes:
      folder: where it lies on this machine.
      inputs: names of the first argument's entries, or `("",)` where it is a single tensor.
      input_dtypes: TensorFlow's names of their types, such as `int32`.
      outputs: output name to shape (None where a size varies); a list of outputs appears as `name/0`, `name/1`, ...
      methods: names of the functions that it can be asked for, `__call__` first of all.
      assets: paths of asset files, relative to the folder.
      ops: names of all TensorFlow ops in its functions.
      variables: variable name to shape.
    """

    folder: str
    inputs: tuple[str, ...]
    input_dtypes: tuple[str, ...]
    outputs: dict[str, Shape]
    methods: frozenset[str]
    assets: tuple[str, ...]
    ops: frozenset[str]
    variables: dict[str, tuple[int, ...]] = field(default_factory=dict)


def describe_saved_model(folder: str, handle: str = "") -> SavedModelSpec:
    """Reads the interface of a SavedModel.

    Args:
      folder: a local folder.
      handle: what the user wrote, for messages.

    Raises:
      EncoderError: if the folder holds no SavedModel or one without a callable object.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    shown = handle or folder
    path = Path(folder, "saved_model.pb")
    if not path.is_file():
        found = "it is a file" if Path(folder).is_file() else "the folder holds no saved_model.pb"
        found = found if Path(folder).exists() else "there is no such folder"
        raise EncoderError(f"{shown} is not a SavedModel: {found}; give the folder that holds saved_model.pb")
    model = saved_model_pb2.SavedModel()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise EncoderError(f"{path} is damaged; download or export the model again") from None
    if not model.meta_graphs:
        raise EncoderError(f"{path} is empty; download or export the model again")
    graph = model.meta_graphs[0]
    objects = graph.object_graph_def
    if not objects.nodes:
        raise EncoderError(f"{shown} is a TensorFlow 1 module; only TensorFlow 2 SavedModels can be used")
    functions = {
        child.local_name: objects.nodes[child.node_id].function.concrete_functions
        for child in objects.nodes[0].children
        if objects.nodes[child.node_id].WhichOneof("kind") == "function"
    }
    children = {child.local_name for child in objects.nodes[0].children}
    if not functions.get("__call__"):
        raise EncoderError(f"{shown} cannot be called like a TF Hub model; only callable SavedModels can be used")
    call = objects.concrete_functions[functions["__call__"][0]]
    inputs = _flatten(_first_argument(call.canonicalized_input_signature))
    outputs = {name: spec.shape for name, spec in _flatten(call.output_signature).items()}
    return SavedModelSpec(
        folder=folder,
        inputs=tuple(sorted(inputs)),
        input_dtypes=tuple(inputs[name].dtype for name in sorted(inputs)),
        outputs=outputs,
        methods=frozenset(children),
        assets=tuple(os.path.join("assets", asset.filename) for asset in graph.asset_file_def),
        ops=frozenset(node.op for function in graph.graph_def.library.function for node in function.node_def),
        variables={name: shape for name, (_, shape) in list_variables(folder).items()},
    )


def list_variables(folder: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Lists a SavedModel's variables: those of its `variables` attribute, or all where it has none.

    Checkpoint keys are anonymous (`variables/7/...`); the names stand in the checkpoint's own object graph.

    Returns:
      name -> (checkpoint key, shape).
    """
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    reader = _open_checkpoint(folder)
    shapes = reader.get_variable_to_shape_map()
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(_read_tensor(reader, folder, "_CHECKPOINTABLE_OBJECT_GRAPH"))
    found = {
        attribute.checkpoint_key: attribute.full_name
        for node in graph.nodes
        for attribute in node.attributes
        if attribute.checkpoint_key in shapes
    }
    listed = {key: name for key, name in found.items() if key.startswith("variables/")} or found
    names = Counter(listed.values())
    # Variables may have no name, or the same one.
    return {name if name and names[name] == 1 else key: (key, tuple(shapes[key])) for key, name in listed.items()}


def read_variables(folder: str, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields (name, NumPy array) for each of the named variables, one in memory at a time."""
    keys = list_variables(folder)
    reader = _open_checkpoint(folder)
    for name in names:
        yield name, _read_tensor(reader, folder, keys[name][0])


def tensor_reader(folder: str) -> Callable[[str], Any]:
    """Returns a function from the name of a float32 variable to its value, a tensor.

    NumPy arrays would be a second copy: TensorFlow does not free the memory of arrays that it returns.
    """
    import tensorflow as tf

    keys = list_variables(folder)
    prefix = os.path.join(folder, "variables", "variables")

    def read(name: str) -> Any:
        try:
            return tf.raw_ops.RestoreV2(
                prefix=prefix, tensor_names=[keys[name][0]], shape_and_slices=[""], dtypes=[tf.float32]
            )[0]
        except tf.errors.OpError as error:
            raise _damaged(folder, error) from error

    return read


def read_flag(folder: str, name: str) -> bool:
    """The value of a boolean variable that is an attribute of the SavedModel's root."""
    return bool(_read_tensor(_open_checkpoint(folder), folder, f"{name}/.ATTRIBUTES/VARIABLE_VALUE"))


def _read_tensor(reader: Any, folder: str, key: str) -> Any:
    try:
        return reader.get_tensor(key)
    except Exception as error:
        raise _damaged(folder, error) from error


def _open_checkpoint(folder: str) -> Any:
    from tensorflow.python.training import py_checkpoint_reader

    prefix = os.path.join(folder, "variables", "variables")
    if not os.path.exists(prefix + ".index"):
        raise EncoderError(f"{folder} has no weights: variables/variables.index is missing; download the model again")
    try:
        return py_checkpoint_reader.NewCheckpointReader(prefix)
    except Exception as error:
        raise _damaged(folder, error) from error


def _damaged(folder: str, error: Exception) -> EncoderError:
    return EncoderError(
        f"the weights in {folder}/variables are damaged ({first_line(error)}); download the model again"
    )


def resolve_handle(handle: str) -> str:
    """Turns a folder, a path on any Beam file system or a hub handle into a local folder.

    Remote folders are copied by Beam's file systems (TensorFlow's own use other credentials) into the cache, in a
    folder named after the remote content, so that a changed model is copied again. Hub handles go through
    `hub.resolve`, which honours TFHUB_CACHE_DIR and TFHUB_MODEL_LOAD_FORMAT.

    Raises:
      EncoderError: if there is no such model or it cannot be fetched.
    """
    if handle.startswith(("http://", "https://")):
        return _resolve_hub(handle)
    if "://" in handle:
        return _copy_remote(handle)
    return absolute_path(handle)


def _resolve_hub(handle: str) -> str:
    import tensorflow_hub as hub

    try:
        return str(hub.resolve(handle))
    except Exception as error:
        raise EncoderError(
            f"{handle} cannot be fetched ({error}); download it and give its folder, or set TFHUB_CACHE_DIR"
        ) from error


def _copy_remote(handle: str) -> str:
    from apache_beam.io.filesystems import FileSystems

    root = handle.rstrip("/") + "/"
    try:
        listing = sorted(FileSystems.match([root + "**"])[0].metadata_list, key=lambda found: found.path)
    except Exception as error:
        raise EncoderError(f"{handle} cannot be listed ({error}); check the path and the credentials") from error
    files = [found for found in listing if not found.path.endswith("/")]
    if not files:
        raise EncoderError(f"{handle} holds no files; give the folder that holds saved_model.pb")
    state = "\n".join(f"{f.path} {f.size_in_bytes} {f.last_updated_in_seconds}" for f in files)
    digest = hashlib.sha256(state.encode()).hexdigest()[:16]

    def copy_files(folder: str) -> None:
        for found in files:
            local = Path(folder, found.path[len(root) :])
            local.parent.mkdir(parents=True, exist_ok=True)
            with FileSystems.open(found.path, compression_type="uncompressed") as source, open(local, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)

    return cached_folder(f"copied-{digest}", copy_files)


@dataclass(frozen=True)
class _Tensor:
    shape: Shape
    dtype: str


def _first_argument(signature: Any) -> Any:
    """Of ((positional...), {keyword...}), the first positional argument, or a value without content."""
    positional = signature.tuple_value.values[0].tuple_value.values
    return positional[0] if positional else signature


def _flatten(value: Any, name: str = "") -> dict[str, _Tensor]:
    """Flattens a StructuredValue of tensor specs to names: dict keys, and `name/0` for entries of lists."""
    from tensorflow.python.framework import dtypes

    kind = value.WhichOneof("kind")
    if kind in ("tensor_spec_value", "bounded_tensor_spec_value"):
        spec = getattr(value, kind)
        rank_unknown = spec.shape.unknown_rank
        shape = () if rank_unknown else tuple(None if dim.size < 0 else int(dim.size) for dim in spec.shape.dim)
        return {name: _Tensor(shape, dtypes.as_dtype(spec.dtype).name)}
    entries: list[tuple[str, Any]] = []
    if kind == "dict_value":
        entries = [(f"{name}/{key}" if name else key, entry) for key, entry in value.dict_value.fields.items()]
    elif kind in ("list_value", "tuple_value"):
        entries = [(f"{name}/{i}", entry) for i, entry in enumerate(getattr(value, kind).values)]
    return {key: tensor for path, entry in entries for key, tensor in _flatten(entry, path).items()}
