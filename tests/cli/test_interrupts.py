"""Ctrl-C and SIGTERM: a command ends soon, says so, leaves no process, and the table is unchanged."""

import glob
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ENCODER
from tests.support.processes import assert_one_line, kill_group, list_group, start_cli, wait_for, watches_signals
from tests.support.runs import PROCESSES, run_embed
from tests.support.tables import assert_unchanged, remember

N_LINES = 60_000
CRASH = [pytest.mark.crash, pytest.mark.alone]
pytestmark = pytest.mark.timeout(300)  # on a machine that has a lot to do besides


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


def embed_flags(corpus, table, *flags):
    paths = [f"--input={corpus}", f"--output={table}", f"--encoder={ENCODER}"]
    return ["embed", *paths, "--batch_tokens=64", "--split_bytes=500000", "--max_delete_fraction=1", *flags]


def has_rows(table):
    """Asked through `glob.glob`, which ignores folders that vanish meanwhile, like that of the test for writing."""
    return any(os.path.getsize(path) for path in glob.glob(f"{table}/attempts/*/embeddings-*"))


@pytest.mark.parametrize(
    ("number", "flags", "to_group"),
    [
        pytest.param(signal.SIGINT, [], True, id="Ctrl-C in memory"),
        pytest.param(signal.SIGTERM, [], False, id="SIGTERM in memory", marks=CRASH),
        pytest.param(signal.SIGINT, PROCESSES, True, id="Ctrl-C in processes", marks=CRASH),
        pytest.param(signal.SIGTERM, PROCESSES, False, id="SIGTERM in processes", marks=CRASH),
    ],
)
def test_a_signal_ends_a_run_soon_and_cleanly(corpus, table, number, flags, to_group):
    """Soon: it would publish if it went on to the end."""
    before = remember(table)
    process = start_cli(*embed_flags(corpus, table, "--deletes=keep", *flags))  # else the file that is gone is told
    try:
        wait_for(lambda: has_rows(table), process)
        os.killpg(process.pid, number) if to_group else process.send_signal(number)
        out, err = process.communicate()
        assert (process.returncode, out) == (128 + number, "")
        assert "the last published table is unchanged" in assert_one_line(err)
        while list_group(process):  # a worker that is left would stay
            time.sleep(0.05)
    finally:
        kill_group(process)
    assert_unchanged(table, before)
    assert not list((table / "attempts").iterdir())
    assert flags or list(table.glob("journal/*/*.seg")), "what was finished is lost"  # workers are killed


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc how far the command is")
@pytest.mark.parametrize(
    ("verb", "library"),
    [
        ("embed", ""),
        ("show", ""),
        ("query", ""),
        ("embed", "libtensorflow"),
        pytest.param("show", "pyarrow", marks=pytest.mark.crash),
        pytest.param("query", "libtensorflow", marks=pytest.mark.crash),
    ],
)
def test_ctrl_c_while_a_command_starts_is_one_line(corpus, table, verb, library):
    """At once, or while a library is being imported."""
    before = remember(table)
    flags = {"embed": embed_flags(corpus, table), "show": ["show", table], "query": ["query", table, "a dog"]}
    process = start_cli(*flags[verb])
    try:
        wait_for(lambda: watches_signals(process), process)
        wait_for(lambda: library in Path(f"/proc/{process.pid}/maps").read_text(), process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        kill_group(process)
    assert (process.returncode, out) == (130, "")
    assert "stopped" in assert_one_line(err)
    assert_unchanged(table, before)
