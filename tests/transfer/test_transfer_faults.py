"""Every call of the device fails once, in every place of every transfer: no byte is lost or freed
twice, nothing is handed out that a queued copy touches, and what was given up lives again.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import (
    DIRECTIONS,
    WAYS,
    DriverError,
    FakeDevice,
    filled,
    free_all,
    heap_on,
    memory_of,
    random_bytes,
    read,
    require_sound,
)
from transfer_scenes import Gate, allocated, drain

from kvheap import MemoryBatch, MemoryObj, TensorMemoryAllocator, foreign_transfer
from kvheap.device.host_queue import HostQueue, host_queue
from kvheap.errors import TransferError
from kvheap.transfer import CopyPlan, Transfer, copy, offload, runs, staging

BLOCK = 1024
COUNT = 24
CALLS = (
    "prepare",
    "run",
    "copy_batch",
    "copy_each",
    "record_event",
    "wait_event",
    "event.query",
    "event.synchronize",
    "empty",
    "locate",
)
DEVICE_WAYS = [way for way in WAYS if way[0] != "h2h"]

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Failures are logged with their tracebacks: thousands here."""
    caplog.set_level(logging.CRITICAL + 1, "kvheap")


class Scene:
    """A heap whose blocks are moved or copied to another heap, and what must be true after it.

    Args:
        how: ``copy``, ``offload``, or ``give up``: offload, and free the source.
        has_room: whether staging finds room in the device's heap.
    """

    def __init__(
        self, device: FakeDevice, direction: str, path: Any, how: str, has_room: bool = True
    ) -> None:
        self.device = device
        self.path = path
        self.how = how
        kinds = DIRECTIONS[direction]
        num_bytes = (2 * COUNT + 40 * has_room) * BLOCK
        self.near, self.far = (
            heap_on(device, kind, num_bytes, align_bytes=BLOCK) for kind in kinds
        )
        # Every other block, which are no neighbours, on the device; in a row on the host.
        self.between: list[tuple[TensorMemoryAllocator, list[MemoryObj]]] = []
        is_near = direction != "h2d"
        scattered = self.near if is_near else self.far
        every = filled(scattered, 2 * COUNT, BLOCK)
        rest = scattered.batched_allocate([BLOCK], torch.uint8, 40 * has_room)
        assert rest is not None
        scattered.batched_free(every[::2])
        self.between.append((scattered, every[1::2]))
        self.source = filled(self.near, COUNT, BLOCK, seed=8)
        self.target: MemoryBatch | None = None
        if how == "copy":
            self.target = self.far.batched_allocate([BLOCK], torch.uint8, COUNT)
        if is_near or how == "copy":
            scattered.batched_free(rest)  # for staging
        else:
            self.between.append((scattered, list(rest)))
        self.contents = read(self.source)
        self.before = self.allocated()
        self.stream = device.stream()
        self.error: BaseException | None = None
        self.transfer: Transfer | None = None

    def allocated(self) -> list[int]:
        for heap in (self.near, self.far):
            heap.lifetime.reclaimer.settle(limit=None)
        return allocated(self.near, self.far)

    def begin(self) -> None:
        """Start the transfer; keep what it raises."""
        stream: Any = self.stream
        try:
            if self.how == "copy":
                assert self.target is not None
                by_parts = CopyPlan.between(self.source, self.target)
                self.transfer = copy(by_parts, stream, path=self.path)
            else:
                self.target = offload(
                    self.source, self.far, stream, free=self.how == "give up", path=self.path
                )
                assert self.target is not None
                self.transfer = self.target.transfer
        except BaseException as error:
            self.error = error

    def end(self, timeout_s: float | None = None) -> None:
        """Wait for it; keep what that raises."""
        if self.transfer is not None:
            try:
                self.transfer.result(timeout_s)
            except BaseException as error:
                self.error = error

    @property
    def is_lost(self) -> bool:
        return self.transfer is not None and self.transfer._completion.is_lost

    def require_right(self) -> None:
        """Nothing is queued any more: what must be true, whether it failed or not."""
        near, far = self.allocated()
        require_sound(self.device, self.near, self.far)
        if self.error is None:
            assert self.target is not None
            assert torch.equal(read(self.target), self.contents)
            if self.how == "give up":
                assert not self.source.live.any()
                assert near == self.before[0] - COUNT * BLOCK
            return
        assert self.source.live.all()
        assert torch.equal(read(self.source), self.contents)
        if not self.is_lost:
            assert near == self.before[0]
            if self.transfer is None and self.how != "copy":
                assert far == self.before[1]

    def free_everything(self) -> None:
        """Free all that is live; the heaps must then be as they were before."""
        for heap, batch in ((self.near, self.source), (self.far, self.target)):
            if batch is not None:
                free_all(heap, batch)
        for heap, between in self.between:
            free_all(heap, between)
        require_sound(self.device, self.near, self.far)


