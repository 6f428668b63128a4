"""The lock and the pointer on Cloud Storage: Google's own client against an emulator that keeps its preconditions."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import requests
from google.auth.transport.requests import AuthorizedSession

from pipeline.errors import TableError
from pipeline.tables.lock import LOCK, Lease, TableLock
from pipeline.tables.pointer import GcsObject, read_versioned, replace_if
from tests.support.emulators import start_gcs
from tests.support.pointers import check_pointer

pytestmark = pytest.mark.emulator

HOLD = """
import sys
from pipeline.tables.lock import TableLock
TableLock(sys.argv[1], "first", heartbeat_seconds=0.5, expiry_seconds=4.0).acquire()
print("held", flush=True)
sys.stdin.read()
"""
N_RACERS = 6


@pytest.fixture(scope="module")
def gcs():
    with start_gcs() as gcs, gcs.used_here():
        yield gcs


@pytest.fixture
def table(gcs, request):
    return gcs.path(re.sub(r"\W", "-", request.node.name))


def short_lock(table, run):
    return TableLock(table, run, heartbeat_seconds=0.3, expiry_seconds=2.5)


def dead_lock(table, run):
    """A lock that is never renewed, and so expires soon."""
    return TableLock(table, run, heartbeat_seconds=1000, expiry_seconds=0.2)


def race(work):
    """What `work(i)` returns in each of some threads that start together."""
    results, barrier = [None] * N_RACERS, threading.Barrier(N_RACERS)

    def run(i):
        barrier.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(N_RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def race_for(table):
    """The locks that were got and the number of refusals, when many ask for one table at once."""
    locks = [TableLock(table, f"run {i}") for i in range(N_RACERS)]

    def acquire(i):
        try:
            locks[i].acquire()
        except TableError as error:
            assert "is in use" in str(error)
            return None
        return locks[i]

    got = race(acquire)
    return [lock for lock in got if lock], got.count(None)


@pytest.fixture
def lost_answers():
    """Requests that succeed while their responses are lost; the number of such writes can be set."""
    left = [0]
    request = AuthorizedSession.request

    def lose(self, method, url, *args, **kwargs):
        response = request(self, method, url, *args, **kwargs)
        if "/upload/" in url and left[0]:
            left[0] -= 1
            raise requests.ConnectionError("the answer is lost")
        return response

    with mock.patch.object(AuthorizedSession, "request", lose):
        yield left


def test_a_pointer_is_replaced_only_if_it_is_what_was_read(table):
    path = f"{table}/CURRENT"
    check_pointer(path, "1234")


def test_a_version_is_another_though_the_text_is_the_same(table):
    path = f"{table}/CURRENT"
    replace_if(path, "a", "")
    _, first = read_versioned(path)
    replace_if(path, "a", first)
    assert not replace_if(path, "a", first)


@pytest.mark.parametrize("fresh", [True, False], ids=["new", "old"])
def test_of_many_replacements_of_one_version_one_wins(table, fresh):
    path = f"{table}/CURRENT"
    if not fresh:
        replace_if(path, "old", "")
    _, version = read_versioned(path)
    won = race(lambda i: replace_if(path, f"new {i}", version))
    assert won.count(True) == 1 and won.count(False) == N_RACERS - 1
    assert read_versioned(path)[0] == f"new {won.index(True)}"


def test_replacing_loses_nothing(table):
    path, each = f"{table}/CURRENT", 5

    def count(_):
        left = each
        while left:
            text, version = read_versioned(path)
            left -= replace_if(path, str(int(text or 0) + 1), version)

    race(count)
    assert read_versioned(path)[0] == str(each * N_RACERS)


def test_a_write_whose_answer_is_lost_is_known_for_ours(table, lost_answers):
    path = f"{table}/CURRENT"
    lost_answers[0] = 1  # the client asks again, and is told that the object is another by now
    assert replace_if(path, "a", "")
    text, version = read_versioned(path)
    assert (text, lost_answers[0]) == ("a", 0)

    lost_answers[0] = 1
    impatient = GcsObject(path, persistent=False)
    generation = impatient.write_if("b", int(version), "writer")
    assert (impatient.read().data, impatient.read().generation) == (b"b", generation)


def test_a_write_that_failed_is_an_error_and_not_a_conflict(table):
    path = f"{table}/CURRENT"
    replace_if(path, "a", "")
    version = int(read_versioned(path)[1])
    request = AuthorizedSession.request

    def refuse(self, method, url, *args, **kwargs):
        if "/upload/" in url:
            raise requests.ConnectionError("no route")
        return request(self, method, url, *args, **kwargs)

    with mock.patch.object(AuthorizedSession, "request", refuse), pytest.raises(requests.ConnectionError):
        GcsObject(path, persistent=False).write_if("b", version, "writer")
    assert read_versioned(path) == ("a", str(version))


def test_a_held_table_is_refused_with_the_name_of_its_owner(table):
    with TableLock(table, "first"), pytest.raises(TableError) as refusal:
        TableLock(table, "second").acquire()
    message = str(refusal.value)
    assert message.startswith(f"--output={table} is in use: run first on ")
    assert f", process {os.getpid()}, has held it since " in message
    assert re.search(
        r"wait for it, or stop it\. If it was killed, its lock expires in (90|89|88) seconds: run again then$", message
    )


def test_a_bucket_that_is_not_there_is_told(gcs):
    with pytest.raises(
        TableError, match=r"--output=gs://no-such-bucket/t cannot be locked: 404 .*; check the bucket's"
    ):
        TableLock("gs://no-such-bucket/t", "first").acquire()


def test_releasing_may_be_repeated_and_leaves_nothing(gcs, table):
    lock = TableLock(table, "first")
    lock.release()  # before it was ever held
    lock.acquire()
    with pytest.raises(TableError):
        TableLock(table, "second").acquire()
    name = table.removeprefix(gcs.path(""))
    assert [path for path in gcs.objects() if path.startswith(name)] == [f"{name}/{LOCK}"]
    lock.release()
    lock.release()
    assert not [path for path in gcs.objects() if path.startswith(name)]
    with TableLock(table, "second"):
        lock.release()  # not the other's
        with pytest.raises(TableError, match="run second on"):
            TableLock(table, "third").acquire()


def test_a_heartbeat_keeps_a_lock_that_would_have_expired(table):
    with short_lock(table, "first"):
        time.sleep(4)
        with pytest.raises(TableError, match="run first on"):
            short_lock(table, "second").acquire()
    with short_lock(table, "second"):
        pass


def test_a_killed_owner_frees_its_table_when_its_lock_expires(gcs, table):
    command = [sys.executable, "-c", HOLD, table]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | gcs.environment
    ) as owner:
        assert owner.stdout.readline() == "held\n"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    start = time.monotonic()
    with pytest.raises(TableError, match=f"process {owner.pid}, .* its lock expires in [1234] seconds: run again then"):
        TableLock(table, "second").acquire()  # by the time that its owner gave it, not the second's
    while True:
        try:
            TableLock(table, "second").acquire()
            break
        except TableError:
            assert time.monotonic() - start < 10
            time.sleep(0.2)
    with pytest.raises(TableError, match="run second on"):
        TableLock(table, "third").acquire()


def test_of_many_that_start_together_one_gets_the_table(table):
    got, n_refused = race_for(table)
    assert (len(got), n_refused) == (1, N_RACERS - 1)
    got[0].release()


def test_of_many_that_find_a_dead_lock_one_gets_the_table(table):
    dead_lock(table, "dead").acquire()
    time.sleep(0.5)
    got, n_refused = race_for(table)
    assert (len(got), n_refused) == (1, N_RACERS - 1)
    got[0].release()


def test_an_owner_that_was_overtaken_says_so_once_and_leaves_the_lock(table, caplog):
    sleeper = TableLock(table, "sleeper", heartbeat_seconds=1.0, expiry_seconds=0.2)
    sleeper.acquire()
    time.sleep(0.4)
    with caplog.at_level(logging.WARNING, "pipeline.tables.lock"), TableLock(table, "second"):
        time.sleep(2.5)
        assert [record.getMessage() for record in caplog.records] == [
            f"another run has taken the lock of {table}, because this run did not renew it in time; "
            "only one of the two can publish"
        ]
        sleeper.release()
        with pytest.raises(TableError, match="run second on"):
            TableLock(table, "third").acquire()


def test_a_heartbeat_outlives_a_network_that_fails_for_a_while(table, caplog):
    request = AuthorizedSession.request
    broken = threading.Event()

    def fail(self, method, url, *args, **kwargs):
        if broken.is_set():
            raise requests.ConnectionError("no route")
        return request(self, method, url, *args, **kwargs)

    with mock.patch.object(AuthorizedSession, "request", fail), short_lock(table, "first"):
        broken.set()
        time.sleep(1.2)
        broken.clear()
        time.sleep(2)
        with pytest.raises(TableError, match="run first on"):
            short_lock(table, "second").acquire()
    assert not caplog.records


def test_a_lock_whose_answer_is_lost_is_known_for_ours(table, lost_answers):
    lost_answers[0] = 1
    with short_lock(table, "first"):
        lost_answers[0] = 1  # of a heartbeat
        time.sleep(3)
        assert lost_answers[0] == 0
        with pytest.raises(TableError, match="run first on"):
            short_lock(table, "second").acquire()


# --- the lease of a job that may outlive its launcher ----------------------------------------------------------------


def age(monkeypatch, seconds):
    """Lets every lease look old enough to be renewed, and be looked at again at once."""
    monkeypatch.setattr("pipeline.tables.lock._RENEWAL_SECONDS", seconds)
    monkeypatch.setattr("pipeline.tables.lock._LOOK_SECONDS", 0)


def test_a_lock_that_is_left_to_a_job_stays(table):
    lock = dead_lock(table, "job")
    lock.acquire()
    lock.leave_to_job()
    lock.release()
    assert GcsObject(f"{table}/{LOCK}").read() is not None


def test_workers_keep_a_lock_that_nobody_else_renews(table, monkeypatch):
    age(monkeypatch, 0)
    lock = TableLock(table, "job", heartbeat_seconds=1000, expiry_seconds=2.0)
    lock.acquire()
    lock.leave_to_job()
    for _ in range(8):
        Lease(table, "job").renew()
        with pytest.raises(TableError, match="is in use: run job"):
            TableLock(table, "another").acquire()
        time.sleep(0.5)
    Lease(table, "job").release()
    with TableLock(table, "another"):
        pass


def test_a_lease_is_renewed_only_when_it_is_old(table, monkeypatch):
    age(monkeypatch, 1000)
    lock = dead_lock(table, "job")
    lock.acquire()
    before = GcsObject(f"{table}/{LOCK}").read()
    Lease(table, "job").renew()
    assert GcsObject(f"{table}/{LOCK}").read() == before
    age(monkeypatch, 0)
    Lease(table, "job").renew()
    after = GcsObject(f"{table}/{LOCK}").read()
    assert after.generation > before.generation and after.data == before.data


def test_a_lease_leaves_the_lock_of_another_run_alone(table, monkeypatch):
    age(monkeypatch, 0)
    with TableLock(table, "another"):
        before = GcsObject(f"{table}/{LOCK}").read()
        Lease(table, "job").renew()
        Lease(table, "job").release()
        assert GcsObject(f"{table}/{LOCK}").read() == before


def test_launcher_and_workers_renew_one_lock(table, monkeypatch, caplog):
    age(monkeypatch, 0)
    lock = short_lock(table, "job")
    lock.acquire()
    for _ in range(10):
        Lease(table, "job").renew()
        time.sleep(0.35)
    with pytest.raises(TableError, match="is in use: run job"):
        TableLock(table, "another").acquire()
    lock.release()
    assert GcsObject(f"{table}/{LOCK}").read() is None
    assert not caplog.records


def test_a_lock_that_the_job_has_given_back_is_not_missed(table, caplog):
    lock = short_lock(table, "job")
    lock.acquire()
    Lease(table, "job").release()
    time.sleep(1)
    with TableLock(table, "another"):
        lock.release()
        assert b"another" in GcsObject(f"{table}/{LOCK}").read().data
    assert not caplog.records
