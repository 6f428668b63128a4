"""From a record's fields to a document: ids, texts, second segments and kept fields, with their checks."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Optional, Union

from pipeline.read_config import KeptField, ReadConfig
from pipeline.records import DeadLetter, Document, Origin, pack_kept
from pipeline.sources.encoding import is_binary_text
from pipeline.sources.field_paths import MISSING, find_value, list_fields, name_fields, suggest_field
from pipeline.sources.kept import name_kind, read_kept
from pipeline.sources.source import PREVIEW_BYTES, InputFile, Record, Source, describe_too_large

_EXACT = 1 << 53  # a float holds every whole number up to here
_INVISIBLE = ("Cc", "Cf", "Mn")  # control, format and combining characters
_FILLERS = "\u115f\u1160\u3164\uffa0"  # letters of Hangul without a form


class BadRecord(Exception):
    """A record that cannot become a document; `reason` is a key of `records.REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def build_document(
    record: Record,
    file: InputFile,
    source: Source,
    config: ReadConfig,
    kept_fields: Sequence[KeptField],
    kept_nulls: Optional[Counter[str]] = None,
) -> Union[Document, DeadLetter, None]:
    """Turns a record into a document.

    Args:
      record: what the source yielded.
      file: the file that it comes from.
      source: the format of that file.
      config: names of the fields and rules for them.
      kept_fields: the fields to keep, with their types.
      kept_nulls: counts, by the name of the kept field, the values that became null because they do not fit.

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
        kept, misfits = read_kept(record.values, kept_fields, source.values_are_strings)
        if misfits and config.on_kept_mismatch == "dead_letter":
            raise BadRecord("wrong_type", misfits[0][1])
        if config.on_empty != "embed" and is_blank(text):
            if config.on_empty == "skip":
                return None
            raise BadRecord("empty_text", "the text is empty or blank; --on_empty=skip drops it, =embed embeds it")
        if is_binary_text(text):
            raise BadRecord("binary_text", "the text is mostly control characters; see --encoding and --input_format")
    except BadRecord as error:
        if error.reason == "too_large" and text is not None:
            text = text[:PREVIEW_BYTES]
        return DeadLetter("read", error.reason, str(error), origin, document_id, text)
    if misfits and kept_nulls is not None:
        kept_nulls.update(field.name for field, _ in misfits)
    return Document(document_id or "", text, pair, pack_kept(kept), origin)


def read_id(values: Mapping[str, Any], name: str) -> str:
    """The id as a string; a whole number gives its digits, however it is stored.

    Raises:
      BadRecord: missing_field if it is absent or empty, wrong_type if it is neither a string nor a whole number.
    """
    value = find_value(values, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is MISSING:
        raise _missing(values, "id_field", [name])
    if value is None or value in ("", b"") or value != value:  # NaN is how pandas stores what is absent
        raise BadRecord("missing_field", f"the id field {name!r} is missing or empty; see --id_field")
    if isinstance(value, float | Decimal):
        is_whole = value == value.to_integral_value() if isinstance(value, Decimal) else value.is_integer()
        if not is_whole or not math.isfinite(value) or (isinstance(value, float) and abs(value) > _EXACT):
            raise BadRecord(
                "wrong_type",
                f"field {name!r} holds a number that is not whole, or is not exact; ids are strings or whole numbers",
            )
        return str(int(value))
    return as_text(value, name, "a string or a whole number")


def read_text(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """The text fields that are present; several are joined by a space, without those that are blank.

    Raises:
      BadRecord: missing_field if none is there, wrong_type or invalid_utf8 if one is not text.
    """
    found = []
    for name in names:
        value = find_value(values, name)
        if value is not None and value is not MISSING:
            found.append(as_text(value, name))
    if not found:
        raise _missing(values, "text_field", names)
    return found[0] if len(names) == 1 else " ".join(text for text in found if text and not text.isspace())


def read_pair(values: Mapping[str, Any], name: str) -> Optional[str]:
    """The second segment, or None if there is none."""
    value = find_value(values, name) if name else None
    return None if value is None or value is MISSING else as_text(value, name)


def is_blank(text: str) -> bool:
    """Whether a text has no character that the BERT preprocessor makes a token of.

    It drops white space, control and format characters, combining characters without a letter, and letters without a
    form; the same again once compatibility characters are decomposed.
    """
    return all(map(_is_invisible, text))  # ends at the first visible character


def _is_invisible(character: str) -> bool:
    if character.isspace() or character in _FILLERS:
        return True
    if character.isascii() and character.isprintable():  # only to be fast
        return False
    return all(
        part.isspace() or unicodedata.category(part) in _INVISIBLE
        for part in unicodedata.normalize("NFKD", character).casefold()
    )


def as_text(value: Any, name: str, expected: str = "a string") -> str:
    """A string that can be stored as UTF-8.

    Raises:
      BadRecord: wrong_type if it is not a string, invalid_utf8 if it is broken bytes or holds a lone surrogate.
    """
    try:
        if isinstance(value, bytes):
            return value.decode()
        if not isinstance(value, str):
            raise BadRecord("wrong_type", f"field {name!r} holds {name_kind(value)}, not {expected}")
        if not value.isascii():
            value.encode()
        return value
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRecord("invalid_utf8", f"field {name!r} is not valid UTF-8: {error.reason}") from None


def _missing(values: Mapping[str, Any], flag: str, names: Sequence[str]) -> BadRecord:
    there = list(list_fields(values))
    what = f"the {flag.partition('_')[0]} field {' or '.join(map(repr, names))} is missing"
    return BadRecord(
        "missing_field", f"{what}; the record has {name_fields(there)}; {suggest_field(flag, names[0], there)}"
    )
