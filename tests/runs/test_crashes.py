"""Killed runs: kill -9 at any moment loses seconds of work and nothing else, and readers do not notice.

The full form, some ten minutes on two cores:

    EMBEAM_KILLS=20 EMBEAM_KILL_DOCUMENTS=20000 pytest tests/runs/test_crashes.py -m crash
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import RunError, TableError
from pipeline.records import Row
from pipeline.reuse import journal, journal_writer
from pipeline.tables.manifest import open_table
from tests.support.paths import ENCODER
from tests.support.processes import kill_group, start_cli, start_python, wait_for
from tests.support.runs import run_embed
from tests.support.tables import TOLERANCE, assert_unchanged, list_snapshots, remember

N_KILLS = int(os.environ.get("EMBEAM_KILLS", "6"))
N_DOCUMENTS = int(os.environ.get("EMBEAM_KILL_DOCUMENTS", "3000"))
SLOW = "--batch_tokens=64"  # hundreds of documents per second, so that there is time for a kill
WORDS = [
    "dog",
    "cat",
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "it",
    "house",
    "tree",
    "water",
    "fire",
    "stone",
    "river",
]

Contents = dict[str, tuple[str, np.ndarray]]  # id -> content hash and vector


def write_corpus(path: Path, numbers: range, salt: str, changed: float = 1.0) -> Path:
    """Documents with the given numbers as ids; the salt is in that share of the texts, the others are always equal."""
    lines = []
    for i in numbers:
        rng = random.Random(i)  # an id has the same words in every corpus
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, 40)))
        text = f"{salt} {i} {words}" if rng.random() < changed else f"{i}"
        lines.append(json.dumps({"id": f"n{i}", "text": text}) + "\n")
    path.write_text("".join(lines))
    return path


def read_snapshot(folder: Path) -> Contents:
    """All rows of a snapshot, as TensorFlow reads them; fails if anything is missing or not as its manifest says."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in [*manifest["files"], *manifest["index_files"], *manifest["dead_letter_files"]]:
        data = (folder / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["n_bytes"], file["sha256"]), file["name"]
    names = sorted(str(path) for path in folder.glob("embeddings-*"))
    assert names == sorted(str(folder / file["name"]) for file in manifest["files"])
    contents: Contents = {}
    for record in tf.data.TFRecordDataset(names).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        name = features["id"].bytes_list.value[0].decode()
        assert name not in contents, f"{name} is there twice"
        content = features["content_hash"].bytes_list.value[0].decode()
        contents[name] = content, np.array(features["embedding"].float_list.value, np.float32)
    assert len(contents) == manifest["rows"]
    return contents


def read_live(table: Path) -> Contents:
    return read_snapshot(table / "snapshots" / (table / "CURRENT").read_text().strip())


def is_same(contents: Contents, expected: Contents) -> bool:
    if contents.keys() != expected.keys() or any(contents[name][0] != expected[name][0] for name in expected):
        return False
    return all(float(np.max(np.abs(contents[name][1] - expected[name][1]))) <= TOLERANCE for name in expected)


class Reader(threading.Thread):
    """Follows the pointer all the time, and looks through every snapshot that it ever names."""

    def __init__(self, table: Path, states: dict[str, Contents]) -> None:
        super().__init__(daemon=True)
        self.table = table
        self.states = states
        self.seen: dict[str, str] = {}  # snapshot -> which state it holds
        self.n_polls = 0
        self.errors: list[str] = []
        self._stop_it = threading.Event()

    def run(self) -> None:
        while not self._stop_it.is_set():
            try:
                self._look()
            except BaseException as error:
                self.errors.append(repr(error))
            self._stop_it.wait(0.002)

    def _look(self) -> None:
        self.n_polls += 1
        name = (self.table / "CURRENT").read_text().strip()
        if name in self.seen:
            return
        contents = read_snapshot(self.table / "snapshots" / name)
        fitting = [state for state, expected in self.states.items() if is_same(contents, expected)]
        self.seen[name] = fitting[0] if fitting else "none"
        assert fitting, f"{name} holds {len(contents)} rows of no state that the corpus ever had"

    def finish(self) -> None:
        self._stop_it.set()
        self.join()
        assert not self.errors, self.errors[:3]


