"""A storm of signals: a timer raises at random moments into a heap at work.

Run it for as long as you like::

    python tests/soak/soak_signals.py --minutes 60

The main thread allocates, fills, frees, counts, pins, leases, records streams and drops; a signal
handler raises into it every few hundred microseconds, and half of the time only calls the heap
itself. Other threads work on the same heap, and finalizers free blocks while the collector runs at
every few allocations. At each checkpoint everything stops, and the heap must account for every
byte: what is allocated is what lives in batches that somebody holds, and nothing is in two of them.
At some of them a child is forked, which goes on with what it inherited; in the end, three threads
close the heap at once.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from small_heaps import PAGE, FakeStream

from kvheap import (
    BlockInUseError,
    ClosedError,
    DoubleFreeError,
    LifetimeError,
    MemoryBatch,
    MemoryObj,
    TensorMemoryAllocator,
)

__all__ = ["Storm"]

PAGES = 256

FORKED_CHECKPOINTS = 2
"""A child is forked at one checkpoint in so many."""


class TimeOutError(Exception):
    """What the signal handler raises, as a request's time-out does."""


class Request:
    """Holds a block in a cycle, and frees it when the collector finds it."""

    def __init__(self, obj: MemoryObj, by_del: bool) -> None:
        self.itself = self
        self.obj: MemoryObj | None = obj if by_del else None
        if not by_del:
            weakref.finalize(self, obj.ref_count_down)

    def __del__(self) -> None:
        obj = getattr(self, "obj", None)  # __init__ may have been interrupted
        if obj is not None:
            obj.ref_count_down()


