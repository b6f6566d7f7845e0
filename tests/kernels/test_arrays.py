"""Integer arrays of callers: what is taken, what is refused, and what divides all values."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvheap.kernels.arrays import alignment_of, combined_bits, int64_array


@given(st.lists(st.integers(0, 1 << 40), max_size=5))
def test_alignment_is_the_largest_power_of_two_up_to_16(values: list[int]) -> None:
    expected = max(n for n in (1, 2, 4, 8, 16) if all(value % n == 0 for value in values))
    assert alignment_of(*values) == expected
    assert alignment_of(combined_bits(np.array(values, np.int64))) == expected


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.uint64])
def test_integers_of_any_dtype_become_int64(dtype: type[np.generic]) -> None:
    given_values = np.array([3, 0, 1], dtype)
    found = int64_array("slots", given_values)
    assert found.dtype == np.int64
    assert found.tolist() == [3, 0, 1]
    assert np.shares_memory(found, given_values) == (dtype is np.int64)


@pytest.mark.parametrize("empty", [[], (), np.empty(0, np.float32), np.empty(0, np.int32)])
def test_no_values_are_int64(empty: object) -> None:
    assert int64_array("slots", empty).dtype == np.int64  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0.5], TypeError, "slots must be integers, got float64"),
        ([True], TypeError, "slots must be integers, got bool"),
        (["1"], TypeError, "slots must be integers, got <U1"),
        ([1 << 70], TypeError, "slots must be integers, got object"),
        ([[1]], ValueError, "slots must be one-dimensional, got shape (1, 1)"),
        (7, ValueError, "slots must be one-dimensional, got shape ()"),
        (np.array([1, 2**63], np.uint64), ValueError, f"below 2**63: slots[1] is {2**63}"),
    ],
)
def test_other_values_are_refused(values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        int64_array("slots", values)  # type: ignore[arg-type]


def test_one_integer_alone_is_taken_where_it_is_allowed() -> None:
    assert int(int64_array("sizes", 7, allow_scalar=True)) == 7
    with pytest.raises(ValueError, match=re.escape("sizes must be below 2**63, got")):
        int64_array("sizes", np.uint64(2**63), allow_scalar=True)