def comes_to(condition: Callable[[], bool], process: Any) -> bool:
    """Polls fast; returns False if the run ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0003)
    return True


def has_file(folder: Path, old: set[str], pattern: str) -> Callable[[], bool]:
    """Whether a subfolder that is not an old one has a matching file."""

    def look() -> bool:
        try:
            return any(path.relative_to(folder).parts[0] not in old for path in folder.glob("*/" + pattern))
        except FileNotFoundError:  # a folder that was removed while it was listed
            return False

    return look


def list_names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def count_finished(table: Path) -> int:
    """Rows that a run says it has written, as its progress is shown."""
    total = 0
    for path in table.glob("attempts/*/scratch/*.json"):
        try:
            total += json.loads(path.read_text()).get("rows", 0)
        except (OSError, ValueError):
            pass
    return total


def list_segments(table: Path) -> list[Path]:
    return sorted(table.glob("journal/*/*.seg"), key=lambda path: path.stat().st_mtime)


def count_rows(segment: Path) -> int:
    """Rows of a segment, by its head."""
    data = segment.read_bytes()[:16]
    assert data[:8] == b"embeam2\n"
    return int(struct.unpack("<Q", data[8:])[0])


def embed_flags(corpus: Path, table: Path, *flags: str) -> list[str]:
    paths = ["embed", f"--input={corpus}", f"--output={table}", f"--encoder={ENCODER}"]
    return [*paths, "--id_field=id", "--max_delete_fraction=0.5", *flags]


def encode(corpus: Path, table: Path, **settings: Any) -> Any:
    """A run in this process, with large batches."""
    return run_embed(corpus, table, id_field="id", max_delete_fraction=0.5, **settings)


# A run that stands still in its fifth batch, having said so; each row that is finished is in the journal at once.
STANDS_STILL = """
import sys, threading
from pathlib import Path
from pipeline.cli import main as cli
from pipeline.encoders.handler import LoadedEncoder
from pipeline.reuse import journal_writer

told, encode, seen = Path(sys.argv.pop(1)), LoadedEncoder.encode, []

def encode_four(self, batch):
    seen.append(batch)
    if len(seen) == 5:
        told.touch()
        threading.Event().wait()
    return encode(self, batch)

