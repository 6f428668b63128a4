"""The same table from every engine that runs on one machine: the results must not depend on how work is cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.sources.planning import plan_input
from pipeline.tables.manifest import Manifest, open_table
from tests.support.corpora import some_texts, write_jsonl
from tests.support.emulators import PRISM, require
from tests.support.official import official_vector
from tests.support.paths import ENCODER, ROOT
from tests.support.runs import PROCESSES, THREADS, make_config, run_pipeline
from tests.support.tables import Rows, assert_close, assert_same_rows, read_dead_letters, read_rows

N_TEXTS = 90
SETTINGS = {"split_bytes": 1500, "keep_fields": "year", "max_dead_fraction": 0.5}
FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files with ids of their own, of which every tenth occurs again: nearby, and in another file."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = some_texts(N_TEXTS, seed=31)
    records: list[dict[str, Any]] = [{"id": f"n{i}", "text": text, "year": i} for i, text in enumerate(texts)]
    again = [{"id": f"n{i}", "text": "somebody else's text", "year": -i} for i in range(0, N_TEXTS, 10)]
    records = [*records[:75], *again[:4], *records[75:], *again[4:]]
    for i in range(3):
        write_jsonl(folder / f"part-{i}.jsonl", records[33 * i : 33 * (i + 1)])
    assert len(records) == 3 * 33
    assert len(plan_input(make_config(folder, **SETTINGS).read).splits) >= 10
    return folder


@pytest.fixture(scope="module")
def local(corpus, tmp_path_factory) -> Rows:
    table = str(tmp_path_factory.mktemp("local") / "table")
    check_counts(run_pipeline(corpus, output=table, **SETTINGS), table)
    rows = read_rows(table)
    for i, text in enumerate(some_texts(N_TEXTS, seed=31)):
        assert rows[f"n{i}", 0]["year"] == i
        if i % 3 == 0:
            assert_close(rows[f"n{i}", 0]["embedding"], official_vector(text), text)
    return rows


def check_counts(manifest: Manifest, table: str) -> None:
    """What was counted does not depend on the engine either, and the later of two equal ids is dropped everywhere."""
    assert manifest.rows == N_TEXTS
    assert manifest.dead_letters == {"duplicate_id": 9}
    assert sum(file.rows for file in manifest.files) == N_TEXTS
    assert manifest.counts["read"]["records"] == N_TEXTS + 9
    assert manifest.counts["read"]["documents"] == manifest.counts["preprocess"]["documents"] == N_TEXTS
    assert manifest.counts["write_embeddings"]["records"] == manifest.counts["encode"]["rows"] == N_TEXTS
    dead_letters = read_dead_letters(table)
    assert sorted(dead_letter["id"] for dead_letter in dead_letters) == sorted(f"n{i}" for i in range(0, N_TEXTS, 10))
    assert {dead_letter["text"] for dead_letter in dead_letters} == {"somebody else's text"}


def assert_same_table(table: str, local: Rows) -> None:
    manifest, _ = open_table(table)
    check_counts(manifest, table)
    assert_same_rows(read_rows(table), local)
    assert not list(Path(table, "attempts").iterdir())


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_two_processes_give_the_same_table(corpus, local, tmp_path, monkeypatch):
    readers: set[str] = set()
    ended = threading.Event()

    def watch_progress() -> None:
        """Every process that reads says so in a file of its own, which is there until the run's end."""
        while not ended.wait(0.02):
            for path in tmp_path.glob("table/attempts/*/scratch/*.json"):
                with contextlib.suppress(OSError, ValueError):
                    if json.loads(path.read_text()).get("documents"):
                        readers.add(path.name)

    watcher = threading.Thread(target=watch_progress)
    watcher.start()
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    table = str(tmp_path / "table")
    try:
        manifest = run_pipeline(corpus, PROCESSES, output=table, **SETTINGS)
    finally:
        ended.set()
        watcher.join()
    assert_same_table(table, local)
    assert len(readers) == 2, "one process read everything"
    assert len(manifest.files) >= 2


