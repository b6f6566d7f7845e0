"""AddressManager: results, errors, and a state machine against a bitmap."""

from __future__ import annotations

import linecache
import pickle
import random
import subprocess
import sys
import threading
from types import FrameType

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvheap import (
    AddressBatch,
    AddressManager,
    DoubleFreeError,
    HeapCorruptionError,
    InvalidFreeError,
    NegativeBatchSizeError,
    OutOfMemoryError,
)
from kvheap.free_list import FreeList

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
    starts, sizes = heap.free_extents()
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
            ([(0.5, PAGE)], None, TypeError, "must be integers, got float64"),
            ([0, PAGE], None, ValueError, "pairs, got shape"),
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


class TestCheck:
    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda f: f._size_of.update({0: 2 * PAGE}), "order by size"),
            (lambda f: f._starts.add(7 * PAGE), "order by address"),
            (lambda f: f._by_size.clear(), "order by size"),
            (lambda f: setattr(f, "free_bytes", 1), "the counter says 1"),
            (lambda f: f.insert(100 * PAGE, PAGE), "beyond the heap"),
            (lambda f: f.insert(4 * PAGE + 1, 1), "not aligned"),
        ],
    )
    def test_a_broken_invariant_is_named(self, break_it: object, message: str) -> None:
        heap = heap_with_holes([1, 2])
        break_it(heap._free_list)  # type: ignore[operator]
        heap._free_list.commit()
        with pytest.raises(HeapCorruptionError, match=message):
            heap.check()
        assert not heap.check_consistency()

    @pytest.mark.parametrize(("second", "message"), [(0, "overlaps"), (PAGE, "touches")])
    def test_extents_must_be_apart(self, second: int, message: str) -> None:
        starts, sizes = np.array([0, PAGE + second]), np.array([2 * PAGE, PAGE])
        free_list = FreeList(starts, sizes)
        with pytest.raises(HeapCorruptionError, match=message):
            free_list.check(8 * PAGE, PAGE)


class TestInterrupted:
    """An exception inside a change, wherever it strikes, undoes the change."""

    OPERATIONS = (
        lambda heap: heap.allocate(PAGE),
        lambda heap: heap.allocate(3 * PAGE),
        lambda heap: heap.batched_allocate(PAGE, 7),
        lambda heap: heap.free(2 * PAGE, PAGE),
        lambda heap: heap.free(0, PAGE),
        lambda heap: heap.batched_free([(2 * PAGE, PAGE), (5 * PAGE, PAGE), (14 * PAGE, PAGE)]),
        lambda heap: heap.sbrk(4 * PAGE),
    )

    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_at_every_line(self, operation: object, error: type[BaseException]) -> None:
        line, done = 0, False
        while not done:
            line += 1
            heap = AddressManager(16 * PAGE)
            heap.batched_allocate(PAGE, 15)
            heap.batched_free([(1 * PAGE, PAGE), (3 * PAGE, 2 * PAGE), (7 * PAGE, 4 * PAGE)])
            before = state(heap)
            done = not self.interrupt(heap, operation, error, line)
            heap.check()
            if not done:
                # The very last line may come after the change was committed.
                assert state(heap) in (before, self.after(operation))
        assert line > 5

    def is_safe_from_signals(self, frame: FrameType) -> bool:
        """A line before which a trace function runs but never a signal handler.

        CPython looks for signals after calls and jumps, so neither between the end of a ``with``
        block and the release of its lock, nor at a ``try``, which no exception table covers.
        """
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        return line == "try:" or line.startswith("with self._lock")

    def after(self, operation: object) -> object:
        heap = AddressManager(16 * PAGE)
        heap.batched_allocate(PAGE, 15)
        heap.batched_free([(1 * PAGE, PAGE), (3 * PAGE, 2 * PAGE), (7 * PAGE, 4 * PAGE)])
        operation(heap)  # type: ignore[operator]
        return state(heap)

    def interrupt(
        self, heap: AddressManager, operation: object, error: type[BaseException], at_line: int
    ) -> bool:
        """Raise ``error`` before the ``at_line``-th line run in kvheap; False if it ended first."""
        lines = 0

        def trace(frame: FrameType, event: str, argument: object) -> object:
            nonlocal lines
            if "kvheap" not in frame.f_globals.get("__name__", ""):
                return None
            if event == "line" and not self.is_safe_from_signals(frame):
                lines += 1
                if lines == at_line:
                    raise error
            return trace

        sys.settrace(trace)
        try:
            operation(heap)  # type: ignore[operator]
        except error:
            return True
        finally:
            sys.settrace(None)
        return False


