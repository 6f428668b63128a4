"""The lock of a table: one run at a time, because two runs would encode the same documents and one result is lost.

TABLE/lock names the owner, as JSON. On a local disk the kernel holds the lock and releases it when the process ends in
any way. On gs:// the object is the lock: its owner renews it every few seconds, and an expired one may be taken. A job
on a distributed engine may outlive the process that started it: its lock lasts longer, and its workers renew it too
(`Lease`). Beam's other file systems have no locks. A table stays consistent because its pointer is compared and
replaced; a lock only saves work.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Optional

from pipeline.errors import TableError, first_line
from pipeline.files import is_local, join
from pipeline.tables.pointer import GcsObject, StoredObject, is_gcs

LOCK = "lock"
HEARTBEAT_SECONDS = 20.0
EXPIRY_SECONDS = 90.0
LEASE_SECONDS = 7200.0  # of a job, which may wait this long for workers
_REQUEST_SECONDS = 10.0  # a renewal that takes longer is abandoned; the next one follows
_TRIES = 5
_RENEWAL_SECONDS = 300.0  # a lease younger than this is not renewed
_LOOK_SECONDS = 60.0  # between two checks of one worker: an object allows one write per second from all workers

_LOGGER = logging.getLogger(__name__)


def can_lock(table: str) -> bool:
    """Whether the table's file system supports locks."""
    return is_local(table) or is_gcs(table)


class TableLock:
    """Locks a table for one run, against other processes and other runs in this process; can be used once.

    On file systems that are neither local nor gs:// it does nothing.

    Args:
      table: the table's folder.
      run: a name for the run, which the error message of other runs shows.
      heartbeat_seconds: between two renewals on gs://.
      expiry_seconds: after which a lock on gs:// that is not renewed may be taken.
    """

    def __init__(
        self,
        table: str,
        run: str,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        expiry_seconds: float = EXPIRY_SECONDS,
    ) -> None:
        self._lock: Optional[_GcsLock | _LocalLock] = None
        if is_gcs(table):
            self._lock = _GcsLock(table, run, heartbeat_seconds, expiry_seconds)
        elif is_local(table):
            self._lock = _LocalLock(table, run)

    def acquire(self) -> None:
        """Takes the lock without waiting.

        Raises:
          TableError: if another run has it, or the folder cannot be locked.
        """
        if self._lock is not None:
            self._lock.acquire()

    def release(self) -> None:
        """Releases the lock; may be called from any thread and more than once."""
        if self._lock is not None:
            self._lock.release()

    def leave_to_job(self) -> None:
        """Leaves the lock to the run's job, whose workers renew it and whose last step releases it."""
        if isinstance(self._lock, _GcsLock):
            self._lock.leave()

    def __enter__(self) -> TableLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.release()


class _LocalLock:
    """The kernel's lock of a file. The file is never removed: a new file of this name could be locked a second time."""

    def __init__(self, table: str, run: str) -> None:
        self._table = table
        self._path = os.path.join(os.path.abspath(table), LOCK)
        self._run = run
        self._mutex = threading.Lock()
        self._file: Optional[int] = None

    def acquire(self) -> None:
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise TableError(f"--output={self._table} cannot be written to: {error}; check its permissions") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(os.pread(file, 4096, 0))
            os.close(file)
            raise TableError(f"{_in_use(self._table, owner)}; wait for it, or stop it") from None
        except OSError as error:
            os.close(file)
            raise TableError(
                f"--output={self._table} cannot be locked: {error}; give a folder on a file system that has locks"
            ) from error
        with suppress(OSError):  # on a full disk the lock is held without the owner's name
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_describe(self._run)).encode(), 0)
        self._file = file

    def release(self) -> None:
        with self._mutex:
            file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                os.ftruncate(file, 0)
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not unlock while a forked child has the file open
            os.close(file)


