"""Spells the command that makes a table, for messages that ask to run it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pipeline.config import EmbedConfig, EncoderConfig, PreprocessConfig, VectorConfig, WriteConfig
from pipeline.read_config import ReadConfig
from pipeline.settings import REPEATED

_SPELLED = (ReadConfig, PreprocessConfig, EncoderConfig, VectorConfig, WriteConfig)
_RESOLVED = ("encoder_graph", "precision")  # a manifest holds what was chosen, not what was given


def spell_command(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The `embeam embed` command that made a table, with some settings changed; defaults are left out.

    Args:
      settings: of the table's manifest.
      changes: name to new value.
    """
    default = EmbedConfig().flat()
    given = {name: value for name, value in settings.items() if name not in _RESOLVED} | dict(changes)
    words = ["embeam", "embed"]
    for name in (field.name for kind in _SPELLED for field in fields(kind)):
        items = _list(given.get(name, default[name]))
        if items != _list(default[name]):
            joined = items if name in REPEATED else [",".join(map(str, items))]
            words += [f"--{name}={one}" for one in joined]
    return shlex.join(words)


def _list(value: Any) -> list[Any]:
    """A manifest has lists where the configuration has tuples."""
    return list(value) if isinstance(value, list | tuple) else [value]
