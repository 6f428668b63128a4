"""Writes the fast encoder as StableHLO programs, which run without TensorFlow: `python -m benchmarks.stablehlo`.

For each length a program takes the three int32 inputs `[B, L]` and the weights, and gives `pooled_output`. Weights are
not written: `signature.json` tells their shapes and types, and `benchmarks/accelerator.py` makes up values, as the time
does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

LENGTHS = (32, 128, 512)
TOKENS = 32768  # rows x length of a batch


def export_programs(encoder: str, precision: str, tokens: int, output: str) -> None:
    """Writes `length-L.mlir` for each length, and `signature.json`."""
    from pipeline.config import VectorChoice
    from pipeline.encoders.architecture import Architecture, recognise_architecture, text_flops
    from pipeline.encoders.fast import define_graph
    from pipeline.encoders.mode import Mode
    from pipeline.encoders.runtime import load_tensorflow
    from pipeline.encoders.saved_model import describe_saved_model
    from pipeline.encoders.weights import read_weights

    tf = load_tensorflow()
    a = recognise_architecture(describe_saved_model(encoder).variables)
    if not isinstance(a, Architecture):
        raise SystemExit(f"--encoder={encoder} has no fast graph: {a}")
    choice, mode = VectorChoice("pooled_output"), Mode(precision, precision, compiled=True, packed=False)
    weights = read_weights(encoder, a, choice, mode)
    flat = [tensor for tensor in tf.nest.flatten(weights) if tensor is not None]
    os.makedirs(output, exist_ok=True)
    programs = {}
    for length in LENGTHS:
        rows = max(1, tokens // length)

        def run(*arguments: Any) -> Any:
            given = iter(arguments[3:])
            packed = tf.nest.map_structure(lambda tensor: None if tensor is None else next(given), weights)
            return define_graph(packed, a, choice, mode)(*arguments[:3])

        program = tf.function(run, jit_compile=True, autograph=False)
        specs = [tf.TensorSpec([rows, length], tf.int32)] * 3 + [tf.TensorSpec(t.shape, t.dtype) for t in flat]
        text = program.experimental_get_compiler_ir(*specs)(stage="stablehlo_serialized")
        name = f"length-{length}.mlir"
        with open(os.path.join(output, name), "wb") as program_file:
            program_file.write(text)
        programs[name] = {"rows": rows, "length": length, "flops_of_a_text": text_flops(a, length)}
        print(f"{name}: {rows} rows, {len(text):,} bytes", flush=True)
    signature = {
        "architecture": a._asdict(),
        "precision": precision,
        "weights": [[list(t.shape), t.dtype.name] for t in flat],
        "programs": programs,
    }
    with open(os.path.join(output, "signature.json"), "w", encoding="utf-8") as file:
        json.dump(signature, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.stablehlo", description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", required=True, metavar="DIR", help="a SavedModel of a known family")
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"rows x length of a batch (default: {TOKENS})")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    options = parser.parse_args()
    export_programs(options.encoder, options.precision, options.tokens, options.output)


if __name__ == "__main__":
    main()
