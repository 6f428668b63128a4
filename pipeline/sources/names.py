"""Names of input files as tables store them, and what the names of their folders say."""

from __future__ import annotations

import re
from urllib.parse import unquote

from pipeline.errors import as_line

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_NEEDS_ESCAPE = re.compile(r"[\ud800-\udfff]|\\x[89a-f][0-9a-f]")
_ESCAPED = re.compile(r"\\|[\ud800-\udfff]")


def name_as_text(path: str) -> str:
    r"""A path as text that can be stored anywhere: a byte that is not UTF-8 becomes `\xNN`, such as `caf\xe9.txt`.

    Python gives such bytes as lone surrogates, which no file format, database or coder takes. Different paths stay
    different: a backslash is doubled in a path that has such bytes, or that looks as if it had.
    """
    if path.isascii() and "\\" not in path:
        return path
    return _ESCAPED.sub(_escape, path) if _NEEDS_ESCAPE.search(path) else path


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    return r"\\" if character == "\\" else f"\\x{ord(character) & 0xFF:02x}"


def show_name(path: str) -> str:
    """A path as text on one line, for messages."""
    return as_line(name_as_text(path))


def parse_partition(path: str) -> tuple[tuple[str, str], ...]:
    """The fields that Hive's names of folders give: `year=2026/lang=en/a.parquet` has year and lang.

    Args:
      path: of a file. If folders give one field twice, the inner one counts.
    """
    folders = name_as_text(path).split("/")[:-1]
    pairs = (folder.partition("=") for folder in folders if "=" in folder)
    return tuple({unquote(name): unquote(value) for name, _, value in pairs if name}.items())