def test_threads_and_repeated_bundles_give_the_same_table(corpus, local, tmp_path):
    table = str(tmp_path / "threads")
    assert len(run_pipeline(corpus, THREADS, output=table, **SETTINGS).files) >= 2
    assert_same_table(table, local)
    table = str(tmp_path / "repeated")
    run_pipeline(corpus, ["--direct_runner_bundle_repeat=1"], output=table, **SETTINGS)
    assert_same_table(table, local)


def embed_command(corpus: Path, table: str) -> list[str]:
    own = [f"--input={corpus}/*.jsonl", f"--output={table}", "--id_field=id", f"--encoder={ENCODER}"]
    return [sys.executable, "-m", "pipeline.cli", "embed", *own, *FLAGS]


def find_services(log_dir: Path) -> list[int]:
    """Process ids of everything that has the marker of this test in its environment."""
    marker = f"EMBEAM_TEST={log_dir}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.engine
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", [[], [f"--prism={PRISM}"]], ids=["python", "prism"])
def test_a_job_service_and_a_worker_pool_give_the_same_table(engine, corpus, local, tmp_path):
    if engine:
        require(PRISM)
    table = str(tmp_path / "table")
    command = [
        sys.executable,
        "-m",
        "runners.portable",
        f"--log_dir={tmp_path / 'logs'}",
        *engine,
        *embed_command(corpus, table),
    ]
    environment = os.environ | {"EMBEAM_TEST": str(tmp_path / "logs")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = "".join(path.read_text()[-3000:] for path in (tmp_path / "logs").glob("*.log"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    assert_same_table(table, local)
    assert "Starting worker with command" in (tmp_path / "logs/worker_pool.log").read_text(), "no worker was started"
    assert find_services(tmp_path / "logs") == []


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_the_encoder_has_workers_of_its_own(corpus, local, tmp_path):
    """Asked for a GPU, which nobody has here, it runs in a process beside the one for everything else."""
    table = str(tmp_path / "table")
    command = [sys.executable, "-m", "runners.portable", f"--log_dir={tmp_path / 'logs'}"]
    command += [*embed_command(corpus, table), "--accelerator=nvidia-l4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log = (tmp_path / "logs/worker_pool.log").read_text()
    assert done.returncode == 0, done.stderr[-3000:] + log[-3000:]
    assert_same_table(table, local)
    assert log.count("Starting sdk harness") + log.count("Starting worker with command") == 2, log[-3000:]


@pytest.mark.engine
def test_the_portable_services_end_with_what_started_them(tmp_path):
    command = [sys.executable, "-m", "runners.portable", f"--log_dir={tmp_path}"]
    environment = os.environ | {"EMBEAM_TEST": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        flags = process.stdout.readline().split()
        assert [flag.split("=")[0] for flag in flags] == [
            "--runner",
            "--job_endpoint",
            "--environment_type",
            "--environment_config",
        ]
        assert len(find_services(tmp_path)) == 3  # the command and both services
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    while find_services(tmp_path):  # one that is left would stay
        time.sleep(0.1)


@pytest.mark.engine
def test_the_portable_services_pass_on_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "runners.portable", sys.executable, "-c", "import sys; sys.exit(7)"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 7


def test_tables_are_compared_number_by_number():
    """The comparison above would notice one wrong number in one row."""
    rows = {(f"n{i}", 0): {"id": f"n{i}", "embedding": np.full(64, i, np.float32)} for i in range(9)}
    changed = {key: {**row, "embedding": row["embedding"].copy()} for key, row in rows.items()}
    assert_same_rows(changed, rows)
    changed["n7", 0]["embedding"][5] += 1e-4
    with pytest.raises(AssertionError, match="off by"):
        assert_same_rows(changed, rows)
