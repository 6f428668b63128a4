"""What both file formats do with Arrow's arrays."""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa


def list_bytes(column: pa.Array) -> list[bytes]:
    """The numbers of each row of a list column, as bytes; by way of NumPy, Arrow would import pandas."""
    values = column.values  # of the whole array that the column may be a slice of
    width = values.type.bit_width // 8
    data = memoryview(values.buffers()[1] or b"")[values.offset * width :]
    if pa.types.is_fixed_size_list(column.type):
        ends = [column.type.list_size * (column.offset + i) for i in range(len(column) + 1)]
    else:
        ends = column.offsets.to_pylist()
    return [bytes(data[start * width : end * width]) for start, end in pairwise(ends)]
