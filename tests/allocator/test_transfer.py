"""Transfers: every byte where it should be, and no byte handed out before a copy has ended."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import (
    DIRECTIONS,
    PATHS_OF,
    POISON,
    WAYS,
    FakeDevice,
    FakeStream,
    filled,
    heap_on,
    memory_of,
    random_bytes,
    read,
    require_sound,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvheap import (
    BlockInUseError,
    BufferAllocator,
    DoubleFreeError,
    LazyMemoryAllocator,
    LifetimeError,
    MemoryBatch,
    MemoryFormat,
    MemoryObj,
    PagedTensorMemoryAllocator,
    PinMemoryAllocator,
    TensorMemoryAllocator,
    completion,
    planner,
    transfer_paths,
)
from kvheap.errors import TransferError
from kvheap.transfer import CopyPlan, Transfer, copy, offload, restore

BLOCK = 4096


def stream_of(device: FakeDevice, direction: str) -> FakeStream | None:
    return None if direction == "h2h" else device.stream()


def drain(device: FakeDevice) -> None:
    device.drain()
    device.peers[0].drain()


def allocated(*heaps: TensorMemoryAllocator) -> list[int]:
    return [heap.stats().allocated_bytes for heap in heaps]


@pytest.fixture
def by_queue(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Copies within the host are made by the queue's thread, when a test opens the gate."""
    gate = Gate()
    monkeypatch.setattr(transfer_paths, "SMALL_BYTES", 0)
    copy_on_host = transfer_paths.copy_on_host

    def held_up(pieces: Any) -> None:
        gate.wait()
        copy_on_host(pieces)

    monkeypatch.setattr(transfer_paths, "copy_on_host", held_up)
    return gate


class Gate:
    def __init__(self) -> None:
        self.opened = threading.Event()

    def wait(self) -> None:
        assert self.opened.wait(20)

    def open(self) -> None:
        self.opened.set()


# -- bytes -------------------------------------------------------------------------------------


@dataclass
class Places:
    """A layout of N blocks in two buffers: scattered on the device, in a row on the host."""

    source: torch.Tensor
    target: torch.Tensor
    starts: tuple[np.ndarray, np.ndarray]
    sizes: np.ndarray

    @classmethod
    def of(cls, device: FakeDevice, direction: str, sizes: np.ndarray, seed: int = 1) -> Places:
        kinds = DIRECTIONS[direction]
        count, slot = len(sizes), -(-int(sizes.max()) // 64) * 64
        rng = np.random.default_rng(seed)
        buffers, starts = [], []
        for kind in kinds:
            buffers.append(memory_of(device, kind, 2 * count * slot))
            if kind == "host" and direction != "h2h":
                starts.append(slot + np.cumsum(sizes) - sizes)
            else:
                room = 2 * slot - sizes
                starts.append(rng.permutation(count) * 2 * slot + rng.integers(0, room + 1))
        buffers[0].copy_(random_bytes(buffers[0].numel(), seed))
        return cls(buffers[0], buffers[1], (starts[0], starts[1]), sizes)

    def expected(self) -> torch.Tensor:
        """What a loop would make of the target."""
        found = self.target.clone()
        for source, target, size in zip(*self.starts, self.sizes, strict=True):
            found[target : target + size] = self.source[source : source + size]
        return found


@pytest.mark.parametrize("sizes", ["equal", "random", "single bytes"])
@pytest.mark.parametrize("by", ["addresses", "pointers"])
@pytest.mark.parametrize(("direction", "path"), [*WAYS, *((each, None) for each in DIRECTIONS)])
def test_pieces_arrive_and_nothing_else_changes(
    device: FakeDevice, direction: str, path: Any, by: str, sizes: str
) -> None:
    rng = np.random.default_rng(3)
    of_each = {
        "equal": np.full(90, 512),
        "random": rng.integers(1, 2000, 90),
        "single bytes": np.ones(90, np.int64),
    }[sizes]
    places = Places.of(device, direction, of_each)
    expected, before = places.expected(), places.source.clone()
    if by == "addresses":
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, of_each)
    else:
        names = {"host": "cpu", "device": "cuda:0", "peer": "cuda:1"}
        source, target = (names[kind] for kind in DIRECTIONS[direction])
        plan = CopyPlan.of_pointers(
            places.starts[0] + places.source.data_ptr(),
            places.starts[1] + places.target.data_ptr(),
            of_each,
            source,
            target,
            keep=[places.source, places.target],
        )
    transfer = copy(plan, stream_of(device, direction), path=path)
    assert transfer.result() is None
    assert (transfer.direction, transfer.num_bytes) == (direction, of_each.sum())
    assert transfer.path == path or path is None
    assert torch.equal(places.target, expected)
    assert torch.equal(places.source, before)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_pieces_are_copied_as_by_a_loop_of_memmove(device: FakeDevice, data: Any) -> None:
    direction, path = data.draw(st.sampled_from(WAYS))
    gaps = st.sampled_from([0, 0, 0, 1, 3, 8, 64])
    rows = data.draw(st.lists(st.tuples(gaps, gaps, st.integers(0, 300)), min_size=1, max_size=40))
    gap, target_gap, sizes = (np.array([row[at] for row in rows]) for at in range(3))
    if path == "staged":  # as one run on the host, which it is for
        gap, target_gap = (gap, 0 * gap) if direction == "d2h" else (0 * gap, target_gap)
    places = [np.cumsum(each + sizes) - sizes for each in (gap, target_gap)]
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    places, sizes = [places[0][order], places[1][order]], sizes[order]
    buffers = [memory_of(device, kind, 20_000) for kind in DIRECTIONS[direction]]
    buffers[0].copy_(random_bytes(20_000, 1))
    expected = buffers[1].clone()
    for source, target, size in zip(*places, sizes, strict=True):
        ctypes.memmove(
            expected.data_ptr() + int(target), buffers[0].data_ptr() + int(source), int(size)
        )
    plan = CopyPlan.of_addresses(*buffers, *places, sizes)
    stream = stream_of(device, direction)
    copy(plan, stream, path=path).result()
    assert torch.equal(buffers[1], expected)


def blocks_of(
    heap: TensorMemoryAllocator, how: str, count: int, shape: list[int]
) -> MemoryBatch | list[MemoryObj]:
    """Blocks in a row, or objects of three batches that are no neighbours."""
    if how == "batch":
        batch = heap.batched_allocate(shape, torch.float32, count)
        assert batch is not None
        return batch
    batches = [heap.batched_allocate(shape, torch.float32, count) for _ in range(3)]
    found = [batch[row] for row in range(0, count, 2) for batch in batches if batch is not None]
    return found[:count]


@pytest.mark.parametrize(
    ("source_is", "target_is"),
    [
        ("batch", "batch"),
        ("objects", "batch"),
        ("batch", "objects"),
        ("objects", "objects"),
        ("batch", "tensor"),
        ("objects", "tensor"),
        ("tensor", "batch"),
        ("tensor", "objects"),
        ("tensor", "tensor"),
        ("batch", "bytes"),
        ("bytes", "objects"),
    ],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [[4, 256], [5, 100]])
