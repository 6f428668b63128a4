"""The fast encoder from file to table, against stock Beam and against what this machine can multiply.

References: `ordinary.py`, as in the benchmark `stock`; and the rate of bare matmuls, measured in the same turns.
Work is counted in the FLOPs of real tokens alone, by the formula of the architecture, so padding and whatever a graph
does beside are losses, and work that our graph leaves out (most of the last layer, for `pooled_output`) is a gain.
bfloat16 is measured where the processor has it.
"""

from __future__ import annotations

import argparse
import os
import shutil
from typing import Any

from benchmarks.measure import BenchmarkError, Ratio, Report, Side, alternate, median, run_side, steady_rate
from benchmarks.models import find_models
from benchmarks.plot import plot_bars
from benchmarks.stock import STOCK_TOKENS
from benchmarks.texts import make_sentences, write_lines

SIZE, COUNT, REPETITIONS = "base", 600, 3
FLOORS = {"float32": 0.9, "bfloat16": 0.7}  # of the machine's matmul rate
TOLERANCES = {"float32": 2e-4, "bfloat16": 0.3}  # largest difference of a number from stock's


def count_flops(table: str, encoder: str) -> dict[str, float]:
    """FLOPs of the real tokens of a table's documents. Runs in a child."""
    from pipeline import iter_table
    from pipeline.encoders.architecture import Architecture, recognise_architecture, text_flops
    from pipeline.encoders.saved_model import describe_saved_model

    a = recognise_architecture(describe_saved_model(encoder).variables)
    if not isinstance(a, Architecture):
        raise SystemExit(f"{encoder}: the FLOPs of an unknown architecture cannot be counted: {a}")
    sizes = [row["n_tokens"] for row in iter_table(table)]
    return {"flops": sum(text_flops(a, n) for n in sizes), "documents": len(sizes), "tokens": sum(sizes)}


def has_native_bfloat16() -> dict[str, bool]:
    """Runs in a child."""
    from pipeline.encoders.runtime import native_half_precision

    return {"native": native_half_precision() == "bfloat16"}


def run(options: argparse.Namespace) -> Report:
    count, folder = options.count, options.folder
    encoder, preprocessor = find_models(options.encoder, options.preprocessor, options.size, options.models)
    texts, stock = (os.path.join(folder, name) for name in ("texts.txt", "stock"))
    write_lines(texts, make_sentences(count))
    native = run_side(Side("benchmarks.encoder:has_native_bfloat16", {}), folder)["native"]
    precisions = ["float32", "bfloat16"] if native else ["float32"]
    records = os.path.join(stock, "embeddings")
    models = {"preprocessor": preprocessor, "encoder": encoder}
    sides = {"stock Beam": Side("benchmarks.stock:embed_stock", {"source": texts, "output": records} | models)}
    outputs = {"stock Beam": stock}
    for precision in precisions:
        name = f"embeam {precision}"
        outputs[name] = os.path.join(folder, precision)
        flags = {"input": texts, "output": outputs[name], "precision": precision, "max_tokens": STOCK_TOKENS} | models
        arguments = [f"--{flag}={value}" for flag, value in flags.items()]
        sides[name] = Side("benchmarks.child:embed", {"arguments": arguments})
    matmuls: dict[str, list[dict[str, float]]] = {precision: [] for precision in precisions}

    def prepare(name: str) -> None:
        """Removes the side's last table and measures the machine just before the run, under the same load."""
        shutil.rmtree(outputs[name], ignore_errors=True)
        precision = name.removeprefix("embeam ")
        if precision in matmuls:
            matmuls[precision].append(
                run_side(Side("benchmarks.matmul:measure_matmul", {"precision": precision}), folder)
            )

    runs = alternate(sides, options.repetitions, folder, prepare)
    facts: dict[str, Any] = {"encoder": encoder}
    for precision in precisions:
        table = outputs[f"embeam {precision}"]
        compared = run_side(
            Side("benchmarks.stock:compare_tables", {"source": texts, "records": records, "table": table}), folder
        )
        if compared["rows"] != count or compared["max_difference"] > TOLERANCES[precision]:
            raise BenchmarkError(f"the tables of stock Beam and {precision} differ: {compared}")
        facts[f"{precision}: largest difference of a number from stock's"] = compared["max_difference"]
    counted = run_side(
        Side("benchmarks.encoder:count_flops", {"table": outputs["embeam float32"], "encoder": encoder}), folder
    )
    flops_each = counted["flops"] / counted["documents"]
    facts["mean word pieces"] = counted["tokens"] / counted["documents"]
    facts["GFLOP of a text"] = flops_each / 1e9
    rates = {name: steady_rate(side) * flops_each for name, side in runs.items()}
    ratios = []
    for precision in precisions:
        name, machine = f"embeam {precision}", median(matmuls[precision], "flops")
        rates[f"matmul {precision}"] = machine
        share = Ratio(
            f"{name} / the machine's matmuls in {precision}, steady", rates[name] / machine, FLOORS[precision]
        )
        ratios += [share, Ratio(f"{name} / stock Beam, steady", rates[name] / rates["stock Beam"])]
    for name, rate in rates.items():
        facts[f"{name}, GFLOP/s of real tokens"] = rate / 1e9
    title = f"{count:,} sentences of {facts['mean word pieces']:.1f} word pieces on average, from text to a table"
    plot = os.path.join(os.path.dirname(folder), "encoder.png")
    plot_bars(plot, title, "GFLOP/s of real tokens", {name: rate / 1e9 for name, rate in rates.items()})
    facts["plot"] = plot
    return Report(title, "texts", runs, ratios, facts)
