"""A stand-in for a GPU and its streams, over host memory: work is done when it is told to.

Nothing that is queued is done before :meth:`FakeDevice.run_one`, ``drain``, or a wait on an event
asks for it, so a test decides what is in flight. Every call of the device can be made to fail.
What a real one would refuse, or do wrong without a word, is kept in ``violations``.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kvheap.kernels.copy_engine import Location
from kvheap.kernels.pieces import Pieces


class DriverError(RuntimeError):
    """What the stand-in raises where it was told to fail."""


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.captured = stream.capturing
        self.passed = False

    def query(self) -> bool:
        self.stream.device.call("event.query")
        return self.passed

    def synchronize(self) -> None:
        self.stream.device.call("event.synchronize")
        self.stream.device.run_until(self)


class FakeStream:
    """A queue of work, in order."""

    def __init__(self, device: FakeDevice, name: str, *, legacy: bool = False) -> None:
        self.device = device
        self.name = name
        self.legacy = legacy
        self.capturing = False
        self.destroyed = False
        self.queue: deque[tuple[str, Callable[[], None] | FakeEvent]] = deque()
        self.graph: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Do what was captured."""
        for work in self.graph:
            work()

    def record_event(self) -> FakeEvent:
        return self.device.record_event(self)

    def __repr__(self) -> str:
        return f"FakeStream({self.name})"


class FakePrepared:
    def __init__(self, device: FakeDevice, pieces: Pieces) -> None:
        self.device = device
        self.pieces = pieces

    def run(self, max_sms: int | None = None) -> None:
        device, stream = self.device, self.device.current
        done = device.call("run", ("run", self.pieces, stream, max_sms))
        device.enqueue(stream, self.pieces, done)

    def warm_up(self) -> None:
        self.device.call("warm_up")


