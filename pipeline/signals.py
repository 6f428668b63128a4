"""Handles Ctrl-C and SIGTERM: cleans up before the process ends, and delays the end while a run publishes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import psutil

PUBLISHING = threading.Lock()  # held while this process publishes, so that a signal cannot end it halfway
STOPPING = threading.Event()  # set once a signal ends the process; only the signal thread may then exit
_WATCHER = "embeam-signals"
_on_stop: list[Callable[[], object]] = []
_on_stop_first: list[Callable[[], object]] = []


def on_stop(clean_up: Callable[[], object], first: bool = False) -> Callable[[], None]:
    """Registers a clean-up for when a signal ends the process; returns a function that unregisters it.

    Args:
      clean_up: is called from another thread.
      first: call it before child processes are killed, because it needs one of them.
    """
    registry = _on_stop_first if first else _on_stop
    registry.append(clean_up)
    return lambda: registry.remove(clean_up)


def clean_up_all(registry: list[Callable[[], object]], terminal: int) -> None:
    """Calls the clean-ups in reverse order: later ones depend on earlier ones, so the lock is released last."""
    for clean_up in reversed(list(registry)):
        try:
            clean_up()
        except Exception as error:
            os.write(terminal, f"embeam: files of the run could not be removed: {error}\n".encode())


def watch_signals() -> None:
    """Ends the process soon after Ctrl-C or SIGTERM: prints one line, kills all children, publishes nothing partly.

    Python would raise KeyboardInterrupt in the main thread, and Beam report it as a failure of some DoFn. So all
    threads block the signals, and one of its own waits for them.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    if sys.platform == "linux":  # where a blocked signal waits even if it is ignored
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the workers: the shell they start from clears the mask

    # As stderr is now: while TensorFlow is imported nothing is shown of what is written there.
    terminal = os.dup(2) if sys.stderr else os.open(os.devnull, os.O_WRONLY)

    def wait() -> None:
        number = signal.sigwait(signals)
        STOPPING.set()
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Beam's threads have a lot to say about workers that are gone
        os.write(terminal, b"\nembeam: stopped; the last published table is unchanged; run the same command again\n")
        clean_up_all(_on_stop_first, terminal)
        children = psutil.Process().children(recursive=True)  # Beam starts its workers through a shell
        for child in children:  # all at once, or one would report the end of another
            with suppress(psutil.Error):
                child.suspend()
        for child in children:
            with suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=3)  # else they may write what is being removed
        PUBLISHING.acquire()
        clean_up_all(_on_stop, terminal)
        os._exit(128 + number)

    if all(thread.name != _WATCHER for thread in threading.enumerate()):
        threading.Thread(target=wait, name=_WATCHER, daemon=True).start()
