"""Fields of a record by name, or by a path into nested fields: `meta.lang`, `choices.0.message.content`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

SHOWN_FIELDS = 20
_LISTED_FIELDS = 500
_DEPTH = 4


class _Missing:
    """The type of `MISSING`."""


MISSING = _Missing()  # a field that a record does not have, as opposed to one that is null


def find_value(values: Any, path: str) -> Any:
    """The value at a path, or `MISSING`.

    A field whose name is the path wins over nested fields. A number is a position in a list, from 0.

    Args:
      values: a record's fields, or the value of one of them.
      path: a field's name, or names of nested fields with dots between them.
    """
    if isinstance(values, Mapping):
        if path in values:
            return values[path]
        head, dot, rest = path.partition(".")
        return find_value(values[head], rest) if dot and head in values else MISSING
    if isinstance(values, list):
        head, dot, rest = path.partition(".")
        if not (head.isascii() and head.isdigit()) or int(head) >= len(values):
            return MISSING
        return find_value(values[int(head)], rest) if dot else values[int(head)]
    return MISSING


def list_fields(values: Mapping[str, Any], depth: int = _DEPTH) -> Iterator[str]:
    """The paths of a record's fields, nested ones behind the field that holds them."""
    for name, value in values.items():
        yield str(name)
        inner = {str(i): item for i, item in enumerate(value[:1])} if isinstance(value, list) else value
        if isinstance(inner, Mapping) and depth > 1:
            nested = islice(list_fields(inner, depth - 1), _LISTED_FIELDS)
            yield from (f"{name}.{path}" for path in nested if isinstance(value, Mapping) or "." in path)


def name_fields(fields: Iterable[str]) -> str:
    """The names of fields for a message; of nested ones only the outermost name."""
    names = list(dict.fromkeys(fields))
    outer = [name for name in names if name.partition(".")[0] not in names or "." not in name]
    return ", ".join(outer[:SHOWN_FIELDS]) + (", ..." if len(outer) > SHOWN_FIELDS else "") or "none"


def suggest_field(flag: str, wanted: str, fields: Iterable[str]) -> str:
    """What to do about a field that is missing: the name that is most like it, or the flag to look at."""
    close = find_nearest(wanted, fields)
    return f"did you mean --{flag}={close}?" if close else f"see --{flag}"


def find_nearest(wanted: str, fields: Iterable[str]) -> str:
    """The field whose name is most like the wanted one; empty if none is."""
    known = {name.lower(): name for name in reversed(list(islice(fields, _LISTED_FIELDS)))}
    close = difflib.get_close_matches(wanted.lower(), known, 1)
    return known[close[0]] if close else ""
