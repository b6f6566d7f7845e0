"""No byte handed out before a copy has ended: frees, closed heaps, threads, a forked child."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import (
    DIRECTIONS,
    PATHS_OF,
    WAYS,
    FakeDevice,
    filled,
    free_all,
    heap_on,
    memory_of,
    random_bytes,
    read,
    require_sound,
    write,
)
from transfer_scenes import BLOCK, Gate, allocated, in_a_row, scattered, stream_of

from kvheap import LifetimeError, MemoryBatch, MemoryObj, TensorMemoryAllocator
from kvheap.device import completion
from kvheap.errors import TransferError
from kvheap.transfer import CopyPlan, Transfer, copy, offload, runs


class TestProtection:
    @pytest.mark.parametrize(("direction", "path"), WAYS)
    @pytest.mark.parametrize("how", ["free", "drop", "free some", "free one by one"])
    @pytest.mark.parametrize("side", ["source", "target"])
    def test_bytes_come_back_when_the_copy_has_ended(
        self, device: FakeDevice, by_queue: Gate, direction: str, path: Any, how: str, side: str
    ) -> None:
        count = 24
        near, far = (heap_on(device, kind, BLOCK * 2 * count) for kind in DIRECTIONS[direction])
        source, room = (in_a_row if direction == "h2d" else scattered)(near, count)
        target, more_room = (scattered if direction == "h2d" else in_a_row)(far, count)
        contents = read(source)
        transfer = copy((source, target), stream_of(device, direction), path=path)
        heap, batch = (near, source) if side == "source" else (far, target)
        before = allocated(heap)[0]
        addresses = set(batch.addresses.tolist())
        if how == "free":
            heap.batched_free(batch)
        elif how == "free some":
            heap.batched_free(batch[:5])
            addresses = {obj.address for obj in batch[:5]}
        elif how == "free one by one":
            for obj in batch:
                obj.ref_count_down()
        else:
            if side == "source":
                del source, batch
            else:
                del target, batch
            gc.collect()
        require_sound(device, near, far)
        assert allocated(heap)[0] == before
        other = heap.batched_allocate([BLOCK], torch.uint8, 2 * count, allow_partial=True)
        assert other is not None
        assert not addresses & set(other.addresses.tolist())
        write(other, torch.full((len(other), BLOCK), 7, dtype=torch.uint8))
        require_sound(device, near, far)
        by_queue.open()
        transfer.result()
        if side == "source":
            assert torch.equal(read(target), contents)
        again = heap.batched_allocate([BLOCK], torch.uint8, 2 * count, allow_partial=True)
        assert again is not None
        assert addresses <= set(again.addresses.tolist())
        assert heap.memcheck()
        del room, more_room

    def test_a_full_heap_says_so_until_the_copy_has_ended(self, device: FakeDevice) -> None:
        near, far = heap_on(device, "device", 8 * BLOCK), heap_on(device, "host", 8 * BLOCK)
        batch = filled(near, 8)
        away = offload(batch, far, device.stream())
        assert away is not None
        near.batched_free(batch)
        far.batched_free(away)
        for heap in (near, far):
            assert heap.batched_allocate([BLOCK], torch.uint8, 1) is None
            assert heap.stats().pending_bytes == 8 * BLOCK
        device.drain()
        for heap in (near, far):
            assert len(filled(heap, 8)) == 8

    def test_an_allocation_waits_for_a_copy(self, device: FakeDevice) -> None:
        near = heap_on(device, "device", 8 * BLOCK, stream_wait_s=20.0)
        far = heap_on(device, "host", 8 * BLOCK)
        batch = filled(near, 8)
        assert offload(batch, far, device.stream(), free=True) is not None
        threading.Timer(0.02, device.drain).start()
        assert near.batched_allocate([BLOCK], torch.uint8, 8) is not None

    @pytest.mark.parametrize("is_freed", [False, True])
    def test_closing_a_heap_waits(self, device: FakeDevice, is_freed: bool) -> None:
        for side in (0, 1):
            near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
            batch = filled(near, 8)
            contents = read(batch)
            away = offload(batch, far, device.stream())
            assert away is not None
            heap, blocks = [(near, batch), (far, away)][side]
            if is_freed:
                heap.batched_free(blocks)
            closing = threading.Thread(target=heap.close)
            closing.start()
            closing.join(0.02)
            assert closing.is_alive()
            assert not device.is_idle
            device.drain()
            closing.join(20)
            assert not closing.is_alive()
            away.transfer.result()
            if side == 0:
                assert torch.equal(read(away), contents)

    @pytest.mark.parametrize("asked", [True, False])
    def test_buffers_are_kept_until_the_copy_has_ended(
        self, device: FakeDevice, asked: bool
    ) -> None:
        memories = [np.zeros(4096, np.uint8) for _ in range(2)]
        views = [memory[:] for memory in memories]
        source, target = (torch.from_numpy(view) for view in views)
        alive = [weakref.ref(view) for view in views]
        device.own.append((source.data_ptr(), source.data_ptr() + 4096))
        device.pin(target)
        memories[0][:] = 9
        transfer = copy(CopyPlan.of_addresses(source, target, [0], [0], 4096), device.stream())
        del source, target, views
        gc.collect()
        assert [found() is not None for found in alive] == [True, True]
        device.drain()
        assert (memories[1] == 9).all()
        if asked:
            transfer.result()
        del transfer
        for _ in range(20):  # copies that nobody asks about are looked at when others begin
            copy((torch.zeros(1, 8), torch.zeros(1, 8)))
            copy((memory_of(device, "device", 8)[None], memory_of(device, "host", 8)[None]))
            device.drain()
        assert [found() for found in alive] == [None, None]

    def test_a_heap_is_not_kept_by_what_was_moved_out_of_it(self, device: FakeDevice) -> None:
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        away = offload(filled(near, 4), far, device.stream(), free=True)
        assert away is not None
        away.transfer.result()
        alive = weakref.ref(near)
        del near
        gc.collect()
        assert alive() is None

    def test_a_dropped_heap_is_copied_from(self, device: FakeDevice) -> None:
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4, seed=4)
        away = offload(batch, far, device.stream())
        assert away is not None
        del near, batch
        gc.collect()
        away.transfer.result()
        assert torch.equal(read(away), random_bytes(4 * BLOCK, 4).view(4, -1))

    def test_thousands_of_transfers_leave_no_records(self, device: FakeDevice) -> None:
        near = heap_on(device, "device", 1 << 16)
        out = memory_of(device, "host", 8 * BLOCK).view(8, BLOCK)
        batch = filled(near, 8)
        stream = device.stream()
        for number in range(1000):
            plan = (batch, out) if number % 2 else (batch[2:5], out[:3])
            copy(plan, stream).result()
        assert 0 < len(batch.counts.streams_of(None)) <= 16
        assert len(completion.in_flight) <= 64
        near.batched_free(batch)
        assert allocated(near) == [0]

    def test_what_is_freed_after_the_end_is_free_at_once(self, device: FakeDevice) -> None:
        near = heap_on(device, "device", 1 << 16)
        out = memory_of(device, "host", 8 * BLOCK).view(8, BLOCK)
        batch = filled(near, 8)
        copy((batch, out), device.stream()).result()
        near.batched_free(batch)
        assert near.address_manager.total_allocated_size == 0

    def test_a_copy_that_was_lost_is_never_forgotten(self, device: FakeDevice) -> None:
        near = heap_on(device, "device", 8 * BLOCK)
        out = memory_of(device, "host", 8 * BLOCK).view(8, BLOCK)
        batch = filled(near, 8)
        lost = copy((batch, out), device.stream())
        device.fail("event.query")
        with pytest.raises(TransferError, match="cannot be queried"):
            lost.result()
        for _ in range(64):
            copy((batch, out), device.stream()).result()
        near.batched_free(batch)
        assert near.batched_allocate([BLOCK], torch.uint8, 1) is None
        assert allocated(near) == [8 * BLOCK]

    def test_what_is_freed_cannot_be_copied(self, device: FakeDevice) -> None:
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        target = far.batched_allocate([BLOCK], torch.uint8, 4)
        assert target is not None
        plan = CopyPlan.between(batch, target)
        copy(plan, device.stream()).result()
        near.free(batch[2])
        for refused in (plan, (batch, target), ([batch[2]], [target[0]])):
            with pytest.raises(LifetimeError, match="freed"):
                copy(refused, device.stream())  # type: ignore[arg-type]
        assert device.is_idle
        assert allocated(near, far) == [3 * BLOCK, 4 * BLOCK]
        far.batched_free(target)
        assert allocated(far) == [0]  # what was refused holds nothing


@dataclass
class Entry:
    """Blocks, and what they must hold once ``filled_by`` has ended."""

    heap: TensorMemoryAllocator
    blocks: list[MemoryObj]
    contents: torch.Tensor
    filled_by: Transfer | None = None
    waits_for_its_transfer: bool = True


class Model:
    """Random transfers and frees, and what every live block must hold.

    Args:
        seed: of all that is random.
        heaps: where blocks are; the first two on the device, the third pinned, the last not.
    """

    def __init__(self, device: FakeDevice, heaps: list[TensorMemoryAllocator], seed: int) -> None:
        self.rng = random.Random(seed)
        self.device = device
        self.heaps = heaps
        self.streams = [device.stream() for _ in range(3)]
        self.entries: list[Entry] = []
        self.count = 0

    def fresh(self) -> None:
        heap = self.rng.choice(self.heaps)
        batch = heap.batched_allocate([512], torch.uint8, self.rng.randint(1, 12))
        if batch is not None:
            contents = random_bytes(len(batch) * 512, self.rng.getrandbits(30))
            write(batch, contents.view(len(batch), -1))
            self.entries.append(Entry(heap, list(batch), contents.view(len(batch), -1)))

    def move(self) -> None:
        ready = [
            entry
            for entry in self.entries
            if entry.filled_by is None or entry.waits_for_its_transfer or entry.filled_by.done()
        ]
        if not ready:
            return
        entry = self.rng.choice(ready)
        rows = sorted(
            self.rng.sample(range(len(entry.blocks)), self.rng.randint(1, len(entry.blocks)))
        )
        if self.rng.random() < 0.3:
            rows = list(range(len(entry.blocks)))
        blocks, contents = [entry.blocks[row] for row in rows], entry.contents[rows]
        target_heap = self.rng.choice(self.heaps)
        plain = self.heaps[3]
        if (entry.heap is plain or target_heap is plain) and not {
            id(entry.heap),
            id(target_heap),
        } <= {id(heap) for heap in self.heaps[2:]}:
            return  # a device does not reach what is not pinned
        is_host = {id(entry.heap), id(target_heap)} <= {id(heap) for heap in self.heaps[2:]}
        stream: Any = None if is_host else self.rng.choice([None, *self.streams])
        path: Any = self.rng.choice([None, None, "kernel", "staged", "copy_engine"])
        if is_host or (stream is None and path == "copy_engine"):
            path = None
        free = self.rng.random() < 0.4
        if self.rng.random() < 0.5:
            moved = self.unless_refused(offload, blocks, target_heap, stream, free=free, path=path)
            if moved is None:
                return
            transfer = moved.transfer
            if free:
                gone = set(rows)
                keep = [row for row in range(len(entry.blocks)) if row not in gone]
                entry.blocks = [entry.blocks[row] for row in keep]
                entry.contents = entry.contents[keep]
                if not keep:
                    self.entries.remove(entry)
        else:
            moved = target_heap.batched_allocate([512], torch.uint8, len(blocks))
            if moved is None:
                return
            if stream is not None:  # as a caller has to for bytes of the current stream
                self.device.wait_event(
                    stream, self.device.record_event(self.device.require_stream(None))
                )
            transfer = self.unless_refused(copy, (blocks, moved), stream, path=path)
            if transfer is None:
                target_heap.batched_free(moved)
                return
        assert transfer is not None
        self.count += 1
        in_order = moved.transfer is not None
        self.entries.append(Entry(target_heap, list(moved), contents, transfer, in_order))

    @staticmethod
    def unless_refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """None where the path that was drawn cannot be taken."""
        try:
            return call(*arguments, **options)
        except ValueError as error:
            if "cannot be taken" not in str(error):
                raise
            return None

    def free(self) -> None:
        if not self.entries:
            return
        entry = self.rng.choice(self.entries)
        count = self.rng.randint(1, len(entry.blocks))
        gone, entry.blocks = entry.blocks[:count], entry.blocks[count:]
        entry.contents = entry.contents[count:]
        if self.rng.random() < 0.8:
            entry.heap.batched_free(gone)
        del gone  # or dropped, where its batch has no other blocks
        if not entry.blocks:
            self.entries.remove(entry)

    def check(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.filled_by is None or entry.filled_by.done():
                assert torch.equal(read(entry.blocks), entry.contents)

    def step(self) -> None:
        self.rng.choice([self.fresh, self.move, self.move, self.move, self.free, self.free])()

    def finish(self) -> None:
        for entry in self.entries:
            if entry.filled_by is not None:
                entry.filled_by.result()
        self.check(self.entries)
        for entry in self.entries:
            free_all(entry.heap, entry.blocks)
        self.entries = []


def four_heaps(device: FakeDevice, num_bytes: int) -> list[TensorMemoryAllocator]:
    plain = TensorMemoryAllocator(
        torch.zeros(num_bytes, dtype=torch.uint8), 512, stream_wait_s=0.0, on_full=None
    )
    kinds = ("device", "device", "host")
    return [*(heap_on(device, kind, num_bytes, align_bytes=512) for kind in kinds), plain]


def require_empty(heaps: Iterable[TensorMemoryAllocator]) -> None:
    gc.collect()
    deadline = time.monotonic() + 20
    for heap in heaps:
        while heap.stats().pending_bytes and time.monotonic() < deadline:
            time.sleep(0.001)
        assert heap.stats().allocated_bytes == 0
        heap.address_manager.check()


@pytest.mark.parametrize("seed", range(6))
def test_a_hundred_in_flight_and_random_frees(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 2048)  # both ways within the host
    heaps = four_heaps(device, 256 << 10)
    model = Model(device, heaps, seed)
    for number in range(600):
        model.step()
        if model.count > 100:
            device.run_some(model.rng, model.rng.randint(0, 6))
        if number % 20 == 0:
            model.check(model.entries)
            require_sound(device, *heaps)
    assert model.count > 100
    device.drain()
    model.finish()
    device.drain()
    require_empty(heaps)


@pytest.mark.parametrize("seed", range(2))
def test_threads_copy_and_free_while_another_drains(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 2048)
    heaps = four_heaps(device, 512 << 10)
    failures: list[BaseException] = []
    done = threading.Event()

    def work(number: int) -> None:
        try:
            model = Model(device, heaps, 100 * seed + number)
            for step in range(150):
                model.step()
                if step % 20 == 0:
                    model.check(model.entries)
            model.finish()
        except BaseException as failure:
            failures.append(failure)

    def run_device() -> None:
        rng = random.Random(seed)
        while not done.is_set():
            device.run_some(rng, 5)
            time.sleep(0.0002)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    drainer = threading.Thread(target=run_device)
    for thread in (*threads, drainer):
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    done.set()
    drainer.join()
    assert failures == []
    device.drain()
    require_empty(heaps)


@pytest.mark.parametrize("path", PATHS_OF["d2h"])
def test_one_batch_is_copied_by_two_threads(device: FakeDevice, path: Any) -> None:
    near = heap_on(device, "device", 1 << 20)
    blocks = filled(near, 64)[::2]
    outs = [memory_of(device, "host", 32 * BLOCK).view(32, BLOCK) for _ in range(20)]
    transfers: list[Transfer] = []

    def work(number: int) -> None:
        stream: Any = device.stream()
        transfers.extend(copy((blocks, out), stream, path=path) for out in outs[number::2])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    contents = read(blocks)
    assert len(transfers) == 20
    near.batched_free(blocks)
    require_sound(device, near)
    for transfer in transfers:
        transfer.result()
    assert all(torch.equal(out, contents) for out in outs)
    near.lifetime.reclaimer.settle(limit=None)
    assert near.stats().pending_bytes == 0


def test_a_thread_frees_what_another_copies(device: FakeDevice) -> None:
    near = heap_on(device, "device", 1 << 20)
    out = memory_of(device, "host", 8 * BLOCK).view(8, BLOCK)
    refused = 0
    for number in range(100):
        batch = filled(near, 8)
        barrier = threading.Barrier(2)

        def free(batch: MemoryBatch = batch, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            near.batched_free(batch)

        thread = threading.Thread(target=free)
        thread.start()
        barrier.wait()
        stream: Any = device.stream()
        try:
            transfer = copy((batch, out), stream)
        except LifetimeError:
            refused += 1
        else:
            thread.join()
            require_sound(device, near)
            transfer.result()
        thread.join()
        device.streams.remove(stream)
        assert allocated(near) == [0], number
    assert near.memcheck()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_host_copies_in_a_forked_child() -> None:
    source = random_bytes(4 << 20, 1).view(64, -1)
    copy((source, torch.zeros_like(source))).result()  # the parent has its thread
    near = TensorMemoryAllocator(torch.zeros(8 << 20, dtype=torch.uint8))
    expected = source.numpy().tobytes()
    child = os.fork()  # torch's own threads are not there: it must not fill a large tensor
    if not child:
        signal.alarm(20)
        status = 1
        try:
            batch = near.batched_allocate([1 << 16], torch.uint8, 64)
            copy((source, batch)).result(15)
            arrived = near.buffer.numpy()[: source.nbytes]
            near.batched_free(batch)
            is_right = arrived.tobytes() == expected and not near.stats().allocated_bytes
            status = 0 if is_right else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
