"""AddressManager: results and errors, one operation at a time."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap import (
    AddressBatch,
    AddressManager,
    DoubleFreeError,
    HeapCorruptionError,
    InvalidFreeError,
    NegativeBatchSizeError,
    OutOfMemoryError,
)
from kvheap.addresses.extents import Extents
from kvheap.addresses.free_list import FreeList, Receipt

PAGE = 4096


def heap_with_holes(hole_pages: list[int]) -> AddressManager:
    """A heap whose free extents have these sizes, one allocated page between them."""
    total = sum(hole_pages) + len(hole_pages)
    heap = AddressManager(total * PAGE)
    heap.allocate(total * PAGE)
    start = 0
    for pages in hole_pages:
        heap.free(start * PAGE, pages * PAGE)
        start += pages + 1
    return heap


def state(heap: AddressManager) -> tuple[object, list[int], list[int]]:
    starts, sizes = heap.snapshot().T
    return heap.stats(), starts.tolist(), sizes.tolist()


class TestAllocate:
    def test_a_fresh_heap_allocates_from_zero_upward(self) -> None:
        heap = AddressManager(10 * PAGE)
        assert heap.allocate(1) == (0, PAGE)
        assert heap.allocate(PAGE + 1) == (PAGE, 2 * PAGE)
        assert heap.allocate(7 * PAGE) == (3 * PAGE, 7 * PAGE)
        assert heap.get_free_size() == 0
        heap.check()

    def test_the_whole_heap_is_one_extent(self) -> None:
        heap = AddressManager(10 * PAGE)
        assert heap.allocate(10 * PAGE) == (0, 10 * PAGE)

    def test_the_smallest_extent_that_fits_is_taken_the_lowest_of_equals(self) -> None:
        heap = heap_with_holes([5, 2, 3, 2])
        assert heap.allocate(2 * PAGE) == (6 * PAGE, 2 * PAGE)
        assert heap.allocate(2 * PAGE) == (13 * PAGE, 2 * PAGE)
        assert heap.allocate(2 * PAGE) == (9 * PAGE, 2 * PAGE)
        assert heap.allocate(2 * PAGE) == (0, 2 * PAGE)

    @pytest.mark.parametrize(("size", "usable"), [(0, 0), (1, 0), (PAGE + 5, PAGE)])
    def test_a_heap_is_rounded_down(self, size: int, usable: int) -> None:
        heap = AddressManager(size)
        assert heap.get_heap_size() == heap.get_free_size() == usable
        heap.check()
        with pytest.raises(OutOfMemoryError):
            heap.allocate(usable + 1)

    def test_a_full_heap_says_what_is_free(self) -> None:
        heap = heap_with_holes([2, 3])
        with pytest.raises(OutOfMemoryError, match="no memory is available") as caught:
            heap.allocate(4 * PAGE - 1)
        assert caught.value.requested_bytes == 4 * PAGE
        assert caught.value.free_bytes == 5 * PAGE
        assert caught.value.largest_free_bytes == 3 * PAGE
        assert isinstance(caught.value, RuntimeError)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert copy.free_bytes == 5 * PAGE

    @pytest.mark.parametrize("size", [0, -1])
    def test_sizes_must_be_positive(self, size: int) -> None:
        heap = AddressManager(PAGE)
        with pytest.raises(ValueError, match="size must be greater than 0"):
            heap.allocate(size)
        with pytest.raises(ValueError, match="size must be greater than 0"):
            heap.batched_allocate(size, 1)

    @pytest.mark.parametrize("size", [1.0, "1", None, True])
    def test_sizes_must_be_integers(self, size: object) -> None:
        with pytest.raises(TypeError, match="must be an integer, got"):
            AddressManager(PAGE).allocate(size)  # type: ignore[arg-type]

    def test_numpy_integers_are_integers(self) -> None:
        heap = AddressManager(np.int64(4 * PAGE), np.int32(PAGE))  # type: ignore[arg-type]
        address, size = heap.allocate(np.int64(5))  # type: ignore[arg-type]
        assert (type(address), type(size)) == (int, int)

    @pytest.mark.parametrize("align_bytes", [0, -1, 3, 4097])
    def test_the_alignment_must_be_a_power_of_two(self, align_bytes: int) -> None:
        with pytest.raises(ValueError, match=f"positive power of two, got {align_bytes}"):
            AddressManager(PAGE, align_bytes)

    @pytest.mark.parametrize("size", [-1, 1 << 63])
    def test_the_heap_must_be_addressable(self, size: int) -> None:
        with pytest.raises(ValueError, match=str(size)):
            AddressManager(size)


class TestBatchedAllocate:
    def test_one_extent_holds_the_batch_where_it_can_the_smallest_such(self) -> None:
        heap = heap_with_holes([9, 4, 5])
        batch = heap.batched_allocate(PAGE, 4)
        assert (batch.num_runs, list(batch)[0]) == (1, (10 * PAGE, PAGE))

    def test_a_batch_over_holes_takes_the_fewest_runs(self) -> None:
        heap = heap_with_holes([1, 5, 2, 4, 1])
        batch = heap.batched_allocate(PAGE, 10)  # 5 + 4 + the smallest hole for one more
        assert batch.run_counts.tolist() == [1, 5, 4]
        assert batch.run_starts.tolist() == [0, 2 * PAGE, 11 * PAGE]
        assert heap.get_free_size() == 3 * PAGE
        heap.check()

    def test_a_batch_is_all_or_nothing(self) -> None:
        heap = heap_with_holes([3, 3])
        before = state(heap)
        with pytest.raises(OutOfMemoryError) as caught:
            heap.batched_allocate(2 * PAGE, 3)  # 6 pages are free, but only two pairs
        assert caught.value.requested_bytes == caught.value.free_bytes == 6 * PAGE
        assert state(heap) == before

    def test_a_batch_of_none_is_empty(self) -> None:
        batch = AddressManager(0).batched_allocate(PAGE, 0)
        assert (len(batch), list(batch), batch) == (0, [], [])
        AddressManager(0).batched_free(batch)

    def test_a_negative_batch_is_two_kinds_of_error(self) -> None:
        heap = AddressManager(PAGE)
        for kind in (ValueError, RuntimeError, NegativeBatchSizeError):
            with pytest.raises(kind, match="batch_size must be non-negative, got -1"):
                heap.batched_allocate(1, -1)

    def test_very_many_holes_are_taken_by_rebuilding(self) -> None:
        heap = heap_with_holes([1, 2] * 500)
        batch = heap.batched_allocate(PAGE, 1400)
        assert batch.num_runs == 900  # all 500 pairs, and 400 of the single pages
        assert set(batch.run_counts.tolist()) == {1, 2}
        heap.check()
        assert heap.get_free_size() == 100 * PAGE
        heap.batched_free(batch)
        assert heap.stats().free_extents == 1000
        heap.check()


class TestPartialBatches:
    def test_the_largest_prefix_that_fits_is_allocated(self) -> None:
        heap = heap_with_holes([3, 1, 5])
        batch = heap.batched_allocate(2 * PAGE, 9, allow_partial=True)
        assert list(batch) == [(0, 2 * PAGE), (6 * PAGE, 2 * PAGE), (8 * PAGE, 2 * PAGE)]
        heap.check()
        assert heap.get_free_size() == 3 * PAGE

    def test_what_fits_whole_is_allocated_whole(self) -> None:
        heap = heap_with_holes([3, 1, 5])
        assert len(heap.batched_allocate(PAGE, 9, allow_partial=True)) == 9
        assert heap.get_free_size() == 0

    def test_none_at_all_is_an_empty_batch(self) -> None:
        heap = heap_with_holes([3, 1, 5])
        batch = heap.batched_allocate(6 * PAGE, 2, allow_partial=True)
        assert (len(batch), batch.num_runs, batch.addresses.tolist()) == (0, 0, [])
        heap.batched_free(batch)
        assert heap.get_free_size() == 9 * PAGE

    def test_very_many_holes_give_a_prefix_too(self) -> None:
        heap = heap_with_holes([1, 2] * 500)
        assert len(heap.batched_allocate(2 * PAGE, 501, allow_partial=True)) == 500
        assert len(heap.batched_allocate(PAGE, 10**9, allow_partial=True)) == 500
        assert heap.get_free_size() == 0
        heap.check()

    def test_max_batch_is_what_a_batch_gets(self) -> None:
        heap = heap_with_holes([1, 2, 7] * 100)
        for pages, expected in [(1, 1000), (2, 400), (3, 200), (7, 100), (8, 0)]:
            assert heap.max_batch(pages * PAGE) == expected
        with pytest.raises(OutOfMemoryError):
            heap.batched_allocate(3 * PAGE, 201)
        assert len(heap.batched_allocate(3 * PAGE, 200)) == 200
        with pytest.raises(ValueError, match="greater than 0, got 0"):
            heap.max_batch(0)


class TestAddressBatch:
    def batch(self) -> AddressBatch:
        return AddressBatch(8, np.array([0, 32, 80]), np.array([2, 3, 1]))

    def test_it_is_a_sequence_of_pairs(self) -> None:
        pairs = [(0, 8), (8, 8), (32, 8), (40, 8), (48, 8), (80, 8)]
        batch = self.batch()
        assert list(batch) == pairs
        assert batch == pairs
        assert batch != pairs[:-1]
        assert [batch[0], batch[-1], *batch[1:3]] == [pairs[0], pairs[-1], *pairs[1:3]]
        assert batch + [(1, 2)] == [*pairs, (1, 2)]
        assert [(1, 2)] + batch == [(1, 2), *pairs]
        assert [batch.address(i) for i in range(6)] == [address for address, _ in pairs]
        with pytest.raises(IndexError):
            batch[6]

    def test_the_caller_keeps_his_arrays(self) -> None:
        starts, counts = np.array([0, 32]), np.array([2, 3])
        AddressBatch(8, starts, counts).addresses  # noqa: B018
        assert starts.flags.writeable
        assert counts.flags.writeable

    def test_a_batch_made_by_hand_is_checked_when_it_is_freed(self) -> None:
        heap = AddressManager(16 * PAGE)
        heap.allocate(16 * PAGE)
        before = state(heap)
        for starts, counts in ([0, PAGE], [2, 2]), ([0], [17]), ([0], [0]), ([8], [1]):
            with pytest.raises(InvalidFreeError):
                heap.batched_free(AddressBatch(PAGE, starts, counts))
        assert state(heap) == before
        heap.batched_free(AddressBatch(PAGE, [5 * PAGE, 0], [1, 2]))
        assert state(heap)[1:] == ([0, 5 * PAGE], [2 * PAGE, PAGE])

    def test_it_cannot_be_changed_and_travels(self) -> None:
        batch = self.batch()
        for array in (batch.addresses, batch.run_starts, batch.run_counts):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
        copy = pickle.loads(pickle.dumps(batch))
        assert copy == batch
        assert copy.num_runs == 3


def wrong_frees() -> list[tuple[int, int, type[Exception], str]]:
    """Of a heap of 8 pages whose pages 2 and 3 are free."""
    return [
        (2 * PAGE, PAGE, DoubleFreeError, "is free already"),
        (PAGE, 2 * PAGE, DoubleFreeError, "is free already"),
        (3 * PAGE, 2 * PAGE, DoubleFreeError, "is free already"),
        (0, 8 * PAGE, DoubleFreeError, "is free already"),
        (7 * PAGE, 2 * PAGE, InvalidFreeError, "outside the heap"),
        (-PAGE, PAGE, InvalidFreeError, "outside the heap"),
        (1 << 70, PAGE, InvalidFreeError, "outside the heap"),
        (1, PAGE, InvalidFreeError, "not aligned"),
        (0, 100, InvalidFreeError, "not aligned"),
        (0, 0, InvalidFreeError, "must be positive"),
        (0, -PAGE, InvalidFreeError, "must be positive"),
    ]


class TestReserve:
    """Given extents leave the free list; all or none."""

    def test_they_are_not_handed_out_and_can_be_freed(self) -> None:
        heap = AddressManager(6 * PAGE)
        heap.reserve([(4 * PAGE, PAGE), (PAGE, 2 * PAGE)])
        assert heap.snapshot().tolist() == [[0, PAGE], [3 * PAGE, PAGE], [5 * PAGE, PAGE]]
        heap.check()
        heap.batched_free([(4 * PAGE, PAGE), (PAGE, 2 * PAGE)])
        assert heap.snapshot().tolist() == [[0, 6 * PAGE]]

    @pytest.mark.parametrize("by_rebuilding", [True, False])
    def test_a_heap_is_as_it_was_when_its_batches_are_reserved_again(
        self, by_rebuilding: bool
    ) -> None:
        old, heap = heap_with_holes([3, 50, 200, 1]), AddressManager(258 * PAGE)
        batch = old.batched_allocate(2 * PAGE, 100 if by_rebuilding else 3)
        heap.reserve(np.array([(3, 1), (54, 1), (255, 1), (257, 1)]) * PAGE)
        heap.reserve(batch)
        assert heap.snapshot().tolist() == old.snapshot().tolist()
        heap.check()

    def test_nothing_is_nothing(self) -> None:
        heap = AddressManager(6 * PAGE)
        heap.reserve([])
        heap.reserve(np.empty(0, np.int64), PAGE)
        assert heap.get_free_size() == 6 * PAGE
        AddressManager(0).reserve([])

    @pytest.mark.parametrize(
        ("extents", "message"),
        [
            ([(0, PAGE), (PAGE + 8, PAGE)], r"\[4104, 8200\): the address is not aligned to 4096"),
            ([(0, PAGE), (PAGE, 100)], r"\[4096, 4196\): the size is not a multiple of 4096"),
            ([(0, PAGE), (PAGE, 0)], r"\[4096, 4096\): a size must be positive"),
            ([(0, PAGE), (-PAGE, PAGE)], r"\[-4096, 0\): an address must not be negative"),
            ([(0, PAGE), (7 * PAGE, 2 * PAGE)], r"\[28672, 36864\): outside the heap \[0, 32768\)"),
            ([(0, PAGE), (1 << 62, 1 << 62)], r"2\*\*63"),
            ([(0, PAGE), (1 << 63, PAGE)], r"2\*\*63"),
            (
                [(0, 2 * PAGE), (6 * PAGE, PAGE), (PAGE, PAGE)],
                r"\[4096, 8192\): it overlaps \[0, 8192\) of the same call",
            ),
            (
                [(PAGE, PAGE), (6 * PAGE, PAGE), (PAGE, PAGE)],
                r"\[4096, 8192\): it overlaps \[4096, 8192\) of the same call",
            ),
            ([(0, PAGE), (4 * PAGE, PAGE), (5 * PAGE, PAGE)], r"\[16384, 20480\): it is not free"),
            ([(0, PAGE), (3 * PAGE, 2 * PAGE)], r"\[12288, 20480\): 16384 is not free"),
            ([(0, PAGE), (5 * PAGE, 2 * PAGE)], r"\[20480, 28672\): it is not free"),
        ],
    )
    def test_the_first_wrong_extent_is_named_and_nothing_is_taken(
        self, extents: list[tuple[int, int]], message: str
    ) -> None:
        heap = AddressManager(8 * PAGE)
        heap.reserve([(4 * PAGE, 2 * PAGE)])
        before = state(heap)
        with pytest.raises(ValueError, match=message):
            heap.reserve(extents)
        assert state(heap) == before

    def test_no_extent_spans_two_segments(self) -> None:
        heap = AddressManager(2 * PAGE)
        heap.sbrk(2 * PAGE, new_segment=True)
        with pytest.raises(ValueError, match=r"\[4096, 12288\): it spans two segments"):
            heap.reserve([(PAGE, 2 * PAGE)])
        heap.reserve(AddressBatch(PAGE, [PAGE], [2]))
        assert heap.snapshot().tolist() == [[0, PAGE], [3 * PAGE, PAGE]]

    @given(st.integers(0, 2**20))
    @settings(max_examples=50)
    def test_what_one_heap_has_allocated_another_can_reserve(self, seed: int) -> None:
        source = np.random.default_rng(seed)
        old, heap = (AddressManager.of_pages(3000, 576) for _ in range(2))
        live = [old.allocate(int(size)) for size in source.integers(1, 3000, 400)]
        source.shuffle(live)
        old.batched_free(live[:200])
        heap.reserve(live[200:])
        assert state(heap) == state(old)
        heap.check()


class TestFree:
    @pytest.fixture
    def heap(self) -> AddressManager:
        heap = AddressManager(8 * PAGE)
        heap.allocate(8 * PAGE)
        heap.free(2 * PAGE, 2 * PAGE)
        return heap

    @pytest.mark.parametrize(("address", "size", "error", "message"), wrong_frees())
    def test_a_wrong_free_raises_and_changes_nothing(
        self, heap: AddressManager, address: int, size: int, error: type[Exception], message: str
    ) -> None:
        before = state(heap)
        with pytest.raises(error, match=message):
            heap.free(address, size)
        if abs(address) < 1 << 63:
            with pytest.raises(error):
                heap.batched_free([(5 * PAGE, PAGE), (address, size)])
        assert state(heap) == before
        heap.check()

    def test_neighbours_are_joined_on_both_sides(self, heap: AddressManager) -> None:
        heap.free(5 * PAGE, PAGE)
        heap.free(4 * PAGE, PAGE)
        assert state(heap)[1:] == ([2 * PAGE], [4 * PAGE])
        heap.check()

    @pytest.mark.parametrize(
        ("blocks", "sizes"),
        [
            ([(6 * PAGE, PAGE), (0, PAGE)], None),
            (((a, PAGE) for a in (6 * PAGE, 0)), None),
            (np.array([[6 * PAGE, PAGE], [0, PAGE]]), None),
            (np.array([6 * PAGE, 0]), PAGE),
            ([6 * PAGE, 0], [PAGE, PAGE]),
        ],
    )
    def test_a_batch_comes_in_any_form_and_order(
        self, heap: AddressManager, blocks: object, sizes: object
    ) -> None:
        heap.batched_free(blocks, sizes)  # type: ignore[arg-type]
        assert state(heap)[1:] == ([0, 2 * PAGE, 6 * PAGE], [PAGE, 2 * PAGE, PAGE])
        heap.check()

    @pytest.mark.parametrize(
        ("blocks", "sizes", "error", "message"),
        [
            ([(0, PAGE), (0, PAGE)], None, DoubleFreeError, "in the same call"),
            ([(0, 2 * PAGE), (PAGE, PAGE)], None, DoubleFreeError, "in the same call"),
            ([(0.5, PAGE)], None, TypeError, "must be integers: 'float' object"),
            ([(0.5, PAGE)], None, TypeError, "blocks.*got 0.5"),
            ([(0, "4096")], None, TypeError, "blocks.*got '4096'"),
            (None, None, TypeError, "blocks must be .*got None"),
            (3, None, TypeError, "blocks must be .*got 3"),
            (3, PAGE, TypeError, "blocks must be .*got 3"),
            (np.dtype, None, TypeError, "blocks must be .*got <class"),
            ("ab", None, TypeError, "blocks must be .*got 'ab'"),
            (b"ab", PAGE, TypeError, "blocks must be .*got b'ab'"),
            ("", None, TypeError, "blocks must be .*got ''"),
            ({0: PAGE}, None, TypeError, "blocks must be .*got {0: 4096}"),
            ({0: PAGE}, PAGE, TypeError, "blocks must be .*got {0: 4096}"),
            ([0], 1 << 70, InvalidFreeError, f"sizes must be below .*got {1 << 70}"),
            ([1 << 70], PAGE, InvalidFreeError, f"addresses must be below .*got {1 << 70}"),
            (
                [[0], [1, 2]],
                PAGE,
                ValueError,
                r"addresses must be one-dim.*got \[\[0\], \[1, 2\]\]",
            ),
            ([0], [[1], [1, 2]], ValueError, r"sizes must be one-dim.*got \[\[1\], \[1, 2\]\]"),
            ([0, PAGE], None, ValueError, "pairs, got 0"),
            ([(0, PAGE), (PAGE, PAGE, PAGE)], None, ValueError, "pairs, got"),
            (np.arange(4), None, ValueError, r"pairs, got shape \(4,\)"),
            (np.array([[0.5, PAGE]]), None, TypeError, "must be integers, got float64"),
            ([(1 << 70, PAGE)], None, InvalidFreeError, f"below .*, got {1 << 70}"),
            ([0, PAGE], [PAGE], ValueError, "2 addresses but 1 sizes"),
            ([(1 << 62, 1 << 62), (0, PAGE)], None, InvalidFreeError, "beyond any heap"),
        ],
    )
    def test_a_wrong_batch_raises_and_changes_nothing(
        self,
        heap: AddressManager,
        blocks: object,
        sizes: object,
        error: type[Exception],
        message: str,
    ) -> None:
        before = state(heap)
        with pytest.raises(error, match=message):
            heap.batched_free(blocks, sizes)  # type: ignore[arg-type]
        assert state(heap) == before

    def test_a_wrong_free_among_very_many_changes_nothing(self) -> None:
        heap = AddressManager(4000 * PAGE)
        batch = heap.batched_allocate(PAGE, 4000)
        heap.free(2000 * PAGE, PAGE)
        before = state(heap)
        with pytest.raises(DoubleFreeError, match=f"{2000 * PAGE}"):
            heap.batched_free(batch.addresses[::2], PAGE)
        with pytest.raises(InvalidFreeError, match="outside"):
            heap.batched_free(batch.addresses[::2] + 2001 * PAGE, PAGE)
        with pytest.raises(InvalidFreeError, match="not aligned"):
            heap.batched_free(batch.addresses[::2] + 8, PAGE)
        assert state(heap) == before


class TestSbrk:
    def test_the_new_end_joins_a_free_tail(self) -> None:
        heap = AddressManager(2 * PAGE)
        heap.allocate(PAGE)
        heap.sbrk(3 * PAGE)
        heap.sbrk(0)
        assert heap.get_heap_size() == 5 * PAGE
        assert heap.allocate(4 * PAGE) == (PAGE, 4 * PAGE)
        heap.check()

    @pytest.mark.parametrize("size", [-PAGE, 1, PAGE + 1, 1 << 63])
    def test_a_wrong_size_raises_and_changes_nothing(self, size: int) -> None:
        heap = AddressManager(2 * PAGE)
        with pytest.raises(ValueError, match=str(size) if size < 1 << 63 else "below"):
            heap.sbrk(size)
        assert heap.get_heap_size() == heap.get_free_size() == 2 * PAGE


class TestTrim:
    def test_a_free_tail_is_given_back(self) -> None:
        heap = heap_with_holes([2, 3])
        heap.sbrk(4 * PAGE)
        assert heap.trim() == 4 * PAGE
        assert heap.get_heap_size() == 7 * PAGE
        assert heap.trim() == 0
        heap.check()
        heap.free(6 * PAGE, PAGE)
        assert heap.trim() == 4 * PAGE
        assert state(heap)[1:] == ([0], [2 * PAGE])
        heap.check()

    def test_a_heap_may_vanish_and_come_back(self) -> None:
        heap = AddressManager(3 * PAGE)
        assert (heap.trim(), heap.trim()) == (3 * PAGE, 0)
        assert heap.get_heap_size() == heap.get_free_size() == 0
        with pytest.raises(OutOfMemoryError):
            heap.allocate(1)
        heap.sbrk(PAGE)
        assert heap.allocate(1) == (0, PAGE)

    def test_bytes_that_were_trimmed_cannot_be_freed(self) -> None:
        heap = AddressManager(3 * PAGE)
        heap.allocate(PAGE)
        heap.trim()
        with pytest.raises(InvalidFreeError, match="outside the heap"):
            heap.free(PAGE, PAGE)


class TestSegments:
    @pytest.fixture
    def heap(self) -> AddressManager:
        """Segments of four and of three pages."""
        heap = AddressManager(4 * PAGE)
        heap.sbrk(3 * PAGE, new_segment=True)
        return heap

    def test_nothing_straddles_two(self, heap: AddressManager) -> None:
        with pytest.raises(OutOfMemoryError) as caught:
            heap.allocate(5 * PAGE)
        assert caught.value.free_bytes == 7 * PAGE
        batch = heap.batched_allocate(2 * PAGE, 3)
        assert batch.addresses.tolist() == [0, 2 * PAGE, 4 * PAGE]
        heap.batched_free(batch)
        assert heap.snapshot().tolist() == [[0, 4 * PAGE], [4 * PAGE, 3 * PAGE]]
        heap.check()

    def test_a_free_across_the_boundary_is_refused(self, heap: AddressManager) -> None:
        heap.batched_allocate(PAGE, 7)
        with pytest.raises(InvalidFreeError, match="spans two segments"):
            heap.free(3 * PAGE, 2 * PAGE)
        with pytest.raises(InvalidFreeError, match=f"a segment of the heap begins at {4 * PAGE}"):
            heap.batched_free([(0, PAGE), (3 * PAGE, 2 * PAGE)])
        heap.batched_free([(4 * PAGE, PAGE), (3 * PAGE, PAGE)])
        assert heap.snapshot().tolist() == [[3 * PAGE, PAGE], [4 * PAGE, PAGE]]

    def test_very_many_blocks_are_freed_up_to_it(self) -> None:
        heap = AddressManager(300 * PAGE)
        heap.sbrk(300 * PAGE, new_segment=True)
        batch = heap.batched_allocate(PAGE, 600)
        heap.batched_free(batch.addresses[::2], PAGE)
        heap.batched_free(batch.addresses[1::2], PAGE)
        heap.check()
        assert heap.snapshot().tolist() == [[0, 300 * PAGE], [300 * PAGE, 300 * PAGE]]

    def test_the_first_bytes_of_an_empty_heap_are_no_second_segment(self) -> None:
        heap = AddressManager(0)
        heap.sbrk(PAGE, new_segment=True)
        heap.sbrk(PAGE)
        assert heap.allocate(2 * PAGE) == (0, 2 * PAGE)


class TestPages:
    def test_a_page_has_any_size(self) -> None:
        heap = AddressManager.of_pages(10, 656)
        batch = heap.batched_allocate(656, 4)
        assert batch.addresses.tolist() == [0, 656, 1312, 1968]
        assert heap.allocate(657) == (4 * 656, 2 * 656)
        heap.free(656, 656)
        with pytest.raises(InvalidFreeError, match="not aligned to 656"):
            heap.free(64, 656)
        assert heap.snapshot().tolist() == [[656, 656], [6 * 656, 4 * 656]]
        heap.check()

    @pytest.mark.parametrize(("num_pages", "page_bytes"), [(-1, 8), (1, 0), (1 << 62, 4)])
    def test_wrong_sizes_are_refused(self, num_pages: int, page_bytes: int) -> None:
        with pytest.raises(ValueError, match=r"num_pages|below"):
            AddressManager.of_pages(num_pages, page_bytes)


class TestSnapshot:
    def test_it_is_all_free_extents_in_bytes(self) -> None:
        heap = heap_with_holes([2, 1, 3])
        table = heap.snapshot()
        assert table.dtype == np.int64
        assert table.tolist() == [[0, 2 * PAGE], [3 * PAGE, PAGE], [5 * PAGE, 3 * PAGE]]
        table[:] = 0  # the caller's own
        assert heap.snapshot().tolist() != table.tolist()

    def test_of_a_full_heap_it_is_empty(self) -> None:
        assert AddressManager(0).snapshot().shape == (0, 2)


class TestWideHeap:
    """Heaps of 2**31 units and more, whose extents do not fit into an int64."""

    def test_the_largest_heap_works(self) -> None:
        heap = AddressManager((1 << 63) - 1, align_bytes=1)
        batch = heap.batched_allocate(1 << 40, 1000)
        heap.batched_free(batch.addresses[::2], 1 << 40)
        heap.check()
        assert heap.stats().free_extents == 501
        assert heap.max_batch(1 << 40) == 500 + ((1 << 63) - 1 - (1000 << 40) >> 40)
        odd = heap.batched_allocate(1 << 40, 400)
        assert odd.num_runs == 1
        heap.batched_free(odd)
        heap.batched_free(batch.addresses[1::2], 1 << 40)
        assert heap.snapshot().tolist() == [[0, (1 << 63) - 1]]

    def test_a_heap_may_grow_wide(self) -> None:
        heap = AddressManager((1 << 31) - 1, align_bytes=1)
        heap.allocate(7)
        heap.allocate(10)
        heap.free(0, 7)
        heap.sbrk(1 << 40)
        heap.check()
        assert heap.snapshot().tolist() == [[0, 7], [17, (1 << 40) + (1 << 31) - 18]]
        assert heap.allocate(1 << 39) == (17, 1 << 39)
        assert heap.allocate(7) == (0, 7)


class TestCheck:
    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda f: f._index.by_start.add(7 << f._index.bits | 1), "hold different extents"),
            (lambda f: f._index.by_size.clear(), "hold different extents"),
            (lambda f: f._index.by_start._lists[0].reverse(), "a sorted order"),
            (lambda f: setattr(f, "free_units", 1), "the counter says 1"),
            (lambda f: f.insert(100, 1), "beyond the heap"),
            (lambda f: setattr(f, "end", 3), "the last extent ends at 4, beyond the heap's 3"),
            (lambda f: f._index.add(1 << f._index.bits, 1), "is empty"),
            (lambda f: f._index.add(2 << f._index.bits | 2, 2 << f._index.bits | 2), "counter"),
        ],
    )
    def test_a_broken_invariant_is_named(self, break_it: object, message: str) -> None:
        heap = heap_with_holes([1, 2])
        break_it(heap.space._free_list)  # type: ignore[operator]
        heap.space._free_list.commit()
        with pytest.raises(HeapCorruptionError, match=message):
            heap.check()
        assert not heap.check_consistency()

    @pytest.mark.parametrize(("second", "message"), [(1, "overlaps"), (2, "touches")])
    def test_extents_must_be_apart(self, second: int, message: str) -> None:
        free_list = FreeList(Extents(np.array([0, second]), np.array([2, 1])), 8)
        with pytest.raises(HeapCorruptionError, match=message):
            free_list.check()


def test_it_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from kvheap import AddressManager; AddressManager(1 << 20).allocate(1); "
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestAddressesOfSomeBlocks:
    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=12),
        st.lists(st.integers(0, 10_000), max_size=20),
        st.booleans(),
    )
    def test_they_are_those_of_all(
        self, runs: list[tuple[int, int]], picks: list[int], is_known: bool
    ) -> None:
        starts, at = [], 0
        for gap, count in runs:
            at += gap * PAGE
            starts.append(at)
            at += count * PAGE
        counts = [count for _, count in runs]
        expected = [
            start + PAGE * n
            for start, many in zip(starts, counts, strict=True)
            for n in range(many)
        ]
        batch = AddressBatch(PAGE, np.array(starts), np.array(counts))
        if is_known:
            assert batch.addresses.tolist() == expected
        rows = np.array([pick % len(batch) for pick in picks], np.int64)
        assert batch.addresses_of(rows).tolist() == [expected[row] for row in rows]
        assert [batch.address(int(row)) for row in rows] == [expected[row] for row in rows]
        batch.forget_addresses()
        assert batch.addresses.tolist() == expected


class TestGiveBackBatches:
    def manager(self) -> tuple[AddressManager, list[AddressBatch]]:
        """Two segments of four pages, all allocated one by one."""
        manager = AddressManager(4 * PAGE)
        manager.sbrk(4 * PAGE, new_segment=True)
        return manager, [manager.batched_allocate(PAGE, 1) for _ in range(8)]

    def test_as_one_by_one(self) -> None:
        source = random.Random(5)
        for _ in range(200):
            together, batches = self.manager()
            alone, _ = self.manager()
            chosen = source.sample(batches, source.randint(1, 8))
            receipts = [Receipt() for _ in chosen]
            assert together.give_back_batches(chosen, receipts)
            for blocks in chosen:
                alone.give_back_batch(blocks, Receipt())
            assert all(receipt.done for receipt in receipts)
            together.check()
            assert together.snapshot().tolist() == alone.snapshot().tolist()

    @pytest.mark.parametrize("wrong", ["free already", "several runs", "outside", "twice"])
    def test_all_or_none(self, wrong: str) -> None:
        manager, batches = self.manager()
        manager.free(6 * PAGE, PAGE)
        others = {
            "free already": batches[6],
            "several runs": AddressBatch(PAGE, [0, 2 * PAGE], [1, 1]),
            "outside": AddressBatch(PAGE, 8 * PAGE, 1),
            "twice": batches[1],
        }
        before = manager.snapshot().tolist()
        chosen = [batches[1], batches[3], others[wrong], batches[0]]
        receipts = [Receipt() for _ in chosen]
        assert not manager.give_back_batches(chosen, receipts)
        assert not any(receipt.done for receipt in receipts)
        manager.check()
        assert manager.snapshot().tolist() == before
