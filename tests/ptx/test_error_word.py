"""The error word of compiled kernels: it names the lowest token out of range, which is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from compiled import ON_ALL_CAPABILITIES, needs_compiler
from paged_reference import Engine, Sizes
from paged_worlds import BOTH_WAYS, FLASH, World, cache_of, slots_of_blocks
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import paged_convert, paged_copy
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.token_copy import Chunks, TokenCopy

pytestmark = needs_compiler

NUM_TOKENS, BLOCK_SIZE = 230, 4
ENGINE = Sizes(num_layers=2, num_blocks=64, block_size=BLOCK_SIZE, num_heads=2, head_dim=16)


def chunks_of(world: World) -> Chunks:
    """The batch of a world as kernels know it."""
    heap, batch = world.heap, world.batch
    layout = ChunkLayout.of("PLTD", batch.shape, batch.dtype.itemsize)
    addresses = heap.buffer.data_ptr() + np.asarray(batch.addresses)
    return Chunks(heap.buffer, addresses, layout.size_bytes, 16, layout)


def copy_unseen(
    cache: PagedKVCache, places: torch.Tensor, chunks: Chunks, are_blocks: bool, is_store: bool
) -> None:
    """A copy whose slots or block ids nobody checks on the host, as where a device has them."""
    slots = BlockIds(range(len(places)), NUM_TOKENS) if are_blocks else range(NUM_TOKENS)
    copy = TokenCopy.of(cache, slots, chunks, None, None, eager=False, to_heap=is_store)
    copy = replace(copy, places=replace(copy.places, values=places))
    if chunks.scale_offset is None:
        paged_copy._launch_copy(copy)
    else:
        paged_convert.launch_conversion(copy)


def require_named(cache: PagedKVCache, token: int, place: int) -> None:
    """The cache reports this token, and once."""
    with pytest.raises(ValueError, match=rf"token {token} of a copy had slot or block {place}:"):
        cache.synchronize()
    cache.synchronize()


def check_slots(
    dtype: torch.dtype, is_store: bool, capability: int, rewrite: Callable[[str], str] = str
) -> None:
    """Copy tokens of which some are out of range, spread over several programs."""
    world = World(Engine(FLASH, ENGINE), MemoryFormat.KV_2LTD, NUM_TOKENS, 32)
    cache = cache_of(world.engine)
    slots = np.random.default_rng(1).permutation(cache.num_slots)[:NUM_TOKENS]
    # In both halves of a tile of 64 rows, since threads copy several rows each.
    bad = {209: -2, 71: cache.num_slots, 130: 2**31 - 1, 131: -(2**31), 72: 10**6, 5: -1}
    bad |= {226: -2, 103: cache.num_slots, 37: -1}
    expected = world.expected([-1 if t in bad else int(s) for t, s in enumerate(slots)], is_store)
    slots[list(bad)] = list(bad.values())
    memory = GlobalMemory(world.parts(), [*world.parts(), cache.error_word()])
    with running_ptx(capability, memory, rewrite=rewrite) as gpu:
        copy_unseen(cache, torch.tensor(slots, dtype=dtype), chunks_of(world), False, is_store)
    assert world.differences(expected) == []
    assert gpu.launches[0].num_blocks > 4
    assert any(name.startswith("atom.global") for name in gpu.executed)
    require_named(cache, 71, cache.num_slots)


@ON_ALL_CAPABILITIES
@BOTH_WAYS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_out_of_range(dtype: torch.dtype, is_store: bool, capability: int) -> None:
    check_slots(dtype, is_store, capability)


def test_a_report_that_is_lost_would_be_seen() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_slots(torch.int64, True, 90, lambda ptx: ptx.replace("acq_rel.min", "acq_rel.max"))


@ON_ALL_CAPABILITIES
@BOTH_WAYS
def test_blocks_out_of_range(is_store: bool, capability: int) -> None:
    world = World(Engine(FLASH, ENGINE), MemoryFormat.KV_2LTD, NUM_TOKENS, 32)
    cache = cache_of(world.engine)
    ids = np.random.default_rng(1).permutation(ENGINE.num_blocks)[: -(-NUM_TOKENS // BLOCK_SIZE)]
    bad = {40: 1 << 40, 20: -(1 << 40), 3: -1}
    slots = slots_of_blocks(ids.tolist(), BLOCK_SIZE, NUM_TOKENS)
    slots = [-1 if token // BLOCK_SIZE in bad else slot for token, slot in enumerate(slots)]
    expected = world.expected(slots, is_store)
    ids[list(bad)] = list(bad.values())
    memory = GlobalMemory(world.parts(), [*world.parts(), cache.error_word()])
    with running_ptx(capability, memory):
        copy_unseen(cache, torch.tensor(ids), chunks_of(world), True, is_store)
    assert world.differences(expected) == []
    require_named(cache, 20 * BLOCK_SIZE, -(1 << 31))


@ON_ALL_CAPABILITIES
@BOTH_WAYS
def test_slots_of_conversions(is_store: bool, capability: int) -> None:
    """Beside a copy on the CPU that skips the same tokens."""
    engine, random = Engine(FLASH, ENGINE), torch.Generator().manual_seed(3)
    for tensor in engine.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=random))
    cache = cache_of(engine)
    slots = np.random.default_rng(1).permutation(cache.num_slots)[:NUM_TOKENS]
    bad = {209: -2, 71: cache.num_slots, 130: 2**31 - 1, 5: -1}
    skipping = [-1 if token in bad else int(slot) for token, slot in enumerate(slots)]
    heap = TensorMemoryAllocator(torch.zeros(1 << 18, dtype=torch.uint8))
    batch = heap.batched_store(cache, slots, 32, convert=True)
    assert batch is not None
    if is_store:
        heap.buffer.zero_()
    parts = [*engine.storages, heap.buffer]
    before = [part.clone() for part in parts]
    if is_store:
        kvheap.store(cache, skipping, batch, convert=True)
    else:
        kvheap.load(batch, cache, skipping, convert=True)
    expected = [part.clone() for part in parts]
    for part, saved in zip(parts, before, strict=True):
        part.copy_(saved)
    layout = ChunkLayout.of("PLTD", batch.shape, 1)
    addresses = heap.buffer.data_ptr() + np.asarray(batch.addresses)
    chunks = Chunks(heap.buffer, addresses, batch.size_bytes, 16, layout, layout.size_bytes)
    slots[list(bad)] = list(bad.values())
    memory = GlobalMemory(parts, [*parts, cache.error_word()])
    with running_ptx(capability, memory):
        copy_unseen(cache, torch.tensor(slots), chunks, False, is_store)
    assert not all(map(torch.equal, expected, before))
    assert all(map(torch.equal, parts, expected))
    require_named(cache, 71, cache.num_slots)