def test_blocks_and_tensors_arrive(
    device: FakeDevice, direction: str, source_is: str, target_is: str, shape: list[int]
) -> None:
    count = 24
    size_bytes = 4 * shape[0] * shape[1]
    sides: list[Any] = []
    memories: list[torch.Tensor] = []
    for kind, what in zip(DIRECTIONS[direction], (source_is, target_is), strict=True):
        if what in ("batch", "objects"):
            heap = heap_on(device, kind, 1 << 20)
            sides.append(blocks_of(heap, what, count, shape))
            memories.append(heap.buffer)
        else:
            memories.append(memory_of(device, kind, count * (size_bytes + 64)))
            rows = memories[-1].view(count, -1)[:, :size_bytes]  # each 64 bytes behind the other
            sides.append(rows if what == "bytes" else rows.view(torch.float32).unflatten(1, shape))
    contents = random_bytes(count * size_bytes, 5).view(count, size_bytes)
    if source_is in ("batch", "objects"):
        write((block for block in sides[0]), contents.view(torch.float32).unflatten(1, shape))
    else:
        sides[0].copy_(
            contents if source_is == "bytes" else contents.view(torch.float32).unflatten(1, shape)
        )
    before = memories[0].clone()
    copy((sides[0], sides[1]), stream_of(device, direction)).result()
    assert torch.equal(memories[0], before)
    if target_is in ("batch", "objects"):
        assert torch.equal(read(sides[1]), contents)
        for block in sides[1]:  # with the padding, which is the block's
            start = block.address
            memories[1][start : start + -(-size_bytes // BLOCK) * BLOCK] = POISON
    else:
        arrived = memories[1].view(count, -1)
        assert torch.equal(arrived[:, :size_bytes], contents)
        arrived[:, :size_bytes] = POISON
    assert (memories[1] == POISON).all()


@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d", "h2h"])
def test_the_paths_take_what_they_are_told(device: FakeDevice, direction: str) -> None:
    places = Places.of(device, direction, np.full(64, 256))
    plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
    for path in ("kernel", "copy_engine", "staged", "host"):
        stream = stream_of(device, direction)
        if path not in PATHS_OF[direction]:
            with pytest.raises(ValueError, match=r"cannot (take|be taken)"):
                copy(plan, stream, path=path)  # type: ignore[arg-type]
            assert device.is_idle
            continue
        for max_sms in (None, 3):
            device.calls.clear()
            copy(plan, stream, path=path, max_sms=max_sms).result()  # type: ignore[arg-type]
            kinds = {call[0] for call in device.calls}
            assert (
                kinds
                == {
                    "kernel": {"run"},
                    "copy_engine": {"copy_batch"},
                    "staged": {"run", "copy_each"},
                    "host": set(),
                }[path]
            )
            default = None if direction == "d2d" else 8
            asked = {call[3] for call in device.calls if call[0] == "run"}
            assert asked <= {max_sms or default}
            assert {call[3] for call in device.calls if call[0] == "copy_batch"} <= {direction}


def test_a_staged_copy_moves_large_pieces_over_the_link(device: FakeDevice) -> None:
    places = Places.of(device, "d2h", np.full(128, 512))
    plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 512)
    expected = places.expected()
    copy(plan, device.stream(), path="staged").result()
    assert torch.equal(places.target, expected)
    moved = [pieces for name, pieces, *_ in device.calls if name == "copy_each"]
    assert [len(pieces) for pieces in moved] == [1] * 4
    assert [pieces.num_bytes for pieces in moved] == [16384] * 4


def test_staging_is_let_go_when_the_copy_has_ended(device: FakeDevice) -> None:
    places = Places.of(device, "d2h", np.full(128, 512))
    plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 512)
    transfer = copy(plan, device.stream(), path="staged")
    assert device.held_staging == 1
    gc.collect()
    transfer.result()
    assert device.held_staging == 0


@pytest.mark.parametrize("path", PATHS_OF["d2h"])
def test_staging_takes_the_heaps_own_bytes_and_gives_them_back(
    device: FakeDevice, path: Any
) -> None:
    near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
    batch = filled(near, 64)
    scattered = batch[::2]
    before = allocated(near)[0]
    away = offload(scattered, far, device.stream(), path=path)
    assert away is not None
    assert (allocated(near)[0] > before) == (path == "staged")
    require_sound(device, near, far)
    away.transfer.result()
    assert allocated(near)[0] == before
    assert torch.equal(read(away), read(scattered))


def test_staging_does_without_the_heap_where_that_is_full(device: FakeDevice) -> None:
    near, far = heap_on(device, "device", 64 * BLOCK), heap_on(device, "host", 1 << 20)
    batch = filled(near, 64)
    away = offload(batch[::2], far, device.stream(), path="staged")
    assert away is not None
    assert device.held_staging == 1
    away.transfer.result()
    assert torch.equal(read(away), read(batch[::2]))


