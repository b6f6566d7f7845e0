"""Small cases of every kernel, for ``compute-sanitizer``: run by benchmarks/gpu_evidence.sh.

Allocations end where the last block ends. With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor has an
allocation of its own, so that an access beyond the last block is an access beyond an allocation.
"""

from __future__ import annotations

import numpy as np
import torch

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import copy_pieces

# Words of 16, 8, 4, 2 and 1 bytes; less than a tile, several tiles, tiles with ragged ends.
BLOCK_BYTES = (4096, 16, 8, 132, 6, 7, 656, 70_000)

CHUNK_TOKENS = 24
"""No whole number of blocks, and the last chunk is filled in part."""

# Engine layout, shape of one layer's tensor, dtype; heads of 160 and 33 bytes, tokens of 1152 and
# 656 bytes.
PAGED_CASES = (
    ("vllm-flash-nhd", (2, 5, 16, 3, 80), torch.bfloat16),
    ("vllm-flash-nhd", (2, 5, 16, 3, 33), torch.uint8),
    ("vllm-flash-hnd", (2, 5, 3, 16, 80), torch.bfloat16),
    ("vllm-flash-hnd", (2, 5, 3, 16, 33), torch.uint8),
    ("mla", (5, 16, 576), torch.bfloat16),
    ("mla", (5, 16, 656), torch.uint8),
)

# First byte of the source and of the target, and sizes: every width of access, heads and tails.
PIECE_CASES = (
    (0, 0, (4096, 4096, 4096)),
    (8, 0, (70_000, 24, 8)),
    (0, 0, (132, 132, 132)),
    (3, 19, (1000, 16, 70_001)),
    (3, 11, (1000, 200)),
    (3, 7, (1000, 200)),
    (3, 5, (1000, 200)),
    (3, 4, (1000, 1, 200)),
    (1, 0, (5, 7, 1)),
)


def copy_and_check(block_bytes: int, num_blocks: int) -> None:
    """Scatter, gather, move and fill blocks at both ends of a buffer and between."""
    slots = np.random.default_rng(block_bytes).permutation(2 * num_blocks)
    here, there = slots[:num_blocks] * block_bytes, slots[num_blocks:] * block_bytes
    size = (num_blocks, block_bytes)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
    buffer = torch.zeros(2 * num_blocks * block_bytes, dtype=torch.uint8, device="cuda")
    scatter_blocks(blocks, buffer, here)
    move_blocks(buffer, here, there, block_bytes)
    for addresses in (here, torch.from_numpy(there).cuda()):
        assert torch.equal(gather_blocks(buffer, addresses, torch.empty_like(blocks)), blocks)
    fill_blocks(buffer, here, block_bytes, 0x5A)
    filled = gather_blocks(buffer, here, torch.empty_like(blocks))
    assert (filled == 0x5A).all()
    assert torch.equal(gather_blocks(buffer, there, torch.empty_like(blocks)), blocks)


