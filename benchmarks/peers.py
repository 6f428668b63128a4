"""The product against other ways to run the same encoder, all-MiniLM-L6-v2, on the same sentences with all cores.

References: sentence-transformers on PyTorch, OpenVINO and ONNX Runtime, each at its best (`peer_sides.py`), in an
environment of their own that is made here. Twice: encoding alone, from texts in memory to normalised vectors in memory,
by an encoder that is loaded and has run before; and whole processes, from a file of texts to a file of vectors.
Tokenising is part of both. All vectors are compared afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import BenchmarkError, Ratio, Report, Side, alternate, run_side, steady_rate, whole_rate
from benchmarks.peer_sides import PEERS
from benchmarks.texts import make_sentences, write_lines

SIZE, COUNT, REPETITIONS = "", 8000, 2
FLOORS = {"sentence-transformers": 2.0, "OpenVINO": 1.5}  # for encoding alone
TOLERANCE = 1e-3  # between any two numbers in float32: our GELU is the tanh form, theirs erf, which makes about 5e-4
COSINE = 0.99  # of vectors in bfloat16 with sentence-transformers' in float32, at least
LOCK = Path(__file__).parent.parent / "peers.lock"
OURS, REFERENCE = "embeam", "sentence-transformers"
ALONE, WHOLE = "encoding alone", "whole process"


def make_environment(folder: str) -> str:
    """Installs what peers.lock lists, once, and returns the environment's Python.

    Raises:
      BenchmarkError: if that fails.
    """
    python, stamp = os.path.join(folder, "bin", "python"), Path(folder, ".ready")
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print("Setting up the peers: 3 GB to download, 5 GB on disk, some minutes, only once.", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    install = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--requirement"]
    for command in ([sys.executable, "-m", "venv", folder], [python, *install, str(LOCK)]):
        if subprocess.run(command).returncode:
            raise BenchmarkError(f"the environment of {LOCK.name} could not be created: see above")
    stamp.write_text(wanted)  # last, so an interrupted set-up runs again
    return python


def fetch_models(models: str) -> dict[str, float]:
    """Writes the encoder as published, and as the SavedModels that the product takes. Runs in a child."""
    from training.teacher import convert_teacher, fetch_published

    unfinished = models + "-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    package, published = (os.path.join(unfinished, name) for name in ("package", "published"))
    os.makedirs(package)
    os.rename(fetch_published(package), published)
    shutil.rmtree(package)
    convert_teacher(published, os.path.join(unfinished, "converted"))
    os.rename(unfinished, models)
    return {}


def list_flags(models: str, precision: str) -> dict[str, Any]:
    """The settings of `embeam embed` that give the published encoder's vectors."""
    from training.teacher import MAX_TOKENS, VECTOR

    return {
        "encoder": os.path.join(models, "converted", "encoder"),
        "preprocessor": os.path.join(models, "converted", "preprocessor"),
        "vector": VECTOR,
        "max_tokens": MAX_TOKENS,
        "normalize": "true",
        "precision": precision,
    }


def encode_alone(models: str, precision: str, source: str, output: str) -> dict[str, float]:
    """The product's own functions without Beam, in a child: tokenise, batch, encode, normalise."""
    import numpy as np

    from benchmarks.overhead import make_batches
    from benchmarks.peer_sides import time_encoding
    from pipeline.config import EmbedConfig
    from pipeline.embedding_spec import make_embedding_spec
    from pipeline.encoders.handler import EncoderHandler
    from pipeline.vectors.storing import shape_vectors

    plan = make_embedding_spec(EmbedConfig.from_flat(list_flags(models, precision)))
    encoder = EncoderHandler(plan.encoder, plan.buckets.full_shapes()).load_model()

    def encode(texts: list[str]) -> np.ndarray:
        vectors = np.empty((len(texts), plan.dimension), np.float32)
        for batch in make_batches(plan, texts):
            vectors[[int(chunk.document.id) for chunk in batch]] = encoder.encode(batch).vectors
        return shape_vectors(vectors, plan.vectors.vectors)

    return time_encoding(encode, source, output)


def embed_table(models: str, precision: str, source: str, output: str) -> dict[str, float]:
    """The product's whole process, in a child: `embeam embed` from the file of texts to a table."""
    from benchmarks.child import embed

    flags = list_flags(models, precision) | {"input": source, "output": output}
    return embed([f"--{name}={value}" for name, value in flags.items()])


def compare_vectors(source: str, outputs: dict[str, dict[str, str]], reference: str) -> dict[str, Any]:
    """How far the sides' vectors are from each other. Runs in a child.

    Args:
      source: the file of texts.
      outputs: by precision and side, the table or the `.npy` that it wrote.
      reference: the float32 side that those in bfloat16 are compared with.

    Returns:
      `spread`, the largest difference between two sides' numbers for one place in float32, and `cosines`, by side, the
      least with the reference; `mean_pieces` of the texts.
    """
    import numpy as np

    from pipeline import open_table
    from pipeline.encoders.parity import cosines

    exact = {side: read_vectors(source, output) for side, output in outputs["float32"].items()}
    stacked = np.stack(list(exact.values()))  # [sides, n, D]
    rounded = outputs.get("bfloat16", {})
    least = {side: float(cosines(read_vectors(source, at), exact[reference]).min()) for side, at in rounded.items()}
    table = next(output for output in outputs["float32"].values() if not output.endswith(".npy"))
    pieces = open_table(table)[0].counts["preprocess"]["tokens"]
    spread = float((stacked.max(0) - stacked.min(0)).max())
    return {"spread": spread, "cosines": least, "mean_pieces": pieces / stacked.shape[1]}


