"""Whoever reads blocks that a transfer fills waits for it: every way to read, every direction."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable

import pytest
import torch
from fake_device import FakeDevice, filled, heap_on
from transfer_scenes import BLOCK, Gate, drain

from kvheap import (
    BlockIds,
    MemoryBatch,
    PagedKVCache,
    TensorMemoryAllocator,
    TransferError,
    load,
    offload,
)
from kvheap.engine.chunks import store
from kvheap.files import FileTier
from kvheap.transfer import copy

COUNT = 4

Read = Callable[[TensorMemoryAllocator, MemoryBatch], torch.Tensor]


def by_free(heap: TensorMemoryAllocator, batch: MemoryBatch) -> torch.Tensor:
    out = torch.empty(COUNT, BLOCK, dtype=torch.uint8)
    heap.batched_free(batch, out=out)
    return out


def by_free_of_objects(heap: TensorMemoryAllocator, batch: MemoryBatch) -> torch.Tensor:
    out = torch.empty(COUNT, BLOCK, dtype=torch.uint8)
    heap.batched_free(list(batch), out=out)
    return out


def by_load(heap: TensorMemoryAllocator, batch: MemoryBatch) -> torch.Tensor:
    layers = [torch.zeros(COUNT, 16, BLOCK // 16, dtype=torch.uint8)]
    load(chunks_of(heap, batch), PagedKVCache.of("mla", layers), torch.arange(16 * COUNT))
    return layers[0].view(COUNT, BLOCK)


def chunks_of(heap: TensorMemoryAllocator, batch: MemoryBatch) -> MemoryBatch:
    """The same blocks as chunks of 16 tokens."""
    view = heap.view(batch.runs, [1, 1, 16, BLOCK // 16], torch.uint8)
    view.transfer = batch.transfer
    return view


READS: dict[str, Read] = {
    "tensor": lambda heap, batch: torch.stack([obj.tensor for obj in batch]),  # type: ignore[misc]
    "raw_tensor": lambda heap, batch: torch.stack([obj.raw_tensor for obj in batch]),  # type: ignore[misc]
    "byte_view": lambda heap, batch: torch.stack(
        [torch.frombuffer(obj.byte_view, dtype=torch.uint8).clone() for obj in batch]
    ),
    "free": by_free,
    "free of objects": by_free_of_objects,
    "batched_read": lambda heap, batch: heap.batched_read(batch),
    "batched_read of a slice": lambda heap, batch: heap.batched_read(batch[:]),
    "evict": lambda heap, batch: heap.batched_evict(batch),
    "load": by_load,
}


@pytest.fixture(params=["d2h", "h2h"])
def ends(
    request: pytest.FixtureRequest, device: FakeDevice, by_queue: Gate
) -> tuple[TensorMemoryAllocator, TensorMemoryAllocator, torch.cuda.Stream | None]:
    """A heap to move from, one to move to, and a stream of the first."""
    by_queue.open()
    kind = "device" if request.param == "d2h" else "host"
    near, far = heap_on(device, kind, 1 << 16), heap_on(device, "host", 1 << 16)
    return near, far, device.stream() if kind == "device" else None  # type: ignore[return-value]


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_reader_gets_the_bytes(ends: tuple, device: FakeDevice, read: Read) -> None:
    near, far, stream = ends
    batch = filled(near, COUNT)
    expected = torch.stack([obj.tensor for obj in batch]).clone()  # type: ignore[misc]
    away = offload(batch, far, stream, free=True)
    assert away is not None
    assert torch.equal(read(far, away), expected)
    drain(device)


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_reader_of_what_failed_is_told(
    device: FakeDevice, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
    away = offload(filled(near, COUNT), far, device.stream())  # type: ignore[arg-type]
    assert away is not None
    device.lose()
    with pytest.raises(TransferError):
        read(far, away)
    assert away.live.all()  # and nothing was freed
    device.is_lost = False
    for stream in device.streams:
        stream.queue.clear()


def test_a_store_does_not_overtake_the_transfer(device: FakeDevice) -> None:
    near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
    away = offload(filled(near, COUNT), far, device.stream())  # type: ignore[arg-type]
    assert away is not None
    layers = [torch.full((COUNT, 16, BLOCK // 16), 7, dtype=torch.uint8)]
    store(PagedKVCache.of("mla", layers), torch.arange(16 * COUNT), chunks_of(far, away))
    drain(device)
    assert all(obj.tensor.eq(7).all() for obj in away)  # type: ignore[union-attr]


CHUNK = [1, 1, 16, BLOCK // 16]


def by_write(heap: TensorMemoryAllocator, batch: MemoryBatch, cache: PagedKVCache) -> None:
    heap.batched_write(batch[1:], torch.full((COUNT - 1, *CHUNK), 7, dtype=torch.uint8))


def by_copy(heap: TensorMemoryAllocator, batch: MemoryBatch, cache: PagedKVCache) -> None:
    rows = torch.full((COUNT, *CHUNK), 7, dtype=torch.uint8)
    other = heap.batched_allocate(CHUNK, torch.uint8, COUNT, source=rows)
    copy((other, batch)).result()


def by_file(heap: TensorMemoryAllocator, batch: MemoryBatch, cache: PagedKVCache) -> None:
    pytest.importorskip("lmdb")
    pytest.importorskip("xxhash")
    rows = torch.full((COUNT, *CHUNK), 7, dtype=torch.uint8)
    other = heap.batched_allocate(CHUNK, torch.uint8, COUNT, source=rows)
    assert other is not None
    keys = [bytes([number]) for number in range(COUNT)]
    with (
        tempfile.TemporaryDirectory() as folder,
        FileTier(folder, 1 << 20, batch.layout, namespace="model") as tier,
    ):
        tier.store(keys, other).result()
        tier.load(keys, batch).result()


Write = Callable[[TensorMemoryAllocator, MemoryBatch, PagedKVCache], object]

WRITES: dict[str, Write] = {
    "store": lambda heap, batch, cache: store(cache, torch.arange(16 * COUNT), batch),
    "store of whole blocks": lambda heap, batch, cache: store(
        cache, BlockIds(list(range(COUNT))), batch
    ),
    "store to a slice": lambda heap, batch, cache: store(cache, BlockIds([0, 1]), batch[2:]),
    "store to objects": lambda heap, batch, cache: store(
        cache, torch.arange(32), [batch[3], batch[1]]
    ),
    "write": by_write,
    "copy": by_copy,
    "load from a file": by_file,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_writer_waits_for_the_transfer_that_reads(by_queue: Gate, write: Write) -> None:
    near = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    far = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    layer = torch.ones(COUNT, 16, BLOCK // 16, dtype=torch.uint8)
    cache = PagedKVCache.of("mla", [layer])
    batch = near.batched_allocate(CHUNK, torch.uint8, COUNT)
    assert batch is not None
    for _ in range(2):  # the second one knows the layout
        store(cache, BlockIds(list(range(COUNT))), batch)
    away = offload(batch, into=far)
    assert away is not None
    layer.fill_(7)
    timer = threading.Timer(0.1, by_queue.open)
    timer.start()
    write(near, batch, cache)
    timer.join()
    assert away.transfer is not None
    away.transfer.result()
    assert far.batched_read(away).eq(1).all()
    assert near.batched_read(batch)[-1].eq(7).all()
