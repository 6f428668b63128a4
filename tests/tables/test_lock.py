"""One run at a time holds a table, and one of many replaces its pointer: on a local disk, against real processes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from apache_beam.io.localfilesystem import LocalFileSystem

from pipeline.errors import TableError
from pipeline.tables.lock import LOCK, TableLock
from pipeline.tables.pointer import read_versioned, replace_if
from tests.support.pointers import check_pointer

# Starts a process for each line that it reads: forked, because every new Python takes seconds to import Beam.
FORK = """
import multiprocessing, os, signal, sys, time
from pipeline.errors import TableError
from pipeline.tables.lock import TableLock
from pipeline.tables.pointer import read_versioned, replace_if

context = multiprocessing.get_context("fork")

def hold(table):
    lock = TableLock(table, "first")
    lock.acquire()
    print("held", os.getpid(), flush=True)
    signal.pause()

def hold_with_a_child(table):
    lock = TableLock(table, "first")
    lock.acquire()
    child = os.fork()
    if child == 0:
        signal.pause()
    lock.release()
    print("released", child, os.getpid(), flush=True)
    signal.pause()

def together(work, path, n, repeats):
    barrier = context.Barrier(n)

    def contend(i):
        barrier.wait()
        lock = TableLock(path, f"run {i}")
        try:
            lock.acquire()
            return "held"
        except TableError:
            return "refused"
        finally:
            barrier.wait()  # all have tried before one ends

    def count(i):
        barrier.wait()
        left = repeats
        while left:
            text, version = read_versioned(path)
            left -= replace_if(path, str(int(text or 0) + 1), version)
        return "done"

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    results = context.SimpleQueue()
    run = {"contend": contend, "count": count}[work]
    processes = [context.Process(target=lambda i: results.put(run(i)), args=(i,)) for i in range(n)]
    for process in processes:
        process.start()
    print(*sorted(results.get() for _ in processes), flush=True)
    for process in processes:
        process.join()

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are gone at once
for line in sys.stdin:
    task, *arguments = eval(line)
    if os.fork() == 0:
        {"hold": hold, "hold with a child": hold_with_a_child, "together": together}[task](*arguments)
        os._exit(0)
