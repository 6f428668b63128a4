"""`python -m benchmarks [NAME ...]`: runs benchmarks, prints what they find and writes it to build/benchmarks/."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys

from benchmarks.measure import BenchmarkError
from benchmarks.models import SIZES
from benchmarks.report import format_hardware, format_report, write_json

BENCHMARKS = {
    "stock": "from text to table, against an ordinary Beam pipeline",
    "encoder": "the fast encoder from text to table, against stock Beam and bare matmuls",
    "overhead": "the whole pipeline, against a bare loop around its encoder",
    "tokenize": "text to token ids on one core, against the published preprocessor",
    "reindex": "a run after few documents have changed, against the run that made the table",
    "scaling": "the distributed graph on two worker processes, against one",
    "memory": "peak memory at a tenth of the documents and at all of them",
    "peers": "the same encoder in sentence-transformers, OpenVINO and ONNX Runtime; downloads 3 GB",
}
ON_REQUEST = ("peers",)  # needs the network, and gigabytes


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    names = "\n".join(f"  {name:10} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=f"Measures the product beside a reference in the same run.\n\nbenchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which to run (default: all but {', '.join(ON_REQUEST)})"
    )
    parser.add_argument("--encoder", default="", metavar="DIR", help="a SavedModel with the TF Hub text interface")
    parser.add_argument("--preprocessor", default="", metavar="DIR", help="the preprocessor that belongs to it")
    parser.add_argument("--size", choices=SIZES, help="without --encoder: size of the one that is made")
    parser.add_argument("--count", type=int, default=0, help="number of documents; each benchmark has its own default")
    parser.add_argument("--repetitions", type=int, default=0, help="number of runs of each side, likewise")
    parser.add_argument("--output", default="build/benchmarks", metavar="DIR", help="folder for results and scratch")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if options.count < 0 or options.repetitions < 0:
        parser.error("--count and --repetitions must be positive")
    return options


def run_benchmark(name: str, options: argparse.Namespace) -> None:
    """Runs one benchmark in a scratch folder, which is removed on success."""
    output = os.path.abspath(options.output)
    folder = os.path.join(output, f"scratch-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    module = importlib.import_module(f"benchmarks.{name}")
    resolved = argparse.Namespace(**vars(options), folder=folder, models=output)
    resolved.count = options.count or module.COUNT
    resolved.repetitions = options.repetitions or module.REPETITIONS
    resolved.size = options.size or module.SIZE
    report = module.run(resolved)
    path = os.path.join(output, f"{name}.json")
    write_json(name, report, vars(resolved), path)
    print(f"{name}: {format_report(report)}\n  results: {path}\n", flush=True)
    shutil.rmtree(folder)


def main() -> None:
    options = parse_arguments()
    print(format_hardware(), flush=True)
    for name in options.names or [name for name in BENCHMARKS if name not in ON_REQUEST]:
        try:
            run_benchmark(name, options)
        except BenchmarkError as error:
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
