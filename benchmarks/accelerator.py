"""Runs the programs of `benchmarks.stablehlo` through JAX and reports their share of the chip's own matmul rate.

`python -m benchmarks.accelerator DIR [DIR ...]`: needs JAX and NumPy alone, nothing of the product and no TensorFlow.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

SECONDS = 2.0  # of measuring each program
PIPELINED = 4  # batches under way at once


def load_program(path: str, arguments: list[Any], result: Any) -> Callable[..., Any]:
    """A serialized StableHLO module as a function of JAX."""
    with open(path, "rb") as file:
        module = file.read()
    avals = tuple(jax.core.ShapedArray(a.shape, a.dtype) for a in arguments)
    exported = jax.export.Exported(
        fun_name="encode",
        in_tree=jax.tree.structure((tuple(arguments), {})),
        in_avals=avals,
        out_tree=jax.tree.structure(result),
        out_avals=(jax.core.ShapedArray(result.shape, result.dtype),),
        in_shardings_hlo=(None,) * len(avals),
        out_shardings_hlo=(None,),
        nr_devices=1,
        platforms=(jax.default_backend() if jax.default_backend() != "gpu" else "cuda",),
        ordered_effects=(),
        unordered_effects=(),
        disabled_safety_checks=(),
        mlir_module_serialized=module,
        calling_convention_version=jax.export.maximum_supported_calling_convention_version,
        module_kept_var_idx=tuple(range(len(avals))),
        uses_global_constants=False,
        _get_vjp=None,
        **_fields_of_newer_versions(len(avals)),
    )
    return jax.jit(exported.call)


def _fields_of_newer_versions(n_arguments: int) -> dict[str, Any]:
    """What this version of JAX asks for beyond the documented fields: that nothing is sharded."""
    known = {
        "_has_named_shardings": False,
        "_in_named_shardings": (None,) * n_arguments,
        "_out_named_shardings": (None,),
    }
    return {name: value for name, value in known.items() if name in jax.export.Exported.__dataclass_fields__}


def time_calls(function: Callable[[], Any]) -> float:
    """Seconds a call, with a few calls under way at once, after compiling."""
    jax.block_until_ready(function())
    calls, waiting, begun = 0, [], time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        waiting.append(function())
        calls += 1
        if len(waiting) > PIPELINED:
            jax.block_until_ready(waiting.pop(0))
    jax.block_until_ready(waiting)
    return (time.perf_counter() - begun) / calls


def measure_matmul(precision: str, size: int) -> float:
    """FLOP/s of a square matmul."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(precision))
    multiply = jax.jit(lambda x: x @ a)
    return 2 * size**3 / time_calls(lambda: multiply(a))


def main(folders: list[str]) -> None:
    if not folders:
        sys.exit(__doc__)
    device = jax.devices()[0]
    size = 8192 if device.platform != "cpu" else 512
    print(f"{device.device_kind}, JAX {jax.__version__}")
    for folder in folders:
        with open(os.path.join(folder, "signature.json"), encoding="utf-8") as file:
            signature = json.load(file)
        a, precision = signature["architecture"], signature["precision"]
        machine = measure_matmul(precision, size)
        print(f"{folder}: {a['layers']} layers, width {a['width']}; matmul in {precision} {machine / 1e12:.2f} TFLOP/s")
        rng = np.random.default_rng(0)
        weights = [
            jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02, jnp.dtype(kind))
            for shape, kind in signature["weights"]
        ]
        for name, program in signature["programs"].items():
            rows, length = program["rows"], program["length"]
            ids = rng.integers(0, a["vocabulary"], (rows, length)).astype(np.int32)
            inputs = [ids, np.ones_like(ids), np.zeros_like(ids)]
            result = jax.ShapeDtypeStruct((rows, a["width"]), jnp.float32)
            begun = time.perf_counter()
            encode = load_program(os.path.join(folder, name), [*inputs, *weights], result)
            jax.block_until_ready(encode(*inputs, *weights))
            compiled = time.perf_counter() - begun
            seconds = time_calls(lambda: encode(*inputs, *weights))  # noqa: B023  called at once, transfers and all
            rate = rows * program["flops_of_a_text"] / seconds
            print(
                f"  length {length}: {rows / seconds:,.0f} texts/s, {rows * length / seconds:,.0f} tokens/s, "
                f"{rate / 1e12:.2f} TFLOP/s, {rate / machine:.0%} of the matmul; compiled in {compiled:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