LoadedEncoder.encode, journal_writer.FLUSH_BYTES = encode_four, 1
cli.run()
"""


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_has_had_its_table_alone_and_loses_nothing(tmp_path):
    n, table = 60, tmp_path / "table"
    encode(write_corpus(tmp_path / "old.jsonl", range(n), "old"), table)
    corpus, before = write_corpus(tmp_path / "new.jsonl", range(n), "new"), remember(table)
    process = start_python("-c", STANDS_STILL, tmp_path / "told", *embed_flags(corpus, table, SLOW))
    try:
        wait_for((tmp_path / "told").exists, process)
        with pytest.raises(TableError, match=f"is in use: run .* process {process.pid}, has held it since"):
            encode(corpus, table)
    finally:
        kill_group(process)
    assert_unchanged(table, before)
    n_kept = sum(map(count_rows, list_segments(table)))
    assert 4 <= n_kept < n
    manifest = encode(corpus, table)
    assert (manifest.counts["encode"]["rows"], manifest.counts["reuse"]["reused"]) == (n - n_kept, n_kept)
    encode(corpus, tmp_path / "fresh")
    assert is_same(read_live(table), read_live(tmp_path / "fresh"))
    assert not list_names(table / "attempts") and not (table / "journal").exists()


# Moments of the kill: what to wait for, flags, and the seconds to wait after that.
MOMENTS: dict[str, tuple[Callable[[Path, set[str], set[str]], Callable[[], bool]], list[str], float]] = {
    "encoding": (lambda t, a, s: has_file(t / "attempts", a, "embeddings-*"), [SLOW], 4.0),
    "the last rows": (lambda t, a, s: has_file(t / "attempts", a, "index-*"), [], 0.05),
    "publishing": (lambda t, a, s: lambda: bool(list_names(t / "snapshots") - s), [], 0.003),
    "starting": (lambda t, a, s: lambda: bool(list_names(t / "attempts") - a), [SLOW], 1.5),
    "agreed": (lambda t, a, s: has_file(t / "attempts", a, "commit.json"), [], 0.01),
    "published": (lambda t, a, s: has_file(t / "snapshots", s, "manifest.json"), [], 0.02),
}


@pytest.mark.crash
@pytest.mark.alone
@pytest.mark.timeout(60 * N_KILLS + 300)
def test_kills_at_any_moment_lose_nothing_and_readers_see_whole_tables(tmp_path):
    n = N_DOCUMENTS
    targets = {  # state -> corpus and settings; each is made from the one before, the last by another model
        "new": (write_corpus(tmp_path / "new.jsonl", range(n // 10, n), "new", 0.8), {}),
        "cut": (tmp_path / "new.jsonl", {"max_tokens": 12}),
        "old": (write_corpus(tmp_path / "old.jsonl", range(n - n // 10), "old", 0.8), {}),
    }
    states = {}
    for state, (corpus, settings) in targets.items():
        encode(corpus, tmp_path / state, **settings)
        states[state] = read_live(tmp_path / state)
    assert len(states["old"].keys() & states["new"].keys()) == n - 2 * (n // 10)
    n_equal = sum(states["new"].get(name, ("",))[0] == row[0] for name, row in states["old"].items())
    assert n // 20 < n_equal < n // 2, "some rows should stay and most should change"
    assert not is_same(states["new"], states["cut"])

    table = tmp_path / "table"
    shutil.copytree(tmp_path / "old", table)
    reader = Reader(table, states)
    reader.start()
    rng = random.Random(n)
    order = list(targets)
    goal, ends = 0, []
    try:
        for number in range(N_KILLS):
            moment = list(MOMENTS)[number % len(MOMENTS)]
            condition, flags, seconds = MOMENTS[moment]
            corpus, settings = targets[order[goal]]
            more = [f"--{name}={value}" for name, value in settings.items()]
            reached = condition(table, list_names(table / "attempts"), list_names(table / "snapshots"))
            process = start_cli(*embed_flags(corpus, table, *flags, *more))
            try:
                found = comes_to(reached, process)
                if found:
                    time.sleep(rng.uniform(0, seconds))
                ended = process.poll()
            finally:
                kill_group(process)
            ends.append((moment, found, ended))
            assert ended in (None, 0), f"a run after kills failed: {ends}"
            if (live := read_live(table)) and is_same(live, states[order[goal]]):
                goal = (goal + 1) % len(order)  # the run had published before it was killed
        assert sum(ended is None for _, _, ended in ends) >= max(1, N_KILLS * 2 // 3), f"too few died: {ends}"
        corpus, settings = targets[order[goal]]
        process = start_cli(*embed_flags(corpus, table, *(f"--{name}={value}" for name, value in settings.items())))
        _, err = process.communicate()
        assert process.returncode == 0, err
        time.sleep(0.1)
    finally:
        reader.finish()
    assert is_same(read_live(table), states[order[goal]])
    assert reader.seen[(table / "CURRENT").read_text().strip()] == order[goal]
    assert len(reader.seen) >= 2 and reader.n_polls > 100
    assert set(list_snapshots(table)) <= set(reader.seen), "a snapshot that never was live takes room for ever"
    live = open_table(str(table))[0]
    assert not list_names(table / "attempts")
    assert live.fingerprint[:32] not in list_names(table / "journal"), "only the other model may have a journal"


@pytest.mark.crash
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_a_kill_costs_at_most_half_a_minute(tmp_path):
    """As told by the segments that are there, against what the next run encodes."""
    n = max(20_000, N_DOCUMENTS)
    corpus, table = write_corpus(tmp_path / "c.jsonl", range(n), "new"), tmp_path / "table"
    process = start_cli(*embed_flags(corpus, table, SLOW))
    try:
        assert comes_to(lambda: count_finished(table) > 0, process)
        begun = time.time()
        assert comes_to(lambda: bool(list_segments(table)), process), "it should take longer than one segment"
        time.sleep(2)
        n_finished, now = count_finished(table), time.time()
        assert process.poll() is None
    finally:
        kill_group(process)
    segments = list_segments(table)
    n_kept = sum(map(count_rows, segments))
    assert 0 < n_kept < n
    assert now - segments[-1].stat().st_mtime < 30
    rate = n_finished / (now - begun + 1)
    assert n_finished - n_kept <= max(1000, 30 * rate)
    manifest = encode(corpus, table)
    assert manifest.counts["encode"]["rows"] == n - n_kept
    assert manifest.counts["reuse"]["reused"] == n_kept
    encode(corpus, tmp_path / "fresh")
    assert is_same(read_live(table), read_live(tmp_path / "fresh"))


@pytest.mark.crash
@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["INT", "TERM"])
def test_a_run_that_is_stopped_keeps_all_that_it_finished(tmp_path, number, to_group):
    n = 6000
    corpus, table = write_corpus(tmp_path / "c.jsonl", range(n), "new"), tmp_path / "table"
    process = start_cli(*embed_flags(corpus, table, SLOW))
    try:
        assert comes_to(lambda: count_finished(table) > 0, process)
        time.sleep(1)
        n_finished = count_finished(table)
        os.killpg(process.pid, number) if to_group else process.send_signal(number)
        process.communicate()
        assert process.returncode == 128 + number
    finally:
        kill_group(process)
    n_kept = sum(map(count_rows, list_segments(table)))
    assert 0 < n_finished <= n_kept < n
    assert not list_names(table / "attempts") and not (table / "CURRENT").exists()
    manifest = encode(corpus, table)
    assert manifest.counts["encode"]["rows"] == n - n_kept
    assert manifest.counts["reuse"]["reused"] == n_kept


# What is in the journal, and what a crash or a broken disk makes of it


def test_the_journal_holds_back_neither_much_nor_for_half_a_minute(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal_writer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    folder = tmp_path / "journal" / "fingerprint"
    folder.mkdir(parents=True)
    writer = journal_writer.JournalWriter(str(folder))

    def add(number: int, seconds: float, n_bytes: int = 256) -> list[int]:
        """How many rows each segment has after another row, so many seconds later."""
        now[0] += seconds
        writer.add(Row("", 0, bytes(n_bytes), 0.0, 4, 0, f"{number:032x}", b"", None))
        return sorted(map(count_rows, list_segments(tmp_path)))

    assert add(0, seconds=1) == add(1, seconds=1) == []
    assert add(2, seconds=27) == [3]
    assert add(3, seconds=1) == [3]
    assert add(4, seconds=0, n_bytes=8 << 20) == [2, 3]
    add(5, seconds=1)
    writer.close()
    assert sorted(map(count_rows, list_segments(tmp_path))) == [1, 2, 3]


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> tuple[Path, Path, Contents]:
    """As `stopped`, for the tests to copy, and what is in a table that the same corpus makes."""
    folder = tmp_path_factory.mktemp("stopped")
    table = folder / "table"
    encode(write_corpus(folder / "c.jsonl", range(20), "old"), table)
    corpus = write_corpus(folder / "c.jsonl", range(5, 50), "old")  # 15 stay, 30 are new
    with mock.patch.object(journal_writer, "FLUSH_BYTES", 1), pytest.raises(RunError, match="max_delete_fraction"):
        run_embed(corpus, table, id_field="id", max_delete_fraction=0.1)
    assert [count_rows(path) for path in list_segments(table)] == [1] * 30
    encode(corpus, folder / "fresh")
    return corpus, table, read_live(folder / "fresh")


@pytest.fixture
def stopped(stopped_run, tmp_path) -> Path:
    """A table whose run was stopped behind the encoder, with 30 segments of one row each."""
    return Path(shutil.copytree(stopped_run[1], tmp_path / "table"))


@pytest.fixture
def check_rerun(stopped_run) -> Callable[[Path, int], None]:
    """Checks that the same run, once more, encodes so many rows and makes the right table."""
    corpus, _, fresh = stopped_run

    def check(table: Path, n_encoded: int) -> None:
        manifest = encode(corpus, table)
        assert manifest.counts["encode"].get("rows", 0) == n_encoded
        assert is_same(read_live(table), fresh)
        assert not (table / "journal").exists()

    return check


def test_incomplete_segments_cost_their_rows_and_nothing_else(stopped, check_rerun):
    segments = list_segments(stopped)
    sizes = [0, 7, 12, 16, 40, segments[5].stat().st_size - 1]
    for path, size in zip(segments, sizes, strict=False):
        path.write_bytes(path.read_bytes()[:size])
    data = bytearray(segments[6].read_bytes())
    data[-1] ^= 1
    segments[6].write_bytes(data)
    segments[7].write_bytes(segments[7].read_bytes() + b"more")
    segments[8].unlink()
    (segments[9].parent / (segments[9].name + ".0a1b2c3d.new")).write_bytes(segments[9].read_bytes()[:50])
    check_rerun(stopped, 9)


def test_a_segment_that_is_there_twice_is_harmless(stopped, check_rerun):
    segments = list_segments(stopped)
    data = segments[0].read_bytes()
    segments[0].write_bytes(data)  # a writer that was repeated
    (segments[0].parent / ("0" * 40 + ".seg")).write_bytes(data)
    (segments[0].parent / (segments[0].name + ".seg")).write_bytes(data)
    rows = []
    for path in segments[:12]:  # the same vectors in another segment, as of two bundles
        segment = journal.read_segment(str(path))
        columns = {name: values[0] for name, values in segment.columns([0]).items()}
        content = bytes(segment.records["content"][0]).ljust(16, b"\0").hex()
        rows.append(Row(id="", vector=columns.pop("embedding"), content_hash=content, kept=b"", text=None, **columns))
    journal.write_segment(str(segments[0].parent), rows)
    assert sorted(map(count_rows, list_segments(stopped)))[-1] == 12
    check_rerun(stopped, 0)


def test_what_a_killed_run_left_is_removed(stopped, check_rerun):
    table = stopped
    name = "29990101T000000Z-abcdef"  # younger than the live one, complete, and never live
    live = Path(open_table(str(table))[1])
    shutil.copytree(live, table / "snapshots" / name)
    for rest in ("scratch/known", "scratch"):
        (table / "attempts" / name / rest).mkdir(parents=True, exist_ok=True)
        (table / "attempts" / name / rest / "entries").write_bytes(b"torn")
    (table / "attempts" / name / "embeddings-0a.tfrecord").write_bytes(b"torn")
    half = table / "snapshots" / "29990101T000000Z-000000"
    half.mkdir()
    (table / "attempts" / half.name).mkdir()
    (half / "embeddings-00000-of-00001.tfrecord").write_bytes(b"torn")
    check_rerun(table, 0)
    assert list_snapshots(table) == sorted([live.name, (table / "CURRENT").read_text().strip()])
    assert not list_names(table / "attempts")
