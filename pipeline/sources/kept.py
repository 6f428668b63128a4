"""Kept fields: the type of each, and its values as that type.

A table has columns of four types. What is none of them is a string: a list or an object as JSON, a decimal as its
digits; dates and times come as ISO 8601 from Arrow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pipeline.read_config import KeptField
from pipeline.sources.field_paths import MISSING, find_value

_INT64 = range(-(1 << 63), 1 << 63)
_EXACT = 1 << 53  # a float holds every whole number up to here
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

# The kinds of values that each type holds; a `long` is a whole number that a float does not hold exactly.
HOLDS = {
    "bool": {"bool"},
    "int": {"int", "long"},
    "float": {"int", "float"},
    "string": {"bool", "int", "long", "float", "string"},
}


class Misfit(Exception):
    """A value that does not fit the type of its field."""


def find_kind(value: Any) -> str:
    """The kind of a value that is not null, as in `HOLDS`."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= _EXACT else "long" if value in _INT64 else "string"
    return "float" if isinstance(value, float) else "string"


def choose_type(kinds: set[str], live: str = "") -> str:
    """The type of a field.

    Args:
      kinds: of its values; without any, the field is a string.
      live: the type of the field in the live table. It stays if it holds the values, else it widens: rows that stay
        keep their values.
    """
    if live and kinds <= HOLDS[live]:
        return live
    kinds = kinds | {live} if live else kinds
    return next((kind for kind in HOLDS if kinds and kinds <= HOLDS[kind]), "string")


def read_kept(
    values: Mapping[str, Any], kept_fields: Sequence[KeptField], from_strings: bool = False
) -> tuple[list[Any], list[tuple[KeptField, str]]]:
    """The kept fields' values in their order, and the fields whose value does not fit, with a message.

    Args:
      values: field name to value.
      kept_fields: names and types.
      from_strings: whether numbers and booleans are written as strings, as in CSV.

    Returns:
      The values, in which what is absent or does not fit is None, and the misfits.
    """
    found, misfits = [], []
    for field in kept_fields:
        try:
            found.append(convert_kept(find_value(values, field.source), field.type, from_strings))
        except Misfit as error:
            found.append(None)
            misfits.append((field, f"field {field.source!r} holds {error}"))
    return found, misfits


def convert_kept(value: Any, kind: str, from_strings: bool = False) -> Any:
    """A value as a type, exactly: whole numbers may be written as floats, and bools as 0 and 1.

    Raises:
      Misfit: if it does not fit.
    """
    if value is None or value is MISSING or (from_strings and value == "" and kind != "string"):
        return None
    try:
        if from_strings and kind in _FROM_STRING:
            value = _FROM_STRING[kind](value)
        return _CONVERT[kind](value)
    except UnicodeError:
        raise Misfit("text that is not valid UTF-8") from None
    except (ValueError, KeyError, OverflowError, RecursionError):
        raise Misfit(f"{name_kind(value)}, not {kind}") from None


def format_json(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces; decimals, and numbers that JSON does not have, are strings.

    Raises:
      ValueError: if it holds bytes that are not UTF-8, or something that cannot be read.
    """
    text = json.dumps(_as_json(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    text.encode()
    return text


def name_kind(value: Any) -> str:
    """The kind of a value, without its content, which may be private."""
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        return "a whole number of more than 64 bits"
    return _SPOKEN.get(type(value), "something that cannot be read")


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Decimal):
        return format(value, "f")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError


def _convert_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError
    whole = int(value)
    if whole != value or whole not in _INT64 or (isinstance(value, float) and abs(whole) > _EXACT):
        raise ValueError
    return whole


def _convert_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError
    number = float(value)
    if isinstance(value, int) and int(number) != value:
        raise ValueError
    return number


def _convert_bool(value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError
    return bool(value)


def _convert_string(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
        return value
    if isinstance(value, Decimal):
        return format(value, "f")
    return json.dumps(value) if isinstance(value, int | float) else format_json(value)


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number) and any(digit in text for digit in "0123456789"):
        raise ValueError
    return number


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "int": _convert_int,
    "float": _convert_float,
    "bool": _convert_bool,
    "string": _convert_string,
}
_FROM_STRING: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": _parse_float,
    "bool": lambda text: _WORDS[text.lower()],
}

_SPOKEN = {
    str: "text",
    bytes: "bytes",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Decimal: "a decimal number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
