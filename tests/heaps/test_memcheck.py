"""Checks of a heap that grew, and of one that is broken."""

from __future__ import annotations

import threading

import pytest
from small_heaps import PAGE, heap_of, in_threads, no_debug, take

from kvheap import HeapCorruptionError

__all__ = ["no_debug"]


class TestMemcheckAndGrowth:
    def test_statistics_are_snapshots_while_the_heap_grows(self) -> None:
        heap = heap_of(4)
        manager = heap.address_manager
        manager.allocate(4 * PAGE)
        stop = threading.Event()

        def grow() -> None:
            for _ in range(400):
                manager.sbrk(PAGE)
                manager.trim()
            stop.set()

        def look() -> None:
            while not stop.is_set():
                assert manager.check_consistency()
                stats = manager.stats()
                assert stats.free_bytes + stats.allocated_bytes == stats.heap_bytes
                assert manager.snapshot()[:, 1].sum() in (0, PAGE)

        assert in_threads([grow, look, look]) == [None] * 3


class TestOwners:
    """What the ledger of a heap says must fit its address space."""

    def test_bytes_that_were_freed_by_address_under_a_live_block(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 3)
        heap.check()
        heap.address_manager.free(PAGE, PAGE)
        assert not heap.memcheck()
        with pytest.raises(HeapCorruptionError, match=r"\[4096, 8192\) is in the free extent"):
            heap.check()
        assert batch.live.all()

    def test_bytes_with_two_owners(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 3)
        heap.address_manager.free(2 * PAGE, PAGE)
        other = take(heap, 1)
        with pytest.raises(HeapCorruptionError, match=r"own the same bytes: .* \[8192, 12288\)"):
            heap.check()
        assert other.addresses[0] == batch.addresses[2]

    def test_what_is_kept_on_purpose_is_in_order(self) -> None:
        heap = heap_of(8)
        blocks = take(heap, 3).detach()
        heap.address_manager.allocate(PAGE)
        batch = take(heap, 2)
        heap.free(batch[0])
        heap.check()
        heap.address_manager.batched_free(blocks)
        assert heap.memcheck()
