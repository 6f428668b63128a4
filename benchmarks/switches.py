"""Measures each switch of the fast graph on this machine: `python -m benchmarks.switches --encoder=DIR`.

The mode that the product would choose, and every mode that differs from it in one switch, encode the same batches of
made-up ids by turns. Printed are the best time of a batch and the lowest cosine to the plain float32 graph, so that a
switch can be judged on a machine that nobody has measured yet. Modes are in `pipeline/encoders/mode.py`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

ROUNDS = 6
SHAPES = ((42, 48), (32, 64), (16, 128))  # rows x length: about 1,800 real tokens each
Inputs = dict[str, np.ndarray]


def make_batch(rows: int, length: int, vocabulary: int) -> Inputs:
    """Random ids in rows of nearly one length, as batches of sorted texts are."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(length * 0.9, length * 0.06, rows).astype(int), 2, length)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)  # [B, L]
    ids = (rng.integers(0, vocabulary, mask.shape) * mask).astype(np.int32)  # [B, L]
    return {"input_word_ids": ids, "input_mask": mask, "input_type_ids": np.zeros_like(mask)}


def vary(mode: Any, precision: str) -> dict[str, Any]:
    """A mode by what it differs in from the one that is given first."""
    modes = {"as chosen": mode}
    for switch in ("packed", "fused", "laid_out"):
        modes[f"{switch}={not getattr(mode, switch)}"] = mode._replace(**{switch: not getattr(mode, switch)})
    if precision != "float32":
        other = "float32" if mode.attention == precision else precision
        modes[f"attention={other}"] = mode._replace(attention=other)
    return modes


def measure_switches(folder: str, precision: str) -> None:
    """Prints a line for each mode."""
    from pipeline.config import VectorChoice
    from pipeline.encoders.architecture import Architecture, recognise_architecture, text_flops
    from pipeline.encoders.base import TokenEncoder
    from pipeline.encoders.fast import build_graph
    from pipeline.encoders.mode import Mode, choose_modes
    from pipeline.encoders.parity import cosines
    from pipeline.encoders.saved_model import describe_saved_model
    from pipeline.encoders.weights import read_weights

    a = recognise_architecture(describe_saved_model(folder).variables)
    if not isinstance(a, Architecture):
        raise SystemExit(f"--encoder={folder} has no fast graph: {a}")
    choice = VectorChoice("pooled_output")
    batches = [make_batch(rows, length, a.vocabulary) for rows, length in SHAPES]

    def load(mode: Mode) -> TokenEncoder:
        return TokenEncoder(choice, build_graph(read_weights(folder, a, choice, mode), a, choice, mode))

    plain = load(Mode())
    expected = [plain.run(batch) for batch in batches]
    del plain
    encoders = {name: load(mode) for name, mode in vary(choose_modes(precision)[0], precision).items()}
    best = {name: [float("inf")] * len(batches) for name in encoders}
    nearest = dict.fromkeys(encoders, 1.0)
    for _ in range(ROUNDS):
        for name, encoder in encoders.items():
            for i, batch in enumerate(batches):
                begun = time.perf_counter()
                vectors = encoder.run(batch)
                best[name][i] = min(best[name][i], time.perf_counter() - begun)
                nearest[name] = min(nearest[name], float(cosines(vectors, expected[i]).min()))
    print(f"{'':24}" + "".join(f"{f'{rows} x {length}':>12}" for rows, length in SHAPES) + "   GFLOP/s   lowest cosine")
    flops = [sum(text_flops(a, int(n)) for n in batch["input_mask"].sum(1)) for batch in batches]
    for name, seconds in best.items():
        rate = sum(flops) / sum(seconds) / 1e9
        print(f"{name:24}" + "".join(f"{s * 1e3:9.0f} ms" for s in seconds) + f"{rate:10.0f}   {nearest[name]:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.switches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--encoder", required=True, metavar="DIR", help="a SavedModel of a known family")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    from benchmarks.report import format_hardware

    print(format_hardware())
    measure_switches(options.encoder, options.precision)


if __name__ == "__main__":
    main()
