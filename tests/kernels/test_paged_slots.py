"""Slots that only the device sees: bad ones are skipped and reported; debug mode looks at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvheap
from kvheap import BlockIds, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import paged_copy
from kvheap.kernels.launch import triton
from kvheap.kernels.paged_copy import TokenCopy, pairing_of
from kvheap.kernels.paged_slots import Places

needs_triton = pytest.mark.skipif(triton is None, reason="needs the triton package")
DEVICES = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=needs_triton),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
BLOCKS, BLOCK_SIZE = 6, 4
CHUNK = (2, 2, 8, 32)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel on CPU tensors."""
    from triton.runtime.interpreter import InterpretedFunction

    kernel = InterpretedFunction(paged_copy._copy_tokens_kernel.fn)
    monkeypatch.setattr(paged_copy, "_copy_tokens_kernel", kernel)


def make(device, **options):
    shape = (2, BLOCKS, BLOCK_SIZE, 2, 16)
    tensors = [torch.randn(shape, device=device) for _ in range(2)]
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8, device=device), **options)
    batch = heap.batched_allocate(CHUNK, torch.float32, 2)
    return PagedKVCache.of("vllm-flash-nhd", tensors), tensors, batch


def copy_unseen(cache, values, batch, num_tokens, are_blocks, to_heap=True):
    """A copy whose slots are not looked at on the host, as where they are on a device."""
    chunks, _ = kvheap.engine.chunks._chunks(batch.allocator, batch, cache, False)
    pairing = pairing_of(cache, chunks.layout, None, None)
    unit = pairing.block_unit if are_blocks else 1
    places = Places(values.to(cache.device), are_blocks, unit, num_tokens)
    paged_copy._copy_on_gpu(TokenCopy(pairing, places, chunks, to_heap))