def round_trip(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Store all slots of a cache and load them back, by slots and by blocks, two layers."""
    raw = [byte_tensor(shape, dtype) for _ in range(2)]
    cache = PagedKVCache.of(name, [layer.view(dtype) for layer in raw])
    is_mla = name == "mla"
    fmt = MemoryFormat.KV_MLA_FMT if is_mla else MemoryFormat.KV_2LTD
    chunk = (cache.num_planes, 2, CHUNK_TOKENS, cache.num_heads * cache.head_dim)
    num_chunks = -(-cache.num_slots // CHUNK_TOKENS)
    chunk_bytes = torch.Size(chunk).numel() * dtype.itemsize
    buffer = torch.zeros(num_chunks * chunk_bytes, dtype=torch.uint8, device="cuda")
    alignment = chunk_bytes & -chunk_bytes
    heap = TensorMemoryAllocator(buffer, min(alignment, 4096), debug=False)
    batch = heap.batched_allocate(chunk, dtype, num_chunks, fmt)
    assert batch is not None
    generator = np.random.default_rng(cache.head_dim)
    blocks = generator.permutation(cache.num_blocks)
    slots = generator.permutation(cache.num_slots)
    before = [layer.clone() for layer in raw]
    on_device = (torch.from_numpy(slots).cuda(), BlockIds(torch.from_numpy(blocks).cuda()))
    for places in (*on_device, slots, BlockIds(blocks)):
        kvheap.store(cache, places, batch)
        for layer in raw:
            layer.zero_()
        kvheap.load(batch, cache, places)
        cache.synchronize()
        assert all(map(torch.equal, raw, before))


def convert_round_trip(name: str, shape: tuple[int, ...]) -> None:
    """Store all slots of a cache as fp8 and load them back: 0 and 448 come back exactly."""
    tensors = [(torch.randint(0, 2, shape, device="cuda") * 448).bfloat16() for _ in range(2)]
    for tensor in tensors:
        tensor[..., 0] = 448  # so that every scale is 1
    cache = PagedKVCache.of(name, tensors)
    shapes = [
        (cache.num_planes, 2, CHUNK_TOKENS, cache.num_heads * cache.head_dim),
        (cache.num_planes, 2, cache.num_heads),
    ]
    dtypes = [torch.float8_e4m3fn, torch.float32]
    code_bytes, scale_bytes = torch.Size(shapes[0]).numel(), 4 * torch.Size(shapes[1]).numel()
    chunk_bytes = -(-(code_bytes + scale_bytes) // 16) * 16
    num_chunks = -(-cache.num_slots // CHUNK_TOKENS)
    buffer = torch.zeros(num_chunks * chunk_bytes, dtype=torch.uint8, device="cuda")
    heap = TensorMemoryAllocator(buffer, 16, debug=False)
    batch = heap.batched_allocate(shapes, dtypes, num_chunks, MemoryFormat.KV_2LTD)
    assert batch is not None
    generator = np.random.default_rng(cache.head_dim)
    slots = torch.from_numpy(generator.permutation(cache.num_slots)).cuda()
    blocks = BlockIds(torch.from_numpy(generator.permutation(cache.num_blocks)).cuda())
    before = [tensor.clone() for tensor in tensors]
    for places in (slots, blocks):
        kvheap.store(cache, places, batch, convert=True)
        for tensor in tensors:
            tensor.zero_()
        kvheap.load(batch, cache, places, convert=True)
        cache.synchronize()
        assert all(map(torch.equal, tensors, before))


def copy_by_pointers(source_start: int, target_start: int, sizes: tuple[int, ...]) -> None:
    """Copy pieces that follow each other, the last one first, up to the ends of both sides."""
    num_bytes = sum(sizes)
    starts = np.cumsum((0, *sizes))[:-1]
    for memory in ("cuda", "pinned"):
        source = byte_tensor((source_start + num_bytes,), torch.uint8)
        target = torch.zeros(target_start + num_bytes, dtype=torch.uint8, device="cuda")
        if memory == "pinned":
            source = source.cpu().pin_memory()
        sources = source.data_ptr() + source_start + starts
        targets = target.data_ptr() + target_start + starts
        for max_sms in (1, None):
            target.zero_()
            copy_pieces(
                Pieces.of(sources[::-1], targets[::-1], sizes[::-1]), target.device, max_sms
            )
            assert torch.equal(target[target_start:], source[source_start:].cuda())
            assert not target[:target_start].any()


def byte_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bytes for a tensor of that shape and dtype."""
    sizes = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, sizes, dtype=torch.uint8, device="cuda")


def main() -> None:
    """Run every case; the sanitizer reports wrong accesses."""
    for block_bytes in BLOCK_BYTES:
        copy_and_check(block_bytes, num_blocks=5)
    for case in PAGED_CASES:
        round_trip(*case)
    for name in ("vllm-flash-nhd", "vllm-flash-hnd"):
        convert_round_trip(name, (2, 5, 16, 16, 80))
    for start_and_sizes in PIECE_CASES:
        copy_by_pointers(*start_and_sizes)
    torch.cuda.synchronize()
    print(
        f"{len(BLOCK_BYTES)} block sizes, {len(PAGED_CASES)} paged caches and "
        f"{len(PIECE_CASES)} lists of pieces passed"
    )


if __name__ == "__main__":
    main()
