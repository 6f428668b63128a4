"""Ctrl-C and SIGTERM: what is cleaned up before the process ends, and the moments in which it must not."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import psutil

PUBLISHING = threading.Lock()  # held while this process publishes, so that no signal ends it half way
STOPPING = threading.Event()  # set once a signal ends the process: its own thread does, and no other
_WATCHER = "embeam-signals"
_on_stop: list[Callable[[], object]] = []
_on_stop_first: list[Callable[[], object]] = []


def on_stop(clean_up: Callable[[], object], first: bool = False) -> Callable[[], None]:
    """Registers what must be cleaned up when a signal ends the process; returns the function that takes it back.

    Args:
      clean_up: is called from another thread.
      first: before child processes are killed, for what needs one of them.
    """
    registry = _on_stop_first if first else _on_stop
    registry.append(clean_up)
    return lambda: registry.remove(clean_up)


def clean_up_all(registry: list[Callable[[], object]], terminal: int) -> None:
    """Calls what was registered; what came last rests on what came first, so the lock goes at the end."""
    for clean_up in reversed(list(registry)):
        try:
            clean_up()
        except Exception as error:
            os.write(terminal, f"embeam: what the run had written could not be removed: {error}\n".encode())


def watch_signals() -> None:
    """Ends the process within moments of Ctrl-C or SIGTERM: one line, no child left, nothing half published.

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
        os.write(terminal, b"\nembeam: stopped; a table is what it was last published as; run the same command again\n")
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