@DEVICES
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [BLOCKS * BLOCK_SIZE, -2, 2**31 - 1, -(2**31)])
def test_a_slot_out_of_range_is_skipped_and_named(device, dtype, bad, request):
    if device == "cpu":
        request.getfixturevalue("interpreted")
    cache, tensors, batch = make(device)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE)[:15].to(dtype)
    slots[6], slots[9], slots[12] = -1, bad, bad
    copy_unseen(cache, slots, batch, 15, are_blocks=False)
    for token, slot in enumerate(slots.tolist()):
        stored = batch[token // 8].tensor[:, :, token % 8]
        if token in (6, 9, 12):
            assert (stored == 0).all()
        else:
            rows = torch.stack([t.reshape(2, -1, 32)[:, slot] for t in tensors], dim=1)
            assert torch.equal(stored, rows)
    with pytest.raises(ValueError, match=rf"token 9 of a copy had slot or block {bad}:"):
        cache.synchronize()
    cache.synchronize()  # it was said once


@DEVICES
@pytest.mark.parametrize("bad", [BLOCKS, 1 << 40])
def test_a_block_out_of_range_is_skipped_and_named(device, bad, request):
    if device == "cpu":
        request.getfixturevalue("interpreted")
    cache, tensors, batch = make(device)
    batch[1].tensor.zero_()
    ids = torch.tensor([4, bad, -1, 2])
    before = [tensor.clone() for tensor in tensors]
    copy_unseen(cache, ids, batch, 16, are_blocks=True)
    expected = torch.stack([t[:, 2].reshape(2, BLOCK_SIZE, 32) for t in tensors], dim=1)
    assert torch.equal(batch[1].tensor[:, :, BLOCK_SIZE:], expected)
    assert (batch[0].tensor[:, :, BLOCK_SIZE:] == 0).all()
    assert (batch[1].tensor[:, :, :BLOCK_SIZE] == 0).all()
    with pytest.raises(ValueError, match="token 4 of a copy had slot or block"):
        cache.synchronize()
    copy_unseen(cache, ids, batch, 16, are_blocks=True, to_heap=False)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    with pytest.raises(ValueError, match="token 4"):
        cache.synchronize()


@DEVICES
def test_good_slots_and_skipped_ones_report_nothing(device, request):
    if device == "cpu":
        request.getfixturevalue("interpreted")
    cache, _, batch = make(device)
    cache.synchronize()
    copy_unseen(cache, torch.tensor([-1, 0, 23, -1, *range(1, 12)]), batch, 15, are_blocks=False)
    cache.synchronize()


def test_debug_mode_refuses_to_load_two_tokens_into_one_slot():
    cache, tensors, batch = make("cpu", debug=True)
    before = [tensor.clone() for tensor in tensors]
    slots = [*range(15), 3]
    with pytest.raises(ValueError, match="must differ: 3 twice"):
        kvheap.load(batch, cache, slots)
    with pytest.raises(ValueError, match="must differ"):
        kvheap.load(batch, cache, BlockIds([1, 2, 1, 3]))
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    kvheap.load(batch, cache, [-1] * 14 + [3, 4])
    kvheap.store(cache, slots, batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_debug_mode_refuses_bad_slots_on_a_device_before_anything_moves():
    cache, _, batch = make("cuda", debug=True)
    before = batch[0].raw_tensor.clone()
    slots = torch.tensor([*range(15), 24], device="cuda")
    with pytest.raises(ValueError, match=r"slots\[15\] is 24"):
        kvheap.store(cache, slots, batch)
    assert torch.equal(batch[0].raw_tensor, before)
    cache.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_pinned", [True, False])
def test_chunks_may_lie_in_pinned_host_memory_only(is_pinned):
    cache, tensors, _ = make("cuda")
    buffer = torch.zeros(1 << 16, dtype=torch.uint8, pin_memory=is_pinned)
    heap = TensorMemoryAllocator(buffer)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE)
    if not is_pinned:
        with pytest.raises(ValueError, match="pinned"):
            heap.batched_store(cache, slots, 8)
        assert heap.total_allocated_size == 0
        return
    batch = heap.batched_store(cache, slots, 8)
    original = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    heap.batched_load(batch, cache, slots)
    cache.synchronize()
    assert all(torch.equal(now, then) for now, then in zip(tensors, original, strict=True))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers": [0]}, r"layers must be a range, got \[0\]"),
        ({"layers": 1}, "layers must be a range, got 1"),
        ({"heads": range(1)}, r"heads must be a slice, got range\(0, 1\)"),
    ],
)
@pytest.mark.parametrize("convert", [False, True])
def test_parts_of_another_type_are_refused(kept, message, convert):
    tensors = [torch.zeros(2, BLOCKS, BLOCK_SIZE, 2, 16).half() for _ in range(2)]
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    batch = heap.batched_store(cache, range(15), 8, convert=convert)
    with pytest.raises(TypeError, match=message):
        kvheap.store(cache, range(15), batch, convert=convert, **kept)


@pytest.mark.parametrize("bad", [2**64 - 1, 2**63])
def test_unsigned_slots_do_not_wrap_to_skipped_ones(bad):
    cache, _, batch = make("cpu")
    slots = np.arange(15, dtype=np.uint64)
    slots[3] = bad
    with pytest.raises(ValueError, match=str(bad)):
        kvheap.store(cache, slots, batch)


def test_what_cannot_be_written_out_is_not_evicted(monkeypatch):
    cache, _, batch = make("cpu")
    heap = batch.allocator
    kvheap.store(cache, range(15), batch)
    expected = torch.stack([obj.tensor.clone() for obj in batch])
    with pytest.raises(ValueError, match="or the host, got meta"):
        heap.batched_evict(batch, out=torch.empty(expected.shape, device="meta"))
    # A heap that is elsewhere than ``out``, whose copy fails.
    monkeypatch.setattr(type(heap), "device", torch.device("cpu", 0))
    monkeypatch.setattr(heap, "_require_gatherable", lambda parts, out: None)
    with pytest.raises(RuntimeError):
        heap.batched_evict(batch, out=torch.empty(CHUNK).expand(expected.shape))
    assert batch.live.all()
    out = torch.empty(expected.shape)
    assert torch.equal(heap.batched_evict(batch, out=out), expected)
    assert not batch.live.any()
