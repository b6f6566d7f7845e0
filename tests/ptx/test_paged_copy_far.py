"""Compiled paged copies with offsets beyond 2**32, in memory of which little is real.

Only the rows that are copied may be touched, so an offset that wraps is caught wherever it leads.
"""

from __future__ import annotations

from typing import TypeAlias

import pytest
import torch
from compiled import ON_ALL_CAPABILITIES, needs_compiler
from paged_worlds import FLASH
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory
from sparse import sparse_memory

import kvheap
from kvheap import MemoryBatch, MemoryFormat, PagedKVCache, TensorMemoryAllocator

pytestmark = needs_compiler

F = MemoryFormat
GIB = 1 << 30

Rows: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
"""Pairs of a row of the engine and the row of the chunks that holds the same bytes."""


def check_round_trip(
    cache: PagedKVCache,
    batch: MemoryBatch,
    slots: list[int],
    rows: Rows,
    capability: int,
    layers: range | None = None,
) -> None:
    """Store tokens, and load them back."""
    theirs, ours = [row for row, _ in rows], [row for _, row in rows]
    for row in theirs:
        row.copy_(torch.randint(1, 256, row.shape, dtype=torch.uint8))
    saved = [row.clone() for row in theirs]
    with running_ptx(capability, GlobalMemory(reads=theirs, writes=ours)):
        kvheap.store(cache, slots, batch, layers=layers)
    assert all(map(torch.equal, ours, saved))
    for row in theirs:
        row.zero_()
    with running_ptx(capability, GlobalMemory(reads=ours, writes=theirs)):
        kvheap.load(batch, cache, slots, layers=layers)
    assert all(map(torch.equal, theirs, saved))


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("dim", [64, 61])
def test_blocks_layers_and_chunks(dim: int, capability: int) -> None:
    """Blocks 5 GiB apart, a layer at 50 GiB, chunks at up to 39 GiB.

    In words of 8 bytes, 32 GiB wrap.
    """
    pool, buffer = sparse_memory(100 * GIB), sparse_memory(40 * GIB)
    strides = (4 * dim, 5 * GIB, dim, dim, 1)
    tensors = [pool[start:].as_strided((2, 10, 4, 1, dim), strides) for start in (0, 50 * GIB)]
    heap = TensorMemoryAllocator(buffer)
    shape, addresses = (2, 2, 4, dim), [4 * GIB - 4096, 39 * GIB + 4096]
    batch = heap.view(addresses, shape, torch.uint8, F.KV_2LTD)
    slots = [39, 0, 17, 34, 5]
    rows = []
    for token, slot in enumerate(slots):
        start = addresses[token // 4]
        chunk = buffer[start : start + 16 * dim].view(shape)
        for layer, plane in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row = tensors[layer][plane, slot // 4, slot % 4, 0]
            rows.append((row, chunk[plane, layer, token % 4]))
    check_round_trip(PagedKVCache.of(FLASH, tensors), batch, slots, rows, capability)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("dim", [48, 45])
def test_slots_and_heads(dim: int, capability: int) -> None:
    """Slots 18 GiB apart, heads 60 GiB."""
    strides = (dim, 240 * GIB, 18 * GIB, 60 * GIB, 1)
    tensor = sparse_memory(160 * GIB).as_strided((2, 1, 3, 3, dim), strides)
    heap = TensorMemoryAllocator(torch.zeros(1 << 12, dtype=torch.uint8))
    batch = heap.view([0], (2, 1, 3, 3 * dim), torch.uint8, F.KV_2LTD)
    chunk, slots = heap.buffer[: 18 * dim].view(2, 3, 3, dim), [2, 0, 1]
    rows = [
        (tensor[plane, 0, slot, head], chunk[plane, token, head])
        for plane in (0, 1)
        for token, slot in enumerate(slots)
        for head in range(3)
    ]
    check_round_trip(PagedKVCache.of(FLASH, [tensor]), batch, slots, rows, capability)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("fmt", [F.KV_2TLD, F.KV_PL2TD], ids=lambda fmt: fmt.name)
def test_tokens_and_pages_of_a_large_chunk(fmt: MemoryFormat, capability: int) -> None:
    """One of 8,192 layers is copied: tokens are 8 MiB apart, or pages of two tokens 32 MiB."""
    num_layers, num_tokens, dim = 8192, 8192, 1024
    tensor = torch.zeros(2, 1, num_tokens, 1, dim, dtype=torch.uint8)
    shape: tuple[int, ...] = (2, num_tokens, num_layers, dim)
    if fmt is F.KV_PL2TD:
        shape = (num_tokens // 2, num_layers, 2, 2, dim)
    size = torch.Size(shape).numel()
    heap = TensorMemoryAllocator(sparse_memory(size))
    batch, chunk = heap.view([0], shape, torch.uint8, fmt), heap.buffer.view(shape)
    slots = [-1] * num_tokens
    rows = []
    for token in (0, 1, 2047, 2048, 4095, 4096, 8190, 8191):
        slots[token] = num_tokens - 1 - token
        for plane in (0, 1):
            if fmt is F.KV_2TLD:
                row = chunk[plane, token, -1]
            else:
                row = chunk[token // 2, -1, plane, token % 2]
            rows.append((tensor[plane, 0, slots[token], 0], row))
    cache = PagedKVCache.of(FLASH, [tensor] * num_layers)
    layers = range(num_layers - 1, num_layers)
    check_round_trip(cache, batch, slots, rows, capability, layers)