def run_with(device: FakeDevice, scene: Scene) -> None:
    """Begin, look at all, end, look again, and free everything."""
    scene.begin()
    require_sound(device, scene.near, scene.far)
    scene.end()
    drain(device)
    scene.require_right()
    scene.free_everything()
    drain(device)
    if not scene.is_lost:
        assert scene.allocated() == [0, 0]
    else:
        scene.allocated()
    require_sound(device, scene.near, scene.far)


@pytest.mark.parametrize("how", ["copy", "offload", "give up"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("direction", "path"), DEVICE_WAYS)
def test_one_call_fails(device: FakeDevice, direction: str, path: Any, call: str, how: str) -> None:
    # Pieces that were queued before it failed: none, some, all but one.
    for number in (1, 2, 3):
        for after in (0, 1, COUNT // 8 - 1) if call in ("run", "copy_batch", "copy_each") else (0,):
            for has_room in (True, False) if path == "staged" else (True,):
                scene = Scene(device, direction, path, how, has_room)
                device.fail(call, number, after)
                run_with(device, scene)
                is_hit = not device.faults
                device.faults.clear()
                if scene.error is not None:
                    assert is_hit
                    assert isinstance(scene.error, TransferError | DriverError | ValueError)
                    assert "fault" in str(scene.error)
                if is_hit and call in ("prepare", "run", "copy_batch", "copy_each"):
                    assert scene.error is not None
                may_be_lost = call in ("event.query", "event.synchronize")
                assert may_be_lost or not scene.is_lost


@pytest.mark.parametrize("how", ["copy", "give up"])
@pytest.mark.parametrize("first", ["copy", "record_event", "wait_event"])
@pytest.mark.parametrize("second", ["record_event", "wait_event"])
@pytest.mark.parametrize(("direction", "path"), DEVICE_WAYS)
def test_what_was_queued_cannot_be_asked_about(
    device: FakeDevice, direction: str, path: Any, first: str, second: str, how: str
) -> None:
    """The copy fails, and so does the event behind what was queued of it."""
    copies = {"kernel": "run", "staged": "run", "copy_engine": "copy_batch"}
    for number in (1, 2, 3):
        for further in range(5):
            scene = Scene(device, direction, path, how)
            device.fail(copies[path] if first == "copy" else first, number, after=2)
            at = device.counts[second] + further
            for each in (at + 1, at + 2, at + 3):
                device.faults.setdefault((second, each), (DriverError("no event"), 0))
            scene.begin()
            require_sound(device, scene.near, scene.far)
            scene.end()
            device.faults.clear()
            require_sound(device, scene.near, scene.far)
            if scene.error is not None:
                assert scene.source.live.all()
            scene.free_everything()
            # Where nobody can tell, bytes stay allocated; nothing is queued on what is free.
            drain(device)
            scene.allocated()
            require_sound(device, scene.near, scene.far)


@pytest.mark.parametrize("how", ["copy", "offload", "give up"])
@pytest.mark.parametrize(("direction", "path"), DEVICE_WAYS)
def test_the_device_is_lost_at_each_step(
    device: FakeDevice, direction: str, path: Any, how: str
) -> None:
    for step in range(1, 60):
        scene = Scene(device, direction, path, how)
        device.lost_at = sum(device.counts.values()) + step
        scene.begin()
        was_lost_early = device.is_lost
        device.lose()
        scene.end(10)
        assert not isinstance(scene.error, TimeoutError)
        require_sound(device, scene.near, scene.far)
        assert scene.near.memcheck()
        assert scene.far.memcheck()
        assert scene.error is not None
        assert scene.source.live.all()
        scene.free_everything()  # the work is still queued: nothing of it is free
        for heap in (scene.near, scene.far):  # and what is free can be used
            some = heap.batched_allocate([BLOCK], torch.uint8, 2 * COUNT, allow_partial=True)
            assert some is not None
            require_sound(device, heap)
            heap.batched_free(some)
        for stream in device.streams:
            stream.queue.clear()
        device.is_lost, device.lost_at = False, None
        if not was_lost_early:
            return
    raise AssertionError("more calls than were tried")


@pytest.mark.parametrize("how", ["copy", "offload", "give up"])
@pytest.mark.parametrize(("direction", "path"), DEVICE_WAYS)
def test_an_interrupt_at_each_step(device: FakeDevice, direction: str, path: Any, how: str) -> None:
    for call in ("prepare", "run", "copy_batch", "copy_each", "record_event", "wait_event"):
        for number in (1, 2, 3, 4):
            scene = Scene(device, direction, path, how)
            device.fail(call, number, 1 if call[0] in "rc" else 0, KeyboardInterrupt())
            run_with(device, scene)
            assert scene.error is None or isinstance(scene.error, KeyboardInterrupt)
            assert (scene.error is not None) == (not device.faults)
            device.faults.clear()


@pytest.mark.parametrize("how", ["copy", "offload", "give up"])
@pytest.mark.parametrize(("direction", "path"), DEVICE_WAYS)
def test_a_stream_that_is_destroyed_afterwards(
    device: FakeDevice, direction: str, path: Any, how: str
) -> None:
    scene = Scene(device, direction, path, how)
    scene.begin()
    scene.stream.destroyed = True
    device.drain()
    scene.end()
    assert scene.error is None
    scene.require_right()
    scene.free_everything()
    assert scene.allocated() == [0, 0]


@pytest.mark.parametrize("how", ["copy", "offload", "give up"])
@pytest.mark.parametrize(("direction", "path"), DEVICE_WAYS)
def test_a_stream_that_is_destroyed_before(
    device: FakeDevice, direction: str, path: Any, how: str
) -> None:
    scene = Scene(device, direction, path, how)
    scene.stream.destroyed = True
    scene.begin()
    scene.end()
    assert scene.error is not None
    assert scene.source.live.all()
    assert torch.equal(read(scene.source), scene.contents)
    scene.free_everything()
    assert scene.allocated() == [0, 0]  # no event can tell, but the device was waited for


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("call", ["copy_batch", "record_event"])
@pytest.mark.parametrize("direction", ["d2h", "h2d", "d2d"])
def test_parts_before_the_one_that_fails(
    device: FakeDevice, direction: str, call: str, number: int
) -> None:
    source, target = (memory_of(device, kind, 1 << 16) for kind in DIRECTIONS[direction])
    source.copy_(random_bytes(1 << 16, 1))
    starts = np.arange(32) * 512
    plan = CopyPlan.of_addresses(source, target, starts, starts, 256, parts=[8, 8, 8, 8])
    device.fail(call, number, after=3)
    stream: Any = device.stream()
    transfer = copy(plan, stream, path="copy_engine")
    assert len(transfer.parts) == number - 1
    assert repr(transfer).endswith("failed)")
    for index, part in enumerate(transfer.parts):
        part.wait()
        assert part.done()
        for at in starts[8 * index : 8 * index + 8]:
            assert torch.equal(target[at : at + 256], source[at : at + 256])
    with pytest.raises(TransferError, match="fault") as caught:
        transfer.result()
    assert isinstance(caught.value.__cause__, DriverError)
    with pytest.raises(TransferError, match="fault"):
        transfer.wait_stream(device.stream())  # type: ignore[arg-type]
    assert transfer.done()


def test_nothing_is_queued_where_memory_cannot_be_located(device: FakeDevice) -> None:
    gpu, host = memory_of(device, "device", 4096), memory_of(device, "host", 4096)
    for number in (1, 2):
        device.fail("locate", number)
        plans = [[gpu, host]] * (number - 1)
        assert all(CopyPlan.of_addresses(*pair, [0], [0], 8) for pair in plans)
        with pytest.raises(DriverError, match="fault"):
            CopyPlan.of_addresses(gpu, host, [0], [0], 8)
    with pytest.raises(ValueError, match="is not in memory of Fake GPU that CUDA knows"):
        CopyPlan.of_pointers([4096], [host.data_ptr()], 8, "cuda", "cpu")
    assert device.is_idle


def test_a_stream_that_cannot_wait_takes_nothing_from_the_transfer(device: FakeDevice) -> None:
    near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
    batch = filled(near, 4)
    away = offload(batch, far, device.stream())  # type: ignore[arg-type]
    assert away is not None
    assert away.transfer is not None
    for ask in (away.transfer, away.transfer.parts[0]):
        device.fail("wait_event")
        with pytest.raises(DriverError, match="fault"):
            ask.wait_stream(device.stream())  # type: ignore[arg-type]
    device.fail("wait_event")
    assert copy((away, batch), device.stream())._completion.error is not None  # type: ignore[arg-type]
    away.transfer.result()
    assert torch.equal(read(away), read(batch))
    near.batched_free(batch)
    far.batched_free(away)
    device.drain()
    assert allocated(near, far) == [0, 0]


def test_what_has_ended_stays_ended(device: FakeDevice) -> None:
    """A device that is lost later takes back nothing of what has been told."""
    near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
    batch = filled(near, 4)
    away = offload(batch, far, device.stream())  # type: ignore[arg-type]
    assert away is not None
    assert away.transfer is not None
    away.transfer.result()
    device.lose()
    assert away.transfer.done()
    assert away.transfer.result() is None
    with suppress(TransferError):
        away.transfer.parts[0].done()
    assert away.transfer.result() is None
    near.batched_free(batch)
    far.batched_free(away)
    assert allocated(near, far) == [0, 0]


def test_errors_that_are_raised_again_and_again_do_not_grow(device: FakeDevice) -> None:
    near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
    batch = filled(near, 4)
    away = offload(batch, far, device.stream())  # type: ignore[arg-type]
    assert away is not None
    assert away.transfer is not None
    near.batched_free(batch)
    far.batched_free(away)
    device.lose()
    lengths = []
    for _ in range(2):
        for _ in range(50):
            near.stats()
            with pytest.raises(TransferError):
                away.transfer.result()
        frames, trace = 0, away.transfer._completion.error.__traceback__
        while trace is not None:
            frames, trace = frames + 1, trace.tb_next
        lengths.append(frames)
    assert lengths[1] <= lengths[0]


def test_closing_a_heap_whose_device_is_lost(device: FakeDevice) -> None:
    for is_freed in (True, False):
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        away = offload(batch, far, device.stream())  # type: ignore[arg-type]
        assert away is not None
        if is_freed:
            near.batched_free(batch)
            far.batched_free(away)
        device.lose()
        for heap in (near, far):
            with pytest.raises((TimeoutError, TransferError)):
                heap.close(timeout_s=0.1)
        for stream in device.streams:
            stream.queue.clear()
        device.is_lost = False


class TestHost:
    """Copies within the host."""

    @pytest.fixture(autouse=True)
    def none_is_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)

    @staticmethod
    def layers(heap: TensorMemoryAllocator) -> MemoryBatch:
        batch = heap.batched_allocate([2, 4, 4, 32], torch.uint8, 4)
        assert batch is not None
        return batch

    @pytest.mark.parametrize("number", range(5))
    @pytest.mark.parametrize("how", ["copy", "offload", "give up"])
    @pytest.mark.parametrize("is_small", [True, False])
    @pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
    def test_a_part_fails(
        self,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        how: str,
        is_small: bool,
        error: BaseException,
    ) -> None:
        if is_small:
            monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 1 << 30)
        elif isinstance(error, KeyboardInterrupt):
            return  # which only comes to the main thread
        near, far = (
            TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8)) for _ in range(2)
        )
        batch = self.layers(near)
        near.buffer.copy_(random_bytes(1 << 16, 1))
        contents = read(batch)
        copies: list[Any] = []
        copy_on_host = runs.copy_on_host

        def fails(pieces: Any) -> None:
            copies.append(pieces)
            if len(copies) == number + 1:
                raise error
            copy_on_host(pieces)

        monkeypatch.setattr(runs, "copy_on_host", fails)
        target: MemoryBatch | None = None
        raised: BaseException | None = None
        try:
            if how == "copy":
                target = self.layers(far)
                transfer = copy(CopyPlan.between(batch, target, by_layer=True))
            else:
                target = offload(batch, far, free=how == "give up", by_layer=True)
                assert target is not None
                assert target.transfer is not None
                transfer = target.transfer
            assert len(transfer.parts) == 4
            transfer.result(20)
            for part in transfer.parts:
                assert part.done()
        except BaseException as failure:
            raised = failure
        if number == 4:
            assert raised is None
            assert target is not None
            assert torch.equal(read(target), contents)
        elif isinstance(error, KeyboardInterrupt):
            assert raised is error
        else:
            assert isinstance(raised, TransferError)
            assert "no room" in str(raised)
            assert len(copies) == number + 1  # those behind it are not begun
        is_moved = how == "give up" and number == 4
        assert batch.live.tolist() == [not is_moved] * 4
        if not is_moved:
            assert torch.equal(read(batch), contents)
        for heap, blocks in ((near, batch), (far, target)):
            if blocks is not None:
                free_all(heap, blocks)
            assert heap.stats().allocated_bytes == 0
            heap.address_manager.check()

    @pytest.mark.parametrize("has_begun", [False, True])
    def test_an_interrupt_while_the_parts_are_queued(
        self, monkeypatch: pytest.MonkeyPatch, has_begun: bool
    ) -> None:
        near, far = (
            TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8)) for _ in range(2)
        )
        batch, target = self.layers(near), self.layers(far)
        gate = Gate()
        copy_on_host = runs.copy_on_host
        begun: list[Any] = []

        def waits(pieces: Any) -> None:
            begun.append(pieces)
            gate.wait()
            copy_on_host(pieces)

        submit = HostQueue.submit

        def fails(self: HostQueue, *arguments: Any) -> None:
            if has_begun:
                submit(self, *arguments)
                while not begun:
                    time.sleep(1e-3)
            raise KeyboardInterrupt

        monkeypatch.setattr(runs, "copy_on_host", waits)
        monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)
        monkeypatch.setattr(HostQueue, "submit", fails)
        try:
            with pytest.raises(KeyboardInterrupt):
                copy(CopyPlan.between(batch, target, by_layer=True))
            near.batched_free(batch)
            far.batched_free(target)
            if has_begun:  # the first part is at work, on bytes that must be nobody else's
                assert allocated(near, far) == [4 * 4096, 4 * 4096]
        finally:
            gate.open()
            monkeypatch.undo()
            host_queue.run([lambda: None], False)[0].synchronize()
        assert allocated(near, far) == [0, 0]
        assert len(begun) == (4 if has_begun else 0)

    def test_the_extents_are_given_back_when_they_cannot_be_used(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*arguments: object, **options: object) -> None:
            raise MemoryError("no descriptors")

        monkeypatch.setattr(staging.Staging, "_copy", fails)
        scene = Scene(device, "d2h", "staged", "give up")
        run_with(device, scene)
        assert "no descriptors" in str(scene.error)