def read_vectors(source: str, output: str) -> Any:
    """What a side wrote, in the order of the texts: float32 `[n, D]`."""
    import numpy as np

    from pipeline import read_table

    if output.endswith(".npy"):
        return np.load(output)
    ids, vectors = read_table(output)
    with open(source, "rb") as file:
        sizes = [len(line) for line in file]
    place = {int(offset): i for i, offset in enumerate(np.cumsum([0, *sizes[:-1]]))}  # an id ends with @OFFSET
    ordered = np.full((len(sizes), vectors.shape[1]), np.nan, np.float32)  # a row that is missing fits nothing
    ordered[[place[int(id.rpartition("@")[2])] for id in ids]] = vectors
    return ordered


def run(options: argparse.Namespace) -> Report:
    if options.encoder or options.preprocessor or options.size:
        raise BenchmarkError("peers runs only all-MiniLM-L6-v2; leave out --encoder, --preprocessor and --size")
    folder, models = options.folder, os.path.join(options.models, "peers")
    python = make_environment(os.path.join(options.models, "peers-venv"))
    prepare_models(models, python, folder)
    source = os.path.join(folder, "texts.txt")
    write_lines(source, make_sentences(options.count))
    native = run_side(Side("benchmarks.encoder:has_native_bfloat16", {}), folder)["native"]
    precisions = ["float32", "bfloat16"] if native else ["float32"]
    facts: dict[str, Any] = {"encoder": "all-MiniLM-L6-v2"}
    sides: dict[str, Side] = {}
    outputs: dict[str, dict[str, str]] = {precision: {} for precision in precisions}
    for precision in precisions:
        # Encoding alone comes first: there the product proves its graph, once per machine, and no process pays for it.
        common = {"models": models, "precision": precision, "source": source}
        alone, whole = (os.path.join(folder, f"{OURS}-{precision}-{kind}") for kind in ("alone.npy", "whole"))
        outputs[precision] |= {name_side(OURS, precision, ALONE): alone, name_side(OURS, precision, WHOLE): whole}
        sides[name_side(OURS, precision, ALONE)] = Side("benchmarks.peers:encode_alone", common | {"output": alone})
        sides[name_side(OURS, precision, WHOLE)] = Side("benchmarks.peers:embed_table", common | {"output": whole})
        for peer in list_peers(precision):
            choose = Side("benchmarks.peer_sides:choose_setting", common | {"peer": peer}, python)
            chosen = run_side(choose, folder)
            tried = ", ".join(f"{rate:.0f} with {setting}" for setting, rate in chosen["rates"].items())
            facts[f"{peer} {precision}, texts/s on trial"] = tried
            for kind, function in ((ALONE, "encode_alone"), (WHOLE, "embed_file")):
                side = name_side(peer, precision, kind)
                outputs[precision][side] = output = os.path.join(folder, side.replace(" ", "-") + ".npy")
                arguments = common | {"peer": peer, "setting": chosen["setting"], "output": output}
                sides[side] = Side(f"benchmarks.peer_sides:{function}", arguments, python)

    def clear(side: str) -> None:
        shutil.rmtree(outputs[sides[side].arguments["precision"]][side], ignore_errors=True)  # a table; files go anyway

    runs = alternate(sides, options.repetitions, folder, clear)
    reference = name_side(REFERENCE, "float32", ALONE)
    compare = {"source": source, "outputs": outputs, "reference": reference}
    compared = run_side(Side("benchmarks.peers:compare_vectors", compare), folder)
    check_vectors(compared)
    facts["largest difference of two sides in float32"] = compared["spread"]
    facts |= {f"least cosine with float32's, {side}": f"{least:.4f}" for side, least in compared["cosines"].items()}
    facts |= run_side(Side("benchmarks.peer_sides:describe_versions", {}, python), folder)["versions"]
    ratios = []
    for kind, rate in ((ALONE, steady_rate), (WHOLE, whole_rate)):
        for precision in precisions:
            ours = rate(runs[name_side(OURS, precision, kind)])
            for peer in list_peers(precision):
                value = ours / rate(runs[name_side(peer, precision, kind)])
                floor = FLOORS.get(peer) if kind == ALONE else None
                ratios.append(Ratio(f"{OURS} / {peer} in {precision}, {kind}", value, at_least=floor))
    title = f"{options.count:,} sentences of {compared['mean_pieces']:.1f} word pieces on average, normalised means"
    return Report(title, "texts", runs, ratios, facts)


def prepare_models(models: str, python: str, folder: str) -> None:
    """Writes whatever is not yet in the folder of the models."""
    if not os.path.isdir(models):
        run_side(Side("benchmarks.peers:fetch_models", {"models": models}), folder)
    if not os.path.exists(os.path.join(models, "encoder.onnx")):
        run_side(Side("benchmarks.peer_sides:export_onnx", {"models": models}, python), folder)


def list_peers(precision: str) -> list[str]:
    return [name for name, peer in PEERS.items() if precision in peer.precisions]


def name_side(name: str, precision: str, kind: str) -> str:
    return f"{name} {precision}, {kind}"


def check_vectors(compared: dict[str, Any]) -> None:
    """Raises `BenchmarkError` if the sides' vectors differ or hold NaN."""
    if not compared["spread"] <= TOLERANCE:
        raise BenchmarkError(f"two sides differ by {compared['spread']:.2g} in float32, more than {TOLERANCE:g}")
    for side, cosine in compared["cosines"].items():
        if not cosine >= COSINE:
            raise BenchmarkError(f"{side}: a vector has a cosine of {cosine:.4f}, less than {COSINE}")