"""


@pytest.fixture(scope="module")
def start():
    """Starts a task in a process of its own and returns the words that it says."""
    command = [sys.executable, "-c", FORK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def send(*task):
            server.stdin.write(f"{task!r}\n")
            server.stdin.flush()
            line = server.stdout.readline().split()
            assert line, "the process has failed, see above"
            return line

        yield send
        server.stdin.close()


def kill(*numbers):
    """Kills processes, children first, and waits until they are gone."""
    for number in numbers:
        os.kill(number, signal.SIGKILL)
        while is_alive(number):
            time.sleep(0.01)


def is_alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def started(start, *task):
    """What a task says that does not end by itself: a word, and the numbers of its processes."""
    word, *numbers = start(*task)
    numbers = list(map(int, numbers))
    try:
        yield word, *numbers
    finally:
        kill(*filter(is_alive, numbers))


def test_a_held_table_is_refused_with_the_name_of_its_owner_and_free_once_that_is_killed(start, tmp_path):
    table = str(tmp_path / "table")
    with started(start, "hold", table) as (word, owner):
        assert word == "held"
        with pytest.raises(TableError) as refusal:
            TableLock(table, "second").acquire()
        kill(owner)
        with TableLock(table, "second"), pytest.raises(TableError, match="run second on"):
            TableLock(table, "third").acquire()
    message = str(refusal.value)
    assert message.startswith(f"--output={table} is in use: run first on ")
    assert re.search(rf", process {owner}, has held it since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC; ", message)
    assert message.endswith("wait for it, or stop it")


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    table = str(tmp_path)
    with TableLock(table, "first"), pytest.raises(TableError, match="run first on"):
        TableLock(table, "second").acquire()
    with TableLock(table, "second"):
        pass


def test_a_forked_child_does_not_keep_what_its_parent_has_released(start, tmp_path):
    with started(start, "hold with a child", str(tmp_path)) as (word, child, _):
        assert word == "released" and is_alive(child)
        with TableLock(str(tmp_path), "second"):
            pass


def test_of_many_that_start_together_one_gets_the_table(start, tmp_path):
    assert start("together", "contend", str(tmp_path / "table"), 5, 0) == ["held"] + ["refused"] * 4


def test_releasing_may_be_repeated_from_any_thread_and_leaves_an_empty_file(tmp_path):
    lock = TableLock(str(tmp_path), "first")
    lock.release()  # before it was ever held
    lock.acquire()
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    lock.release()
    assert (tmp_path / LOCK).read_bytes() == b""
    with TableLock(str(tmp_path), "second"):
        lock.release()  # not the other's
        with pytest.raises(TableError, match="run second on"):
            TableLock(str(tmp_path), "third").acquire()


def test_an_owner_that_has_not_yet_given_its_name_is_refused_all_the_same(tmp_path):
    with TableLock(str(tmp_path), "first"):
        (tmp_path / LOCK).write_bytes(b'{"run": "fi')
        with pytest.raises(TableError, match="is in use by another run; wait"):
            TableLock(str(tmp_path), "second").acquire()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TableError, match=r"cannot be written to: .*; check its permissions"):
        TableLock(str(tmp_path / "file" / "table"), "first").acquire()


def test_other_file_systems_have_no_lock():
    first, second = (TableLock("hdfs://nowhere/table", name) for name in ("first", "second"))
    with first, second:
        pass


class KeptFileSystem(LocalFileSystem):
    """`kept://`: a file system that is not local to the product, and has no lock."""

    @classmethod
    def scheme(cls):
        return "kept"

    def exists(self, path):
        return super().exists(_strip(path))

    def open(self, path, *args, **kwargs):
        return super().open(_strip(path), *args, **kwargs)

    def create(self, path, *args, **kwargs):
        return super().create(_strip(path), *args, **kwargs)


def _strip(path):
    return path.removeprefix("kept:/")


@pytest.mark.parametrize("prefix", ["", "kept:/"], ids=["local", "other"])
def test_a_pointer_is_replaced_only_if_it_is_what_was_read(tmp_path, prefix):
    path = f"{prefix}{tmp_path}/CURRENT"
    check_pointer(path, "some version")
    assert sorted(os.listdir(tmp_path)) == ["CURRENT"]


def test_an_empty_pointer_is_not_an_absent_one(tmp_path):
    path = tmp_path / "CURRENT"
    path.touch()
    text, version = read_versioned(str(path))
    assert text == "" and version
    assert not replace_if(str(path), "a", "")
    assert replace_if(str(path), "a", version)


def test_a_damaged_pointer_is_not_an_absent_one_and_can_be_replaced(tmp_path):
    path = tmp_path / "CURRENT"
    path.write_bytes(b"a\xff")
    text, version = read_versioned(str(path))
    assert text == "a\ufffd"
    assert not replace_if(str(path), "b", "")
    assert replace_if(str(path), "b", version)
    assert read_versioned(str(path))[0] == "b"


def test_replacing_loses_nothing_between_processes(start, tmp_path):
    path = tmp_path / "CURRENT"
    assert start("together", "count", str(path), 4, 30) == ["done"] * 4
    assert path.read_text() == str(4 * 30)


def test_of_many_replacements_of_one_version_one_wins(tmp_path):
    path, n = str(tmp_path / "CURRENT"), 16
    replace_if(path, "old", "")
    _, version = read_versioned(path)
    won = race(n, lambda i: replace_if(path, f"new {i}", version))
    assert won.count(True) == 1 and won.count(False) == n - 1
    assert read_versioned(path)[0] == f"new {won.index(True)}"


def race(n, work):
    """What `work(i)` returns in each of n threads that start together."""
    results, barrier = [None] * n, threading.Barrier(n)

    def run(i):
        barrier.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
