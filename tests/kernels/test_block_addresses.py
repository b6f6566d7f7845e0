"""Checks of block addresses against naive models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvheap.kernels import block_addresses


@given(st.lists(st.integers(0, 60), max_size=8), st.integers(0, 12))
def test_overlap_is_found_exactly_where_there_is_some(addresses: list[int], size: int) -> None:
    places = sorted(addresses)
    overlapping = any(b - a < size for a, b in itertools.pairwise(places))
    array = np.array(addresses, np.int64)
    if not overlapping:
        block_addresses.require_disjoint("addresses", array, size)
        return
    with pytest.raises(ValueError, match=r"addresses\[\d\] is \d+, addresses\[\d\] is \d+"):
        block_addresses.require_disjoint("addresses", array, size)


@given(st.lists(st.integers(-5, 80), min_size=1, max_size=8), st.integers(0, 12))
def test_a_block_outside_the_buffer_is_named(addresses: list[int], size: int) -> None:
    inside = all(0 <= address <= 64 - size for address in addresses)
    if inside:
        checked = block_addresses.host_addresses("addresses", addresses, 64, size)
        assert checked.dtype == np.int64
        assert checked.tolist() == addresses
        return
    with pytest.raises(ValueError, match=r"addresses\[\d\] is -?\d+") as caught:
        block_addresses.host_addresses("addresses", addresses, 64, size)
    at, address = str(caught.value).split(":")[0].removeprefix("addresses[").split("] is ")
    assert addresses[int(at)] == int(address)
    assert not 0 <= int(address) <= 64 - size


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64])
def test_any_integer_dtype_becomes_int64(dtype: type[np.generic]) -> None:
    for given_addresses in (np.array([0, 8], dtype), torch.from_numpy(np.array([0, 8], dtype))):
        checked = block_addresses.host_addresses("addresses", given_addresses, 16, 8)
        assert checked.dtype == np.int64
        assert checked.tolist() == [0, 8]


@given(
    st.lists(st.integers(0, 40), max_size=5),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(1, 9),
)
def test_a_target_on_a_source_is_named(sources: list[int], targets: list[int], size: int) -> None:
    arrays = [np.array(side, np.int64) for side in (sources, targets)]
    if not any(abs(source - target) < size for source in sources for target in targets):
        block_addresses.require_apart(*arrays, size)
        return
    with pytest.raises(ValueError, match=r"the target block at \d+ overlaps the source block at"):
        block_addresses.require_apart(*arrays, size)
