"""Kept fields of every kind that docs/tables.md lists: as a Parquet file has them, and as tables give them back."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

IDS = ["a", "b", "c"]
_MOMENT = datetime.datetime(2026, 1, 31, 12, 0, 0, 500_000)


class KeptCase(NamedTuple):
    """A field of the input: its Arrow type, its values in the documents `IDS`, and those of its column in a table."""

    kind: pa.DataType
    given: list[Any]
    expected: list[Any]


KEPT_CASES = {
    "int": KeptCase(pa.int64(), [1, -(2**63), None], [1, -(2**63), None]),
    "float": KeptCase(pa.float64(), [0.25, -1.0, None], [0.25, -1.0, None]),  # 32 bits hold them too
    "bool": KeptCase(pa.bool_(), [True, False, None], [True, False, None]),
    "string": KeptCase(pa.string(), ['it\'s "new"\n東京', "", None], ['it\'s "new"\n東京', "", None]),
    "none": KeptCase(pa.string(), [None, None, None], [None, None, None]),
    "list": KeptCase(pa.list_(pa.string()), [["b", None, "é"], [], None], ['["b",null,"é"]', "[]", None]),
    "object": KeptCase(
        pa.struct([("z", pa.int64()), ("a", pa.list_(pa.bool_()))]),
        [{"z": 1, "a": [True]}, {"z": None, "a": None}, None],
        ['{"a":[true],"z":1}', '{"a":null,"z":null}', None],
    ),
    "map": KeptCase(pa.map_(pa.string(), pa.int64()), [[("b", 1), ("a", 2)], [], None], ['{"a":2,"b":1}', "{}", None]),
    "date": KeptCase(
        pa.date32(), [datetime.date(2026, 1, 31), datetime.date(1, 1, 1), None], ["2026-01-31", "0001-01-01", None]
    ),
    "clock": KeptCase(
        pa.time32("s"), [datetime.time(12, 0, 1), datetime.time(0), None], ["12:00:01", "00:00:00", None]
    ),
    "local": KeptCase(
        pa.timestamp("us"), [_MOMENT, _MOMENT, None], ["2026-01-31T12:00:00.5", "2026-01-31T12:00:00.5", None]
    ),
    "zoned": KeptCase(
        pa.timestamp("us", "UTC"), [_MOMENT, _MOMENT, None], ["2026-01-31T12:00:00.5Z", "2026-01-31T12:00:00.5Z", None]
    ),
    "pause": KeptCase(pa.duration("ms"), [datetime.timedelta(seconds=1.5)] * 2 + [None], ["PT1.5S", "PT1.5S", None]),
    "decimal": KeptCase(
        pa.decimal128(20, 2), [decimal.Decimal("1.50"), decimal.Decimal("-0.25"), None], ["1.50", "-0.25", None]
    ),
    "big": KeptCase(pa.uint64(), [2**64 - 1, 0, None], [str(2**64 - 1), "0", None]),
    "raw": KeptCase(pa.binary(2), [b"\x01\xff", b"\x02\x00", None], ["01ff", "0200", None]),
    "meta_lang": KeptCase(
        pa.struct([("lang", pa.string())]), [{"lang": "en"}, {"lang": None}, None], ["en", None, None]
    ),
}
FIELDS = [{"meta_lang": "meta.lang"}.get(name, name) for name in KEPT_CASES]


def write_kept(path: Path, texts: dict[str, str], changed: str = "") -> None:
    """A Parquet file with the documents `IDS`.

    Args:
      path: of the file.
      texts: of the documents, by id.
      changed: name of a column in which the first two documents change their values.
    """
    columns = {"id": pa.array(IDS), "text": pa.array([texts[name] for name in IDS])}
    for name, case in KEPT_CASES.items():
        given = [*case.given[1::-1], *case.given[2:]] if name == changed else case.given
        columns[name.partition("_")[0]] = pa.array(given, case.kind)
    pq.write_table(pa.table(columns), path)


def expect_kept(document: str, changed: str = "") -> dict[str, Any]:
    """The kept columns of a document's rows."""
    i = IDS.index(document)
    return {name: case.expected[1 - i if name == changed and i < 2 else i] for name, case in KEPT_CASES.items()}
