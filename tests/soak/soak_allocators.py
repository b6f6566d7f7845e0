"""Soak: many threads do everything to one heap at once, right and wrong, for minutes.

Every block is filled with a byte of its owner's and looked at before it is given up. Every
allocation and every way of giving a block up is counted, so that in the end the heap must not
only be empty: it must have reclaimed exactly what was dropped, and let expire exactly the leases
that nobody released.

Who may touch a block:

========  ========================================================================================
holding   one thread's own batch: the thread knows every count, and what each call must answer
contest   a batch on the common board. Of a *ticket* contest, a ticket is the right to drop the one
          reference that a block was born with, while visitors take and return counts of their own.
          Of a *race*, every thread frees at random, and each block must be freed once
========  ========================================================================================

Phases: a plain heap, one with ``scrub`` and one with ``debug``. Run it for longer than the tests
do after any change to who holds what::

    python tests/soak/soak_allocators.py --minutes 10 --threads 8

Exit status 1 and the seed, when anything is not as it must be. The seed fixes what each thread
tries, not how the threads interleave.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import os
import pickle
import queue
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvheap import (
    BlockInUseError,
    DoubleFreeError,
    ForeignObjectError,
    InvalidFreeError,
    Lease,
    LifetimeError,
    MemoryBatch,
    MemoryFormat,
    MemoryObj,
    TensorMemoryAllocator,
    WriteAfterFreeError,
)
from kvheap.blocks.block_layout import BlockLayout
from kvheap.kernels.block_copy import gather_blocks, scatter_blocks

PAGE = 4096
HEAP_PAGES = 640
MAX_BLOCKS = 48
MAX_HOLDINGS = 24
MAX_CONTESTS = 6
FAULT_RATE = 0.03
LONGEST_WORK_S = 0.03
LONGEST_LEASE_S = 0.01
STREAM_WAIT_S = 0.02
DEVICE_TICK_S = 0.5e-3
STOP_WAIT_S = 60.0
SWITCH_INTERVAL_S = 20e-6

LAYOUTS = (
    BlockLayout.of([96], torch.uint8, MemoryFormat.BINARY),
    BlockLayout.of([2, 1, 16, 32], torch.float16, MemoryFormat.KV_2LTD),
    BlockLayout.of([4097], torch.uint8, MemoryFormat.BINARY),
    BlockLayout.of([3, 2048], torch.int32, MemoryFormat.HS_TD),
    BlockLayout.of([(8, 64), (33,)], [torch.bfloat16, torch.int8], MemoryFormat.UNDEFINED),
)

PHASES: tuple[tuple[str, float, dict[str, bool]], ...] = (
    ("plain", 0.6, {"debug": False}),
    ("scrub", 0.2, {"debug": False, "scrub": True}),
    ("debug", 0.2, {"debug": True}),
)
"""Name, share of the time, and options of the heap."""

Blocks = list[tuple[torch.Tensor, int]]
"""Bytes of blocks, each with the byte that all of them must be."""


class SoakError(Exception):
    """What the soak makes fail on purpose raises this."""


class ViolationError(AssertionError):
    """The heap did what it must never do."""


def require(condition: bool, what: object) -> None:
    if not condition:
        raise ViolationError(str(what))


@contextlib.contextmanager
def must_raise(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds:
        return
    raise ViolationError(f"{' or '.join(kind.__name__ for kind in kinds)} was not raised")


def holds(block: torch.Tensor, value: int) -> bool:
    return bool((block == value).all())


# -- what fails, and what takes its time ---------------------------------------------------------


class Faults:
    """Makes the block copies of threads that asked for it fail now and then."""

    def __init__(self) -> None:
        self._local = threading.local()

    def strike_here(self, source: random.Random) -> None:
        """From now on in this thread."""
        self._local.source = source

    def wrapped(self, copy: Callable[..., None]) -> Callable[..., None]:
        """``copy``, which may also fail before, or when all is copied."""

        def faulty(*arguments: Any) -> None:
            source: random.Random | None = getattr(self._local, "source", None)
            if source is None or source.random() >= FAULT_RATE:
                copy(*arguments)
                return
            if source.random() < 0.5:
                copy(*arguments)
            raise SoakError

        return faulty

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with (
            mock.patch("kvheap.heaps.segments.scatter_blocks", self.wrapped(scatter_blocks)),
            mock.patch("kvheap.heaps.segments.gather_blocks", self.wrapped(gather_blocks)),
        ):
            yield


class FakeEvent:
    """Passes when the work before it has ended, which reads its blocks to the very end."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed


