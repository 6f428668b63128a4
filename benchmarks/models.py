"""The encoders that the benchmarks run: those named on the command line, or seeded ones of a size, written once."""

from __future__ import annotations

import os

from benchmarks.measure import BenchmarkError, Side, run_side

SIZES = {"tiny": (2, 64, 4), "small": (4, 256, 4), "base": (12, 768, 12)}  # layers, width, heads


def write_models(size: str, folder: str) -> dict[str, float]:
    """Writes a seeded encoder of a size and its preprocessor, with the built-in vocabulary. Runs in a child."""
    from pipeline.encoders.default import default_vocabulary
    from pipeline.encoders.export import export_encoder, initial_weights
    from pipeline.preprocess.export import export_preprocessor

    vocabulary = default_vocabulary()
    encoder, preprocessor = (os.path.join(folder, name) for name in ("encoder", "preprocessor"))
    if not os.path.isdir(preprocessor):  # an interrupted attempt may have left one of the two
        export_preprocessor(vocabulary, preprocessor)
    if not os.path.isdir(encoder):
        export_encoder(initial_weights(*SIZES[size], len(vocabulary)), vocabulary, encoder)
    return {}


def find_models(encoder: str, preprocessor: str, size: str, folder: str) -> tuple[str, str]:
    """The folders of encoder and preprocessor.

    Args:
      encoder: a SavedModel that the user named, or "".
      preprocessor: the one that belongs to it, or "".
      size: what to write if neither is named.
      folder: where to write it; what an earlier run wrote there is used again.

    Raises:
      BenchmarkError: if one is named without the other.
    """
    if bool(encoder) != bool(preprocessor):
        raise BenchmarkError("--encoder and --preprocessor belong together: give both or neither")
    if encoder:
        return os.path.abspath(encoder), os.path.abspath(preprocessor)
    folder = os.path.abspath(os.path.join(folder, f"models-{size}"))
    if not os.path.isdir(os.path.join(folder, "encoder")):
        os.makedirs(folder, exist_ok=True)
        run_side(Side("benchmarks.models:write_models", {"size": size, "folder": folder}), folder)
    return os.path.join(folder, "encoder"), os.path.join(folder, "preprocessor")