def test_staging_out_of_a_heap_of_small_pages(device: FakeDevice) -> None:
    pages = PagedTensorMemoryAllocator(device.tensor(64 * BLOCK), [BLOCK], torch.uint8)
    far = heap_on(device, "host", 1 << 20)
    batch = filled(pages, 32)
    away = offload(batch[::2], far, device.stream(), path="staged")
    assert away is not None
    away.transfer.result()
    assert torch.equal(read(away), read(batch[::2]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("path", [None, "kernel", "copy_engine", "staged"])
def test_nothing_to_copy_is_copied_at_once(device: FakeDevice, direction: str, path: Any) -> None:
    source, target = (memory_of(device, kind, 4096) for kind in DIRECTIONS[direction])
    if path not in (None, *PATHS_OF[direction]):
        return
    for plan in (
        CopyPlan.of_addresses(source, target, [], [], []),
        CopyPlan.of_addresses(source, target, [8, 16], [8, 16], 0),
        CopyPlan.between(source[:0].view(0, 8), target[:0].view(0, 8)),
    ):
        transfer = copy(plan, stream_of(device, direction), path=path)
        transfer.result()
        assert (transfer.num_bytes, transfer.num_runs) == (0, 0)
    assert (target == POISON).all()


# -- what a transfer is ------------------------------------------------------------------------


@dataclass
class InFlight:
    """A transfer of 40 blocks of which nothing is done before its device runs."""

    device: FakeDevice
    source: torch.Tensor
    target: torch.Tensor
    transfer: Transfer
    finish: Callable[[], None]
    num_parts: int


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def flying(
    request: pytest.FixtureRequest, device: FakeDevice, by_queue: Gate
) -> Iterator[InFlight]:
    direction, path = request.param
    places = Places.of(device, direction, np.full(64, 512))
    places.target.fill_(POISON)
    plan = CopyPlan.of_addresses(
        places.source, places.target, *places.starts, 512, parts=[32, 0, 32]
    )
    transfer = copy(plan, stream_of(device, direction), path=path)

    def finish() -> None:
        by_queue.open()
        drain(device)

    yield InFlight(device, places.expected(), places.target, transfer, finish, 3)
    finish()


class TestTransfer:
    def test_returns_at_once(self, flying: InFlight) -> None:
        transfer = flying.transfer
        assert (flying.target == POISON).all()
        assert not transfer.done()
        assert [part.done() for part in transfer.parts] == [False] * 3
        assert not transfer.wait(0.001)
        with pytest.raises(TimeoutError, match=r"in flight\) has not ended in 0.001 s"):
            transfer.result(0.001)
        with pytest.raises(TimeoutError):
            transfer.result(0)
        assert (flying.target == POISON).all()
        flying.finish()
        assert transfer.wait(20)
        assert transfer.done()
        assert [part.done() for part in transfer.parts] == [True] * 3
        assert transfer.result() is None
        assert torch.equal(flying.target, flying.source)

    def test_wait_without_a_timeout_does_the_work(self, flying: InFlight) -> None:
        if flying.transfer.path == "host":
            threading.Timer(0.02, flying.finish).start()
        assert flying.transfer.wait()
        assert torch.equal(flying.target, flying.source)

    def test_wait_with_a_timeout_waits_for_others(self, flying: InFlight) -> None:
        threading.Timer(0.02, flying.finish).start()
        assert flying.transfer.wait(20)
        assert torch.equal(flying.target, flying.source)

    def test_a_part_can_be_waited_for(self, flying: InFlight) -> None:
        if flying.transfer.path == "host":
            flying.finish()
        flying.transfer.parts[0].wait()
        assert flying.transfer.parts[0].done()
        if flying.transfer.path != "host":
            assert not flying.transfer.parts[2].done()
            assert not flying.transfer.done()
        flying.transfer.parts[2].wait()
        assert flying.transfer.done()
        assert torch.equal(flying.target, flying.source)

    @pytest.mark.parametrize("part", [None, 0, 2])
    def test_a_stream_waits(self, flying: InFlight, part: int | None) -> None:
        if flying.transfer.path == "host":
            threading.Timer(0.02, flying.finish).start()
        device = flying.device
        stream = device.stream()
        seen: list[torch.Tensor] = []
        waited = flying.transfer if part is None else flying.transfer.parts[part]
        waited.wait_stream(stream)  # type: ignore[arg-type]
        stream.queue.append(("work", lambda: seen.append(flying.target.clone())))
        assert flying.transfer.path == "host" or not flying.transfer.done()
        while device.run_one(stream):
            pass
        if part == 0:
            assert not torch.equal(seen[0], torch.full_like(seen[0], POISON))
        else:
            assert torch.equal(seen[0], flying.source)

    def test_a_wrong_stream_changes_nothing(self, flying: InFlight) -> None:
        if flying.transfer.path == "host":
            return
        with pytest.raises(TypeError, match="stream must be"):
            flying.transfer.wait_stream("7")  # type: ignore[arg-type]
        assert not flying.transfer.done()

    def test_leaving_its_context_waits(self, flying: InFlight) -> None:
        if flying.transfer.path == "host":
            threading.Timer(0.02, flying.finish).start()
        with flying.transfer as entered:
            assert entered is flying.transfer
            assert not flying.transfer.done()
        assert flying.transfer.done()
        assert torch.equal(flying.target, flying.source)

    def test_leaving_its_context_by_an_error_waits_too(self, flying: InFlight) -> None:
        if flying.transfer.path == "host":
            threading.Timer(0.02, flying.finish).start()
        with pytest.raises(ZeroDivisionError), flying.transfer:
            _ = 1 // 0
        assert flying.transfer.done()
        assert torch.equal(flying.target, flying.source)

    def test_its_name(self, flying: InFlight) -> None:
        transfer = flying.transfer
        head = f"Transfer({transfer.direction} by {transfer.path}, 32768 bytes in "
        assert repr(transfer).startswith(head)
        assert repr(transfer).endswith(f"{transfer.num_runs} runs, in flight)")
        assert repr(transfer.parts[1]) == "Part(1)"
        flying.finish()
        transfer.result()
        assert repr(transfer).endswith("runs, ended)")

    def test_it_can_be_dropped(self, flying: InFlight) -> None:
        del flying.transfer
        gc.collect()
        flying.finish()
        completion.host_queue.run([lambda: None], False)[0].synchronize()
        assert torch.equal(flying.target, flying.source)


def test_two_are_awaited_at_once(device: FakeDevice) -> None:
    both = [Places.of(device, direction, np.full(32, 256)) for direction in ("d2h", "h2d")]
    order = []

    async def awaited(number: int, transfer: Transfer) -> None:
        await transfer
        assert transfer.done()
        order.append(number)

    async def main() -> None:
        streams = [device.stream(), device.stream()]
        tasks = []
        for number, places in enumerate(both):
            plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
            transfer = copy(plan, streams[number])
            assert not transfer.done()
            tasks.append(asyncio.ensure_future(awaited(number, transfer)))
        await asyncio.sleep(0.01)
        assert order == []
        while device.run_one(streams[1]):
            pass
        await asyncio.wait_for(tasks[1], 20)
        assert order == [1]
        drainer = threading.Thread(target=device.drain)
        drainer.start()
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        drainer.join()

    expected = [places.expected() for places in both]
    asyncio.run(main())
    for places, bytes_of in zip(both, expected, strict=True):
        assert torch.equal(places.target, bytes_of)


def test_awaiting_one_that_failed_raises(device: FakeDevice) -> None:
    places = Places.of(device, "d2h", np.full(32, 256))
    plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
    device.fail("copy_batch")

    async def main() -> None:
        await copy(plan, device.stream(), path="copy_engine")

    threading.Timer(0.02, device.drain).start()
    with pytest.raises(TransferError, match="fault"):
        asyncio.run(main())


# -- parts -------------------------------------------------------------------------------------

LAYERED = {
    # Format: shape, and the index of layer i in a tensor [N, *shape].
    MemoryFormat.KV_2LTD: ([2, 4, 6, 32], lambda kv, layer: kv[:, :, layer]),
    MemoryFormat.KV_MLA_FMT: ([1, 4, 6, 32], lambda kv, layer: kv[:, :, layer]),
    MemoryFormat.KV_2TLD: ([2, 6, 4, 32], lambda kv, layer: kv[:, :, :, layer]),
    MemoryFormat.KV_PL2TD: ([3, 4, 2, 6, 32], lambda kv, layer: kv[:, :, layer]),
}


@pytest.mark.parametrize(("direction", "path"), WAYS)
@pytest.mark.parametrize("fmt", LAYERED, ids=[fmt.name for fmt in LAYERED])
def test_layers_come_one_after_another(
    device: FakeDevice, by_queue: Gate, direction: str, path: Any, fmt: MemoryFormat
) -> None:
    shape, layer_of = LAYERED[fmt]
    count, dtype = 5, torch.float16
    near, far = (heap_on(device, kind, 1 << 20) for kind in DIRECTIONS[direction])
    kv = random_bytes(count * 2 * int(np.prod(shape)), 2).view(dtype).view(count, *shape)
    batch = near.batched_allocate(shape, dtype, count, fmt)
    target = far.batched_allocate(shape, dtype, count, fmt)
    assert batch is not None
    assert target is not None
    write(batch, kv)
    far.buffer.fill_(POISON)
    plan = CopyPlan.between(batch, target, by_layer=True)
    stream = stream_of(device, direction)
    if path == "staged" and plan.num_host_runs * 8 > plan.num_runs:
        return
    transfer = copy(plan, stream, path=path)
    assert len(transfer.parts) == 4
    if direction == "h2h":
        by_queue.open()
        transfer.result()
    for layer, part in enumerate(transfer.parts):
        assert part.done() == (direction == "h2h")
        part.wait()
        arrived = read(target).view(dtype).view(count, *shape)
        for at in range(layer + 1):
            assert torch.equal(
                layer_of(arrived, at).contiguous().view(torch.uint8),
                layer_of(kv, at).contiguous().view(torch.uint8),
            )
        if direction != "h2h":
            for at in range(layer + 1, 4):
                assert (layer_of(arrived, at).contiguous().view(torch.uint8) == POISON).all()
    transfer.result()
    assert torch.equal(read(target), read(batch))


def test_formats_without_layers_are_refused(device: FakeDevice) -> None:
    near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
    for shape, dtype, fmt in (
        ([2, 6, 32], torch.float16, MemoryFormat.KV_2TD),
        ([6, 2, 32], torch.float16, MemoryFormat.KV_T2D),
        ([64], torch.uint8, MemoryFormat.BINARY),
        ([[2, 4, 6, 32], [4]], [torch.float16, torch.float16], MemoryFormat.KV_2LTD),
        ([2], torch.float16, MemoryFormat.KV_2LTD),
    ):
        batch = near.batched_allocate(shape, dtype, 3, fmt)
        assert batch is not None
        with pytest.raises(ValueError, match=r"not kept layer by layer|cannot be read as"):
            offload(batch, far, device.stream(), by_layer=True)
        with pytest.raises(ValueError, match=r"not kept layer by layer|cannot be read as"):
            restore(batch, far, device.stream(), by_layer=True, free=True)
        assert batch.live.all()
    rows = memory_of(device, "host", 64).view(4, 16)
    with pytest.raises(ValueError, match="two tensors have no layers"):
        CopyPlan.between(rows, rows.clone(), by_layer=True)
    assert allocated(far) == [0]
    assert device.is_idle


# -- protection --------------------------------------------------------------------------------


def in_a_row(heap: TensorMemoryAllocator, count: int) -> tuple[MemoryBatch, None]:
    return filled(heap, count), None


def scattered(heap: TensorMemoryAllocator, count: int) -> tuple[MemoryBatch, list[MemoryObj]]:
    """Blocks that are no neighbours, and what is between them, of a heap that is then full."""
    room = filled(heap, 2 * count)
    heap.batched_free(room[::2])
    return filled(heap, count), room[1::2]


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
        assert batch._streams is not None
        assert len(batch._streams) <= 16
        assert len(completion.in_flight) <= 64
        near.batched_free(batch)
        assert allocated(near) == [0]

    def test_a_copy_that_was_lost_is_never_forgotten(self, device: FakeDevice) -> None:
        near = heap_on(device, "device", 8 * BLOCK)
        out = memory_of(device, "host", 8 * BLOCK).view(8, BLOCK)
        batch = filled(near, 8)
        lost = copy((batch, out), device.stream())
        device.fail("event.query")
        with pytest.raises(TransferError, match="cannot be asked"):
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


# -- there and back ----------------------------------------------------------------------------


@dataclass
class Tiers:
    device: FakeDevice
    near: TensorMemoryAllocator
    far: TensorMemoryAllocator


@pytest.fixture
def tiers(device: FakeDevice) -> Tiers:
    return Tiers(device, heap_on(device, "device", 1 << 18), heap_on(device, "host", 1 << 18))


class TestOffload:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("path", [None, "kernel", "copy_engine", "staged"])
    @pytest.mark.parametrize("free", [False, True])
    @pytest.mark.parametrize("objects", [False, True])
    def test_there_and_back(
        self, device: FakeDevice, direction: str, path: Any, free: bool, objects: bool
    ) -> None:
        if path not in (None, *PATHS_OF[direction]):
            return
        count = 24
        near, far = (heap_on(device, kind, 2 * count * BLOCK) for kind in DIRECTIONS[direction])
        batch, room = (in_a_row if direction == "h2d" else scattered)(near, count)
        if direction == "h2d":  # staging is for what is scattered on the device
            hole, room = scattered(far, count)
            far.batched_free(hole)
        contents = read(batch)
        before, other_bytes = allocated(near)[0], count * BLOCK * (direction != "h2d")
        moved = offload(
            list(batch) if objects else batch,
            far,
            stream_of(device, direction),
            free=free,
            path=path,
        )
        assert moved is not None
        assert (moved.layout, len(moved)) == (batch.layout, count)
        assert (~batch.live).all() if free else batch.live.all()
        assert moved.transfer is not None
        assert moved.transfer.direction == direction
        moved.transfer.result()
        assert allocated(near)[0] == (other_bytes if free else before)
        assert torch.equal(read(moved), contents)
        if direction == "p2p":
            return  # the peer has no stream here
        if not free:
            near.batched_free(batch)
        back_way = {"h2d": "d2h", "d2h": "h2d"}.get(direction, direction)
        back = restore(moved, near, stream_of(device, back_way), free=True)
        assert back is not None
        assert not moved.live.any()
        assert back.transfer is not None
        back.transfer.result()
        assert torch.equal(read(back), contents)
        del room

    def test_a_full_target_changes_nothing(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 8)
        filler = filled(tiers.far, 60)
        before = tiers.far.snapshot().tolist()
        assert offload(batch, tiers.far, tiers.device.stream(), free=True) is None
        assert tiers.far.snapshot().tolist() == before
        assert batch.live.all()
        assert tiers.device.calls == []
        tiers.far.batched_free(filler)
        assert offload(batch, tiers.far, tiers.device.stream(), free=True) is not None

    @pytest.mark.parametrize("free", [False, True])
    @pytest.mark.parametrize("objects", [False, True])
    def test_the_first_ones_that_fit(self, tiers: Tiers, free: bool, objects: bool) -> None:
        batch = filled(tiers.near, 8)
        filled(tiers.far, 61).detach()
        contents = read(batch)
        moved = offload(
            list(batch) if objects else batch,
            tiers.far,
            tiers.device.stream(),
            free=free,
            allow_partial=True,
        )
        assert moved is not None
        moved.transfer.result()
        assert torch.equal(read(moved), contents[:3])
        assert batch.live.tolist() == [not free] * 3 + [True] * 5
        assert allocated(tiers.near) == [(5 if free else 8) * BLOCK]

    @pytest.mark.parametrize("path", [None, "copy_engine", "kernel"])
    def test_nothing_fits(self, tiers: Tiers, path: Any) -> None:
        batch = filled(tiers.near, 8)
        filled(tiers.far, 64).detach()
        stream = tiers.device.stream()
        moved = offload(batch, tiers.far, stream, free=True, allow_partial=True, path=path)
        assert moved is not None
        assert len(moved) == 0
        moved.transfer.result()
        assert batch.live.all()

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("with_stream", [False, True])
    @pytest.mark.parametrize("free", [False, True])
    def test_an_empty_batch(
        self, device: FakeDevice, direction: str, with_stream: bool, free: bool
    ) -> None:
        source, target = (heap_on(device, kind, 1 << 16) for kind in DIRECTIONS[direction])
        empty = source.batched_allocate([BLOCK], torch.uint8, 0)
        assert empty is not None
        stream = stream_of(device, direction) if with_stream else None
        moved = offload(empty, target, stream, free=free)
        assert moved is not None
        assert len(moved) == 0
        moved.transfer.result()
        assert moved.transfer.num_bytes == 0
        with pytest.raises(ValueError, match="no block"):
            offload([], target, stream)

    def test_freed_bytes_come_back_at_the_end(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 64)
        moved = offload(batch, tiers.far, tiers.device.stream(), free=True)
        assert moved is not None
        assert not batch.live.any()
        assert batch[0].tensor is None
        with pytest.raises(DoubleFreeError):
            tiers.near.batched_free(batch)
        assert tiers.near.stats().pending_bytes == 64 * BLOCK
        assert tiers.near.batched_allocate([BLOCK], torch.uint8, 1) is None
        tiers.device.drain()
        assert tiers.near.stats().pending_bytes == 0
        assert allocated(tiers.near) == [0]

    def test_what_is_given_up_waits_for_other_streams_too(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 4)
        other, stream = tiers.device.stream(), tiers.device.stream()
        other.queue.append(("work", lambda: None))
        batch.record_stream(other)
        moved = offload(batch, tiers.far, stream, free=True)
        assert moved is not None
        while tiers.device.run_one(stream):
            pass
        moved.transfer.result()
        assert allocated(tiers.near) == [4 * BLOCK]
        tiers.device.drain()
        assert allocated(tiers.near) == [0]

    @pytest.mark.parametrize("objects", [False, True])
    @pytest.mark.parametrize(
        ("spoil", "error"),
        [
            (lambda heap, batch: batch[2].pin(), BlockInUseError),
            (lambda heap, batch: batch[2].ref_count_up(), BlockInUseError),
            (lambda heap, batch: heap.free(batch[2]), (DoubleFreeError, LifetimeError)),
        ],
        ids=["pinned", "referenced", "freed"],
    )
    def test_what_is_not_the_callers_alone_is_not_given_up(
        self, tiers: Tiers, spoil: Callable[..., None], error: Any, objects: bool
    ) -> None:
        batch = filled(tiers.near, 6)
        contents = tiers.near.buffer.clone()
        spoil(tiers.near, batch)
        live = batch.live.tolist()
        counts = batch.ref_counts.tolist()
        with pytest.raises(error):
            offload(list(batch) if objects else batch, tiers.far, tiers.device.stream(), free=True)
        assert batch.live.tolist() == live
        assert batch.ref_counts.tolist() == counts
        assert allocated(tiers.far) == [0]
        assert torch.equal(tiers.near.buffer, contents)
        assert tiers.device.calls == []
        assert tiers.near.stats().pending_bytes == 0

    def test_one_batch_of_several_refuses_all(self, tiers: Tiers) -> None:
        first, second = filled(tiers.near, 3), filled(tiers.near, 3)
        second[1].pin()
        with pytest.raises(BlockInUseError):
            offload([*first, *second], tiers.far, tiers.device.stream(), free=True)
        assert first.live.all()
        assert second.live.all()
        tiers.near.batched_free(first)
        assert allocated(tiers.near, tiers.far) == [3 * BLOCK, 0]

    def test_an_object_named_twice(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 3)
        with pytest.raises(DoubleFreeError, match="named twice"):
            offload([batch[0], batch[1], batch[0]], tiers.far, tiers.device.stream(), free=True)
        assert batch.live.all()
        twice = offload([batch[0], batch[0]], tiers.far, tiers.device.stream())
        assert twice is not None
        twice.transfer.result()
        assert torch.equal(twice[1].tensor, batch[0].tensor)

    def test_several_groups(self, tiers: Tiers) -> None:
        shapes, dtypes = [[2, 4, 8, 16], [5]], [torch.float16, torch.int16]
        batch = tiers.near.batched_allocate(shapes, dtypes, 7)
        assert batch is not None
        rows = random_bytes(7 * batch.size_bytes, 3).view(7, -1)
        for block, row in zip(batch, rows, strict=True):
            tiers.near.buffer[block.address : block.address + batch.size_bytes] = row
        away = offload(batch, tiers.far, tiers.device.stream(), free=True)
        assert away is not None
        back = restore(away, tiers.near, tiers.device.stream(), free=True)
        assert back is not None
        back.transfer.result()
        assert back.layout == batch.layout
        for block, row in zip(back, rows, strict=True):
            found = tiers.near.buffer[block.address : block.address + batch.size_bytes]
            assert torch.equal(found, row)
        assert allocated(tiers.far) == [0]

    def test_what_the_target_cannot_hold_is_refused(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 3)
        buffers = BufferAllocator()
        with pytest.raises((TypeError, ValueError)):
            offload(batch, buffers, tiers.device.stream(), free=True)
        assert buffers.leaks() == ()
        assert batch.live.all()
        for wrong in ({"path": "fast"}, {"max_sms": 0}, {"path": "host"}):
            with pytest.raises(ValueError, match=r"path|max_sms"):
                offload(batch, tiers.far, tiers.device.stream(), free=True, **wrong)
        with pytest.raises(TypeError):
            offload(batch, tiers.far, "stream", free=True)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            copy(batch)  # type: ignore[arg-type]
        assert allocated(tiers.far) == [0]
        assert batch.live.all()
        tiers.far.close()
        with pytest.raises(RuntimeError, match="closed"):
            offload(batch, tiers.far, tiers.device.stream(), free=True)
        assert batch.live.all()

    def test_of_a_batch_whose_transfer_failed(self, tiers: Tiers) -> None:
        device = tiers.device
        batch = filled(tiers.near, 8)
        target = offload(batch, tiers.far, device.stream())
        assert target is not None
        device.fail("event.query")
        assert target.transfer.done()
        before = allocated(tiers.near)
        for blocks in (target, list(target)):
            with pytest.raises(TransferError):
                restore(blocks, tiers.near, device.stream(), free=True)
        with pytest.raises(TransferError):
            copy((target, batch), device.stream())
        assert allocated(tiers.near) == before
        assert target.live.all()

    def test_of_a_host_copy_that_failed(
        self, tiers: Tiers, monkeypatch: pytest.MonkeyPatch, by_queue: Gate
    ) -> None:
        other = heap_on(tiers.device, "host", 1 << 18)
        batch = filled(tiers.far, 8)

        def fails(pieces: object) -> None:
            by_queue.wait()
            raise MemoryError("no room for the copy")

        monkeypatch.setattr(transfer_paths, "copy_on_host", fails)
        moved = offload(batch, other, free=True)
        assert moved is not None
        assert not batch.live.any()
        chained = offload(moved, heap_on(tiers.device, "host", 1 << 18))
        assert chained is not None
        by_queue.open()
        for failed in (moved, chained):
            with pytest.raises(TransferError, match="no room for the copy"):
                failed.transfer.result()
        assert batch.live.all()  # what was given up for a copy that failed is live again
        assert torch.equal(read(batch), random_bytes(8 * BLOCK, 0).view(8, -1))
        with pytest.raises(TransferError, match="no room"):
            restore(moved, tiers.near, tiers.device.stream())
        tiers.far.batched_free(batch)
        other.batched_free(moved)
        assert allocated(tiers.far, other, tiers.near) == [0, 0, 0]

    def test_another_copy_that_was_lost_is_not_its_own(self, tiers: Tiers) -> None:
        device, batch = tiers.device, filled(tiers.near, 4)
        out = memory_of(device, "host", 4 * BLOCK).view(4, BLOCK)
        lost = copy((batch, out), device.stream())
        away = offload(batch, tiers.far, device.stream(), free=True)
        assert away is not None
        device.fail("event.query")
        assert lost.done()
        away.transfer.result()
        assert not batch.live.any()
        assert allocated(tiers.near) == [4 * BLOCK]  # the lost one may still read them


class TestHeapsThatWatch:
    """Heaps that wipe or poison what is freed, or grow."""

    @pytest.mark.parametrize("options", [{"debug": True}, {"scrub": True}], ids=str)
    def test_there_and_back(self, device: FakeDevice, options: dict[str, bool]) -> None:
        how: Any = {"stream_wait_s": 0, "on_full": None, **options}
        near = TensorMemoryAllocator(device.tensor(1 << 16), **how)
        far = TensorMemoryAllocator(device.pinned_tensor(1 << 16), **how)
        batch = filled(near, 16, seed=5)
        expected = read(batch).clone()
        for path in ("copy_engine", "kernel", "staged", None):
            stream: Any = device.stream()
            away = offload(batch, far, stream, free=True, path=path)
            assert away is not None
            batch = restore(away, near, stream, free=True, path=path)  # type: ignore[assignment]
            assert batch is None  # no room before the copies have ended
            away.transfer.result()
            batch = restore(away, near, stream, free=True, path="copy_engine")  # type: ignore[assignment]
            batch.transfer.result()  # type: ignore[union-attr]
            assert torch.equal(read(batch), expected)
        near.batched_free(batch)
        assert allocated(near, far) == [0, 0]
        if "scrub" in options:
            assert not near.buffer.any()
            assert not far.buffer.any()

    def test_into_a_heap_that_grows(self, device: FakeDevice) -> None:
        near = heap_on(device, "device", 64 * BLOCK)
        registrar: Any = Registrar(device)
        piece = 16 * BLOCK
        with LazyMemoryAllocator(piece, 4 * piece, piece_bytes=piece, registrar=registrar) as far:
            far.wait_until_grown(20)
            assert len(far.host_buffer.pinned_ranges) == 4
            batch = filled(near, 64, seed=6)
            expected = read(batch).clone()
            away = offload(batch, far, device.stream(), free=True)  # type: ignore[arg-type]
            assert away is not None
            assert away.transfer.num_runs == 4  # none straddles two registrations
            away.transfer.result()
            assert torch.equal(read(away), expected)
            far.batched_free(away)


class TestOneAfterAnother:
    @pytest.mark.parametrize("away_path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("back_path", [None, *PATHS_OF["h2d"]])
    def test_back_while_it_is_on_its_way(
        self, device: FakeDevice, away_path: Any, back_path: Any
    ) -> None:
        near, far = heap_on(device, "device", 64 * BLOCK), heap_on(device, "host", 24 * BLOCK)
        whole = filled(near, 64)
        contents = read(whole[:48:2])
        first, second = device.stream(), device.stream()
        away = offload(whole[:48:2], far, first, free=True, path=away_path)
        assert away is not None
        near.batched_free(whole[48::2])  # scattered room
        back = restore(away[:8], near, second, path=None if back_path == "staged" else back_path)
        assert back is not None
        assert not away.transfer.done()
        require_sound(device, near, far)
        while device.run_one(second):
            pass
        back.transfer.result()
        assert away.transfer.done()
        assert torch.equal(read(back), contents[:8])

    def test_of_several_that_are_on_their_way(self, device: FakeDevice) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        batches = [filled(near, 4, seed=seed) for seed in range(5)]
        moved = [offload(batch, far, device.stream(), free=True) for batch in batches]
        objects = [batch[1] for batch in moved if batch is not None]
        last = device.stream()
        back = restore(objects, near, last)
        assert back is not None
        while device.run_one(last):
            pass
        expected = [random_bytes(4 * BLOCK, seed).view(4, -1)[1] for seed in range(5)]
        assert torch.equal(read(back), torch.stack(expected))

    def test_to_another_place_of_the_host_meanwhile(
        self, device: FakeDevice, by_queue: Gate
    ) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        plain = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
        batch = filled(near, 8)
        contents = read(batch)
        away = offload(batch, far, device.stream(), free=True)
        assert away is not None
        further = offload(away, plain, free=True)
        assert further is not None
        assert further.transfer.direction == "h2h"
        assert not further.transfer.done()
        by_queue.open()
        further.transfer.result()
        assert away.transfer.done()
        assert torch.equal(read(further), contents)
        assert allocated(near, far) == [0, 0]

    def test_from_another_place_of_the_host_meanwhile(
        self, device: FakeDevice, by_queue: Gate
    ) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        plain = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
        batch = filled(plain, 8)
        contents = read(batch)
        pinned = offload(batch, far, free=True)
        assert pinned is not None
        threading.Timer(0.02, by_queue.open).start()
        back = restore(pinned, near, device.stream(), free=True)
        assert back is not None
        back.transfer.result()
        assert torch.equal(read(back), contents)
        assert allocated(plain, far) == [0, 0]

    def test_between_devices(self, device: FakeDevice, peer: FakeDevice) -> None:
        near, there = heap_on(device, "device", 1 << 20), heap_on(device, "peer", 1 << 20)
        far = heap_on(device, "host", 1 << 20)
        batch = filled(near, 8)
        contents = read(batch)
        moved = offload(batch, there, device.stream(), free=True)
        assert moved is not None
        assert moved.transfer.direction == "p2p"
        away = offload(moved, far, peer.stream(), free=True)  # on a stream of the other device
        assert away is not None
        away.transfer.result()
        assert torch.equal(read(away), contents)

    def test_a_stream_of_the_target_waits(self, device: FakeDevice, peer: FakeDevice) -> None:
        near, there = heap_on(device, "device", 1 << 20), heap_on(device, "peer", 1 << 20)
        batch = filled(near, 8)
        moved = offload(batch, there, device.stream())
        assert moved is not None
        stream = peer.stream()
        moved.transfer.wait_stream(stream)  # type: ignore[arg-type]
        while peer.run_one(stream):
            pass
        assert torch.equal(read(moved), read(batch))


# -- streams -----------------------------------------------------------------------------------


class TestOrder:
    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    def test_work_queued_before_the_copy_is_seen(self, device: FakeDevice, path: Any) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        whole = filled(near, 64)
        blocks = whole[::2]
        stream = device.stream()
        stream.queue.append(("work", lambda: near.buffer[: 64 * BLOCK].fill_(3)))
        away = offload(blocks, far, stream, path=path)
        assert away is not None
        while device.run_one(device.side):
            pass
        away.transfer.result()
        assert (read(away) == 3).all()

    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("to", ["host", "peer"])
    def test_another_stream_waits_for_the_current_one(
        self, device: FakeDevice, path: Any, to: str
    ) -> None:
        if to == "peer" and path not in (None, "copy_engine"):
            return
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, to, 1 << 20)
        whole = filled(near, 64)
        current, stream = device.stream(), device.stream()
        with device.using(current):
            current.queue.append(("work", lambda: near.buffer[: 64 * BLOCK].fill_(3)))
            away = offload(whole[::2], far, stream, path=path)
        assert away is not None
        for each in (device.side, stream):
            while device.run_one(each):
                pass
        assert (read(away) == 3).all()

    @pytest.mark.parametrize("path", [None, "kernel", "copy_engine"])
    def test_fresh_targets_may_still_be_read_on_the_current_stream(
        self, device: FakeDevice, path: Any
    ) -> None:
        near, far = heap_on(device, "device", 8 * BLOCK), heap_on(device, "host", 1 << 20)
        batch = filled(far, 8, seed=2)
        old = filled(near, 8, seed=1)
        current, stream = device.stream(), device.stream()
        seen: list[torch.Tensor] = []
        with device.using(current):
            current.queue.append(("work", lambda: seen.append(near.buffer.clone())))
            near.batched_free(old)
            back = restore(batch, near, stream, path=path)
        assert back is not None
        while device.run_one(stream):
            pass
        device.drain()
        assert torch.equal(seen[0], random_bytes(8 * BLOCK, 1))
        assert torch.equal(read(back), read(batch))

    def test_fresh_targets_on_another_device(self, device: FakeDevice, peer: FakeDevice) -> None:
        near, there = heap_on(device, "device", 1 << 20), heap_on(device, "peer", 8 * BLOCK)
        batch = filled(near, 8, seed=2)
        old = filled(there, 8, seed=1)
        seen: list[torch.Tensor] = []
        current = peer.stream()
        with peer.using(current):
            current.queue.append(("work", lambda: seen.append(there.buffer.clone())))
            there.batched_free(old)  # free for work on the peer's current stream
            moved = offload(batch, there, device.stream())
        assert moved is not None
        device.drain()
        peer.drain()
        assert torch.equal(seen[0], random_bytes(8 * BLOCK, 1))

    @pytest.mark.parametrize("direction", ["d2h", "h2d"])
    def test_extents_of_the_heap_may_still_be_read_on_the_current_stream(
        self, device: FakeDevice, direction: str
    ) -> None:
        heap = heap_on(device, "device", 96 * BLOCK)
        blocks = filled(heap, 64)[::2]
        old = filled(heap, 32, seed=1)
        out = memory_of(device, "host", 32 * BLOCK).view(32, BLOCK)
        current, stream = device.stream(), device.stream()
        seen: list[torch.Tensor] = []
        with device.using(current):
            current.queue.append(("work", lambda: seen.append(heap.buffer[64 * BLOCK :].clone())))
            heap.batched_free(old)
            pair = (blocks, out) if direction == "d2h" else (out, blocks)
            transfer = copy(pair, stream, path="staged")
        assert device.held_staging == 0  # it did take the heap's
        for each in (device.side, stream):
            while device.run_one(each):
                pass
        device.drain()
        assert torch.equal(seen[0], random_bytes(32 * BLOCK, 1))
        transfer.result()
        assert torch.equal(read(blocks), out)


class TestCapture:
    @pytest.fixture
    def pair(self, device: FakeDevice) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = memory_of(device, "device", 1 << 16), memory_of(device, "host", 1 << 16)
        source.copy_(random_bytes(1 << 16, 1))
        return source, target

    @staticmethod
    def plan_of(pair: tuple[torch.Tensor, torch.Tensor], count: int) -> CopyPlan:
        starts = np.arange(count) * 512
        return CopyPlan.of_addresses(*pair, starts, starts, 256)

    @pytest.fixture
    def capture(self, device: FakeDevice) -> FakeStream:
        stream = device.stream()
        stream.capturing = True
        return stream

    @staticmethod
    def replayed(device: FakeDevice, capture: FakeStream) -> None:
        capture.capturing = False
        assert device.is_idle
        capture.replay()

    @pytest.mark.parametrize("path", [None, "kernel", "staged"])
    def test_many_runs_are_refused(
        self, device: FakeDevice, capture: FakeStream, pair: Any, path: Any
    ) -> None:
        plan = self.plan_of(pair, 64)
        with pytest.raises(RuntimeError, match="captur"):
            copy(plan, capture, path=path)  # type: ignore[arg-type]
        assert capture.graph == []
        assert device.calls == []

    @pytest.mark.parametrize("path", [None, "kernel"])
    def test_a_prepared_plan_is_captured(self, device: FakeDevice, pair: Any, path: Any) -> None:
        plan = self.plan_of(pair, 64)
        with device.using(device.stream()):
            assert plan.prepare() is plan
        capture = device.stream()
        capture.capturing = True
        transfer = copy(plan, capture, path=path)  # type: ignore[arg-type]
        assert [call[0] for call in device.calls] == ["run"]
        assert device.counts["prepare"] == 1
        self.replayed(device, capture)
        assert transfer.path == "kernel"
        for start in range(0, 64 * 512, 512):
            assert torch.equal(pair[1][start : start + 256], pair[0][start : start + 256])
            assert (pair[1][start + 256 : start + 512] == POISON).all()

    @pytest.mark.parametrize(("count", "path"), [(1, None), (8, None), (20, "copy_engine")])
    def test_single_copies_are_captured(
        self, device: FakeDevice, capture: FakeStream, pair: Any, count: int, path: Any
    ) -> None:
        transfer = copy(self.plan_of(pair, count), capture, path=path)  # type: ignore[arg-type]
        assert [call[0] for call in device.calls] == ["copy_each"]
        assert transfer.path == "copy_engine"
        self.replayed(device, capture)
        starts = range(0, count * 512, 512)
        assert all(torch.equal(pair[1][at : at + 256], pair[0][at : at + 256]) for at in starts)

    def test_what_was_captured_has_no_end(
        self, device: FakeDevice, capture: FakeStream, pair: Any
    ) -> None:
        transfer = copy(self.plan_of(pair, 1), capture)  # type: ignore[arg-type]
        assert transfer.parts == ()
        assert repr(transfer).endswith("captured)")
        for ask in (
            transfer.done,
            transfer.wait,
            transfer.result,
            lambda: transfer.wait_stream(device.stream()),  # type: ignore[arg-type]
            lambda: asyncio.run(transfer._ended()),
        ):
            with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
                ask()
        with transfer:
            pass

    def test_what_is_on_its_way_cannot_be_captured(
        self, device: FakeDevice, capture: FakeStream
    ) -> None:
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        away = offload(batch, far, device.stream())
        assert away is not None
        with pytest.raises(RuntimeError, match="in flight"):
            copy((away, batch), capture)  # type: ignore[arg-type]
        assert capture.graph == []
        device.drain()
        copy((away, batch), capture)  # type: ignore[arg-type]

    def test_blocks_cannot_be_given_up_in_a_capture(
        self, device: FakeDevice, capture: FakeStream
    ) -> None:
        """Each replay copies again: there is no end at which they could be freed."""
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        with pytest.raises(RuntimeError, match="captur"):
            offload(batch, far, capture, free=True)  # type: ignore[arg-type]
        assert capture.graph == []
        assert batch.live.all()
        assert allocated(far) == [0]

    def test_no_stream_is_drawn_into_the_capture_of_the_current_one(
        self, device: FakeDevice, capture: FakeStream
    ) -> None:
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        with device.using(capture), pytest.raises(RuntimeError, match="captur"):
            offload(batch, far, device.stream())
        assert capture.graph == []
        assert allocated(far) == [0]

    def test_a_plan_is_not_prepared_in_a_capture(
        self, device: FakeDevice, capture: FakeStream, pair: Any
    ) -> None:
        with device.using(capture), pytest.raises(RuntimeError, match="before the capture"):
            self.plan_of(pair, 64).prepare()
        assert device.counts["prepare"] == 0


class TestLegacyStream:
    @pytest.mark.parametrize("direction", ["d2h", "h2d", "d2d", "p2p"])
    def test_the_batch_call_is_refused_when_forced(
        self, device: FakeDevice, direction: str
    ) -> None:
        places = Places.of(device, direction, np.full(20, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        with pytest.raises(ValueError, match="legacy default stream"):
            copy(plan, path="copy_engine")
        assert device.is_idle
        assert device.calls == []

    def test_one_run_is_allowed(self, device: FakeDevice) -> None:
        places = Places.of(device, "d2h", np.full(1, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        expected = places.expected()
        copy(plan, path="copy_engine").result()
        assert torch.equal(places.target, expected)
        assert [call[0] for call in device.calls] == ["copy_each"]

    @pytest.mark.parametrize("direction", ["d2h", "h2d", "d2d"])
    def test_another_path_is_chosen_and_told_once(
        self, device: FakeDevice, direction: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(3):
            places = Places.of(device, direction, np.full(20, 256))
            plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
            expected = places.expected()
            transfer = copy(plan)
            assert transfer.path in ("kernel", "staged")
            transfer.result()
            assert torch.equal(places.target, expected)
        told = [record for record in caplog.records if "legacy default stream" in record.message]
        assert [record.levelno for record in told] == [logging.WARNING]

    def test_where_there_is_no_other_path_pieces_go_one_by_one(
        self, device: FakeDevice, caplog: pytest.LogCaptureFixture
    ) -> None:
        device.has_kernel = False
        for direction in ("d2h", "h2d", "d2d", "p2p"):
            places = Places.of(device, direction, np.full(20, 256))
            plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
            expected = places.expected()
            copy(plan).result()
            assert torch.equal(places.target, expected)
        assert {call[0] for call in device.calls} == {"copy_each"}
        assert sum("legacy" in record.message for record in caplog.records) == 1

    def test_few_runs_are_copied_one_by_one_and_nobody_is_told(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(planner, "table_for", lambda *_: Choice("copy_engine"))
        places = Places.of(device, "d2h", np.full(8, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        copy(plan).result()
        assert [call[0] for call in device.calls] == ["copy_each"]
        assert caplog.records == []

    @pytest.mark.parametrize("on_default", [True, False])
    @pytest.mark.parametrize("path", [None, "copy_engine"])
    def test_an_older_driver_copies_pieces_one_by_one(
        self,
        device: FakeDevice,
        monkeypatch: pytest.MonkeyPatch,
        on_default: bool,
        path: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        device.has_batch = False
        monkeypatch.setattr(planner, "table_for", lambda *_: Choice("copy_engine"))
        places = Places.of(device, "d2h", np.full(20, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        expected = places.expected()
        copy(plan, None if on_default else device.stream(), path=path).result()  # type: ignore[arg-type]
        assert torch.equal(places.target, expected)
        assert {call[0] for call in device.calls} == {"copy_each"}
        assert caplog.records == []


class Choice:
    """A table that always chooses one path, if it is allowed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.asked: list[tuple[Any, ...]] = []

    def choose(self, direction: str, count: int, num_bytes: int, allowed: Iterable[str]) -> str:
        self.asked.append((direction, count, num_bytes, tuple(allowed)))
        assert self.path in allowed
        return self.path


class TestChoice:
    @pytest.mark.parametrize("direction", ["d2h", "h2d", "d2d"])
    @pytest.mark.parametrize("path", ["kernel", "copy_engine", "staged"])
    def test_the_table_decides(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, direction: str, path: str
    ) -> None:
        table = Choice(path)
        monkeypatch.setattr(planner, "table_for", lambda *_: table)
        places = Places.of(device, direction, np.full(20, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        if path not in PATHS_OF[direction]:
            with pytest.raises(AssertionError):
                copy(plan, device.stream())  # type: ignore[arg-type]
            assert path not in table.asked[0][3]
            return
        assert copy(plan, device.stream()).path == path  # type: ignore[arg-type]
        assert table.asked[0][:3] == (direction, 20, 20 * 256)
        assert set(table.asked[0][3]) == set(PATHS_OF[direction])

    def test_the_table_is_asked_for_one_part_of_several(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each is submitted by itself: 40 runs in 4 parts are no batch of 40."""
        table = Choice("kernel")
        monkeypatch.setattr(planner, "table_for", lambda *_: table)
        places = Places.of(device, "d2h", np.full(40, 256))
        plan = CopyPlan.of_addresses(
            places.source, places.target, *places.starts, 256, parts=[10, 10, 0, 10, 10]
        )
        copy(plan, device.stream())  # type: ignore[arg-type]
        assert [asked[:3] for asked in table.asked] == [("d2h", 10, 10 * 256)]

    def test_the_default_stream_is_told_of_only_where_it_matters(
        self,
        device: FakeDevice,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(planner, "table_for", lambda *_: Choice("kernel"))
        places = Places.of(device, "d2h", np.full(40, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        assert copy(plan).path == "kernel"
        assert caplog.records == []

    def test_staging_is_not_chosen_for_a_scattered_host_side(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class PrefersStaging(Choice):
            def choose(self, direction: str, count: int, num_bytes: int, allowed: Any) -> str:
                self.asked.append((direction, count, num_bytes, tuple(allowed)))
                return "staged" if "staged" in allowed else "kernel"

        monkeypatch.setattr(planner, "table_for", lambda *_: PrefersStaging("staged"))
        gpu, host = device.tensor(1 << 16), device.pinned_tensor(1 << 16)
        starts = np.random.default_rng(0).permutation(64) * 1024
        in_a_row = np.arange(64) * 512
        stream: Any = device.stream()
        for host_side, path in ((in_a_row, "staged"), (starts[::-1].copy(), "kernel")):
            plan = CopyPlan.of_addresses(gpu, host, starts, host_side, 512)
            assert copy(plan, stream).path == path

    def test_without_triton_nothing_needs_it(self, device: FakeDevice) -> None:
        device.has_kernel = False
        places = Places.of(device, "d2h", np.full(64, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        assert copy(plan, device.stream()).path == "copy_engine"  # type: ignore[arg-type]
        for path in ("kernel", "staged"):
            with pytest.raises(ValueError, match="needs the triton package"):
                copy(plan, device.stream(), path=path)  # type: ignore[arg-type]

    def test_the_host_takes_no_stream(self, device: FakeDevice) -> None:
        with pytest.raises(ValueError, match="is on no stream"):
            copy((torch.zeros(2, 2), torch.zeros(2, 2)), device.stream())  # type: ignore[arg-type]


# -- walls -------------------------------------------------------------------------------------


class Registrar:
    """Registers with a stand-in for a GPU, but the numbers in ``refused``."""

    def __init__(self, device: FakeDevice, refused: Iterable[int] = ()) -> None:
        self.device = device
        self.refused = set(refused)
        self.count = 0

    def register(self, pointer: int, num_bytes: int) -> None:
        number, self.count = self.count, self.count + 1
        if number in self.refused:
            raise RuntimeError("no pages left")
        self.device.pinned.append((pointer, pointer + num_bytes))

    def unregister(self, pointer: int) -> None:
        self.device.pinned[:] = [each for each in self.device.pinned if each[0] != pointer]


PIECE = 16 << 10


class TestWalls:
    @pytest.mark.parametrize("direction", ["d2h", "h2d"])
    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("is_stream_legacy", [False, True])
    def test_no_run_is_in_two_registrations(
        self, device: FakeDevice, direction: str, path: Any, is_stream_legacy: bool
    ) -> None:
        near = heap_on(device, "device", 1 << 20)
        with PinMemoryAllocator(
            16 * PIECE, registrar=Registrar(device), piece_bytes=PIECE, stream_wait_s=0.0
        ) as far:
            assert len(far.host_buffer.pinned_ranges) == 16
            on_device: Any = filled(near, 128)
            if path == "staged":
                on_device = on_device[::2]
            else:
                near.batched_free(on_device[64:])
                on_device = on_device[:64]
            on_host = filled(far, 64, seed=1)
            assert on_host.num_runs <= 16
            pair = (on_device, on_host) if direction == "d2h" else (on_host, on_device)
            plan = CopyPlan.between(*pair)
            bounds = sorted(start for start, _ in device.pinned)
            for part in plan.parts:
                starts = part.targets if direction == "d2h" else part.sources
                ends = starts + part.size_array()
                first = np.searchsorted(bounds, starts, side="right")
                last = np.searchsorted(bounds, ends, side="left")
                assert (first == last).all()
            if path != "staged":
                assert len(plan.parts[0]) == 16
            if path == "copy_engine" and is_stream_legacy:
                return
            stream = None if is_stream_legacy else device.stream()
            copy(plan, stream, path=path).result()  # type: ignore[arg-type]
            assert torch.equal(read(on_device), read(on_host))
            assert (
                torch.equal(
                    read(on_host),
                    random_bytes(64 * BLOCK, 0 if direction == "d2h" else 1).view(64, -1),
                )
                or path == "staged"
            )

    @pytest.mark.parametrize("direction", ["d2h", "h2d"])
    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("by", ["tensor", "pointers"])
    def test_no_piece_of_a_tensor_is_in_two_registrations(
        self, device: FakeDevice, direction: str, path: Any, by: str
    ) -> None:
        host = device.pinned_tensor(60_000, cuts=(5000, 5001, 20_001, 40_000))
        gpu = device.tensor(240_000)
        rows = 60
        starts = (np.arange(rows) * 1000, np.arange(rows) * 4000)
        source, target = (gpu, host) if direction == "d2h" else (host, gpu)
        places = starts[::-1] if direction == "d2h" else starts
        source.copy_(random_bytes(source.numel(), 4))
        if by == "tensor":
            plan = CopyPlan.of_addresses(source, target, *places, 1000)
        else:
            names = ("cuda", "cpu") if direction == "d2h" else ("cpu", "cuda")
            plan = CopyPlan.of_pointers(
                places[0] + source.data_ptr(), places[1] + target.data_ptr(), 1000, *names
            )
        assert plan.num_runs == rows + 2  # two of the cuts are inside of pieces
        copy(plan, device.stream(), path=path).result()  # type: ignore[arg-type]
        for here, there in zip(*places, strict=True):
            assert torch.equal(target[there : there + 1000], source[here : here + 1000])

    def test_buffers_of_a_heap_that_share_a_registration(self, device: FakeDevice) -> None:
        memory = device.pinned_tensor(1 << 20, cuts=(300_000,))
        far = TensorMemoryAllocator(memory[: 1 << 19])
        assert far.batched_allocate([1 << 19], torch.uint8, 1) is not None
        far.add_buffer(memory[1 << 19 :])
        near = heap_on(device, "device", 1 << 19)
        source = near.batched_allocate([1 << 19], torch.uint8, 1)
        target = far.view([0], [1 << 19], torch.uint8)
        assert source is not None
        plan = CopyPlan.between(source, target)
        assert plan.parts[0].size_array().tolist() == [300_000, (1 << 19) - 300_000]
        copy(plan, device.stream(), path="copy_engine").result()  # type: ignore[arg-type]

    def test_memory_that_is_not_pinned_is_refused(self, device: FakeDevice) -> None:
        plain = torch.zeros(4096, dtype=torch.uint8)
        gpu = device.tensor(4096)
        for pair in ((gpu, plain), (plain, gpu)):
            with pytest.raises(ValueError, match=r"piece 0 .*is in host memory.* not pinned"):
                CopyPlan.of_addresses(*pair, [0, 8], [0, 8], 8)
        near = heap_on(device, "device", 1 << 16)
        far = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
        batch = filled(near, 4)
        with pytest.raises(ValueError, match="not pinned: Fake GPU cannot reach it"):
            offload(batch, far, device.stream(), free=True)  # type: ignore[arg-type]
        assert batch.live.all()
        assert allocated(far) == [0]
        assert device.is_idle

    def test_a_hole_between_pinned_memory_is_only_where_it_is(self, device: FakeDevice) -> None:
        host, gpu = torch.zeros(3 * 4096, dtype=torch.uint8), device.tensor(3 * 4096)
        base = host.data_ptr()
        device.pinned += [(base, base + 4096), (base + 8192, base + 12288)]
        starts = [0, 8192]
        CopyPlan.of_addresses(gpu, host, starts, starts, 4096)
        with pytest.raises(ValueError, match=r"piece 1 .*not pinned"):
            CopyPlan.of_addresses(gpu, host, [0, 4096, 8192], [0, 4096, 8192], 4096)

    @pytest.mark.parametrize("refused", [[1], [0], [0, 3]])
    def test_a_heap_that_is_pinned_in_part(self, device: FakeDevice, refused: list[int]) -> None:
        near = heap_on(device, "device", 1 << 18)
        with PinMemoryAllocator(
            4 * PIECE,
            registrar=Registrar(device, refused),
            piece_bytes=PIECE,
            allow_unpinned=True,
        ) as far:
            batch = filled(far, 16)
            for row, block in enumerate(batch):
                target = near.batched_allocate([BLOCK], torch.uint8, 1)
                assert target is not None
                if row * BLOCK // PIECE in refused:
                    with pytest.raises(ValueError, match="not pinned"):
                        copy(([block], target), device.stream())  # type: ignore[arg-type]
                else:
                    copy(([block], target), device.stream()).result()  # type: ignore[arg-type]
                    assert torch.equal(read(target), read([block]))
            first = min(row for row in range(16) if row * BLOCK // PIECE in refused)
            before = allocated(near)
            with pytest.raises(ValueError, match=rf"piece {first} .*not pinned"):
                restore(batch[::-1][::-1], near, device.stream(), free=True)  # type: ignore[arg-type]
            assert allocated(near) == before
            assert batch.live.all()

    def test_buffers_of_a_device_are_walls(self, device: FakeDevice) -> None:
        memory = device.tensor(8 * BLOCK)
        device.own[-1:] = [
            (memory.data_ptr(), memory.data_ptr() + 4 * BLOCK),
            (memory.data_ptr() + 4 * BLOCK, memory.data_ptr() + 8 * BLOCK),
        ]
        near = TensorMemoryAllocator(memory[: 4 * BLOCK])
        near.add_buffer(memory[4 * BLOCK :])
        far = heap_on(device, "host", 1 << 16)
        batch = filled(near, 8)
        away = offload(batch, far, device.stream(), path="copy_engine")  # type: ignore[arg-type]
        assert away is not None
        assert away.transfer.num_runs == 2
        away.transfer.result()
        assert torch.equal(read(away), read(batch))


# -- many at once ------------------------------------------------------------------------------


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
            entry.heap.batched_free([obj for obj in entry.blocks if obj.is_valid()])
        self.entries = []


def four_heaps(device: FakeDevice, num_bytes: int) -> list[TensorMemoryAllocator]:
    plain = TensorMemoryAllocator(
        torch.zeros(num_bytes, dtype=torch.uint8), 512, stream_wait_s=0.0, on_full=None
    )
    kinds = ("device", "device", "host")
    return [
        *(
            TensorMemoryAllocator(
                memory_of(device, kind, num_bytes), 512, stream_wait_s=0.0, on_full=None
            )
            for kind in kinds
        ),
        plain,
    ]


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
    monkeypatch.setattr(transfer_paths, "SMALL_BYTES", 2048)  # both ways within the host
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
    monkeypatch.setattr(transfer_paths, "SMALL_BYTES", 2048)
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
    near.lifetime.settle(limit=None)
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


# -- other processes ---------------------------------------------------------------------------


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
