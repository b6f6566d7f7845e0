"""Slots that only the device sees: bad ones are skipped and reported; debug mode looks at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import PATHS, on_a_gpu, running

import kvheap
from kvheap import BlockIds, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import paged_copy
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.token_copy import Chunks, TokenCopy

BY_KERNELS = pytest.mark.parametrize("path", PATHS[1:])
BLOCKS, BLOCK_SIZE = 6, 4
CHUNK = (2, 2, 8, 32)


def make(device, **options):
    shape = (2, BLOCKS, BLOCK_SIZE, 2, 16)
    tensors = [torch.randn(shape, device=device) for _ in range(2)]
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8, device=device), **options)
    batch = heap.batched_allocate(CHUNK, torch.float32, 2)
    return PagedKVCache.of("vllm-flash-nhd", tensors), tensors, batch


def chunks_in(memory, item_bytes, are_scaled=False):
    """Two chunks at the ends of the memory, perhaps with scales behind their elements."""
    layout = ChunkLayout.of("PLTD", CHUNK, item_bytes)
    scale_offset = layout.size_bytes if are_scaled else None
    size_bytes = layout.size_bytes + (4 * 2 * 2 * 2 if are_scaled else 0)
    starts = memory.data_ptr() + np.array([0, len(memory) - size_bytes])
    return Chunks(memory, starts, size_bytes, 16, layout, scale_offset)


def tokens_of(chunks, dtype):
    """What the chunks hold, ``[planes, layers, tokens, elements]``."""
    size = chunks.layout.size_bytes
    starts = (chunks.addresses - chunks.buffer.data_ptr()).tolist()
    parts = [chunks.buffer[start : start + size].view(dtype).view(CHUNK) for start in starts]
    return torch.cat(parts, dim=2)


def copy_unseen(cache, values, chunks, num_tokens, are_blocks, to_heap=True):
    """A copy whose slots are not checked on the host, as where they are on a device."""
    slots = BlockIds(range(len(values)), num_tokens) if are_blocks else range(num_tokens)
    copy = TokenCopy.of(cache, slots, chunks, None, None, eager=False, to_heap=to_heap)
    unseen = values.to(cache.device)
    paged_copy.run_copy(replace(copy, places=replace(copy.places, values=unseen)))


def make_unseen(device, dtype=torch.float32):
    """A cache, its tensors, and chunks for 16 of its tokens, which hold fp8 unless of float32."""
    shape = (2, BLOCKS, BLOCK_SIZE, 2, 16)
    tensors = [(torch.rand(shape) + 1).to(dtype).to(device) for _ in range(2)]
    memory = torch.zeros(1 << 15, dtype=torch.uint8, device=device)
    chunks = (
        chunks_in(memory, 4) if dtype == torch.float32 else chunks_in(memory, 1, are_scaled=True)
    )
    return PagedKVCache.of("vllm-flash-nhd", tensors), tensors, chunks


@BY_KERNELS
@pytest.mark.parametrize("bad", [BLOCKS * BLOCK_SIZE, -2, 2**31 - 1, -(2**31)])
def test_a_slot_out_of_range_is_skipped_and_named(path, bad):
    for dtype in (torch.int32, torch.int64):
        with running(path) as device:
            cache, tensors, chunks = make_unseen(device)
            slots = torch.randperm(BLOCKS * BLOCK_SIZE)[:15].to(dtype)
            slots[6], slots[9], slots[12] = -1, bad, bad
            copy_unseen(cache, slots, chunks, 15, are_blocks=False)
            found = tokens_of(chunks, torch.float32)
            for token, slot in enumerate(slots.tolist()):
                if token in (6, 9, 12):
                    assert (found[:, :, token] == 0).all()
                else:
                    rows = torch.stack([t.reshape(2, -1, 32)[:, slot] for t in tensors], dim=1)
                    assert torch.equal(found[:, :, token], rows)
            with pytest.raises(ValueError, match=rf"token 9 of a copy had slot or block {bad}:"):
                cache.synchronize()
            cache.synchronize()  # reported once


@BY_KERNELS
@pytest.mark.parametrize("bad", [BLOCKS, 1 << 40])
def test_a_block_out_of_range_is_skipped_and_named(path, bad):
    with running(path) as device:
        cache, tensors, chunks = make_unseen(device)
        ids = torch.tensor([4, bad, -1, 2])
        before = [tensor.clone() for tensor in tensors]
        copy_unseen(cache, ids, chunks, 16, are_blocks=True)
        found = tokens_of(chunks, torch.float32).unflatten(2, (4, BLOCK_SIZE))
        for at, block in ((0, 4), (3, 2)):
            rows = [t[:, block].reshape(2, BLOCK_SIZE, 32) for t in tensors]
            assert torch.equal(found[:, :, at], torch.stack(rows, dim=1))
        assert (found[:, :, 1:3] == 0).all()
        with pytest.raises(ValueError, match="token 4 of a copy had slot or block"):
            cache.synchronize()
        copy_unseen(cache, ids, chunks, 16, are_blocks=True, to_heap=False)
        assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
        with pytest.raises(ValueError, match="token 4"):
            cache.synchronize()


@BY_KERNELS
@pytest.mark.parametrize("are_blocks", [False, True])
def test_a_conversion_skips_and_names_them_too(path, are_blocks):
    with running(path) as device:
        cache, tensors, chunks = make_unseen(device, torch.float16)
        good = [3, 0, 5, 1] if are_blocks else torch.randperm(BLOCKS * BLOCK_SIZE)[:15].tolist()
        values = torch.tensor(good)
        values[1], values[2] = -1, -7
        copy_unseen(cache, values, chunks, 15, are_blocks)
        width = BLOCK_SIZE if are_blocks else 1
        with pytest.raises(ValueError, match=rf"token {2 * width} of a copy had slot or block -7:"):
            cache.synchronize()
        codes = tokens_of(chunks, torch.uint8)
        is_stored = codes.bool().all(dim=3).all(dim=1).all(dim=0)
        assert is_stored.tolist() == [not width <= at < 3 * width and at < 15 for at in range(16)]
        before = [tensor.clone() for tensor in tensors]
        copy_unseen(cache, torch.full_like(values, -7), chunks, 15, are_blocks, to_heap=False)
        assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
        with pytest.raises(ValueError, match="token 0 of a copy had slot or block -7:"):
            cache.synchronize()


@BY_KERNELS
def test_good_slots_and_skipped_ones_report_nothing(path):
    with running(path) as device:
        for dtype in (torch.float32, torch.float16):
            cache, _, chunks = make_unseen(device, dtype)
            cache.synchronize()
            slots = torch.tensor([-1, 0, 23, -1, *range(1, 12)])
            copy_unseen(cache, slots, chunks, 15, are_blocks=False)
            cache.synchronize()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize(
    ("slots", "place"),
    [
        ([*range(15), 3], "slots .*: 3 appears twice, at 3 and 15"),
        ([0, 0, *range(1, 15)], "slots .*: 0 appears twice, at 0 and 1"),
        ([8, 9, 10, 11, 12, 13, 14, 15, 4, 5, 6, 7, 8, 1, 2, 3], ": 8 appears twice, at 0 and 12"),
        ([5, -1, 6, -1, 5, *range(8, 19)], ": 5 appears twice, at 0 and 4"),
        ([23, *range(14, -1, -1)[:13], 0, 23], "23 appears twice, at 0 and 15"),
        (BlockIds([1, 2, 1, 3]), "block ids .*: 1 appears twice, at 0 and 2"),
        (BlockIds([5, 5, 0, 3], 14), "5 appears twice"),
        (BlockIds([5, -1, -1, 5], 14), "5 appears twice, at 0 and 3"),
    ],
)
def test_two_tokens_are_not_loaded_into_one_slot(slots, place, debug, convert):
    dtype = torch.float16 if convert else torch.float32
    tensors = [torch.randn(2, BLOCKS, BLOCK_SIZE, 2, 16).to(dtype) for _ in range(2)]
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8), debug=debug)
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    batch = heap.batched_store(cache, range(16), 8, convert=convert)
    before = [tensor.clone() for tensor in tensors]
    for listed in (slots, slots if isinstance(slots, BlockIds) else torch.tensor(slots)):
        with pytest.raises(ValueError, match=place):
            kvheap.load(batch, cache, listed, convert=convert)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_slots_that_are_skipped_or_read_may_repeat():
    cache, _, batch = make("cpu", debug=True)
    kvheap.load(batch, cache, [-1] * 14 + [3, 4])
    kvheap.load(batch, cache, BlockIds([-1, 2, -1, -1]))
    kvheap.load(batch, cache, [-1] * 16)
    kvheap.load([batch[1], batch[1]], cache, range(16))
    kvheap.store(cache, [*range(15), 3], batch)


@given(st.lists(st.integers(-1, 23), min_size=16, max_size=16), st.booleans())
@settings(deadline=None)
def test_exactly_lists_with_repetitions_are_refused(slots, as_runs):
    if as_runs:  # long runs, which are compared as runs
        slots = [(slots[at // 4 * 4] + at % 4) % 24 for at in range(16)]
    real = [slot for slot in slots if slot >= 0]
    cache, _, batch = make("cpu")
    if len(set(real)) == len(real):
        kvheap.load(batch, cache, slots)
    else:
        with pytest.raises(ValueError, match="appears twice"):
            kvheap.load(batch, cache, slots)


@on_a_gpu
def test_debug_mode_refuses_bad_slots_on_a_device_before_anything_moves():
    cache, _, batch = make("cuda", debug=True)
    before = batch[0].raw_tensor.clone()
    slots = torch.tensor([*range(15), 24], device="cuda")
    with pytest.raises(ValueError, match=r"slots\[15\] is 24"):
        kvheap.store(cache, slots, batch)
    assert torch.equal(batch[0].raw_tensor, before)
    cache.synchronize()


@on_a_gpu
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
        ({"heads": slice(0.0, 1)}, "a bound of heads must be an integer, got 0.0"),
        ({"heads": slice("a")}, "a bound of heads must be an integer, got 'a'"),
        ({"heads": slice([0], 1)}, r"a bound of heads must be an integer, got \[0\]"),
        ({"heads": slice(False, 1)}, "a bound of heads must be an integer, got False"),
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


@pytest.mark.parametrize(
    "heads", [slice(-10, 2), slice(-3, None), slice(0, 3), slice(3, 4), slice(1, 1)]
)
def test_heads_out_of_range_are_refused(heads):
    cache = PagedKVCache.of("vllm-flash-nhd", [torch.zeros(2, BLOCKS, BLOCK_SIZE, 2, 16).half()])
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    batch = heap.batched_store(cache, range(15), 8)
    with pytest.raises(ValueError, match="heads must be a slice of the 2 heads"):
        kvheap.load(batch, cache, range(15), heads=heads)
