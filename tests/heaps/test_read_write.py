"""``batched_read`` and ``batched_write``: contents of blocks that stay, in every allocator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from heap_makers import MIB, makers
from hypothesis import given
from hypothesis import strategies as st
from small_heaps import PAGE, heap_of
from transfer_fixtures import by_queue as by_queue
from transfer_scenes import Gate

from kvheap import (
    BlockLayout,
    ClosedError,
    ForeignObjectError,
    ForeignProcessError,
    GPUMemoryAllocator,
    HostMemoryAllocator,
    LifetimeError,
    MemoryBatch,
    MemoryFormat,
    MixedMemoryAllocator,
    PagedKVCache,
    PinMemoryAllocator,
    TransferError,
    foreign_transfer,
    offload,
)

MAKERS = {
    **makers([60, 4]),
    "mixed buffer": lambda: MixedMemoryAllocator(HostMemoryAllocator(MIB)),
}
ROWS = torch.randint(-1000, 1000, (6, 60, 4)).float()
NAN = float("nan")


def take(heap: Any, name: str, count: int) -> tuple[MemoryBatch, torch.Tensor]:
    """Blocks, and random rows that fit them."""
    if "buffer" in name:
        batch = heap.batched_allocate([960], torch.uint8, count, MemoryFormat.BINARY_BUFFER)
        return batch, ROWS[:count].view(torch.uint8).reshape(count, 960)
    return heap.batched_allocate([60, 4], torch.float32, count), ROWS[:count].clone()


@pytest.mark.parametrize("name", MAKERS)
class TestEveryAllocator:
    @pytest.fixture
    def heap(self, name: str) -> Iterator[Any]:
        with MAKERS[name]() as heap:
            yield heap

    def test_reads_what_was_written(self, heap: Any, name: str) -> None:
        batch, rows = take(heap, name, 6)
        heap.batched_write(batch, rows)
        assert torch.equal(heap.batched_read(batch), rows)
        for objs, which in (
            (batch[1:4], slice(1, 4)),
            (batch[::2], slice(None, None, 2)),
            ([batch[5], batch[0]], [5, 0]),
        ):
            out = torch.full_like(rows[which], 7)
            assert heap.batched_read(objs, out) is out
            assert torch.equal(out, rows[which])
            heap.batched_write(objs, -rows[which])
            assert torch.equal(heap.batched_read(objs), -rows[which])
            heap.batched_write(objs, rows[which])
        assert torch.equal(heap.batched_read(batch), rows)
        assert torch.equal(heap.batched_read([batch[1]] * 2), rows[[1, 1]])
        assert torch.equal(heap.batched_read(obj for obj in batch[:2]), rows[:2])
        for reverse in (batch[::-1], list(batch)[::-1]):
            assert torch.equal(heap.batched_read(reverse), rows.flip(0))
        assert batch.live.all()
        batch[0].pin()
        batch[1].ref_count_up()
        assert torch.equal(heap.batched_read(batch), rows)
        batch[0].unpin()
        batch[1].ref_count_down()
        out = torch.empty_like(rows)
        heap.batched_free(batch, out=out)
        assert torch.equal(out, rows)

    def test_nothing_to_read(self, heap: Any, name: str) -> None:
        batch, rows = take(heap, name, 3)
        assert heap.batched_read(batch[:0]).shape == rows[:0].shape
        assert heap.batched_read([], rows[:0]).shape == rows[:0].shape
        heap.batched_write(batch[3:], rows[:0])
        heap.batched_write([], rows[:0])
        with pytest.raises(ValueError, match="pass out"):
            heap.batched_read([])
        with pytest.raises(ValueError, match="no blocks"):
            heap.batched_read([], rows)
        with pytest.raises(ValueError, match="no blocks"):
            heap.batched_write([], rows)
        with pytest.raises(ValueError, match="shape"):
            heap.batched_write(batch[:0], rows)

    def test_wrong_arguments_change_nothing(self, heap: Any, name: str) -> None:
        batch, rows = take(heap, name, 3)
        other, _ = take(MAKERS[name](), name, 1)
        heap.batched_write(batch, rows)
        strided = torch.zeros(3, *rows.shape[1:], 2, dtype=rows.dtype)[..., 0]
        right, wrong = torch.zeros_like(rows), torch.full_like(rows, 9)
        cases: list[tuple[type[Exception], str, Any, Any]] = [
            (ValueError, "shape", batch, wrong[:2]),
            (ValueError, "shape", batch[:2], wrong),
            (ValueError, "shape", batch, wrong.reshape(-1)),
            (ValueError, "must be torch", batch, wrong.to(torch.int16)),
            (ValueError, "contiguous", batch, strided),
            (TypeError, r"torch\.Tensor", batch, "nonsense"),
            (TypeError, r"torch\.Tensor", batch, [1.0]),
            (TypeError, "expected a batch", batch[0], wrong[:1]),
            (TypeError, "expected a batch", 7, wrong),
            (TypeError, "MemoryObj", [batch[0], 7], wrong[:2]),
            (ForeignObjectError, "belong", other, wrong[:1]),
            (ForeignObjectError, r"belong|plain bytes", [batch[0], other[0]], wrong[:2]),
        ]
        for kind, match, objs, tensor in cases:
            with pytest.raises(kind, match=match):
                heap.batched_read(objs, tensor)
            with pytest.raises(kind, match=match):
                heap.batched_write(objs, tensor)
        with pytest.raises(TypeError, match=r"torch\.Tensor"):
            heap.batched_write(batch, None)
        with pytest.raises(ValueError, match="named twice"):
            heap.batched_write([batch[0], batch[0]], wrong[:2])
        with pytest.raises(ValueError, match="rows of out overlap"):
            heap.batched_read(batch, right[:1].expand(3, *rows.shape[1:]))
        assert not right.any()
        assert torch.equal(heap.batched_read(batch), rows)

    def test_freed_blocks(self, heap: Any, name: str) -> None:
        batch, rows = take(heap, name, 3)
        heap.batched_write(batch, rows)
        heap.batched_free(batch[1:2])
        out = torch.zeros_like(rows)
        for objs, count in ((batch, 3), (batch[:2], 2), ([batch[2], batch[1]], 2)):
            with pytest.raises(LifetimeError, match="block 1"):
                heap.batched_read(objs, out[:count])
            with pytest.raises(LifetimeError, match="block 1"):
                heap.batched_write(objs, out[:count])
        assert not out.any()
        assert torch.equal(heap.batched_read(batch[::2]), rows[::2])

    def test_a_closed_allocator(self, heap: Any, name: str) -> None:
        batch, rows = take(heap, name, 3)
        heap.close()
        with pytest.raises(ClosedError):
            heap.batched_read(batch, rows)
        with pytest.raises(ClosedError):
            heap.batched_write(batch, rows)


def test_the_bytes_around_stay() -> None:
    heap = heap_of(8)
    batch = heap.batched_allocate([100], torch.uint8, 8)
    assert batch is not None
    heap.buffer.fill_(7)
    heap.batched_write(batch[2:6:2], torch.ones(2, 100, dtype=torch.uint8))
    expected = torch.full_like(heap.buffer, 7)
    for row in (2, 4):
        expected[row * PAGE : row * PAGE + 100] = 1
    assert torch.equal(heap.buffer, expected)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, unique=True))
def test_objects_of_several_batches_and_buffers(which: list[tuple[int, int]]) -> None:
    heap = heap_of(4)
    batches: list[Any] = [heap.batched_allocate([33], torch.int16, 4)]
    heap.add_buffer(torch.zeros(8 * PAGE, dtype=torch.uint8))
    batches += [heap.batched_allocate([33], torch.int16, 4) for _ in range(2)]
    objs = [batches[number][row] for number, row in which]
    source = torch.randint(-9, 9, (len(objs), 33), dtype=torch.int16)
    heap.batched_write(objs, source)
    assert torch.equal(torch.stack([obj.tensor for obj in objs]), source)
    assert torch.equal(heap.batched_read(objs), source)
    others = [obj for each in batches for obj in each if obj not in objs]
    assert all(not obj.tensor.any() for obj in others)


def test_blocks_of_several_groups() -> None:
    heap = heap_of(8)
    layout = BlockLayout.of([[3], [5]], [torch.float32, torch.int8], MemoryFormat.UNDEFINED)
    batch = heap.batched_allocate(list(layout.shapes), list(layout.dtypes), 3, layout.fmt)
    assert batch is not None
    source = torch.randint(256, (3, layout.size_bytes), dtype=torch.uint8)
    heap.batched_write(batch, source)
    assert torch.equal(heap.batched_read(batch), source)
    assert torch.equal(heap.batched_read([*batch]), source)
    other = heap.batched_allocate([4], torch.float32, 1)
    assert other is not None
    with pytest.raises(ValueError, match="one layout"):
        heap.batched_read([batch[0], other[0]], source[:2])
    with pytest.raises(ValueError, match="one layout"):
        heap.batched_write([batch[0], other[0]], source[:2])


@pytest.mark.parametrize("setting", ["inference", "grad", "default dtype"])
def test_settings_of_the_caller(setting: str) -> None:
    heap = heap_of(8)
    batch = heap.batched_allocate([4], torch.float32, 2)
    assert batch is not None
    source = torch.tensor([[1.0, NAN, -0.0, 3.0]] * 2, requires_grad=setting == "grad")
    if setting == "inference":
        with torch.inference_mode():
            heap.batched_write(batch, source)
            found = heap.batched_read(batch)
    elif setting == "default dtype":
        torch.set_default_dtype(torch.float64)
        try:
            heap.batched_write(batch, source)
            found = heap.batched_read(batch)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        heap.batched_write(batch, source)
        found = heap.batched_read(batch)
        assert not found.requires_grad
    assert torch.equal(found.view(torch.int32), source.detach().view(torch.int32))


class TestTokens:
    def test_a_write_forgets_the_tokens_of_its_blocks(self) -> None:
        cache = PagedKVCache.of("vllm-flash-nhd", [torch.rand(2, 8, 4, 2, 8)])
        heap = heap_of(64)
        batch = heap.batched_store(cache, range(20), 8)
        assert batch is not None
        heap.batched_read(batch)
        assert batch.num_tokens == 20
        with pytest.raises(ValueError, match="never stored"):
            heap.batched_load(batch, cache, range(24))
        with pytest.raises(ValueError, match="shape"):
            heap.batched_write(batch[2:], torch.zeros(2, 2))
        assert batch.num_tokens == 20
        heap.batched_write(batch[2:], heap.batched_read(batch[2:]))
        assert batch[:2].num_tokens == 16
        heap.batched_load(batch, cache, range(24))


class TestTransfers:
    def test_waits_for_the_transfer_that_fills(self) -> None:
        near, far = heap_of(8), heap_of(8)
        batch = near.batched_allocate([4], torch.float32, 2)
        assert batch is not None
        work: Future[None] = Future()
        foreign_transfer(work, target=batch)
        near.buffer.view(torch.float32).fill_(1)
        timer = threading.Timer(0.1, work.set_result, [None])
        timer.start()
        assert torch.equal(near.batched_read(batch), torch.ones(2, 4))
        assert work.done()
        timer.join()
        near.batched_write(batch, torch.zeros(2, 4))
        away = offload(batch, into=far)
        assert away is not None
        assert torch.equal(far.batched_read(away), torch.zeros(2, 4))
        far.batched_write(away, torch.ones(2, 4))
        assert torch.equal(far.batched_read(away[1:]), torch.ones(1, 4))

    @pytest.mark.parametrize("part", [slice(None), slice(1, 3)], ids=str)
    def test_a_write_waits_for_transfers_that_use_its_blocks(self, part: slice) -> None:
        heap = heap_of(8)
        batch = heap.batched_allocate([4], torch.float32, 4)
        assert batch is not None
        heap.batched_write(batch, torch.zeros(4, 4))
        work: Future[None] = Future()
        seen: list[float] = []
        foreign_transfer(work, source=batch[part])
        if part.stop is not None:
            heap.batched_write(batch[3:], torch.ones(1, 4))  # does not wait

        def end() -> None:
            seen.append(float(batch[1].tensor.sum()))  # type: ignore[union-attr]
            work.set_result(None)

        timer = threading.Timer(0.1, end)
        timer.start()
        heap.batched_write(batch, torch.ones(4, 4))
        assert work.done()
        timer.join()
        assert seen == [0.0]
        assert torch.equal(heap.batched_read(batch), torch.ones(4, 4))

    def test_a_transfer_that_failed(self) -> None:
        heap = heap_of(8)
        batch = heap.batched_allocate([4], torch.float32, 2)
        assert batch is not None
        work: Future[None] = Future()
        foreign_transfer(work, target=batch)
        work.set_exception(TransferError("the peer is gone"))
        before = heap.buffer.clone()
        with pytest.raises(TransferError, match="gone"):
            heap.batched_read(batch)
        with pytest.raises(TransferError, match="gone"):
            heap.batched_write(batch, torch.ones(2, 4))
        assert torch.equal(heap.buffer, before)

    def test_a_write_waits_for_a_copy_that_reads(self, by_queue: Gate) -> None:
        near, far = heap_of(8), heap_of(8)
        batch = near.batched_allocate([4], torch.float32, 4)
        assert batch is not None
        near.batched_write(batch, torch.zeros(4, 4))
        away = offload(batch, into=far)
        timer = threading.Timer(0.1, by_queue.open)
        timer.start()
        near.batched_write(batch, torch.ones(4, 4))
        timer.join()
        assert away is not None
        assert not far.batched_read(away).any()
        assert near.batched_read(batch).all()


class TestProcesses:
    def owned(self) -> tuple[HostMemoryAllocator, MemoryBatch]:
        owner = HostMemoryAllocator(MIB, shared=True)
        batch = owner.batched_allocate([4], torch.float32, 3)
        assert batch is not None
        owner.batched_write(batch, torch.ones(3, 4))
        return owner, batch

    def test_an_attached_heap_reads_and_fills_what_it_may(self) -> None:
        owner, batch = self.owned()
        fd = owner.host_buffer.fd
        assert fd is not None
        with owner, HostMemoryAllocator.attach(fd, MIB) as heap:
            view = heap.view(batch.metadata)
            assert torch.equal(heap.batched_read(view), torch.ones(3, 4))
            assert torch.equal(heap.batched_read(view[1:]), torch.ones(2, 4))
            with pytest.raises(ForeignProcessError):
                heap.batched_write(view, torch.zeros(3, 4))
            with pytest.raises(ForeignObjectError):
                heap.batched_write(heap.view(batch.metadata, writable=False), torch.zeros(3, 4))
            assert torch.equal(owner.batched_read(batch), torch.ones(3, 4))
            mine = heap.view(batch.metadata, writable=True)
            heap.batched_write(mine[1:], torch.zeros(2, 4))
            assert owner.batched_read(batch).sum(1).tolist() == [4, 0, 0]
            with pytest.raises(ForeignObjectError):
                owner.batched_read(view, torch.zeros(3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_behind_a_transfer_and_from_the_host() -> None:
    near = GPUMemoryAllocator(64 << 20)
    rows = torch.randn(1000, 60, 4)
    batch = near.batched_allocate([60, 4], torch.float32, 1000)
    assert batch is not None
    for source in (rows, rows.cuda()):
        near.batched_write(batch, torch.zeros_like(rows))
        near.batched_write(batch, source)
        for objs, which in ((batch, slice(None)), (batch[7:900:3], slice(7, 900, 3))):
            assert torch.equal(near.batched_read(objs).cpu(), rows[which])
        assert torch.equal(near.batched_read([batch[5], batch[3]]).cpu(), rows[[5, 3]])
    far = PinMemoryAllocator(64 << 20)
    away = offload(batch, into=far)
    near.batched_write(batch, torch.zeros_like(rows))  # waits for the copy that reads
    assert away is not None
    assert torch.equal(far.batched_read(away), rows)
    with pytest.raises(ValueError, match="out must be on cuda"):
        near.batched_read(batch, torch.empty_like(rows))
