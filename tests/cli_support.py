"""What the tests of bad input, of the command line and of interrupts share: a small encoder, small corpora, runs."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pipeline.config import EmbedConfig
from pipeline.tables.manifest import open_table
from pipeline.tables.read import read_table

ROOT = Path(__file__).resolve().parent.parent
ENCODER = ROOT / "tests" / "reference" / "tiny_v1000"
PREPROCESSOR = ROOT / "tests" / "reference" / "preprocess_v1000"


def run_embed(source, table, **settings):
    """Embeds as a program would that uses the package; returns the manifest."""
    from pipeline.job import build_table

    inputs = [str(source)] if not isinstance(source, (list, tuple)) else [str(path) for path in source]
    values = {"input": inputs, "output": str(table), "encoder": str(ENCODER), "max_dead_fraction": 1.0} | settings
    values.setdefault("max_delete_fraction", 1.0)
    return build_table(EmbedConfig.from_flat(values))


def read_dead_letters(table):
    """All dead letters of the live snapshot, in the order of their places."""
    manifest, folder = open_table(str(table))
    letters = [
        json.loads(line)
        for file in manifest.dead_letter_files
        for line in Path(folder, file.name).read_text().splitlines()
    ]
    assert sum(manifest.dead_letters.values()) == len(letters) == sum(file.rows for file in manifest.dead_letter_files)
    return sorted(letters, key=lambda letter: (letter["file"], letter.get("byte", letter.get("row"))))


def summarize(letters):
    """(file name, place, reason) of each dead letter."""
    return [(os.path.basename(x["file"]), x.get("byte", x.get("row")), x["reason"]) for x in letters]


def hash_folder(folder):
    """Every file below a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def list_snapshots(table):
    """The folders that a reader could take for a snapshot: any with a manifest or with rows in it."""
    return sorted(
        path.name
        for path in Path(table, "snapshots").glob("*")
        if list(path.glob("embeddings-*")) or (path / "manifest.json").exists()
    )


def assert_unchanged(table, before):
    """The table reads as it did, and no other snapshot lies beside it."""
    manifest, folder = open_table(str(table))
    assert manifest.snapshot == before["snapshot"]
    assert list_snapshots(table) == before["snapshots"]
    assert hash_folder(folder) == before["files"]
    ids, vectors = read_table(str(table))
    assert ids == before["ids"] and np.array_equal(vectors, before["vectors"])


def remember(table):
    """What `assert_unchanged` compares with."""
    manifest, folder = open_table(str(table))
    ids, vectors = read_table(str(table))
    return {
        "snapshot": manifest.snapshot,
        "snapshots": list_snapshots(table),
        "files": hash_folder(folder),
        "ids": ids,
        "vectors": vectors,
    }


def start_cli(*arguments, **settings):
    """Starts the command line as a process of its own, in its own process group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    environment |= settings.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        stdout=settings.pop("stdout", subprocess.PIPE),
        stderr=settings.pop("stderr", subprocess.PIPE),
        text=True,
        env=environment,
        start_new_session=True,
        **settings,
    )


def assert_one_line(text):
    """An error as the contract has it: one line, from us, without a traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert "Traceback" not in text, text
    assert len(lines) == 1 and lines[0].startswith("embeam: "), text
    return lines[0]
