"""Rows of Arrow's list columns as bytes, against NumPy row by row."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.sinks.arrow import list_bytes

NUMBERS = [pa.float32(), pa.float16(), pa.int8(), pa.uint8()]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("is_slice", [False, True])
def test_rows_are_their_numbers_bytes(numbers, is_slice):
    dtype = numbers.to_pandas_dtype()
    values = pa.array(np.arange(24).astype(dtype), numbers)
    if is_slice:
        values = pa.concat_arrays([pa.array(np.ones(7), pa.float64()).cast(numbers, safe=False), values]).slice(7)
    fixed = pa.FixedSizeListArray.from_arrays(values, 3)
    ragged = pa.LargeListArray.from_arrays(pa.array([0, 2, 2, 9, 24], pa.int64()), values)
    for column in (fixed, fixed.slice(2), fixed.slice(2, 3), fixed.slice(0, 0), ragged, ragged.slice(1, 2)):
        assert list_bytes(column) == [np.array(row.as_py(), dtype).tobytes() for row in column]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 3), pa.large_list(pa.float32())])
def test_no_rows_have_no_bytes(kind):
    assert list_bytes(pa.array([], kind)) == []