class Device:
    """A thread that does the work of all streams, each at its own random time."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._queue: queue.PriorityQueue[tuple[float, int, FakeEvent]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, blocks: Blocks, ends_at: float) -> FakeEvent:
        """Work on ``blocks`` until then; returns the event after it."""
        event = FakeEvent(blocks)
        self._queue.put((ends_at, next(self._number), event))
        return event

    def finish(self) -> None:
        """End all work now, and all that is submitted later at once."""
        self._is_ending.set()
        self._queue.join()

    def _run(self) -> None:
        while True:
            ends_at, number, event = self._queue.get()
            if time.monotonic() < ends_at and not self._is_ending.wait(DEVICE_TICK_S):
                self._queue.put((ends_at, number, event))
            else:
                if not all(holds(block, value) for block, value in event.blocks):
                    self._report("a block was reused while a stream still worked on it")
                event.has_passed = True
            self._queue.task_done()


class FakeStream:
    """A stream whose work ends at a random later time.

    ``blocks`` must all be released by the free that records an event here.
    """

    def __init__(self, device: Device, seed: int, blocks: Blocks, failures: int = 0) -> None:
        self.device = device
        self.random = random.Random(seed)
        self.blocks = blocks
        self.failures = failures
        """How many calls of ``record_event`` fail."""
        self.ends_at = 0.0

    def record_event(self) -> FakeEvent:
        if self.failures:
            self.failures -= 1
            raise SoakError
        work_s = self.random.choice((0.0, self.random.uniform(0, LONGEST_WORK_S)))
        self.ends_at = max(self.ends_at, time.monotonic() + work_s)  # in order, as streams are
        return self.device.submit(self.blocks, self.ends_at)


# -- who may touch a block -----------------------------------------------------------------------


@dataclass(eq=False)
class Holding:
    """A batch of one thread's own. Each live block has one reference and no pin count."""

    batch: MemoryBatch
    values: torch.Tensor
    live: list[int]
    only_whole: bool = False
    """A stream works on all blocks: they are given up together."""

    def value(self, row: int) -> int:
        return int(self.values[row])

    def check(self, rows: Sequence[int]) -> None:
        for row in rows:
            block = self.batch[row].raw_tensor
            require(block is not None, f"{self.batch!r} lost block {row}")
            assert block is not None
            require(holds(block, self.value(row)), f"{self.batch[row]!r} has other contents")

    def check_counts(self) -> None:
        counts = np.zeros(len(self.batch), np.int32)
        counts[self.live] = 1
        require(np.array_equal(self.batch.ref_counts, counts), f"wrong counts: {self.batch!r}")
        require(not self.batch.pin_counts.any(), f"pinned: {self.batch!r}")


@dataclass(eq=False)
class Contest:
    """A batch that all threads work on; see the module's docstring."""

    holding: Holding
    is_race: bool
    tickets: deque[int]
    freed: deque[int] = field(default_factory=deque)


class Cycle:
    """Garbage that only the cyclic collector finds."""

    def __init__(self, kept: object) -> None:
        self.kept = kept
        self.itself = self


