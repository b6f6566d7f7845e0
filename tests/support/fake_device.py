"""A stand-in for a GPU and its streams, over host memory: work is done when it is told to.

Nothing that is queued is done before :meth:`FakeDevice.run_one`, ``drain``, or a wait on an event
asks for it, so a test decides what is in flight. Every call of the device can be made to fail.
What a real device would not have done as it was asked is kept in ``violations``.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvheap import MemoryBatch, MemoryObj, TensorMemoryAllocator
from kvheap.kernels.copy_engine import Location
from kvheap.kernels.pieces import Pieces

POISON = 0xA5


class DriverError(RuntimeError):
    """What the stand-in raises where it was told to fail."""


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.captured = stream.capturing
        self.passed = False

    def query(self) -> bool:
        self.stream.device.require(not self.captured, "a query of a captured event")
        self.stream.device.call("event.query")
        return self.passed

    def synchronize(self) -> None:
        self.stream.device.require(not self.captured, "a wait for a captured event")
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

    def record_event(self) -> FakeEvent:
        return self.device.record_event(self)

    def replay(self) -> None:
        """Do what was captured on it."""
        for work in self.graph:
            work()

    def __repr__(self) -> str:
        return f"FakeStream({self.name})"


class FakePrepared:
    def __init__(self, device: FakeDevice, pieces: Pieces) -> None:
        self.device = device
        self.pieces = pieces

    def warm_up(self) -> None:
        device = self.device
        device.call("warm_up")
        device.require(not device.current.capturing, "a kernel is loaded in a capture")

    def run(self, max_sms: int | None = None) -> None:
        device, stream = self.device, self.device.current
        device.call("run", ("run", self.pieces, stream, max_sms))
        device.enqueue(stream, self.pieces)


class Move:
    """Pieces that are copied when the stream comes to it."""

    def __init__(self, device: FakeDevice, pieces: Pieces) -> None:
        self.device = device
        self.pieces = pieces

    def __call__(self) -> None:
        pieces = self.pieces
        sources, targets = pieces.sources.tolist(), pieces.targets.tolist()
        self.device.require_held(sources + targets)
        for source, target, size in zip(
            sources, targets, pieces.size_array().tolist(), strict=True
        ):
            ctypes.memmove(target, source, size)


class FakeDevice:
    """A :class:`~kvheap.device.copy_device.CopyDevice` over CPU memory.

    Attributes:
        calls: what was asked of it, in order, with arguments.
        violations: what a real device would have refused, or done wrong without a word.
        peers: devices whose memory it reaches.
        on_call: told the name of each call.
    """

    def __init__(self, name: str = "Fake GPU", *, has_batch: bool = True, index: int = 0) -> None:
        self.name = name
        self.index = index
        self.driver_version = "13.0"
        self.has_kernel = True
        self.has_batch = has_batch
        self.default = FakeStream(self, "default", legacy=True)
        self.side = FakeStream(self, "side")
        self.streams = [self.default, self.side]
        self.own: list[tuple[int, int]] = []
        self.pinned: list[tuple[int, int]] = []
        self.peers: list[FakeDevice] = []
        self.on_call: Callable[[str], None] | None = None
        self.calls: list[tuple[object, ...]] = []
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.faults: dict[tuple[str, int], tuple[BaseException, int]] = {}
        self.is_lost = False
        self.lost_at: int | None = None
        self.staging: list[tuple[int, int, weakref.ref[object]]] = []
        self._memory: list[object] = []
        self._using = threading.local()
        self._lock = threading.RLock()

    # -- whose memory --------------------------------------------------------------------------

    def tensor(self, num_bytes: int) -> torch.Tensor:
        """Bytes of the device."""
        found = torch.from_numpy(np.full(num_bytes, POISON, np.uint8))
        self._memory.append(found)  # so that no other memory ever has its addresses
        self.own.append((found.data_ptr(), found.data_ptr() + num_bytes))
        return found

    def pinned_tensor(self, num_bytes: int, cuts: tuple[int, ...] = ()) -> torch.Tensor:
        """Host memory that is pinned, in several registrations where there are ``cuts``."""
        found = torch.from_numpy(np.full(num_bytes, POISON, np.uint8))
        self._memory.append(found)
        self.pin(found, cuts)
        return found

    def pin(self, tensor: torch.Tensor, cuts: tuple[int, ...] = ()) -> None:
        """Register memory of the host."""
        bounds = [0, *cuts, tensor.nbytes]
        for start, end in itertools.pairwise(bounds):
            self.pinned.append((tensor.data_ptr() + start, tensor.data_ptr() + end))

    def device_of(self, tensor: torch.Tensor) -> FakeDevice | None:
        """Stands in for ``kvheap.device.cuda.device_of``."""
        address = tensor.data_ptr() or tensor.untyped_storage().data_ptr()
        for device in (self, *self.peers):
            if any(start <= address < end for start, end in device.own):
                return device
        return None

    def locate(self, address: int) -> Location | None:
        self.call("locate")
        for device in (self, *self.peers):
            for start, end in device.own:
                if start <= address < end:
                    return Location("device", device.index, start, end)
        for start, end in self.pinned:
            if start <= address < end:
                return Location("pinned", 0, start, end)
        return None

    def is_own(self, location: Location) -> bool:
        return location.kind == "device" and location.device == self.index

    # -- faults --------------------------------------------------------------------------------

    def fail(
        self,
        call: str,
        number: int = 1,
        after: int = 0,
        error: str | BaseException = "fault",
    ) -> None:
        """Let the ``number``-th next call of this kind fail, once ``after`` pieces are queued."""
        raised = error if isinstance(error, BaseException) else DriverError(error)
        self.faults[call, self.counts[call] + number] = (raised, after)

    def lose(self) -> None:
        """Let every call fail from now on, as a device does that is gone."""
        self.is_lost = True

    def call(self, name: str, record: tuple[object, ...] | None = None) -> None:
        """Count a call; raise if it shall fail."""
        if self.on_call is not None:
            self.on_call(name)
        with self._lock:
            self.counts[name] += 1
            if sum(self.counts.values()) == self.lost_at:
                self.lose()
            if record is not None:
                self.calls.append(record)
            if self.is_lost:
                raise DriverError("the device is lost")
            error, after = self.faults.pop((name, self.counts[name]), (None, 0))
            if error is None:
                return
            if record is not None and after:
                pieces, stream = record[1], record[2]
                assert isinstance(pieces, Pieces)
                assert isinstance(stream, FakeStream)
                self.enqueue(stream, pieces[:after])
            raise error

    def require(self, condition: object, violation: str) -> None:
        """Note what a real device would not do; here it fails too."""
        if not condition:
            self.violations.append(violation)
            raise AssertionError(violation)

    # -- streams and events --------------------------------------------------------------------

    def stream(self, name: str = "") -> FakeStream:
        made = FakeStream(self, name or f"stream {len(self.streams)}")
        self.streams.append(made)
        return made

    @property
    def current(self) -> FakeStream:
        stack = getattr(self._using, "stack", None)
        return stack[-1] if stack else self.default

    def current_stream(self) -> FakeStream:
        return self.current

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
        self.require(stream.device is self, "an event of another device's stream")
        if stream.destroyed:
            raise DriverError("the stream is destroyed")
        event = FakeEvent(stream)

        def passes() -> None:
            event.passed = True

        with self._lock:
            (stream.graph.append(passes) if stream.capturing else self._put(stream, passes))
        return event

    def wait_event(self, stream: FakeStream, event: FakeEvent) -> None:
        self.call("wait_event")
        if not isinstance(stream, FakeStream):
            raise TypeError(f"stream must be a stream, got {stream!r}")
        self.require(not event.captured, "the stream would join a capture")
        if stream.capturing:
            raise RuntimeError(f"{stream} is being captured: it cannot wait")
        with self._lock:
            stream.queue.append(("wait", event))

    def synchronize(self) -> None:
        self.call("synchronize")
        self.drain()

    def side_stream(self) -> FakeStream:
        return self.side

    def empty(self, num_bytes: int) -> torch.Tensor:
        self.call("empty")
        memory = np.full(num_bytes, POISON, np.uint8)
        self._memory.append(memory)
        self.own.append((memory.ctypes.data, memory.ctypes.data + num_bytes))
        view = memory[:]  # whose life shows who holds the tensor
        self.staging.append((*self.own[-1], weakref.ref(view)))
        return torch.from_numpy(view)

    @property
    def held_staging(self) -> int:
        """How many of the tensors that ``empty`` made are still held by somebody."""
        return sum(view() is not None for _, _, view in self.staging)

    # -- copies --------------------------------------------------------------------------------

    def prepare(self, pieces: Pieces, *, over_link: bool) -> FakePrepared:
        self.call("prepare")
        self.require(not self.current.capturing, "an upload in a capture")
        ends = [*pieces.sources[:1].tolist(), *pieces.targets[:1].tolist()]
        is_near = all(any(a <= end < b for a, b in self.own) for end in ends)
        self.require(over_link != is_near, f"over_link is {over_link}: {pieces}")
        return FakePrepared(self, pieces)

    def copy_batch(self, pieces: Pieces, stream: FakeStream, *, over_link: bool) -> None:
        self.require(not stream.legacy, "cuMemcpyBatchAsync takes no legacy default stream")
        self.require(not stream.capturing, "a captured batch is silently missing")
        self.require(self.has_batch, "the driver has no cuMemcpyBatchAsync")
        self._require_in_one_range(pieces)
        self.call("copy_batch", ("copy_batch", pieces, stream, over_link))
        self.enqueue(stream, pieces)

    def copy_each(self, pieces: Pieces, stream: FakeStream) -> None:
        self._require_in_one_range(pieces)
        self.call("copy_each", ("copy_each", pieces, stream))
        self.enqueue(stream, pieces)

    def enqueue(self, stream: FakeStream, pieces: Pieces) -> None:
        """Queue the copy: bytes are read and written when it runs."""
        self._require_reachable(pieces)
        self.require(stream.device is self, "a copy on another device's stream")
        move = Move(self, pieces)
        with self._lock:
            (stream.graph.append(move) if stream.capturing else self._put(stream, move))

    def _put(self, stream: FakeStream, work: Callable[[], None]) -> None:
        stream.queue.append(("work", work))

    def _ranges(self) -> list[tuple[int, int]]:
        peers = [both for peer in self.peers for both in peer.own]
        return sorted({*self.own, *peers, *self.pinned})

    def _require_reachable(self, pieces: Pieces) -> None:
        """A GPU faults where memory is neither a device's nor pinned; so does this."""
        joined: list[list[int]] = []
        for start, end in self._ranges():
            if joined and joined[-1][1] >= start:
                joined[-1][1] = max(end, joined[-1][1])
            else:
                joined.append([start, end])
        self._require_within(pieces, np.array(joined, np.int64), "memory that it cannot reach")

    def _require_in_one_range(self, pieces: Pieces) -> None:
        """A copy engine takes no piece of no bytes, and none across two registrations."""
        self.require((pieces.size_array() > 0).all(), "a piece of no bytes")
        ranges = np.array(self._ranges(), np.int64)
        self._require_within(pieces, ranges, "a piece across two registrations")

    def _require_within(self, pieces: Pieces, ranges: np.ndarray, violation: str) -> None:
        sizes = pieces.size_array()
        for starts in (pieces.sources, pieces.targets):
            number = np.searchsorted(ranges[:, 0], starts, side="right") - 1
            is_inside = (number >= 0) & (starts + sizes <= ranges[number, 1])
            self.require(is_inside.all(), violation)

    def require_held(self, addresses: list[int]) -> None:
        """Refuse to touch extents that nobody holds any more."""
        for start, end, view in self.staging:
            is_used = any(start <= address < end for address in addresses)
            self.require(not is_used or view() is not None, "an extent that was let go")

    # -- time ----------------------------------------------------------------------------------

    def run_one(self, stream: FakeStream) -> bool:
        """Do the next work of a stream, and what it waits for; whether there was any."""
        with self._lock:
            if not stream.queue:
                return False
            kind, work = stream.queue[0]
            if kind == "wait":
                assert isinstance(work, FakeEvent)
                work.stream.device.run_until(work)
            else:
                assert not isinstance(work, FakeEvent)
                work()
            stream.queue.popleft()
            return True

    def run_until(self, event: FakeEvent) -> None:
        with self._lock:
            while not event.passed:
                self.require(self.run_one(event.stream), "waiting for what never comes")

    def pending_ranges(self) -> list[tuple[int, int]]:
        """Memory that queued copies will read or write."""
        with self._lock:
            moves = [
                work
                for stream in self.streams
                for _, work in stream.queue
                if isinstance(work, Move)
            ]
        return [
            (start, start + size)
            for move in moves
            for starts in (move.pieces.sources, move.pieces.targets)
            for start, size in zip(starts.tolist(), move.pieces.size_array().tolist(), strict=True)
        ]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued."""
        return not any(stream.queue for stream in self.streams)

    def drain(self) -> None:
        """Do all work that is queued."""
        while not self.is_idle:
            for stream in self.streams:
                while self.run_one(stream):
                    pass

    def run_some(self, rng: random.Random, steps: int) -> None:
        """Do some work of streams in a random order."""
        for _ in range(steps):
            self.run_one(rng.choice(self.streams))


DIRECTIONS = {
    "h2d": ("host", "device"),
    "d2h": ("device", "host"),
    "d2d": ("device", "device"),
    "p2p": ("device", "peer"),
    "h2h": ("host", "host"),
}
"""Where a copy of each direction comes from and goes to."""

PATHS_OF = {
    "h2d": ("kernel", "copy_engine", "staged"),
    "d2h": ("kernel", "copy_engine", "staged"),
    "d2d": ("kernel", "copy_engine"),
    "p2p": ("copy_engine",),
    "h2h": ("host",),
}
"""What can be forced in each direction."""

WAYS = [(direction, path) for direction, paths in PATHS_OF.items() for path in paths]


def memory_of(device: FakeDevice, kind: str, num_bytes: int) -> torch.Tensor:
    """Poisoned bytes on the device, its peer, or pinned on the host."""
    if kind == "host":
        return device.pinned_tensor(num_bytes)
    return (device if kind == "device" else device.peers[0]).tensor(num_bytes)


def heap_on(device: FakeDevice, kind: str, num_bytes: int, **options: Any) -> TensorMemoryAllocator:
    """A heap there, that does not wait for anybody."""
    memory = memory_of(device, kind, num_bytes)
    return TensorMemoryAllocator(memory, **{"stream_wait_s": 0.0, "on_full": None, **options})


def random_bytes(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count, np.uint8))


def filled(
    heap: TensorMemoryAllocator, count: int, block_bytes: int = 4096, seed: int = 0
) -> MemoryBatch:
    """Blocks of random bytes."""
    batch = heap.batched_allocate([block_bytes], torch.uint8, count)
    assert batch is not None
    rows = random_bytes(count * block_bytes, seed).view(count, block_bytes)
    size = batch.allocated_bytes
    if len(heap.segments) > 1 or heap.buffer.numel() % size or (batch.addresses % size).any():
        write(batch, rows)
    else:
        heap.buffer.numpy().reshape(-1, size)[batch.addresses // size, :block_bytes] = rows
    return batch


def write(blocks: Iterable[MemoryObj], rows: torch.Tensor) -> None:
    for block, row in zip(blocks, rows, strict=True):
        assert block.tensor is not None
        block.tensor.copy_(row)


def read(blocks: Iterable[MemoryObj]) -> torch.Tensor:
    """The bytes of live blocks, ``[N, size_bytes]``."""
    rows = [block.tensor for block in blocks]
    assert all(row is not None for row in rows)
    return torch.stack([row.reshape(-1).view(torch.uint8) for row in rows if row is not None])


def free_all(heap: TensorMemoryAllocator, blocks: Iterable[MemoryObj]) -> None:
    """Free what of the blocks is live."""
    heap.batched_free([block for block in blocks if block.is_valid()])


def require_sound(device: FakeDevice, *heaps: TensorMemoryAllocator) -> None:
    """Nothing that a queued copy will touch is free, and every heap is in order."""
    free = []
    for heap in heaps:
        heap.address_manager.check()
        assert heap.memcheck()
        free.append(heap.free_extents() + [heap.segments[0][1].data_ptr(), 0])
    # After what is free: the queue's thread may do queued work, and so free bytes, at any moment.
    queued = device.pending_ranges() + device.peers[0].pending_ranges()
    for extents in free:
        starts, ends = extents[:, 0], extents.sum(axis=1)
        for start, end in queued:
            overlaps = (starts < end) & (start < ends)
            assert not overlaps.any(), "bytes are free that a queued copy touches"