class FakeDevice:
    """A :class:`~kvheap.copy_device.CopyDevice` over CPU memory.

    Attributes:
        calls: what was asked of it, in order, with arguments.
        violations: what a real device would not have done as it was asked to.
        peers: devices whose memory it reaches.
    """

    def __init__(self, name: str = "Fake GPU", *, has_batch: bool = True, index: int = 0) -> None:
        self.name = name
        self.index = index
        self.peers: list[FakeDevice] = []
        self.violations: list[str] = []
        self.driver_version = "13.0"
        self.has_kernel = True
        self.has_batch = has_batch
        self.default = FakeStream(self, "default", legacy=True)
        self.side = FakeStream(self, "side")
        self.streams = [self.default, self.side]
        self.own: list[tuple[int, int]] = []
        self.pinned: list[tuple[int, int]] = []
        self.calls: list[tuple[object, ...]] = []
        self.counts: Counter[str] = Counter()
        self.faults: dict[tuple[str, int], tuple[BaseException, int]] = {}
        self.is_lost = False
        self.staging: list[torch.Tensor] = []
        self._using = threading.local()
        self._lock = threading.RLock()

    # -- whose memory --------------------------------------------------------------------------

    def tensor(self, num_bytes: int) -> torch.Tensor:
        """Bytes of the device."""
        found = torch.zeros(num_bytes, dtype=torch.uint8)
        self.own.append((found.data_ptr(), found.data_ptr() + num_bytes))
        self._make_room(found)
        return found

    def pinned_tensor(self, num_bytes: int, cuts: tuple[int, ...] = ()) -> torch.Tensor:
        """Host memory that is pinned, in several registrations where there are ``cuts``."""
        found = torch.zeros(num_bytes, dtype=torch.uint8)
        bounds = [0, *cuts, num_bytes]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            self.pinned.append((found.data_ptr() + start, found.data_ptr() + end))
        self._make_room(found)
        return found

    def _make_room(self, tensor: torch.Tensor) -> None:
        """Forget what memory was before it was given back, and now is ``tensor``'s."""
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for device in (self, *self.peers):
            for kept in (device.own, device.pinned):
                kept[:] = [
                    (a, b)
                    for a, b in kept
                    if b <= first
                    or end <= a
                    or (first <= a and b <= end and device is self and kept is not None)
                ]

    def device_of(self, tensor: torch.Tensor) -> FakeDevice | None:
        """Stands in for ``kvheap.copy_device.device_of``."""
        address = tensor.data_ptr()
        return self if any(start <= address < end for start, end in self.own) else None

    def locate(self, address: int) -> Location | None:
        self.call("locate")
        for kind, ranges in (("device", self.own), ("pinned", self.pinned)):
            for start, end in ranges:
                if start <= address < end:
                    return Location(kind, 0, start, end)  # type: ignore[arg-type]
        return None

    def is_own(self, location: Location) -> bool:
        return location.kind == "device"

    # -- faults --------------------------------------------------------------------------------

    def fail(self, call: str, number: int = 1, after: int = 0, error: str = "fault") -> None:
        """Let the ``number``-th next call of this kind fail, once ``after`` pieces are queued."""
        self.faults[call, self.counts[call] + number] = (DriverError(error), after)

    def lose(self) -> None:
        """Let every call fail from now on, as a device does that is gone."""
        self.is_lost = True

    def call(self, name: str, record: tuple[object, ...] | None = None) -> int | None:
        """Count a call; raise if it shall fail. How many pieces are done of one that fails late."""
        with self._lock:
            self.counts[name] += 1
            if record is not None:
                self.calls.append(record)
            if self.is_lost:
                raise DriverError("the device is lost")
            error, after = self.faults.pop((name, self.counts[name]), (None, 0))
            if error is not None and record is not None and after:
                pieces, stream = record[1], record[2]
                self.enqueue(stream, pieces[:after], None)
            if error is not None:
                raise error
        return None

    # -- streams and events --------------------------------------------------------------------

    def stream(self, name: str = "") -> FakeStream:
        made = FakeStream(self, name or f"stream {len(self.streams)}")
        self.streams.append(made)
        return made

    @property
    def current(self) -> FakeStream:
        stack = getattr(self._using, "stack", None)
        return stack[-1] if stack else self.default

    def require_stream(self, stream: FakeStream | None) -> FakeStream:
        if stream is None:
            return self.current
        if not isinstance(stream, FakeStream):
            raise TypeError(f"stream must be a stream, got {stream!r}")
        if stream.device is not self:
            raise ValueError("the stream is on another device")
        return stream

    def is_legacy(self, stream: FakeStream) -> bool:
        return stream.legacy

    def is_capturing(self, stream: FakeStream) -> bool:
        return stream.capturing

    @contextmanager
    def using(self, stream: FakeStream) -> Iterator[None]:
        if not hasattr(self._using, "stack"):
            self._using.stack = []
        self._using.stack.append(stream)
        try:
            yield
        finally:
            self._using.stack.pop()

    def record_event(self, stream: FakeStream) -> FakeEvent:
        self.call("record_event")
        event = FakeEvent(stream)

        def passes() -> None:
            event.passed = True

        with self._lock:
            stream.queue.append(("work", passes))
        return event

    def wait_event(self, stream: FakeStream, event: FakeEvent) -> None:
        self.call("wait_event")
        with self._lock:
            stream.queue.append(("wait", event))

    def side_stream(self) -> FakeStream:
        return self.side

    def empty(self, num_bytes: int) -> torch.Tensor:
        self.call("empty")
        found = self.tensor(num_bytes)
        self.staging.append(found)
        return found

    # -- copies --------------------------------------------------------------------------------

    def prepare(self, pieces: Pieces) -> FakePrepared:
        self.call("prepare")
        return FakePrepared(self, pieces)

    def copy_batch(self, pieces: Pieces, stream: FakeStream, direction: str) -> None:
        assert not stream.legacy, "cuMemcpyBatchAsync takes no legacy default stream"
        assert not stream.capturing, "a captured batch is silently missing"
        done = self.call("copy_batch", ("copy_batch", pieces, stream, direction))
        self.enqueue(stream, pieces, done)

    def copy_each(self, pieces: Pieces, stream: FakeStream) -> None:
        done = self.call("copy_each", ("copy_each", pieces, stream))
        self.enqueue(stream, pieces, done)

    def enqueue(self, stream: FakeStream, pieces: Pieces, _: int | None) -> None:
        """Queue the copy: bytes are read and written when it runs."""
        self.require_within(pieces)
        sources, targets = pieces.sources.tolist(), pieces.targets.tolist()
        sizes = pieces.size_array().tolist()

        def move() -> None:
            # As a GPU does: in no order, and all sources as they are now.
            for source, target, size in zip(sources, targets, sizes, strict=True):
                ctypes.memmove(target, source, size)

        with self._lock:
            stream.queue.append(("work", move))

    def require_within(self, pieces: Pieces) -> None:
        """A GPU faults where memory is not its own nor pinned; so does this, before it writes."""
        ranges = np.array(sorted(self.own + self.pinned), np.int64)
        for starts in (pieces.sources, pieces.targets):
            number = np.searchsorted(ranges[:, 0], starts, side="right") - 1
            assert (number >= 0).all(), "an address below all memory"
            assert (starts < ranges[number, 1]).all(), "an address outside of all memory"

    # -- time ----------------------------------------------------------------------------------

    def run_one(self, stream: FakeStream) -> bool:
        """Do the next work of a stream, and what it waits for; whether there was any."""
        with self._lock:
            if not stream.queue:
                return False
            kind, work = stream.queue.popleft()
            if kind == "wait":
                assert isinstance(work, FakeEvent)
                self.run_until(work)
            else:
                assert not isinstance(work, FakeEvent)
                work()
            return True

    def run_until(self, event: FakeEvent) -> None:
        with self._lock:
            while not event.passed:
                assert self.run_one(event.stream), "waiting for an event that never comes"

    def drain(self) -> None:
        """Do all work that is queued."""
        for stream in self.streams:
            while self.run_one(stream):
                pass

    def run_some(self, rng: random.Random, steps: int) -> None:
        """Do some work of streams in a random order."""
        for _ in range(steps):
            self.run_one(rng.choice(self.streams))
