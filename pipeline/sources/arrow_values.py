"""Values of Arrow's arrays as plain ones: those of JSON, and bytes and decimals.

Dates and times become ISO 8601, fixed-size bytes become hexadecimal digits. What cannot be read costs one value, not
the file: text that is not UTF-8 stays bytes, which the checks of fields reject, and all else becomes `Unreadable`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that no plain value can express.

    Attributes:
      why: an error message.
    """

    why: str


def batch_to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch as mappings from column name to value."""
    names = batch.schema.names
    if not names:
        return [{} for _ in range(batch.num_rows)]
    columns = [to_values(column) for column in batch.columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def to_values(column: pa.Array) -> list[Any]:
    """The plain values of an array `[n]`."""
    if is_plain(column.type):
        try:
            values: list[Any] = column.to_pylist()
            return values
        except Exception:  # one value that Python cannot hold: each is looked at by itself
            pass
    return [to_value(scalar) for scalar in column]


@functools.lru_cache(maxsize=256)
def is_plain(kind: pa.DataType) -> bool:
    """Whether Arrow's own conversion gives what `to_value` gives."""
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_map(kind) or pa.types.is_fixed_size_binary(kind):
        return False
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return is_plain(kind.value_type)
    return not pa.types.is_temporal(kind) and all(is_plain(kind.field(i).type) for i in range(kind.num_fields))


def to_value(scalar: pa.Scalar) -> Any:
    """The plain value of a scalar."""
    if not scalar.is_valid:
        return None
    try:
        return _to_value(scalar)
    except Exception as error:  # whatever Arrow raises for a value that Python cannot hold
        return Unreadable(str(error))


def _to_value(scalar: pa.Scalar) -> Any:
    kind = scalar.type
    if isinstance(scalar, pa.UuidScalar):
        return str(scalar.as_py())
    if isinstance(scalar, pa.MapScalar):
        items = [(to_value(entry[0]), to_value(entry[1])) for entry in scalar.values]
        return {key if isinstance(key, str) else str(key): value for key, value in items}
    if isinstance(scalar, pa.StructScalar):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        if len(set(names)) < len(names):
            return Unreadable("two of its fields have one name")
        return {name: to_value(scalar[i]) for i, name in enumerate(names)}
    if isinstance(scalar, pa.ListScalar):  # also large, fixed-size and view lists
        return to_values(scalar.values)
    if isinstance(scalar, pa.DictionaryScalar | pa.RunEndEncodedScalar | pa.UnionScalar | pa.ExtensionScalar):
        return to_value(scalar.value)
    if pa.types.is_temporal(kind):
        return format_time(scalar)
    if isinstance(scalar, pa.FixedSizeBinaryScalar):
        return scalar.as_py().hex()
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def format_time(scalar: pa.Scalar) -> str:
    """A date, time, timestamp, duration or interval in ISO 8601, exactly; timestamps with a time zone are in UTC."""
    kind = scalar.type
    if pa.types.is_interval(kind):
        months, days, nanoseconds = scalar.as_py()
        return f"P{months}M{days}DT{_decimal(nanoseconds, 'ns')}S"
    if pa.types.is_date32(kind):
        return _format_date(scalar.value)
    if pa.types.is_date64(kind):
        return _format_date(scalar.value // (_DAY_SECONDS * 1000))
    unit = kind.unit
    if pa.types.is_duration(kind):
        return ("-" if scalar.value < 0 else "") + f"PT{_decimal(abs(scalar.value), unit)}S"
    seconds, fraction = divmod(scalar.value, _PER_SECOND[unit])
    days, seconds = divmod(seconds, _DAY_SECONDS)
    digits = _decimal(fraction, unit)[1:]
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{digits}"
    if pa.types.is_time(kind):
        return clock
    return f"{_format_date(days)}T{clock}{'Z' if kind.tz else ''}"


def _format_date(days: int) -> str:
    return str(np.datetime64(days, "D"))


def _decimal(value: int, unit: str) -> str:
    """A number of seconds without needless zeros, from a number of units."""
    whole, fraction = divmod(abs(value), _PER_SECOND[unit])
    width = len(str(_PER_SECOND[unit])) - 1
    digits = f"{fraction:0{width}d}".rstrip("0") if width else ""
    return ("-" if value < 0 else "") + str(whole) + (f".{digits}" if digits else "")
