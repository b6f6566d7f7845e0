"""That the tests in this folder reach every kernel, and what ordinary traffic compiles."""

from __future__ import annotations

import numpy as np
import torch
from compiled import needs_compiler
from paged_reference import SPECS, Engine, Sizes
from paged_worlds import SMALL, World, cache_of, format_of, random_slots, transfer
from ptx_machine.jit import Gpu, jit_functions, running_ptx
from sparse import sparse_memory

from kvheap import BlockIds, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import fill_blocks, scatter_blocks
from kvheap.kernels.bulk_copy import BulkCopy
from kvheap.kernels.paged_slots import Slots
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import copy_pieces

pytestmark = needs_compiler

CPU = torch.device("cpu")


def test_no_kernel_is_left_out() -> None:
    """A new kernel needs a test that executes it, and a line here."""
    buffer = torch.zeros(1 << 16, dtype=torch.uint8)
    with running_ptx(90, memory=None) as gpu:
        scatter_blocks(torch.zeros(2, 64, dtype=torch.uint8), buffer, [0, 4096])
        fill_blocks(buffer, [0, 4096], 64, 0xDE)
        pieces = Pieces.of([buffer.data_ptr()], [buffer.data_ptr() + 4096], 64)
        copy_pieces(pieces, CPU)
        BulkCopy.prepare(pieces, CPU).run()
        for layout in SPECS:
            engine = Engine(layout, SMALL)
            world = World(engine, format_of(layout), 5, chunk_tokens=4)
            transfer(world, random_slots(engine, 5), is_store=True)
        heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
        heap.batched_store(cache_of(Engine("vllm-flash-nhd", Sizes())), [0, 1], convert=True)
    assert {launch.kernel for launch in gpu.launches} == set(jit_functions())


def serve(cache: PagedKVCache, heap: TensorMemoryAllocator, seed: int) -> None:
    """Requests of any length, whose KV is stored by slots or by blocks, loaded, and freed."""
    random = np.random.default_rng(seed)
    for number in range(60):
        num_tokens = int(random.integers(1, 3000))
        blocks = random.permutation(cache.num_blocks)[: -(-num_tokens // cache.block_size)]
        if number % 3 == 0:  # in a fresh cache
            blocks = np.arange(len(blocks)) + int(random.integers(cache.num_blocks - len(blocks)))
        places: Slots = BlockIds(blocks, num_tokens)
        if number % 2:
            offsets = np.arange(num_tokens)
            places = blocks[offsets // cache.block_size] * cache.block_size
            places += offsets % cache.block_size
        batch = heap.batched_store(cache, places, convert=number % 10 == 9)
        assert batch is not None
        heap.batched_load(batch, cache, places, convert=number % 10 == 9)
        if number % 10 == 8:
            heap.batched_evict(batch)
        else:
            heap.batched_free(batch)


def compiled_by_traffic(gpu: Gpu) -> dict[str, int]:
    shape = (2, 256, 16, 8, 128)
    size = 2 * torch.Size(shape).numel()
    tensors = [sparse_memory(size).view(torch.bfloat16).view(shape) for _ in range(2)]
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    heap = TensorMemoryAllocator(sparse_memory(1 << 28), on_full=None)
    serve(cache, heap, seed=1)
    return gpu.num_compiled()


def test_traffic_that_was_seen_compiles_nothing() -> None:
    with running_ptx(90, memory=None, is_new=True) as gpu:
        first = compiled_by_traffic(gpu)
        tokens = {"_copy_tokens_kernel": 1, "_convert_tokens_kernel": 2}
        assert first == tokens | {"_copy_blocks_kernel": 1}
        assert compiled_by_traffic(gpu) == first