class _GcsLock:
    """An object that locks the table while its owner renews it; only the store's clock counts."""

    def __init__(self, table: str, run: str, heartbeat_seconds: float, expiry_seconds: float) -> None:
        self._table = table
        self._path = join(table, LOCK)
        self._run = run
        self._heartbeat_seconds = heartbeat_seconds
        self._expiry_seconds = expiry_seconds
        self._text = json.dumps(_describe(run) | {"expiry_seconds": expiry_seconds})
        self._writer = uuid.uuid4().hex
        self._generation = 0  # of our object; 0 if we have none
        self._mutex = threading.Lock()  # between a heartbeat and the release
        self._stop = threading.Event()

    def acquire(self) -> None:
        try:
            self._generation = self._take(GcsObject(self._path))
        except TableError:
            raise
        except Exception as error:  # no bucket, no right to it, no network
            raise TableError(
                f"--output={self._table} cannot be locked: {first_line(error)}; check the bucket's name and permissions"
            ) from error
        threading.Thread(target=self._renew, name="embeam-table-lock", daemon=True).start()

    def leave(self) -> int:
        """Ends the renewals; returns the object's last generation, 0 for none."""
        self._stop.set()
        with self._mutex:
            generation, self._generation = self._generation, 0
        return generation

    def release(self) -> None:
        if generation := self.leave():
            try:
                if not GcsObject(self._path, _REQUEST_SECONDS, persistent=False).delete_if(generation):
                    Lease(self._table, self._run).release()  # a worker may have renewed it
            except Exception as error:  # the run has succeeded even if its lock stays
                _LOGGER.warning(
                    "%s could not be removed (%s); it expires within %d seconds",
                    self._path,
                    error,
                    self._expiry_seconds,
                )

    def _take(self, lock: GcsObject) -> int:
        owner: dict[str, Any] = {}
        left = self._expiry_seconds
        for _ in range(_TRIES):  # repeated if another run takes or releases it between two requests
            generation = lock.write_if(self._text, 0, self._writer)
            if generation:
                return generation
            stored = lock.read()
            if stored is None:
                continue
            owner = _read_owner(stored.data)
            expiry_seconds = owner.get("expiry_seconds", self._expiry_seconds)
            left = expiry_seconds - (lock.read_clock() - stored.updated).total_seconds()
            if left > 0:
                break
            generation = lock.write_if(self._text, stored.generation, self._writer)
            if generation:
                return generation
        raise TableError(
            f"{_in_use(self._table, owner)}; wait for it, or stop it. "
            f"If it was killed, its lock expires in {max(1, round(left))} seconds: run again then"
        )

    def _renew(self) -> None:
        lock = GcsObject(self._path, _REQUEST_SECONDS, persistent=False)
        while not self._stop.wait(self._heartbeat_seconds):
            with self._mutex:
                if not self._generation:
                    return
                try:
                    self._generation = lock.write_if(self._text, self._generation, self._writer)
                    if not self._generation:
                        self._generation = self._find_own(lock)
                except Exception as error:  # the next renewal may succeed
                    _LOGGER.debug("%s could not be renewed: %s", self._path, error)
                    continue
                if not self._generation:
                    return

    def _find_own(self, lock: GcsObject) -> int:
        """The generation of the run's lock after a worker renewed it; 0 if it is released or another run's."""
        stored = lock.read()
        if stored is None:  # the job's last step has released it
            return 0
        if _read_owner(stored.data).get("run") == self._run:
            return stored.generation
        _LOGGER.warning(
            "another run has taken the lock of %s, because this run did not renew it in time; "
            "only one of the two can publish",
            self._table,
        )
        return 0


class Lease(NamedTuple):
    """The lock of a job's table on gs://, which the job's workers renew.

    Attributes:
      table: the table's folder.
      run: the run's name.
    """

    table: str
    run: str

    def renew(self) -> None:
        """Renews the lock; all workers may call it at any time."""
        now = time.monotonic()
        if now - _looked.get(self.run, -_LOOK_SECONDS) < _LOOK_SECONDS:
            return
        _looked[self.run] = now
        try:
            lock, stored = self._find()
            age = datetime.datetime.now(datetime.UTC) - stored.updated if stored else datetime.timedelta()
            if stored and age.total_seconds() >= _RENEWAL_SECONDS:
                lock.write_if(stored.data.decode(), stored.generation, uuid.uuid4().hex)
        except Exception as error:  # the next renewal may succeed
            _LOGGER.debug("the lock of %s could not be renewed: %s", self.table, error)

    def release(self) -> None:
        """Releases the table's lock, if the run still holds it."""
        try:
            lock, stored = self._find()
            if stored:
                lock.delete_if(stored.generation)
        except Exception as error:  # the run has succeeded even if its lock stays
            _LOGGER.warning("the lock of %s could not be removed (%s); it expires", self.table, error)

    def _find(self) -> tuple[GcsObject, Optional[StoredObject]]:
        lock = GcsObject(join(self.table, LOCK), _REQUEST_SECONDS, persistent=False)
        stored = lock.read()
        return lock, stored if stored and _read_owner(stored.data).get("run") == self.run else None


_looked: dict[str, float] = {}  # run -> when this process last checked its lease


def _describe(run: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "since": f"{now:%Y-%m-%d %H:%M:%S} UTC"}


def _read_owner(data: bytes) -> dict[str, Any]:
    """The owner of the lock; empty if it is being written, or was written by another program."""
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(table: str, owner: dict[str, Any]) -> str:
    if not {"run", "host", "pid", "since"} <= owner.keys():
        return f"--output={table} is in use by another run"
    return (
        f"--output={table} is in use: run {owner['run']} on {owner['host']}, process {owner['pid']}, "
        f"has held it since {owner['since']}"
    )
