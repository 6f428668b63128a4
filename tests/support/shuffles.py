"""What crosses the shuffles of a run, as the local engine encodes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from apache_beam.coders.coder_impl import create_InputStream
from apache_beam.runners.portability.fn_api_runner import fn_runner

_WINDOW_BYTES = 13  # timestamp, count of windows, and pane, which an engine drops for the global window


def watch_shuffles(monkeypatch: pytest.MonkeyPatch, count: Callable[[str, Any, bytes], None]) -> None:
    """Calls `count` with a shuffle's name, its buffer, and some encoded elements that it has taken."""
    get_buffer = fn_runner.execution.BundleContextManager.get_buffer

    def watch(manager: Any, buffer_id: bytes, transform_id: str) -> Any:
        buffer = get_buffer(manager, buffer_id, transform_id)
        kind, name = fn_runner.execution.split_buffer_id(buffer_id)
        if kind == "group":
            transform = manager.execution_context.pipeline_components.transforms[name]
            buffer.watched_as = transform.unique_name
        return buffer

    append = fn_runner.execution.GroupingBuffer.append

    def append_and_count(buffer: Any, data: bytes) -> None:
        append(buffer, data)
        count(buffer.watched_as, buffer, data)

    monkeypatch.setattr(fn_runner.execution.BundleContextManager, "get_buffer", watch)
    monkeypatch.setattr(fn_runner.execution.GroupingBuffer, "append", append_and_count)


class KeyCounter:
    """How many elements each shuffle had under each key."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: dict[str, Counter] = {}

        def count(name: str, buffer: Any, data: bytes) -> None:
            self.groups[name] = Counter({key: len(values) for key, values in buffer._table.items()})

        watch_shuffles(monkeypatch, count)

    def shares(self, least: int) -> dict[str, float]:
        """The largest key's share of each shuffle with at least so many elements."""
        return {
            name: max(counts.values()) / counts.total()
            for name, counts in self.groups.items()
            if counts.total() >= least
        }


class ByteCounter:
    """How much each shuffle had.

    Attributes:
      n_bytes: of keys and values.
      elements: how many.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_bytes: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

        def count(name: str, buffer: Any, data: bytes) -> None:
            stream, coder, n = create_InputStream(data), buffer._pre_grouped_coder.get_impl(), 0
            while stream.size() > 0:
                coder.decode_from_stream(stream, True)
                n += 1
            self.elements[name] += n
            self.n_bytes[name] += len(data) - _WINDOW_BYTES * n

        watch_shuffles(monkeypatch, count)
