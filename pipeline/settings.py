"""Declares one setting, checks it against its choices, and reads it from text."""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import os
from dataclasses import dataclass, field, fields
from encodings.aliases import aliases
from typing import Any

from pipeline.errors import ConfigError

REPEATED = ("input", "exclude")  # flags whose values may hold commas, such as inside braces of a glob
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}


def setting(help: str, default: Any = None, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass(frozen=True)
class CheckedConfig:
    """Checks choices when a configuration is built; subclasses add other checks."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"--{f.name}={value} is not one of {', '.join(choices)}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name}={getattr(self, name)} must be at least 1")


def _is_text_encoding(name: str) -> bool:
    try:
        lenient = codecs.getincrementaldecoder(name)("backslashreplace").decode("\n".encode(name), True)
        return "\n".encode(name).decode(name) == lenient == "\n"
    except (LookupError, UnicodeError):  # unknown, or not an encoding of text
        return False


def check_encoding(name: str) -> None:
    """Raises ConfigError if Python has no text encoding of this name."""
    if not _is_text_encoding(name):
        known = ["utf-8", "utf-8-sig", "latin-1", *(one.replace("_", "-") for pair in aliases.items() for one in pair)]
        close = [one for one in difflib.get_close_matches(name.lower(), known, 2) if _is_text_encoding(one)]
        hint = f"did you mean {close[0]}?" if close else "use one such as utf-8, utf-16, latin-1 or cp1252"
        raise ConfigError(f"--encoding={name} is not a text encoding that Python knows; {hint}")


def parse_character(name: str, value: str) -> str:
    """A setting that is one character; a tab may be written as tab or \\t.

    Raises:
      ConfigError: if it is anything else, or a line end.
    """
    character = "\t" if value in ("tab", "\\t") else value
    if len(character) != 1 or character in "\r\n\0":
        raise ConfigError(f"--{name}={value!r} is not one character; write one, or tab")
    return character


def convert_setting(f: dataclasses.Field[Any], value: Any) -> Any:
    """A value as the setting's type, which is that of its default; lists become tuples.

    Raises:
      ConfigError: if it does not fit.
    """
    default, value = f.default, _spell_path(value)
    if isinstance(value, dict) or (isinstance(value, list | tuple) and not isinstance(default, tuple)):
        raise ConfigError(f"--{f.name}={value} is not {_KINDS[type(default)]}; write one value")
    if isinstance(value, bool) and not isinstance(default, bool):
        raise ConfigError(f"--{f.name}={str(value).lower()} is not {_KINDS[type(default)]}")
    if isinstance(default, tuple):
        items = [value] if isinstance(value, str) else list(map(_spell_path, value))
        if f.name in REPEATED:
            return tuple(str(item) for item in items)
        return tuple(part.strip() for item in items for part in str(item).split(",") if part.strip())
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "1", "yes"):
            return True
        if str(value).lower() in ("false", "0", "no"):
            return False
        raise ConfigError(f"--{f.name}={value} is not {_KINDS[bool]}")
    try:
        if isinstance(default, int):
            return int(str(value).replace("_", ""))
        if isinstance(default, float):
            return float(value)
    except ValueError:
        raise ConfigError(f"--{f.name}={value} is not {_KINDS[type(default)]}") from None
    return str(value)


def _spell_path(value: Any) -> Any:
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value