def is_in_finalizer(frame: FrameType | None) -> bool:
    """Whether a finalizer is running: interrupted, it would leave its block to nobody.

    Or a callback of the collector, such as Hypothesis's, whose errors are kept with their frames;
    or logging, which an exception may leave with a lock held for ever.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("__del__", "gc_callback"):
            return True
        if code.co_filename in (weakref.__file__, logging.__file__):
            return True
        frame = frame.f_back
    return False


def collect_all() -> None:
    """A whole collection; ``gc.collect`` does nothing while another thread is collecting."""
    enough = gc.get_stats()[2]["collections"] + 2
    while gc.get_stats()[2]["collections"] < enough:
        gc.collect()
        time.sleep(1e-4)


class Storm:
    """One heap, its users, and the signals.

    Args:
        seed: of the random choices.
        threads: how many other threads work on the heap.
        options: of the heap.
    """

    def __init__(self, seed: int, threads: int = 1, **options: object) -> None:
        self.random = random.Random(seed)
        buffer = torch.zeros(PAGES * PAGE, dtype=torch.uint8)
        self.heap = TensorMemoryAllocator(
            buffer,
            on_full=None,
            stream_wait_s=0.0,
            **options,  # type: ignore[arg-type]
        )
        self.held: list[MemoryBatch] = []
        self.streams: list[FakeStream] = []
        self.interrupts = self.calls = self.operations = self.checkpoints = self.forks = 0
        self._is_armed = False
        self._is_over = False
        self._gates = [threading.Lock() for _ in range(threads)]
        self._workers = [
            threading.Thread(target=self._work, args=(random.Random(seed + i), gate), daemon=True)
            for i, gate in enumerate(self._gates)
        ]

    # -- operations of the main thread ---------------------------------------------------------

    def allocate(self) -> None:
        batch = self.heap.batched_allocate([PAGE], torch.uint8, self.random.randint(0, 9))
        if batch is not None:
            self.held.append(batch)

    def allocate_some(self) -> None:
        batch = self.heap.batched_allocate([PAGE], torch.uint8, 40, allow_partial=True)
        if batch is not None:
            self.held.append(batch)

    def fill(self) -> None:
        source = torch.ones(3, PAGE, dtype=torch.uint8)
        batch = self.heap.batched_allocate([PAGE], torch.uint8, 3, source=source)
        if batch is not None:
            self.held.append(batch)

    def free(self) -> None:
        if self.held:
            self.heap.batched_free(self.random.choice(self.held))

    def free_into_out(self) -> None:
        if self.held:
            batch = self.random.choice(self.held)
            out = torch.zeros(len(batch), PAGE, dtype=torch.uint8)
            self.heap.batched_free(batch, out=out)

    def free_some(self) -> None:
        objs = [obj for batch in self.held[-4:] for obj in batch if self.random.random() < 0.5]
        self.heap.batched_free(objs)

    def count(self) -> None:
        obj = self.choose()
        if obj is not None:
            self.random.choice([obj.ref_count_up, obj.ref_count_down])()

    def pin(self) -> None:
        obj = self.choose()
        if obj is not None:
            self.random.choice([obj.pin, obj.unpin])()

    def lease(self) -> None:
        obj = self.choose()
        if obj is not None:
            lease = obj.pin(ttl=self.random.uniform(1e-4, 1e-2))
            if self.random.random() < 0.5:
                lease.release()

    def record(self) -> None:
        obj = self.choose()
        if obj is not None:
            stream = FakeStream()
            stream.submit()
            self.streams.append(stream)
            obj.record_stream(stream)

    def finish(self) -> None:
        for stream in self.streams:
            stream.finish()
        self.streams.clear()

    def drop(self) -> None:
        if len(self.held) > 5:
            del self.held[self.random.randrange(len(self.held))]

    def request(self) -> None:
        obj = self.heap.allocate([PAGE], torch.uint8)
        if obj is not None:
            Request(obj, self.random.random() < 0.5)

    def ask(self) -> None:
        stats = self.heap.stats()
        assert stats.free_bytes + stats.allocated_bytes == stats.heap_bytes
        self.heap.leaks()

    def choose(self) -> MemoryObj | None:
        batch = self.random.choice(self.held) if self.held else ()
        return self.random.choice(batch) if len(batch) else None

    @property
    def choices(self) -> list[Callable[[], None]]:
        often = [self.allocate, self.free, self.free_some, self.count, self.drop, self.request]
        rarely = [self.allocate_some, self.fill, self.free_into_out, self.pin, self.lease]
        return [*often, *often, *rarely, self.record, self.finish, self.ask]

    # -- signals and threads -------------------------------------------------------------------

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise, or call the heap."""
        if not self._is_armed or is_in_finalizer(frame):
            return
        if number == signal.SIGALRM:
            self._is_armed = False
            self.interrupts += 1
            raise TimeOutError
        self.calls += 1
        obj = self.heap.allocate([PAGE], torch.uint8)
        self.heap.stats()
        if obj is not None:
            obj.ref_count_down()

    def _work(self, chosen: random.Random, gate: threading.Lock) -> None:
        while not self._is_over:
            with gate:
                self._work_once(chosen)
            time.sleep(1e-5)

    def _work_once(self, chosen: random.Random) -> None:
        batch = self.heap.batched_allocate([PAGE], torch.uint8, chosen.randint(1, 5))
        if batch is None:
            return
        obj = batch[0]
        obj.ref_count_up()
        obj.ref_count_down()
        if chosen.random() < 0.5:
            self.heap.batched_free(batch)
        elif chosen.random() < 0.5:
            Request(obj, by_del=False)

    def blow(self, seconds: float, mean_s: float = 3e-4) -> None:
        """Go on for some seconds, with a checkpoint every half second, at least two."""
        before = {
            number: signal.signal(number, self.handle)
            for number in (signal.SIGALRM, signal.SIGVTALRM)
        }
        thresholds = gc.get_threshold()
        gc.collect()
        gc.freeze()  # so that each collection is quick
        gc.set_threshold(50, 5, 5)
        for worker in self._workers:
            worker.start()
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end or self.checkpoints < 2:
                self._go_on(time.monotonic() + 0.5, mean_s)
                with ExitStack() as stopped:
                    for gate in self._gates:
                        stopped.enter_context(gate)
                    self.account()
                    if self.checkpoints % FORKED_CHECKPOINTS == 0:
                        self.fork()
        finally:
            self._is_over = True
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            gc.set_threshold(*thresholds)
            gc.unfreeze()
            for number, handler in before.items():
                signal.signal(number, handler)
        for worker in self._workers:
            worker.join(60)
            assert not worker.is_alive(), "a thread hangs"
        self.close()

    def _go_on(self, until: float, mean_s: float) -> None:
        choices = self.choices
        signal.setitimer(signal.ITIMER_VIRTUAL, 2e-3, 2e-3)
        while time.monotonic() < until:
            try:
                self._is_armed = True
                signal.setitimer(signal.ITIMER_REAL, self.random.expovariate(1 / mean_s) + 1e-6)
                for _ in range(20):
                    self.operations += 1
                    # Blocks may be chosen twice, or be pinned.
                    with suppress(LifetimeError, DoubleFreeError, BlockInUseError):
                        self.random.choice(choices)()
                self._is_armed = False
            except TimeOutError:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def fork(self) -> None:
        """A child finds everything as it was, and can go on; the parent notices nothing."""
        self.heap.lifetime.reclaimer.settle(limit=None)  # a single operation reclaims only a few
        before = self.heap.stats().allocated_bytes
        child = os.fork()
        if not child:
            status = 1
            try:
                signal.alarm(30)  # by default, it kills
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                stats = self.heap.stats()
                assert stats.allocated_bytes == before, (before, stats)
                batch = self.heap.batched_allocate([PAGE], torch.uint8, 1)
                if batch is not None:
                    batch[0].ref_count_down()
                for held in self.held:
                    for obj in held:
                        while obj.is_valid() and obj.ref_count:
                            obj.ref_count_down()
                        if obj.is_valid():
                            break
                self.heap.check()
                self.heap.close(5)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the child ended with {status}"
        self.forks += 1
        assert self.heap.stats().allocated_bytes == before

    def close(self) -> None:
        """Two threads and a finalizer close at once; afterwards everything is refused."""
        closers = [threading.Thread(target=self.heap.close, args=(10,)) for _ in range(2)]
        for closer in closers:
            closer.start()
        self.heap.close(10)
        for closer in closers:
            closer.join(60)
            assert not closer.is_alive(), "closing hangs"
        with suppress(ClosedError):
            self.heap.allocate([PAGE], torch.uint8)
            raise AssertionError("a closed heap allocates")
        while self.held:  # what is left can be dropped and freed
            batch = self.held.pop()
            if len(batch) and batch[0].is_valid() and batch[0].ref_count:
                batch[0].ref_count_down()

    def account(self) -> None:
        """Every byte is free, or lives in one batch that is held."""
        self.checkpoints += 1
        self.finish()
        collect_all()
        time.sleep(0.011)  # the longest lease
        heap = self.heap
        for _ in range(2):
            heap.lifetime.reclaimer.settle(limit=None)
        heap.address_manager.check()
        assert heap.memcheck()
        pages = [
            address
            for batch in self.held
            for address, is_live in zip(batch.addresses.tolist(), batch.live, strict=True)
            if is_live
        ]
        assert len(set(pages)) == len(pages), "a page has two owners"
        stats = heap.stats()
        assert stats.pending_bytes == 0, stats
        assert stats.allocated_bytes == len(pages) * PAGE, (stats, len(pages))
        assert sum(group.num_blocks for group in heap.leaks()) == len(pages)
        del self.held[:-8]


def main() -> None:
    """Blow for a while, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("kvheap").addHandler(logging.StreamHandler())
    end = time.monotonic() + 60 * arguments.minutes
    seed = arguments.seed
    while (left := end - time.monotonic()) > 1:
        options: dict[str, object] = [{}, {"scrub": True}, {"debug": True}][seed % 3]  # type: ignore[list-item]
        storm = Storm(seed, **options)
        storm.blow(min(left, 60.0))
        print(
            f"seed {seed}: {storm.operations:,} operations, {storm.interrupts:,} interrupts, "
            f"{storm.calls:,} calls from handlers, {storm.checkpoints:,} checkpoints, "
            f"{storm.forks:,} forks",
            flush=True,
        )
        seed += 1


if __name__ == "__main__":
    main()
