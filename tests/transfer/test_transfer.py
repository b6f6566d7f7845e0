"""Copies: every byte where it should be, and the Transfer that says when it is there."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
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
from transfer_scenes import BLOCK, Gate, InFlight, Places, allocated, blocks_of, stream_of

from kvheap import MemoryFormat, PagedTensorMemoryAllocator
from kvheap.device.host_queue import host_queue
from kvheap.errors import TransferError
from kvheap.transfer import CopyPlan, Transfer, copy, offload, restore


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
            default = {"h2d": 3, "d2h": 2}.get(direction)
            asked = {call[3] for call in device.calls if call[0] == "run"}
            assert asked <= {max_sms or default}
            assert {call[3] for call in device.calls if call[0] == "copy_batch"} <= {
                direction in ("h2d", "d2h")
            }


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


def test_all_parts_are_staged_in_the_same_two_extents(device: FakeDevice) -> None:
    source, target = device.tensor(1 << 20), device.pinned_tensor(1 << 20)
    source.copy_(random_bytes(1 << 20, 3))
    starts = np.random.default_rng(0).permutation(256) * 4096
    in_a_row = np.arange(256) * 1024
    plan = CopyPlan.of_addresses(source, target, starts, in_a_row, 1024, parts=[16] * 16)
    transfer = copy(plan, device.stream(), path="staged")  # type: ignore[arg-type]
    assert device.counts["empty"] == 1
    transfer.result()
    rows = torch.from_numpy(starts[:, None] + np.arange(1024))
    assert torch.equal(target[: 256 * 1024].view(256, -1), source[rows])


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
        host_queue.run([lambda: None], False)[0].synchronize()
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
        with pytest.raises(ValueError, match=r"does not keep its layers apart|cannot be read as"):
            offload(batch, far, device.stream(), by_layer=True)
        with pytest.raises(ValueError, match=r"does not keep its layers apart|cannot be read as"):
            restore(batch, far, device.stream(), by_layer=True, free=True)
        assert batch.live.all()
    rows = memory_of(device, "host", 64).view(4, 16)
    with pytest.raises(ValueError, match="two tensors have no layers"):
        CopyPlan.between(rows, rows.clone(), by_layer=True)
    assert allocated(far) == [0]
    assert device.is_idle
