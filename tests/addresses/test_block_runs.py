"""Runs of blocks in memory, against a loop over the blocks."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvheap import AddressBatch, BlockRuns, MemorySegment

UNIT = 64


@st.composite
def heaps(draw: st.DrawFn) -> tuple[list[MemorySegment], list[int], int]:
    """Buffers that touch in the heap's addresses, and often in memory; block numbers; a size."""
    units = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    start, base, segments = 0, 1 << 20, []
    for count in units:
        base += draw(st.sampled_from([0, 0, UNIT, 1 << 16]))
        segments.append(MemorySegment(start, count * UNIT, base))
        start += count * UNIT
        base += count * UNIT
    numbers = draw(st.permutations(range(start // UNIT)))
    chosen = numbers[: draw(st.integers(0, len(numbers)))]
    size = draw(st.integers(1, UNIT))
    return segments, sorted(chosen) if draw(st.booleans()) else chosen, size


def naive_place(segments: list[MemorySegment], address: int) -> tuple[int, int]:
    """The buffer of an address, and the absolute address."""
    for number, (start, num_bytes, base) in enumerate(segments):
        if start <= address < start + num_bytes:
            return number, base + address - start
    raise AssertionError(address)


def naive_extents(
    segments: list[MemorySegment], addresses: list[int], size: int, padding: bool
) -> list[tuple[int, int]]:
    found: list[list[int]] = []
    last = None
    for address in addresses:
        number, place = naive_place(segments, address)
        num_bytes = UNIT if padding else size
        joins = found and last == number and found[-1][0] + found[-1][1] == place
        if joins and (padding or size == UNIT):
            found[-1][1] += num_bytes
        else:
            found.append([place, num_bytes])
        last = number
    return [(place, num_bytes) for place, num_bytes in found]


@given(heaps(), st.booleans())
def test_extents_are_those_of_a_loop(
    heap: tuple[list[MemorySegment], list[int], int], padding: bool
) -> None:
    segments, numbers, size = heap
    addresses = [UNIT * number for number in numbers]
    blocks = AddressBatch.of_addresses(addresses, UNIT)
    runs = BlockRuns.placed(blocks, size, segments)
    starts, sizes = runs.extents(padding=padding)
    assert len(runs) == len(addresses)
    assert starts.dtype == sizes.dtype == np.int64
    found = list(zip(starts.tolist(), sizes.tolist(), strict=True))
    assert found == naive_extents(segments, addresses, size, padding)


ONE = [MemorySegment(0, 4096, 1 << 20)]


@pytest.mark.parametrize(
    ("blocks", "size", "segments", "message"),
    [
        (([0], [65]), 64, ONE, r"at 0 leave the heap's buffers"),
        (([4096], [1]), 64, ONE, r"at 4096 leave the heap's buffers"),
        (([0], [1 << 40]), 64, ONE, r"leave the heap's buffers"),
        (([64], [1]), 64, [MemorySegment(128, 64, 4096)], r"at 64 leave"),
        (([0], [2]), 64, [(0, 100, 4096), (100, 100, 8192)], r"at 64 leave"),
        (([128], [1]), 64, [(0, 64, 4096), (256, 64, 8192)], r"at 128 leave"),
        (([0], [1]), 65, ONE, r"blocks of 64 bytes are too small for contents of 65 bytes"),
        (([0], [1]), 0, ONE, r"size_bytes must be positive"),
        (([0, 0], [1, 1]), 64, ONE, r"run_starts overlap"),
        (([-64], [1]), 64, ONE, r"run_starts must be non-negative, got -64"),
        (([0], [1]), 64, [], r"segments must name at least one buffer"),
        (([0], [1]), 64, [(0, 64, 0)], r"segments\[0\] has 64 bytes at no address: 0x0"),
        (([0], [1]), 64, [(0, 64, (1 << 63) - 64)], r"segments\[0\] has 64 bytes at no address"),
        (([0], [1]), 64, [(0, 64, 64), (32, 64, 512)], r"segments\[1\] must begin at 64 or above"),
        (([0], [1]), 64, [(-1, 64, 64)], r"segments\[0\] must begin at 0 or above"),
    ],
)
def test_what_is_no_place_is_refused(
    blocks: tuple[list[int], list[int]], size: int, segments: list[MemorySegment], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockRuns.placed(AddressBatch(64, *blocks), size, segments)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (([64], [1, 1], 64, 64), "got 1 starts but 2 counts"),
        (([0], [1], 64, 64), "starts must be positive, got 0"),
        (([-64], [1], 64, 64), "starts must be positive, got -64"),
        (([64], [0], 64, 64), "counts must be positive, got 0"),
        (([64], [1 << 62], 64, 64), "at 64 end at 2\\*\\*63 or beyond"),
        (([64], [1], 65, 64), "too small for contents of 65 bytes"),
        (([64], [1], 0, 64), "size_bytes must be positive"),
        (([0.5], [1], 64, 64), "starts must be integers"),
        (("ab", [1], 64, 64), "starts must be a sequence"),
    ],
)
def test_runs_from_elsewhere_are_checked(runs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockRuns(*runs).checked()


def test_runs_survive_a_pickle() -> None:
    runs = BlockRuns(np.array([64, 64]), np.array([2, 1]), 60, 64)
    found = pickle.loads(pickle.dumps(runs)).checked()
    assert found.extents(padding=False).starts.tolist() == [64, 128, 64]


def test_an_empty_batch_has_no_extents() -> None:
    starts, sizes = BlockRuns.placed(AddressBatch(64, [], []), 64, ONE).extents()
    assert (len(starts), len(sizes)) == (0, 0)
