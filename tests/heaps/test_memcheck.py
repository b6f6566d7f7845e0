"""Checks of a heap that grew, and of one that is broken."""

from __future__ import annotations

import threading

from small_heaps import (
    PAGE,
    heap_of,
    in_threads,
    no_debug,
)

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
