"""Measures whether more workers help: the distributed graph on two worker processes against one, a core for each.

TensorFlow is held to one thread in every worker, so a second worker is the only way to use the second core. The engine
is Beam's local one with worker processes: every shuffle goes through the process that started them, and all work is
dealt out beforehand, which no cluster does so coarsely. What a worker does is what it does on a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from benchmarks.measure import BenchmarkError, Ratio, Report, Run, Side, run_side, steady_rate
from benchmarks.models import find_models
from benchmarks.texts import make_sentences

SIZE, COUNT, REPETITIONS = "small", 8000, 2
FLOOR = 1.6
ONE, TWO = "one worker", "two workers"
WARM_UP = 8  # the first run has an eighth of the texts: what both take alike is start-up
TINY_FILES = 10_000
_SAMPLE_SECONDS = 0.2
_WORKER = "sdk_worker_main"


def embed_distributed(flags: dict[str, str], workers: int) -> dict[str, Any]:
    """One run of the distributed graph; gives each worker's seconds of processor time."""
    threads = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"), "1")
    os.environ.update(threads, PYTHONPATH=os.getcwd())
    from apache_beam.options.pipeline_options import PipelineOptions

    from pipeline.config import EmbedConfig
    from pipeline.engines.runner import make_runner
    from pipeline.files import make_folder
    from pipeline.run.job import prepare_job, run_job, scratch_folder
    from pipeline.run.resolve import resolve
    from pipeline.tables.publish import name_snapshot

    engine = ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    resolved, options, name = resolve(EmbedConfig.from_flat(flags)), PipelineOptions(engine), name_snapshot()
    make_folder(resolved.store.work)
    watch = WorkerWatch()
    with scratch_folder(resolved.store.work, name) as scratch, watch:
        job = prepare_job(resolved, name, time.time(), True, scratch)
        run_job(job, make_runner(options), options)
    manifest = resolved.store.read_live().manifest
    assert manifest is not None
    return {"items": manifest.counts["encode"]["rows"], "cpu_seconds": watch.seconds()}


class WorkerWatch:
    """Puts each worker process on a core of its own and notes its processor time."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> WorkerWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def seconds(self) -> list[float]:
        return sorted(self._seconds.values())

    def _watch(self) -> None:
        import psutil

        while not self._ended.wait(_SAMPLE_SECONDS):
            for child in psutil.Process().children(recursive=True):
                try:
                    if not any(_WORKER in part for part in child.cmdline()) or "python" not in child.name():
                        continue
                    if child.pid not in self._seconds:
                        child.cpu_affinity([len(self._seconds) % (os.cpu_count() or 1)])
                    self._seconds[child.pid] = sum(child.cpu_times()[:2])
                except psutil.Error:
                    continue


def write_corpus(folder: str, files: Iterable[int], numbers: int) -> None:
    """Writes files of so many texts each, one below the other in one order."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    texts = enumerate(make_sentences(numbers))
    for number, size in enumerate(files):
        with open(os.path.join(folder, f"part-{number:05}.jsonl"), "w", encoding="utf-8") as file:
            for _, (i, text) in zip(range(size), texts, strict=False):
                file.write(json.dumps({"id": f"d{i}", "text": f"{i}: {text}"}) + "\n")


def run(options: argparse.Namespace) -> Report:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        raise BenchmarkError("two workers need two cores")
    if options.count < WARM_UP:
        raise BenchmarkError(f"--count={options.count} leaves no text for the shorter run; use {WARM_UP} or more")
    encoder, preprocessor = find_models(options.encoder, options.preprocessor, options.size, options.models)
    corpus, table = os.path.join(options.folder, "corpus"), os.path.join(options.folder, "table")
    flags = {"id_field": "id", "output": table, "encoder": encoder, "preprocessor": preprocessor}
    flags |= {"input": f"{corpus}/*.jsonl", "split_bytes": "65536"}

    def embed(files: list[int], workers: int) -> Run:
        write_corpus(corpus, files, sum(files))
        shutil.rmtree(table, ignore_errors=True)
        side = Side("benchmarks.scaling:embed_distributed", {"flags": flags, "workers": workers})
        done = run_side(side, options.folder)
        if done["items"] != sum(files):
            raise BenchmarkError(f"{done['items']:,} texts were encoded instead of {sum(files):,}")
        shown = " and ".join(f"{seconds:.1f}" for seconds in done["cpu_seconds"])
        took = f"{done['whole_seconds']:.1f} s, processor seconds of workers {shown}"
        print(f"  {workers} workers, {len(files):,} files: {took}", file=sys.stderr, flush=True)
        return done

    n = options.count
    runs: dict[str, list[Run]] = {ONE: [], TWO: []}
    for turn in range(options.repetitions):
        for name in (ONE, TWO)[:: -1 if turn % 2 else 1]:
            workers = 1 if name == ONE else 2
            short, long = embed([n // WARM_UP], workers), embed([n], workers)
            runs[name].append(subtract(short, long))
            start_up = min(short["cpu_seconds"])
    ratio = steady_rate(runs[TWO]) / steady_rate(runs[ONE])  # before the rest, as a run that is too short has none
    shapes = {
        "one file": [n],
        f"{TINY_FILES:,} files": [n // TINY_FILES + (i < n % TINY_FILES) for i in range(TINY_FILES)],
        "two of 20 files with nine tenths": [n * 9 // 10 // 2] * 2 + [n // 10 // 18] * 18,
    }
    facts: dict[str, Any] = {"encoder": encoder, "threads of TensorFlow in a worker": 1}
    for shape, files in shapes.items():
        done = embed(files, 2)
        least, most = (choose(done["cpu_seconds"]) - start_up for choose in (min, max))
        facts[f"processor seconds of two workers after start-up, {shape}"] = (
            f"{least:.1f} and {most:.1f}, {least / most:.0%}"
        )
    ratios = [Ratio("steady rate of two workers, of one's", ratio, at_least=FLOOR)]
    return Report(f"{n:,} texts on the graph for distributed engines", "texts", runs, ratios, facts)


def subtract(short: Run, long: Run) -> Run:
    """A long run without what a short one takes too."""
    items, seconds = long["items"] - short["items"], long["whole_seconds"] - short["whole_seconds"]
    start_up = long["whole_seconds"] - long["items"] * seconds / items
    return long | {"steady_items": items, "steady_seconds": seconds, "start_up_seconds": start_up}
