"""Ctrl-C, SIGTERM and kill -9: a run ends soon, says so, leaves no process, and the table is what it was."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.tables.read import read_table
from tests.support.paths import ENCODER
from tests.support.processes import assert_one_line, start_cli
from tests.support.runs import run_embed
from tests.support.tables import assert_unchanged, list_snapshots, remember

N_LINES = 60_000
PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus that takes long enough to be interrupted in the middle."""
    path = tmp_path_factory.mktemp("corpus") / "long.txt"
    path.write_text("".join(f"document {i} of a corpus of dogs and cats\n" for i in range(N_LINES)))
    return path


@pytest.fixture
def table(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\na cat\n")
    run_embed(tmp_path / "a.txt", tmp_path / "table")
    return tmp_path / "table"


def start_embed(corpus, table, *flags):
    return start_cli(
        *("embed", f"--input={corpus}", f"--output={table}", f"--encoder={ENCODER}", "--batch_tokens=64"),
        *("--split_bytes=500000", "--max_delete_fraction=1", *flags),
    )


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended early: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.05)


def has_rows(table):
    return lambda: any(path.stat().st_size for path in Path(table, "attempts").glob("*/embeddings-*"))


def list_group(process):
    """The living processes of a run's process group, itself included."""
    found = []
    for other in psutil.process_iter(["status"]):
        try:
            if os.getpgid(other.pid) == process.pid and other.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(other.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def clean_up(process):
    for pid in list_group(process):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "flags", "to_group"),
    [
        (signal.SIGINT, 130, [], True),
        (signal.SIGTERM, 143, [], False),
        (signal.SIGINT, 130, PROCESSES, True),
        (signal.SIGTERM, 143, PROCESSES, False),
    ],
    ids=["Ctrl-C in memory", "SIGTERM in memory", "Ctrl-C in processes", "SIGTERM in processes"],
)
def test_a_signal_ends_a_run_soon_and_cleanly(corpus, table, number, code, flags, to_group):
    before = remember(table)
    process = start_embed(corpus, table, *flags)
    try:
        wait_for(has_rows(table), process)
        begun = time.monotonic()
        os.killpg(process.pid, number) if to_group else process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - begun < 8
        assert (process.returncode, out) == (code, "")
        lines = [line for line in err.splitlines() if not line.startswith("[")]  # progress is no message
        assert "what it was last published as" in assert_one_line("\n".join(lines))
        time.sleep(0.5)
        assert not list_group(process)
    finally:
        clean_up(process)
    assert_unchanged(table, before)
    assert not list((table / "attempts").iterdir())


@pytest.mark.parametrize("seconds", [0.3, 2.5])
def test_a_signal_while_starting_up_is_no_traceback(corpus, table, seconds):
    before = remember(table)
    process = start_embed(corpus, table)
    try:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        clean_up(process)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err
    assert_unchanged(table, before)


@pytest.mark.parametrize("verb", [["show", "DIR"], ["query", "DIR", "a dog"]], ids=["show", "query"])
def test_ctrl_c_in_the_other_verbs_is_no_traceback(table, verb):
    process = start_cli(*(str(table) if argument == "DIR" else argument for argument in verb))
    try:
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        clean_up(process)
    assert process.returncode == 130 and "Traceback" not in err


def test_the_same_command_after_kills_gives_the_right_table(corpus, table, tmp_path):
    before = remember(table)
    source = tmp_path / "short.txt"
    source.write_text("".join(corpus.read_text().splitlines(keepends=True)[:6000]))
    attempts = table / "attempts"
    for seconds in (0.0, 0.5, 1.0):
        known = set(attempts.iterdir())
        process = start_embed(source, table)
        try:
            wait_for(lambda known=known: set(attempts.glob("2*")) - known, process)
            time.sleep(seconds)
            assert process.poll() is None, process.communicate()
        finally:
            clean_up(process)
        assert_unchanged(table, before)
    process = start_embed(source, table)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    run_embed(source, tmp_path / "fresh")
    ids, vectors = read_table(str(table))
    expected_ids, expected = read_table(str(tmp_path / "fresh"))
    order, expected_order = np.argsort(ids), np.argsort(expected_ids)
    assert [ids[i] for i in order] == [expected_ids[i] for i in expected_order] and len(ids) == 6000
    np.testing.assert_allclose(vectors[order], expected[expected_order], atol=1e-5)
    assert len(list_snapshots(table)) == 2
    assert not list(attempts.iterdir()), "what dead runs left takes room for ever"
