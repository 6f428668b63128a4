"""Fields in Arrow's schemas: which columns hold them, and the kinds of their values."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

_DEPTH = 4


def find_leaves(fields: Sequence[pa.Field], path: str, first: int = 0) -> range | None:
    """The columns without columns inside that hold the field at a path, by number; None if there is no such field.

    They are numbered as Parquet numbers its columns: depth first. The rule is that of `field_paths.find_value`.

    Args:
      fields: of a schema or a struct.
      path: name of a field, or names of nested fields with dots between them.
      first: the number of the first column.
    """
    spans: dict[str, tuple[pa.DataType, range]] = {}
    for field in fields:
        end = first + count_leaves(field.type)
        spans[field.name] = field.type, range(first, end)
        first = end
    if path in spans:
        return spans[path][1]
    head, dot, rest = path.partition(".")
    return _find_inside(*spans[head], rest) if dot and head in spans else None


def _find_inside(kind: pa.DataType, leaves: range, path: str) -> range | None:
    if pa.types.is_map(kind):  # its keys are not known before they are read
        return leaves
    if pa.types.is_struct(kind):
        return find_leaves(list(kind), path, leaves.start)
    if not is_list(kind):
        return None
    number, dot, rest = path.partition(".")
    if not (number.isascii() and number.isdigit()):
        return None
    return _find_inside(kind.value_type, leaves, rest) if dot else leaves


def count_leaves(kind: pa.DataType) -> int:
    """How many columns without columns inside a type has."""
    if isinstance(kind, pa.BaseExtensionType):
        return count_leaves(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return count_leaves(kind.value_type)
    return sum(count_leaves(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's lists."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def describe_schema(fields: Sequence[pa.Field] | pa.Schema, prefix: str = "", depth: int = _DEPTH) -> dict[str, str]:
    """The paths of all fields with the kinds of their values, as in `kept.HOLDS`; "" where the values decide."""
    found = {}
    for field in fields:
        found[prefix + field.name] = _find_kind(field.type)
        if pa.types.is_struct(field.type) and depth > 1:
            found |= describe_schema(list(field.type), f"{prefix}{field.name}.", depth - 1)
    return found


def _find_kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _find_kind(kind.value_type)
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):  # a column of large whole numbers may be one of small ones elsewhere
        return "" if pa.types.is_uint64(kind) else "int"
    if pa.types.is_floating(kind):
        return "float"
    return "" if pa.types.is_null(kind) else "string"
