"""AddressManager against a naive model: one bool for each page, and many threads."""

from __future__ import annotations

import random
import sys
import sysconfig
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvheap import AddressManager, DoubleFreeError, InvalidFreeError, OutOfMemoryError
from kvheap.addresses.extent_keys import ExtentKeys

PAGE = 4096

sources = st.integers(0, 2**20).map(random.Random)
"""Choices among the pages. Hypothesis's own, drawn page by page, took most of the time."""


class HeapMachine(RuleBasedStateMachine):
    """Random operations on a small heap, each checked against one bool a page."""

    def __init__(self) -> None:
        super().__init__()
        self.heap = AddressManager(24 * PAGE)
        self.used = [False] * 24
        self.walls: set[int] = set()

    def holes(self) -> list[tuple[int, int]]:
        """(pages, first page) of each free extent."""
        found, start = [], None
        for page, used in enumerate([*self.used, True]):
            if start is not None and (used or page in self.walls):
                found.append((page - start, start))
                start = None
            if not used and start is None:
                start = page
        return found

    def used_pages(self) -> list[int]:
        return [page for page, used in enumerate(self.used) if used]

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

    @rule(pages=st.integers(1, 3), count=st.integers(0, 12), allow_partial=st.booleans())
    def batched_allocate(self, pages: int, count: int, allow_partial: bool) -> None:
        fitting = sorted((size // pages for size, _ in self.holes()), reverse=True)
        assert self.heap.max_batch(pages * PAGE) == sum(fitting)
        if sum(fitting) < count and not allow_partial:
            with pytest.raises(OutOfMemoryError):
                self.heap.batched_allocate(pages * PAGE, count)
            return
        batch = self.heap.batched_allocate(pages * PAGE, count, allow_partial)
        count = min(count, sum(fitting))
        fewest = next(n for n in range(len(fitting) + 1) if sum(fitting[:n]) >= count)
        assert batch.num_runs == fewest
        assert len(batch) == count
        assert batch.addresses.tolist() == sorted(batch.addresses.tolist())
        for address, size in batch:
            assert size == pages * PAGE
            self.mark(address // PAGE, pages, True)

    @precondition(lambda self: any(self.used))
    @rule(source=sources)
    def free_part(self, source: random.Random) -> None:
        first = source.choice(self.used_pages())
        pages = 1
        while (
            first + pages < len(self.used)
            and self.used[first + pages]
            and first + pages not in self.walls
            and pages < 3
        ):
            pages += 1
        self.heap.free(first * PAGE, pages * PAGE)
        self.mark(first, pages, False)

    @precondition(lambda self: any(self.used))
    @rule(source=sources)
    def free_a_random_subset(self, source: random.Random) -> None:
        used = self.used_pages()
        chosen = source.sample(used, source.randint(0, len(used)))
        self.heap.batched_free([(page * PAGE, PAGE) for page in chosen])
        for page in chosen:
            self.mark(page, 1, False)

    def free_runs(self, source: random.Random) -> list[tuple[int, int]]:
        """(first page, pages) of disjoint free runs, none across a wall, in any order."""
        runs = []
        for pages, first in self.holes():
            end = first + pages
            while first < end and source.random() < 0.8:
                first += source.randint(0, end - first - 1)
                length = source.randint(1, min(3, end - first))
                runs.append((first, length))
                first += length
        return source.sample(runs, source.randint(0, len(runs)))

    @rule(source=sources)
    def reserve(self, source: random.Random) -> None:
        runs = self.free_runs(source)
        self.heap.reserve(np.array(runs, np.int64).reshape(-1, 2) * PAGE)
        for first, pages in runs:
            self.mark(first, pages, True)

    @rule(
        first=st.integers(-2, 42),
        pages=st.integers(-1, 4),
        skew=st.sampled_from([0, 0, 0, 8]),
        source=sources,
    )
    def wrong_reserve(self, first: int, pages: int, skew: int, source: random.Random) -> None:
        others = self.free_runs(source)
        asked = [page for at, length in others for page in range(at, at + length)]
        inside = first >= 0 and first + pages <= len(self.used)
        wanted = range(first, first + pages)
        crosses = any(wall in self.walls for wall in wanted[1:])
        is_free = inside and not any(self.used[page] or page in asked for page in wanted)
        if pages > 0 and is_free and not crosses and not skew:
            return
        extents = [(at * PAGE, length * PAGE) for at, length in others]
        wrong = (first * PAGE + skew, pages * PAGE)
        extents.insert(source.randint(0, len(extents)), wrong)
        with pytest.raises(ValueError, match="cannot reserve") as error:
            self.heap.reserve(extents)
        named = [f"[{start}, {start + size})" for start, size in extents]
        if not any(page in asked for page in wanted):
            assert f"[{wrong[0]}, {sum(wrong)})" in str(error.value)
        assert any(name in str(error.value) for name in named)

    @rule(
        first=st.integers(-2, 42),
        pages=st.integers(-1, 4),
        skew=st.sampled_from([0, 0, 0, 8]),
        source=sources,
    )
    def wrong_free(self, first: int, pages: int, skew: int, source: random.Random) -> None:
        inside = first >= 0 and first + pages <= len(self.used)
        is_used = inside and all(self.used[first : first + pages])
        crosses = any(wall in self.walls for wall in range(first + 1, first + pages))
        if pages > 0 and is_used and not crosses and not skew:
            return
        extent = (first * PAGE + skew, pages * PAGE)
        with pytest.raises(InvalidFreeError):
            self.heap.free(*extent)
        right = [(page * PAGE, PAGE) for page in self.used_pages()]
        others = source.sample(right, source.randint(0, len(right)))
        with pytest.raises(InvalidFreeError):
            self.heap.batched_free(source.sample([extent, *others], len(others) + 1))

    @precondition(lambda self: any(self.used))
    @rule(source=sources)
    def free_a_page_twice_in_one_call(self, source: random.Random) -> None:
        used = self.used_pages()
        chosen = source.sample(used, source.randint(1, len(used)))
        twice = source.sample([*chosen, source.choice(chosen)], len(chosen) + 1)
        with pytest.raises(DoubleFreeError):
            self.heap.batched_free(np.array(twice) * PAGE, PAGE)

    @precondition(lambda self: len(self.used) < 40)
    @rule(pages=st.integers(0, 4), new_segment=st.sampled_from([False, False, True]))
    def sbrk(self, pages: int, new_segment: bool) -> None:
        self.heap.sbrk(pages * PAGE, new_segment)
        if pages:
            self.walls = {wall for wall in self.walls if wall < len(self.used)}
        if new_segment and pages and self.used:
            self.walls.add(len(self.used))
        self.used += [False] * pages

    @rule()
    def trim(self) -> None:
        kept = len(self.used)
        while kept and not self.used[kept - 1]:
            kept -= 1
            if kept in self.walls:
                break
        assert self.heap.trim() == (len(self.used) - kept) * PAGE
        del self.used[kept:]

    @invariant()
    def agrees(self) -> None:
        self.heap.check()
        starts, sizes = self.heap.snapshot().T
        pairs = zip(sizes.tolist(), starts.tolist(), strict=True)
        assert [(z // PAGE, a // PAGE) for z, a in pairs] == self.holes()
        assert self.heap.total_allocated_size == sum(self.used) * PAGE
        assert self.heap.get_heap_size() == len(self.used) * PAGE


# The long profile (tests/conftest.py) keeps its own numbers.
HeapMachine.TestCase.settings = (
    settings()
    if settings().max_examples > 250
    else settings(max_examples=250, stateful_step_count=100, deadline=None)
)


class TestStateMachine(HeapMachine.TestCase):  # type: ignore[name-defined,misc]
    pass


class TestStateMachineInShortLists(HeapMachine.TestCase):  # type: ignore[name-defined,misc]
    """Orders of several lists of up to eight keys, where a real heap has them of a thousand."""

    @pytest.fixture(autouse=True)
    def _short_lists(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ExtentKeys, "DEFAULT_LOAD_FACTOR", 4)


class TestStateMachineRebuilding(HeapMachine.TestCase):  # type: ignore[name-defined,misc]
    """Every batch of several runs in array operations."""

    @pytest.fixture(autouse=True)
    def _always_rebuild(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvheap.addresses.bulk.max_steps", lambda free_list: 0)


class TestStateMachineInWideKeys(HeapMachine.TestCase):  # type: ignore[name-defined,misc]
    """Keys as in heaps of 2**31 units and more, and half of the batches in array operations."""

    @pytest.fixture(autouse=True)
    def _wide_keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvheap.addresses.extent_index.NARROW_BITS", 2)
        monkeypatch.setattr("kvheap.addresses.bulk.max_steps", lambda free_list: 2)
        monkeypatch.setattr(ExtentKeys, "DEFAULT_LOAD_FACTOR", 4)


def test_this_build_has_the_interpreter_lock_or_is_built_to_do_without() -> None:
    """On a free-threaded build the test below means what it says: no import brought the GIL back.

    ``PYTHON_GIL=0`` keeps it away.
    """
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("not a free-threaded build")
    assert not sys._is_gil_enabled()


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
    assert heap.snapshot().tolist() == [[0, 4096 * PAGE]]
