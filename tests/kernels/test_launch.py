"""What launchers share: checks of addresses against naive models, and life without Triton."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvheap.kernels import launch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from kvheap.kernels import block_copy
buffer = torch.zeros(32, dtype=torch.uint8)
block_copy.scatter_blocks(torch.ones(1, 8, dtype=torch.uint8), buffer, [16])
assert buffer.nonzero().flatten().tolist() == list(range(16, 24))
import kvheap
cache = kvheap.PagedKVCache.of("mla", [torch.arange(64).reshape(4, 4, 4).half()])
heap = kvheap.TensorMemoryAllocator(torch.zeros(8192, dtype=torch.uint8))
for convert in (False, True):
    batch = heap.batched_store(cache, [7, 2], 2, convert=convert)
    assert batch is not None
try:
    block_copy._copy_blocks_kernel[(1,)]()
except RuntimeError as error:
    print(error)
"""


@given(st.lists(st.integers(0, 60), max_size=8), st.integers(0, 12))
def test_overlap_is_found_exactly_where_there_is_some(addresses: list[int], size: int) -> None:
    places = sorted(addresses)
    overlapping = any(b - a < size for a, b in itertools.pairwise(places))
    array = np.array(addresses, np.int64)
    if not overlapping:
        launch.require_disjoint("addresses", array, size)
        return
    with pytest.raises(ValueError, match=r"addresses\[\d\] is \d+, addresses\[\d\] is \d+"):
        launch.require_disjoint("addresses", array, size)


@given(st.lists(st.integers(-5, 80), min_size=1, max_size=8), st.integers(0, 12))
def test_a_block_outside_the_buffer_is_named(addresses: list[int], size: int) -> None:
    inside = all(0 <= address <= 64 - size for address in addresses)
    if inside:
        checked = launch.host_addresses("addresses", addresses, 64, size)
        assert checked.dtype == np.int64
        assert checked.tolist() == addresses
        return
    with pytest.raises(ValueError, match=r"addresses\[\d\] is -?\d+") as caught:
        launch.host_addresses("addresses", addresses, 64, size)
    at, address = str(caught.value).split(":")[0].removeprefix("addresses[").split("] is ")
    assert addresses[int(at)] == int(address)
    assert not 0 <= int(address) <= 64 - size


@given(st.lists(st.integers(0, 1 << 40), max_size=5))
def test_alignment_is_the_largest_power_of_two_up_to_16(values: list[int]) -> None:
    expected = max(n for n in (1, 2, 4, 8, 16) if all(value % n == 0 for value in values))
    assert launch.alignment_of(*values) == expected


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64])
def test_any_integer_dtype_becomes_int64(dtype: type[np.generic]) -> None:
    for given_addresses in (np.array([0, 8], dtype), torch.from_numpy(np.array([0, 8], dtype))):
        checked = launch.host_addresses("addresses", given_addresses, 16, 8)
        assert checked.dtype == np.int64
        assert checked.tolist() == [0, 8]


def test_an_upload_is_a_copy_of_a_read_only_array() -> None:
    array = np.arange(4)
    array.flags.writeable = False
    uploaded = launch.upload(array, torch.device("cpu"))
    uploaded[0] = 9
    assert array[0] == 0


def test_without_triton_cpu_tensors_work_and_a_launch_says_what_is_missing() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "_copy_blocks_kernel needs the triton package, which is missing"


def test_host_addresses_are_refused_in_a_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        launch.upload(np.zeros(3, np.int64), torch.device("cuda"))
    assert len(launch.upload(np.zeros(3, np.int64), torch.device("cpu"))) == 3