class HeapMachine(RuleBasedStateMachine):
    """Random operations on a small heap, each checked against one bool a page."""

    def __init__(self) -> None:
        super().__init__()
        self.heap = AddressManager(24 * PAGE)
        self.used = [False] * 24

    def holes(self) -> list[tuple[int, int]]:
        """(pages, first page) of each free extent."""
        found, start = [], None
        for page, used in enumerate([*self.used, True]):
            if not used and start is None:
                start = page
            elif used and start is not None:
                found.append((page - start, start))
                start = None
        return found

    def mark(self, first: int, pages: int, used: bool) -> None:
        assert all(self.used[page] is not used for page in range(first, first + pages))
        self.used[first : first + pages] = [used] * pages

    @rule(pages=st.integers(1, 8))
    def allocate(self, pages: int) -> None:
        fitting = [hole for hole in self.holes() if hole[0] >= pages]
        if not fitting:
            with pytest.raises(OutOfMemoryError):
                self.heap.allocate(pages * PAGE)
            return
        assert self.heap.allocate(pages * PAGE - 1) == (min(fitting)[1] * PAGE, pages * PAGE)
        self.mark(min(fitting)[1], pages, True)

    @rule(pages=st.integers(1, 3), count=st.integers(0, 12))
    def batched_allocate(self, pages: int, count: int) -> None:
        fitting = sorted((size // pages for size, _ in self.holes()), reverse=True)
        if sum(fitting) < count:
            with pytest.raises(OutOfMemoryError):
                self.heap.batched_allocate(pages * PAGE, count)
            return
        batch = self.heap.batched_allocate(pages * PAGE, count)
        fewest = next(n for n in range(len(fitting) + 1) if sum(fitting[:n]) >= count)
        assert batch.num_runs == fewest
        assert len(batch) == count
        assert batch.addresses.tolist() == sorted(batch.addresses.tolist())
        for address, size in batch:
            assert size == pages * PAGE
            self.mark(address // PAGE, pages, True)

    @precondition(lambda self: any(self.used))
    @rule(data=st.data())
    def free_part(self, data: st.DataObject) -> None:
        first = data.draw(st.sampled_from([p for p, used in enumerate(self.used) if used]))
        pages = 1
        while first + pages < len(self.used) and self.used[first + pages] and pages < 3:
            pages += 1
        self.heap.free(first * PAGE, pages * PAGE)
        self.mark(first, pages, False)

    @precondition(lambda self: any(self.used))
    @rule(data=st.data())
    def free_a_random_subset(self, data: st.DataObject) -> None:
        used = [page for page, is_used in enumerate(self.used) if is_used]
        chosen = data.draw(st.lists(st.sampled_from(used), unique=True))
        self.heap.batched_free([(page * PAGE, PAGE) for page in chosen])
        for page in chosen:
            self.mark(page, 1, False)

    @rule(first=st.integers(-2, 30), pages=st.integers(0, 4), skew=st.sampled_from([0, 0, 8]))
    def wrong_free(self, first: int, pages: int, skew: int) -> None:
        inside = first >= 0 and first + pages <= len(self.used)
        if skew or not pages or not inside or not all(self.used[first : first + pages]):
            for free in (
                lambda: self.heap.free(first * PAGE + skew, pages * PAGE),
                lambda: self.heap.batched_free([(first * PAGE + skew, pages * PAGE)]),
            ):
                with pytest.raises(InvalidFreeError):
                    free()

    @precondition(lambda self: len(self.used) < 40)
    @rule(pages=st.integers(0, 4))
    def sbrk(self, pages: int) -> None:
        self.heap.sbrk(pages * PAGE)
        self.used += [False] * pages

    @invariant()
    def agrees(self) -> None:
        self.heap.check()
        starts, sizes = self.heap.free_extents()
        pairs = zip(sizes.tolist(), starts.tolist(), strict=True)
        assert [(z // PAGE, a // PAGE) for z, a in pairs] == self.holes()
        assert self.heap.total_allocated_size == sum(self.used) * PAGE
        assert self.heap.get_heap_size() == len(self.used) * PAGE


HeapMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=100, deadline=None)


class TestStateMachine(HeapMachine.TestCase):  # type: ignore[name-defined,misc]
    pass


class TestStateMachineRebuilding(HeapMachine.TestCase):  # type: ignore[name-defined,misc]
    @pytest.fixture(autouse=True)
    def _always_rebuild(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvheap.address_manager._max_steps", lambda free_list: 0)


def test_eight_threads_lose_no_byte() -> None:
    heap = AddressManager(4096 * PAGE)
    owner: dict[int, int] = {}
    failures: list[BaseException] = []

    def release(blocks: list[tuple[int, int]], seed: int) -> None:
        for address, size in blocks:
            for page in range(address, address + size, PAGE):
                assert owner.pop(page) == seed
        heap.batched_free(blocks)

    def work(seed: int) -> None:
        source = random.Random(seed)
        mine: list[tuple[int, int]] = []
        for _ in range(400):
            if source.random() < 0.5:
                source.shuffle(mine)
                release(mine[:8], seed)
                del mine[:8]
                continue
            try:
                batch = heap.batched_allocate(source.randint(1, 4) * PAGE, source.randint(0, 20))
            except OutOfMemoryError:
                release(mine, seed)
                mine.clear()
                continue
            for address, size in batch:
                mine.append((address, size))
                for page in range(address, address + size, PAGE):
                    assert owner.setdefault(page, seed) == seed
        release(mine, seed)

    def guarded(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not owner
    heap.check()
    assert state(heap)[1:] == ([0], [4096 * PAGE])


def test_it_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from kvheap import AddressManager; AddressManager(1 << 20).allocate(1); "
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
