"""Outputs of a DoFn at the end of a bundle, which Beam requires to have a window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindows


def end_bundle(outputs: Iterable[Any]) -> Iterator[Any]:
    """Puts outputs, tagged or not, into the global window, for `finish_bundle`."""
    for output in outputs:
        if isinstance(output, TaggedOutput):
            yield TaggedOutput(output.tag, GlobalWindows.windowed_value(output.value))
        else:
            yield GlobalWindows.windowed_value(output)