class Phase:
    """One heap, and the threads at it."""

    def __init__(self, name: str, options: dict[str, bool], threads: int, seed: int) -> None:
        self.name = name
        self.options = options
        buffer = torch.zeros(HEAP_PAGES * PAGE, dtype=torch.uint8)
        self.heap = TensorMemoryAllocator(
            buffer, PAGE, stream_wait_s=STREAM_WAIT_S, on_full=None, **options
        )
        other = TensorMemoryAllocator(torch.zeros(PAGE, dtype=torch.uint8), debug=False)
        foreign = other.allocate([1], torch.uint8)
        assert foreign is not None
        self.foreign = foreign
        self.faults = Faults()
        self.device = Device(self.report)
        self.streams = [FakeStream(self.device, seed + number, []) for number in range(4)]
        self.board: list[Contest] = []
        self.board_lock = threading.Lock()
        self.violations: deque[str] = deque()
        self.stopping = threading.Event()
        self.workers = [Worker(self, f"{seed} {name} {number}") for number in range(threads)]

    def report(self, violation: str) -> None:
        self.violations.append(violation)
        self.stopping.set()

    # -- run -----------------------------------------------------------------------------------

    def run(self, seconds: float, advance: Callable[[float], None]) -> Counter[str]:
        """Let the threads work for so long, then end; returns what was counted."""
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in self.workers]
        with self.faults.installed():
            for thread in threads:
                thread.start()
            begin = now = time.monotonic()
            while now < begin + seconds and not self.stopping.is_set():
                time.sleep(min(0.1, begin + seconds - now))
                before, now = now, time.monotonic()
                advance(now - before)
            self.stopping.set()
            self._join(threads)
        counts = Counter[str]()
        if not self.violations:
            try:
                counts = self._end()
            except Exception:
                self.report(traceback.format_exc())
        return counts

    def _join(self, threads: list[threading.Thread]) -> None:
        deadline = time.monotonic() + STOP_WAIT_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            faulthandler.dump_traceback()
            self.report(f"a thread does not stop within {STOP_WAIT_S:g} s: its stack is above")

    def _end(self) -> Counter[str]:
        """Give everything up, and find the heap empty and its counters right."""
        counts = Counter[str]()
        for contest in self.board:
            require(len(set(contest.freed)) == len(contest.freed), "a block was freed twice")
        for worker in self.workers:
            worker.give_all_up()
            counts += worker.counts
        self.board.clear()
        contest = worker = None  # type: ignore[assignment]  # they hold batches
        gc.collect()
        time.sleep(LONGEST_LEASE_S)
        self.device.finish()
        self._do_one_thing()
        self.device.finish()  # what that dropped, as leases expired
        self._do_one_thing()
        self._check_empty(counts)
        self._check_options()
        return counts

    def _do_one_thing(self) -> None:
        last = self.heap.allocate([1], torch.uint8)
        require(last is not None, "the empty heap is full")
        assert last is not None
        self.heap.free(last)

    def _check_empty(self, counts: Counter[str]) -> None:
        heap, stats = self.heap, self.heap.stats()
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
        if self.options.get("scrub"):
            require(holds(self.heap.buffer, 0), "freed bytes were not scrubbed")
        whole = self.heap.batched_allocate([PAGE], torch.uint8, HEAP_PAGES)
        require(whole is not None, "the empty heap does not hold a batch of its size")
        assert whole is not None
        late = whole[HEAP_PAGES // 2].tensor
        assert late is not None
        self.heap.batched_free(whole)
        if self.options["debug"]:
            late[7] = 1
            with must_raise(WriteAfterFreeError):
                self.heap.batched_allocate([PAGE], torch.uint8, HEAP_PAGES)
            require(self.heap.stats().allocated_bytes == 0, "the refused batch is allocated")


class Worker:
    """One thread: random operations, each of which knows what must come of it."""

    def __init__(self, phase: Phase, seed: str) -> None:
        self.phase = phase
        self.heap = phase.heap
        self.random = random.Random(seed)
        self.counts = Counter[str]()
        self.holdings: list[Holding] = []

    def run(self) -> None:
        self.phase.faults.strike_here(self.random)
        operations, weights = list(OPERATIONS), list(OPERATIONS.values())
        while not self.phase.stopping.is_set():
            operation = self.random.choices(operations, weights)[0]
            try:
                operation(self)
            except Exception:
                self.phase.report(f"in {operation.__name__}:\n{traceback.format_exc()}")
                return
            self.counts["operations"] += 1
            self.counts[f"  {operation.__name__.replace('_', ' ')}"] += 1

    def give_all_up(self) -> None:
        """At the end, in the main thread: free half of what is held, drop the rest."""
        for holding in self.holdings[::2]:
            holding.check(holding.live)
            self.heap.batched_free([holding.batch[row] for row in holding.live])
            self.counts["blocks freed"] += len(holding.live)
        self.holdings.clear()

    # -- allocate ------------------------------------------------------------------------------

    def allocate_one(self) -> None:
        layout = self.random.choice(LAYOUTS)
        obj = self.heap.allocate(layout.shapes, layout.dtypes, layout.fmt)
        if obj is None:
            self.make_room()
        else:
            self.keep(self.adopt(obj._batch, self.fresh_values(1), is_filled=False))

    def allocate_batch(self) -> None:
        holding = self.new_batch(self.random.choice((1, 3, MAX_BLOCKS)))
        if holding is not None:
            self.keep(holding)

    def new_batch(self, max_blocks: int) -> Holding | None:
        """A batch, with or without source and partial; None when the heap is full or a fault
        struck."""
        layout = self.random.choice(LAYOUTS)
        num_blocks = self.random.randint(0, max_blocks)
        values = self.fresh_values(num_blocks)
        source = self.source_of(layout, values) if self.random.random() < 0.5 else None
        partial = self.random.random() < 0.3
        try:
            batch = self.heap.batched_allocate(
                layout.shapes, layout.dtypes, num_blocks, layout.fmt, source, partial
            )
        except SoakError:
            require(source is not None, "nothing was to be copied")
            self.counts["failed: scatter"] += 1
            return None
        if batch is None:
            require(not partial, "a partial batch was refused")
            self.make_room()
            return None
        require(partial or len(batch) == num_blocks, f"{num_blocks} blocks wanted, got {batch!r}")
        self.counts["partial batches"] += len(batch) < num_blocks
        return self.adopt(batch, values[: len(batch)], is_filled=source is not None)

    def adopt(self, batch: MemoryBatch, values: torch.Tensor, is_filled: bool) -> Holding:
        """Count the blocks, and fill them where that is not done."""
        self.counts["blocks born"] += len(batch)
        holding = Holding(batch, values, list(range(len(batch))))
        if is_filled:
            return holding
        for row, obj in enumerate(batch):
            block = obj.raw_tensor
            assert block is not None
            if self.phase.options.get("scrub"):
                require(holds(block, 0), f"{obj!r} was handed out unscrubbed")
            block.fill_(holding.value(row))
        return holding

    def keep(self, holding: Holding) -> None:
        self.holdings.append(holding)
        while len(self.holdings) > MAX_HOLDINGS:
            self.give_up(self.take_holding())

    def make_room(self) -> None:
        self.counts["failed: full"] += 1
        for _ in range(min(4, len(self.holdings))):
            self.give_up(self.take_holding())

    def fresh_values(self, num_blocks: int) -> torch.Tensor:
        """One byte for each block: neither zero nor poison."""
        first = self.random.randrange(200)
        return ((torch.arange(num_blocks) * 7 + first) % 200 + 1).to(torch.uint8)

    def source_of(self, layout: BlockLayout, values: torch.Tensor) -> torch.Tensor:
        size = layout.size_bytes
        content = values[:, None].repeat(1, size)
        if len(layout.shapes) > 1:
            return content
        return content.view(layout.dtypes[0]).view(len(values), *layout.shapes[0])

    # -- give up -------------------------------------------------------------------------------

    def take_holding(self) -> Holding:
        return self.holdings.pop(self.random.randrange(len(self.holdings)))

    def some_holding(self) -> Holding | None:
        """One that has live blocks."""
        found = [holding for holding in self.holdings if holding.live]
        return self.random.choice(found) if found else None

    def some_row(self) -> tuple[Holding, int] | None:
        found = [holding for holding in self.holdings if holding.live and not holding.only_whole]
        if not found:
            return None
        holding = self.random.choice(found)
        return holding, self.random.choice(holding.live)

    def gone(self, holding: Holding, rows: Sequence[int]) -> None:
        """Note that these were freed."""
        gone = set(rows)
        holding.live = [row for row in holding.live if row not in gone]
        self.counts["blocks freed"] += len(gone)
        for row in gone:
            require(holding.batch[row].tensor is None, "a freed block has a tensor")
        holding.check_counts()

    def give_up(self, holding: Holding) -> None:
        """Free all that is left of a holding, in one of many ways."""
        holding.check(holding.live)
        if not holding.live:
            return
        is_whole = len(holding.live) == len(holding.batch)
        ways = [self.free_rows, self.free_rows_with_out, self.drop]
        if is_whole:
            ways += [self.free_whole, self.free_whole_with_out, self.detach]
        if not holding.only_whole:
            ways += [self.lower_every_count]
        self.random.choice(ways)(holding)

    def free_holding(self) -> None:
        if self.holdings:
            self.give_up(self.take_holding())

    def free_whole(self, holding: Holding) -> None:
        self.heap.batched_free(holding.batch)
        self.gone(holding, holding.live)

    def free_whole_with_out(self, holding: Holding) -> None:
        self.free_into_out(holding, holding.batch, holding.live)

    def free_rows(self, holding: Holding) -> None:
        rows = self.random.sample(holding.live, len(holding.live))
        self.heap.batched_free(holding.batch[row] for row in rows)
        self.gone(holding, rows)

    def free_rows_with_out(self, holding: Holding) -> None:
        rows = self.random.sample(holding.live, len(holding.live))
        self.free_into_out(holding, [holding.batch[row] for row in rows], rows)

    def free_into_out(
        self, holding: Holding, objs: MemoryBatch | list[MemoryObj], rows: Sequence[int]
    ) -> None:
        out = torch.zeros_like(self.source_of(holding.batch.layout, holding.values[list(rows)]))
        try:
            self.heap.batched_free(objs, out=out)
        except SoakError:
            self.counts["failed: gather"] += 1
            holding.check_counts()
            holding.check(holding.live)
            self.holdings.append(holding)
            return
        want = self.source_of(holding.batch.layout, holding.values[list(rows)])
        got = out.reshape(len(rows), -1).view(torch.uint8)
        require(torch.equal(got, want.reshape(len(rows), -1).view(torch.uint8)), "wrong bytes")
        self.gone(holding, rows)

    def lower_every_count(self, holding: Holding) -> None:
        for row in list(holding.live):
            holding.batch[row].ref_count_down()
            self.gone(holding, [row])

    def detach(self, holding: Holding) -> None:
        """Free by address. Streams do not count there, nor does anybody wipe."""
        if holding.batch.counts.streams_of(None) or self.phase.options.get("scrub"):
            self.free_whole(holding)
            return
        self.heap.address_manager.batched_free(holding.batch.detach())
        self.gone(holding, holding.live)

    def drop(self, holding: Holding) -> None:
        """Forget a holding without freeing it: at once, by a handle, or as cyclic garbage."""
        way = self.random.randrange(3)
        if way == 1:
            handle = holding.batch[self.random.choice(holding.live)]
            del holding.batch
            require(handle.is_valid(), "a handle does not keep its batch")
        elif way == 2:
            Cycle(holding)
        self.counts["drops"] += 1

    def free_some_rows(self) -> None:
        found = self.some_row()
        if found is None:
            return
        holding, _ = found
        rows = self.random.sample(holding.live, self.random.randint(1, len(holding.live)))
        holding.check(rows)
        self.heap.batched_free([holding.batch[row] for row in rows])
        self.gone(holding, rows)

    def free_one(self) -> None:
        found = self.some_row()
        if found is None:
            return
        holding, row = found
        holding.check([row])
        self.heap.free(holding.batch[row])
        self.gone(holding, [row])

    def free_mixed(self) -> None:
        """Blocks of several batches and layouts in one call."""
        chosen: dict[int, tuple[Holding, set[int]]] = {}
        for _ in range(self.random.randint(2, 12)):
            found = self.some_row()
            if found is not None:
                chosen.setdefault(id(found[0]), (found[0], set()))[1].add(found[1])
        objs = [holding.batch[row] for holding, rows in chosen.values() for row in rows]
        self.random.shuffle(objs)
        self.heap.batched_free(objs)
        for holding, rows in chosen.values():
            self.gone(holding, list(rows))

    # -- counts and leases ---------------------------------------------------------------------

    def count_up_and_down(self) -> None:
        found = self.some_row()
        if found is None:
            return
        holding, row = found
        obj, times = holding.batch[row], self.random.randint(1, 3)
        for _ in range(times):
            obj.ref_count_up()
            obj.pin()
        require((obj.ref_count, obj.pin_count) == (1 + times, times), f"wrong counts: {obj!r}")
        with must_raise(BlockInUseError):
            self.heap.free(obj)
        for _ in range(times):
            obj.unpin()
            obj.ref_count_down()
        with must_raise(LifetimeError):
            obj.unpin()
        holding.check([row])
        holding.check_counts()

    def hold_by_pin_alone(self) -> None:
        """The last count to go is a pin's."""
        found = self.some_row()
        if found is None:
            return
        holding, row = found
        obj = holding.batch[row]
        obj.pin()
        obj.ref_count_down()
        with must_raise(LifetimeError):
            obj.ref_count_down()
        holding.check([row])
        obj.unpin()
        self.gone(holding, [row])

    def lease(self) -> None:
        """A lease that is released, or that outlives the holding."""
        found = self.some_row()
        if found is None:
            return
        holding, row = found
        lease = self.grant(holding.batch[row])
        if self.random.random() < 0.5:
            time.sleep(self.random.uniform(0, LONGEST_LEASE_S))
            self.end(lease)
            holding.check([row])
            return
        holding.check(holding.live)
        self.holdings.remove(holding)
        if self.random.random() < 0.5:  # else dropped, by whoever lets the lease expire
            for other in holding.live:
                holding.batch[other].ref_count_down()
            self.counts["blocks freed"] += len(holding.live)

    def grant(self, obj: MemoryObj) -> Lease:
        lease = obj.pin(ttl=self.random.uniform(1e-5, LONGEST_LEASE_S))
        self.counts["leases granted"] += 1
        return lease

    def end(self, lease: Lease) -> bool:
        ended = lease.release()
        self.counts["leases released"] += ended
        require(not lease.release(), "a lease ended twice")
        return ended

    # -- streams -------------------------------------------------------------------------------

    def record_stream(self) -> None:
        """A stream works on one block, or on all of a batch, until after it is freed."""
        holding = self.some_holding()
        if holding is None:
            return
        batch, rows = holding.batch, holding.live
        if self.random.random() < 0.3:
            batch[self.random.choice(rows)].record_stream(self.random.choice(self.phase.streams))
        elif self.random.random() < 0.5 and len(rows) == len(batch):
            holding.only_whole = True
            batch.record_stream(
                self.stream_on(holding, self.random.sample(rows, min(4, len(rows))))
            )
        else:
            row = self.random.choice(rows)
            batch[row].record_stream(self.stream_on(holding, [row]))

    def stream_on(self, holding: Holding, rows: Sequence[int], failures: int = 0) -> FakeStream:
        blocks: Blocks = []
        for row in rows:
            block = holding.batch[row].raw_tensor
            assert block is not None
            blocks.append((block, holding.value(row)))
        return FakeStream(self.phase.device, self.random.getrandbits(32), blocks, failures)

    def free_with_a_broken_stream(self) -> None:
        """A stream that cannot record: the free fails, the block lives, the next free works."""
        found = self.some_row()
        if found is None:
            return
        holding, row = found
        obj = holding.batch[row]
        obj.record_stream(self.stream_on(holding, [row], failures=1))
        free = self.random.choice((obj.ref_count_down, lambda: self.heap.free(obj)))
        with must_raise(SoakError):
            free()
        self.counts["failed: record_event"] += 1
        holding.check_counts()
        holding.check([row])
        free()
        self.gone(holding, [row])

    # -- wrong ---------------------------------------------------------------------------------

    def free_wrongly(self) -> None:
        found = self.some_row()
        if found is None:
            return
        holding, row = found
        heap, obj = self.heap, holding.batch[row]
        view = heap.view(holding.batch.metadata)
        wrong_out = torch.empty(2, 3)
        wrongs: list[tuple[type[Exception], Callable[[], object]]] = [
            (DoubleFreeError, lambda: heap.batched_free([obj, obj])),
            (ForeignObjectError, lambda: heap.batched_free([obj, self.phase.foreign])),
            (ForeignObjectError, lambda: heap.batched_free(view)),
            (ForeignObjectError, lambda: heap.free(view[row])),
            (TypeError, lambda: heap.batched_free([obj, 3])),  # type: ignore[list-item]
            (ValueError, lambda: heap.batched_free([obj], out=wrong_out)),
            (InvalidFreeError, lambda: heap.address_manager.free(obj.address + 1, PAGE)),
            (InvalidFreeError, lambda: heap.address_manager.free(HEAP_PAGES * PAGE, PAGE)),
            (LifetimeError, obj.unpin),
            (ValueError, lambda: obj.pin(ttl=0)),
        ]
        kind, wrong = self.random.choice(wrongs)
        with must_raise(kind):
            wrong()
        self.counts[f"refused: {kind.__name__}"] += 1
        holding.check([row])
        holding.check_counts()

    def free_twice(self) -> None:
        found = self.some_row()
        if found is None or len(found[0].live) < 2:
            return
        holding, row = found
        obj = holding.batch[row]
        self.heap.free(obj)
        self.gone(holding, [row])
        other = holding.batch[self.random.choice(holding.live)]
        again: list[tuple[type[Exception], Callable[[], object]]] = [
            (DoubleFreeError, lambda: self.heap.free(obj)),
            (DoubleFreeError, lambda: self.heap.batched_free([other, obj])),
            (DoubleFreeError, lambda: self.heap.batched_free(holding.batch)),
            (DoubleFreeError, holding.batch.detach),
            (LifetimeError, obj.ref_count_down),
            (LifetimeError, obj.ref_count_up),
            (LifetimeError, obj.pin),
            (LifetimeError, lambda: obj.pin(ttl=1)),
            (LifetimeError, lambda: obj.record_stream(self.phase.streams[0])),
        ]
        kind, wrong = self.random.choice(again)
        with must_raise(kind):
            wrong()
        self.counts[f"refused: {kind.__name__}"] += 1
        holding.check_counts()

    # -- look ----------------------------------------------------------------------------------

    def look(self) -> None:
        heap = self.heap
        stats = heap.stats()
        total = stats.allocated_bytes + stats.free_bytes
        require(total == stats.heap_bytes == HEAP_PAGES * PAGE, stats)
        starts, sizes = heap.snapshot().T
        require(bool((sizes > 0).all()), "an empty extent is free")
        require(bool((starts[1:] > (starts + sizes)[:-1]).all()), "free extents touch")
        require(heap.memcheck(), "memcheck")
        require("bytes are free" in str(heap.full_report()), "the report says nothing")
        require(heap.max_batch([PAGE], torch.uint8) <= HEAP_PAGES, "max_batch")
        repr(heap)

    def list_leaks(self) -> None:
        """What is live includes what this thread holds."""
        own_bytes = sum(len(h.live) * h.batch.allocated_bytes for h in self.holdings)
        groups = self.heap.leaks()
        require(sum(group.num_bytes for group in groups) >= own_bytes, "live blocks are missing")
        require(all(group.num_pinned <= group.num_blocks for group in groups), "more pins")
        require(all(bool(group.site) == self.phase.options["debug"] for group in groups), "sites")

    def view(self) -> None:
        """The same bytes through metadata that have travelled."""
        holding = self.some_holding()
        if holding is None:
            return
        view = self.heap.view(pickle.loads(pickle.dumps(holding.batch.metadata)))
        row = self.random.choice(holding.live)
        block = view[row].raw_tensor
        require(block is not None and holds(block, holding.value(row)), "a view differs")
        if self.random.random() < 0.3:
            view[row].ref_count_down()
        require(holding.batch[row].is_valid(), "a view freed its original")

    def collect_garbage(self) -> None:
        gc.collect(self.random.randrange(3))

    # -- contests ------------------------------------------------------------------------------

    def begin_contest(self) -> None:
        if len(self.phase.board) >= MAX_CONTESTS:
            return
        holding = self.new_batch(MAX_BLOCKS)
        if holding is None or not holding.live:
            return
        if self.random.random() < 0.3:
            holding.batch.record_stream(self.random.choice(self.phase.streams))
        is_race = self.random.random() < 0.5
        tickets = self.random.sample(holding.live, len(holding.live))
        with self.phase.board_lock:
            self.phase.board.append(Contest(holding, is_race, deque(tickets)))

    def end_contest(self) -> None:
        """Take one off the board. What nobody has freed is dropped by the last to leave."""
        with self.phase.board_lock:
            if not self.phase.board:
                return
            contest = self.phase.board.pop(self.random.randrange(len(self.phase.board)))
        freed = list(contest.freed)
        require(len(set(freed)) == len(freed), "a block was freed twice")

    def take_part(self) -> None:
        with self.phase.board_lock:
            if not self.phase.board:
                return
            newest = self.random.random() < 0.7  # together at one
            contest = self.phase.board[-1] if newest else self.random.choice(self.phase.board)
        for _ in range(self.random.randint(1, 6)):
            if contest.is_race:
                self.race(contest)
            elif self.random.random() < 0.25:
                self.use_ticket(contest)
            else:
                self.visit(contest)

    def race(self, contest: Contest) -> None:
        """Free a few blocks, if nobody was faster; what comes out must be what was put in."""
        holding = contest.holding
        count = self.random.randint(1, min(3, len(holding.batch)))
        left = sorted(set(range(len(holding.batch))) - set(contest.freed.copy()))
        if len(left) < count:
            return
        rows = self.random.sample(left[: count + 2], count)
        objs = [holding.batch[row] for row in rows]
        want = self.source_of(holding.batch.layout, holding.values[rows])
        out = torch.zeros_like(want) if self.random.random() < 0.5 else None
        try:
            self.heap.batched_free(objs, out=out)
        except DoubleFreeError:
            self.counts["races lost"] += 1
            return
        except SoakError:
            self.counts["failed: gather"] += 1
            return
        contest.freed.extend(rows)
        self.counts["blocks freed"] += len(rows)
        self.counts["races won"] += 1
        if out is not None:
            same = torch.equal(out.view(torch.uint8), want.view(torch.uint8))
            require(same, "a race was won, but the contents were another's")

    def use_ticket(self, contest: Contest) -> None:
        """Drop the reference that a block was born with: this never fails."""
        try:
            row = contest.tickets.pop()
        except IndexError:
            return
        obj = contest.holding.batch[row]
        self.counts["blocks freed"] += 1
        if self.random.random() < 0.5:
            try:
                self.heap.free(obj)
            except BlockInUseError:
                self.counts["refused: BlockInUseError"] += 1
            else:
                return
        obj.ref_count_down()

    def visit(self, contest: Contest) -> None:
        """Hold a block by a count or lease; while it is held, its contents stay."""
        row = self.random.randrange(min(3, len(contest.holding.batch)))
        obj, value = contest.holding.batch[row], contest.holding.value(row)
        way = self.random.randrange(3)
        try:
            lease = self.grant(obj) if way == 0 else None
            if way == 1:
                obj.pin()
            elif way == 2:
                obj.ref_count_up()
        except LifetimeError:
            self.counts["visits to freed blocks"] += 1
            return
        block = obj.raw_tensor
        same = block is not None and holds(block, value)
        if lease is not None:
            was_held = self.end(lease)
            require(same or not was_held, f"{obj!r} changed under a lease")
            return
        require(same, f"{obj!r} changed while it was held")
        for _ in range(8):  # so fast that threads meet inside
            obj.ref_count_up()
            obj.pin()
            obj.ref_count_down()
            obj.unpin()
        if way == 1:
            obj.unpin()
        else:
            obj.ref_count_down()


OPERATIONS: dict[Callable[[Worker], None], int] = {
    Worker.allocate_one: 8,
    Worker.allocate_batch: 14,
    Worker.free_holding: 8,
    Worker.free_some_rows: 5,
    Worker.free_one: 5,
    Worker.free_mixed: 4,
    Worker.count_up_and_down: 3,
    Worker.hold_by_pin_alone: 2,
    Worker.lease: 3,
    Worker.record_stream: 6,
    Worker.free_with_a_broken_stream: 2,
    Worker.free_wrongly: 5,
    Worker.free_twice: 3,
    Worker.look: 2,
    Worker.list_leaks: 2,
    Worker.view: 2,
    Worker.collect_garbage: 1,
    Worker.begin_contest: 3,
    Worker.end_contest: 1,
    Worker.take_part: 16,
}
"""What a thread does, and how often."""


# -- the command ---------------------------------------------------------------------------------


@contextlib.contextmanager
def restless_interpreter() -> Iterator[None]:
    """Switch threads often; collect garbage often, and only what the soak has made."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(60, 4, 4)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.unfreeze()


@contextlib.contextmanager
def unraisable_errors_reported(report: Callable[[str], None]) -> Iterator[None]:
    """What a finalizer raises is a violation too."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda error: report(f"{error.object!r} raised {error.exc_value!r}")
    try:
        yield
    finally:
        sys.unraisablehook = before


def soak(minutes: float, threads: int, seed: int, console: Console) -> bool:
    """Run all phases and print their counters; whether all was as it must be."""
    torch.set_num_threads(1)
    seconds = minutes * 60
    table = Table(title=f"{threads} threads, seed {seed}")
    table.add_column("count")
    counted: dict[str, Counter[str]] = {}
    with Progress(console=console, transient=True) as progress, restless_interpreter():
        task = progress.add_task("soaking", total=seconds)
        for name, share, options in PHASES:
            progress.update(task, description=name)
            phase = Phase(name, options, threads, seed)
            with unraisable_errors_reported(phase.report):
                counted[name] = phase.run(
                    share * seconds, lambda passed: progress.advance(task, passed)
                )
            if phase.violations:
                progress.stop()
                for violation in phase.violations:
                    console.print(violation, markup=False, highlight=False)
                console.print(f"VIOLATION in phase {name}, seed {seed}")
                return False
    for name in counted:
        table.add_column(name, justify="right")
    for key in sorted({key for counts in counted.values() for key in counts}):
        table.add_row(key, *(f"{counts[key]:,}" for counts in counted.values()))
    console.print(table)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=10.0, help="of all phases (10)")
    parser.add_argument("--threads", type=int, default=8, help="at one heap (8)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, help="random")
    arguments = parser.parse_args()
    faulthandler.enable()
    console = Console()
    console.print(f"seed {arguments.seed}")
    sys.stdout.flush()
    if soak(arguments.minutes, arguments.threads, arguments.seed, console):
        console.print(f"no violation in {arguments.minutes:g} minutes")
        return 0
    return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at once: a thread that hangs must not hold the exit up