class TestDroppedSource:
    """The batch whose blocks a failed move was to free is gone: its bytes have other users."""

    @pytest.mark.parametrize("whose", ["a stream's", "another copy's", "a foreign transfer's"])
    def test_bytes_are_not_free_before_others_have_let_go(
        self,
        device: FakeDevice,
        by_queue: Gate,
        whose: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(pieces: object) -> None:
            by_queue.wait()
            raise RuntimeError("the memory cannot be read")

        monkeypatch.setattr(runs, "copy_on_host", fail)
        heap, other = (heap_on(device, "host", COUNT * BLOCK, align_bytes=BLOCK) for _ in "ab")
        near = heap_on(device, "device", COUNT * BLOCK, align_bytes=BLOCK)
        batch: MemoryBatch | None = filled(heap, 4, BLOCK)
        target = filled(near, 4, BLOCK)
        assert batch is not None
        stream, foreign = device.stream(), Future[None]()
        if whose == "a stream's":
            batch.record_stream(stream)
            device.enqueue(stream, CopyPlan.between(batch, target).parts[0])
        elif whose == "another copy's":
            copy((batch, target), stream)
        else:
            foreign_transfer(foreign, source=batch)
        moved = offload(batch, other, free=True)
        assert moved is not None
        assert moved.transfer is not None
        del batch
        by_queue.open()
        with pytest.raises(TransferError):
            moved.transfer.result()
        assert heap.stats().pending_bytes == 4 * BLOCK
        require_sound(device, heap, near)
        drain(device)
        foreign.set_result(None)
        assert heap.stats().allocated_bytes == 0

    def test_bytes_are_never_free_if_the_copy_itself_is_lost(self, device: FakeDevice) -> None:
        heap = heap_on(device, "device", COUNT * BLOCK, align_bytes=BLOCK)
        other = heap_on(device, "host", COUNT * BLOCK, align_bytes=BLOCK)
        batch: MemoryBatch | None = filled(heap, 4, BLOCK)
        assert batch is not None
        moved = offload(batch, other, device.stream(), free=True)
        assert moved is not None
        assert moved.transfer is not None
        del batch
        device.fail("event.query")
        with pytest.raises(TransferError):
            moved.transfer.result()
        for _ in range(2):
            stats = heap.stats()
            assert (stats.pending_bytes, stats.free_bytes) == (4 * BLOCK, (COUNT - 4) * BLOCK)
        require_sound(device, heap)
