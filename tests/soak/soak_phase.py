"""One phase of the soak: threads at one heap for a while, and what must hold in the end."""

from __future__ import annotations

import faulthandler
import gc
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable

import torch
from soak_checks import holds, must_raise, require
from soak_lifetimes import LONGEST_LEASE_S
from soak_operations import OPERATIONS
from soak_worker import Worker
from soak_world import HEAP_PAGES, PAGE, World

from kvheap import WriteAfterFreeError

STOP_WAIT_S = 60.0

USES = 100
"""Calls that take back everything: the threads leave a few dozen frees that waited for streams."""


class Phase:
    """One heap, and the threads at it."""

    def __init__(self, name: str, options: dict[str, bool], threads: int, seed: int) -> None:
        self.world = World(options, seed)
        self.workers = [
            Worker(self.world, f"{seed} {name} {number}", OPERATIONS) for number in range(threads)
        ]

    def run(self, seconds: float, advance: Callable[[float], None]) -> Counter[str]:
        """Let the threads work for so long, then end; returns what was counted."""
        world = self.world
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in self.workers]
        with world.faults.installed():
            for thread in threads:
                thread.start()
            begin = now = time.monotonic()
            while now < begin + seconds and not world.stopping.is_set():
                time.sleep(min(0.1, begin + seconds - now))
                before, now = now, time.monotonic()
                advance(now - before)
            world.stopping.set()
            self._join(threads)
        counts = Counter[str]()
        if not world.violations:
            try:
                counts = self._end()
            except Exception:
                world.report(traceback.format_exc())
        return counts

    def _join(self, threads: list[threading.Thread]) -> None:
        deadline = time.monotonic() + STOP_WAIT_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            faulthandler.dump_traceback()
            self.world.report(
                f"a thread does not stop within {STOP_WAIT_S:g} s; its stack is above"
            )

    def _end(self) -> Counter[str]:
        """Give everything up; require an empty heap with the right counters."""
        counts = Counter[str]()
        for contest in self.world.board:
            require(len(set(contest.freed)) == len(contest.freed), "a block was freed twice")
        for worker in self.workers:
            worker.give_all_up()
            counts += worker.counts
        self.world.board.clear()
        contest = worker = None  # type: ignore[assignment]  # they hold batches
        gc.collect()
        time.sleep(LONGEST_LEASE_S)
        self.world.device.finish()
        self._use()  # drops what expired leases held
        self.world.device.finish()
        self._use()
        self._check_empty(counts)
        self._check_options()
        return counts

    def _use(self) -> None:
        """Use the heap, so that it takes back what was dropped or has expired.

        One call looks at a few of the frees that waited for a stream, the next call at others.
        """
        heap = self.world.heap
        for _ in range(USES):
            last = heap.allocate([1], torch.uint8)
            require(last is not None, "the empty heap is full")
            assert last is not None
            heap.free(last)

    def _check_empty(self, counts: Counter[str]) -> None:
        heap, stats = self.world.heap, self.world.heap.stats()
        heap.address_manager.check()
        require(stats.allocated_bytes == 0, f"bytes were lost: {stats}")
        require(stats.pending_bytes == 0, f"bytes still wait: {stats}")
        require(heap.leaks() == (), f"leaks: {heap.leaks()}")
        require(stats.free_extents == 1, f"not coalesced: {stats}")
        counts["blocks dropped"] = counts["blocks born"] - counts["blocks freed"]
        counts["leases expired"] = counts["leases granted"] - counts["leases released"]
        require(stats.dropped_blocks == counts["blocks dropped"], f"{stats} but {counts}")
        require(stats.expired_leases == counts["leases expired"], f"{stats} but {counts}")

    def _check_options(self) -> None:
        heap, options = self.world.heap, self.world.options
        if options.get("scrub"):
            require(holds(heap.buffer, 0), "freed bytes were not scrubbed")
        whole = heap.batched_allocate([PAGE], torch.uint8, HEAP_PAGES)
        require(whole is not None, "the empty heap does not hold a batch of its size")
        assert whole is not None
        late = whole[HEAP_PAGES // 2].tensor
        assert late is not None
        heap.batched_free(whole)
        if options["debug"]:
            late[7] = 1
            with must_raise(WriteAfterFreeError):
                heap.batched_allocate([PAGE], torch.uint8, HEAP_PAGES)
            require(heap.stats().allocated_bytes == 0, "the refused batch is allocated")
