"""What the soak adds to a heap's life: copies that fail, and streams that take their time."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from soak_checks import SoakError, holds
from soak_internals import block_copies_replaced

FAULT_RATE = 0.03
LONGEST_WORK_S = 0.03
DEVICE_TICK_S = 0.5e-3

Blocks = list[tuple[torch.Tensor, int]]
"""Bytes of blocks, each with the value that all of its bytes must have."""


class Faults:
    """Makes the block copies of those threads fail now and then that asked for it."""

    def __init__(self) -> None:
        self._local = threading.local()

    def strike_here(self, source: random.Random) -> None:
        """Let copies of this thread fail from now on."""
        self._local.source = source

    def wrapped(self, copy: Callable[..., Any]) -> Callable[..., None]:
        """``copy``, but it may fail, either at once or after it has copied everything."""

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
        """Let the allocators copy with faults."""
        with block_copies_replaced(self.wrapped):
            yield


class FakeEvent:
    """Passes when the work before it has ended. That work reads its blocks until its end."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.has_passed = False

    def query(self) -> bool:
        """Whether it has passed."""
        return self.has_passed


class Device:
    """A thread that does the work of all streams, each piece at a random time of its own."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._queue: queue.PriorityQueue[tuple[float, int, FakeEvent]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, blocks: Blocks, ends_at: float) -> FakeEvent:
        """Work on ``blocks`` until ``ends_at``; returns the event that follows the work."""
        event = FakeEvent(blocks)
        self._queue.put((ends_at, next(self._number), event))
        return event

    def finish(self) -> None:
        """End all work now. Work that is submitted later ends at once."""
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
        self._event: FakeEvent | None = None
        self._lock = threading.Lock()

    def record_event(self) -> FakeEvent:
        """The event after the stream's work so far, which several threads may ask for.

        Raises:
            SoakError: as long as ``failures`` is above zero, which it lowers.
        """
        if self.failures:
            self.failures -= 1
            raise SoakError
        with self._lock:
            if self.blocks and self._event is not None:
                return self._event  # the work on blocks was submitted before any free
            work_s = self.random.choice((0.0, self.random.uniform(0, LONGEST_WORK_S)))
            self.ends_at = max(self.ends_at, time.monotonic() + work_s)  # in order, as streams are
            self._event = self.device.submit(self.blocks, self.ends_at)
            return self._event
