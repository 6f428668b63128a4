"""From a record's fields to a document: ids, texts, second segments and kept fields, with their checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Optional, Union

from pipeline.config import KeptField, ReadConfig
from pipeline.records import DeadLetter, Document, Origin, pack_kept
from pipeline.sources.encoding import is_binary_text
from pipeline.sources.source import PREVIEW_BYTES, InputFile, Record, Source, describe_too_large

_INT64 = range(-(1 << 63), 1 << 63)
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class BadRecord(Exception):
    """A record that cannot become a document; `reason` is a key of `records.REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def build_document(
    record: Record, file: InputFile, source: Source, config: ReadConfig, kept_fields: Sequence[KeptField]
) -> Union[Document, DeadLetter, None]:
    """Turns a record into a document.

    Args:
      record: what the source yielded.
      file: the file that it comes from.
      source: the format of that file.
      config: names of the fields and rules for them.
      kept_fields: the fields to keep, with their types.

    Returns:
      The document, a dead letter, or None for a blank text under `--on_empty=skip`.
    """
    origin = Origin(file.source or file.path, record.position, source.position_unit(file))
    document_id = None if config.id_field else f"{file.name}@{record.position}"
    text: Optional[str] = record.text
    try:
        if record.reason:
            raise BadRecord(record.reason, record.message)
        if config.id_field:
            document_id = read_id(record.values, config.id_field)
        text = read_text(record.values, config.text_field)
        if len(text) * 4 > config.max_document_bytes and len(text.encode()) > config.max_document_bytes:
            raise BadRecord("too_large", describe_too_large(len(text.encode()), config))
        pair = read_pair(record.values, config.pair_field)
        kept = read_kept(record.values, kept_fields, source.values_are_strings)
        if config.on_empty != "embed" and not text.strip():
            if config.on_empty == "skip":
                return None
            raise BadRecord("empty_text", "the text is empty or blank; --on_empty=skip drops it, =embed embeds it")
        if is_binary_text(text):
            raise BadRecord("binary_text", "the text is mostly control characters; see --encoding and --input_format")
    except BadRecord as error:
        if error.reason == "too_large" and text is not None:
            text = text[:PREVIEW_BYTES]
        return DeadLetter("read", error.reason, str(error), origin, document_id, text)
    return Document(document_id or "", text, pair, kept, origin)


def read_id(values: Mapping[str, Any], name: str) -> str:
    """The id as a string.

    Raises:
      BadRecord: missing_field if it is absent or empty, wrong_type if it is neither a string nor a whole number.
    """
    value = values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or value in ("", b""):
        raise BadRecord("missing_field", f"the id field {name!r} is missing or empty; see --id_field")
    return as_text(value, name, "a string or a whole number")


def read_text(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """The text fields that are present, joined by a space.

    Raises:
      BadRecord: missing_field if none is there, wrong_type or invalid_utf8 if one is not text.
    """
    found = [as_text(values[name], name) for name in names if values.get(name) is not None]
    if not found:
        hint = f"; it has {', '.join(map(str, values))}" if values else ""
        raise BadRecord("missing_field", f"the text field {' or '.join(map(repr, names))} is missing{hint[:200]}")
    return " ".join(found)


def read_pair(values: Mapping[str, Any], name: str) -> Optional[str]:
    """The second segment, or None if there is none."""
    value = values.get(name) if name else None
    return None if value is None else as_text(value, name)


def read_kept(values: Mapping[str, Any], kept_fields: Sequence[KeptField], from_strings: bool = False) -> bytes:
    """The kept fields as a JSON list in their order; an absent field is null.

    Args:
      values: field name to value.
      kept_fields: names and types.
      from_strings: whether numbers and booleans are written as strings, as in CSV.

    Raises:
      BadRecord: wrong_type if a value does not fit its type.
    """
    return pack_kept([convert_kept(values.get(field.name), field, from_strings) for field in kept_fields])


def convert_kept(value: Any, field: KeptField, from_strings: bool = False) -> Any:
    """Checks one kept value: ints fit 64 bits, floats may be ints, bools may be 0 and 1, strings any scalar."""
    if value is None or (from_strings and value == "" and field.type != "string"):
        return None
    try:
        if from_strings and field.type in _FROM_STRING:
            value = _FROM_STRING[field.type](value)
        return _CONVERT[field.type](value, field.name)
    except (ValueError, KeyError, OverflowError):
        raise BadRecord("wrong_type", f"field {field.name!r} holds {_name_kind(value)}, not {field.type}") from None


def as_text(value: Any, name: str, expected: str = "a string") -> str:
    """A string that can be stored as UTF-8.

    Raises:
      BadRecord: wrong_type if it is not a string, invalid_utf8 if it is broken bytes or holds a lone surrogate.
    """
    try:
        if isinstance(value, bytes):
            return value.decode()
        if not isinstance(value, str):
            raise BadRecord("wrong_type", f"field {name!r} holds {_name_kind(value)}, not {expected}")
        if not value.isascii():
            value.encode()
        return value
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRecord("invalid_utf8", f"field {name!r} is not valid UTF-8: {error.reason}") from None


def infer_type(values: Sequence[Any]) -> str:
    """The type that fits all values: ints widen to float, any other mixture and all nulls are strings.

    Returns:
      A member of `config.FIELD_TYPES`, or empty if a value is a list, an object or something else that cannot be kept.
    """
    kinds = {_KINDS.get(type(value), "") for value in values if value is not None}
    if kinds == {"int", "float"}:
        return "float"
    if "" in kinds:
        return ""
    return kinds.pop() if len(kinds) == 1 else "string"


def _convert_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in _INT64:
        raise ValueError
    return value


def _convert_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError
    return float(value)


def _convert_bool(value: Any, name: str) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError
    return bool(value)


def _convert_string(value: Any, name: str) -> str:
    return json.dumps(value) if isinstance(value, (bool, int, float)) else as_text(value, name, "string")


def _fail(value: Any, name: str) -> NoReturn:
    raise ValueError


_CONVERT: dict[str, Callable[[Any, str], Any]] = {
    "int": _convert_int,
    "float": _convert_float,
    "bool": _convert_bool,
    "string": _convert_string,
    "": _fail,
}
_FROM_STRING: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": lambda text: _WORDS[text.lower()]}
_KINDS = {bool: "bool", int: "int", float: "float", str: "string", bytes: "string"}


_SPOKEN = {
    str: "text",
    bytes: "bytes",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _name_kind(value: Any) -> str:
    """The kind of a value, without its content, which may be private."""
    return _SPOKEN.get(type(value), "something else")
