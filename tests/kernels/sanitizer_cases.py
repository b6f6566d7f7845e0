"""Small cases of every kernel, for ``compute-sanitizer``: run by benchmarks/gpu_evidence.sh.

Allocations end where the last block ends, and with PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor
has its own, so that an access beyond a block is an access beyond an allocation.
"""

from __future__ import annotations

import numpy as np
import torch

from kvheap.kernels import fill_blocks, gather_blocks, move_blocks, scatter_blocks

# Words of 16, 8, 4, 2 and 1 bytes; less than a tile, several tiles, tiles with ragged ends.
BLOCK_BYTES = (4096, 16, 8, 132, 6, 7, 656, 70_000)


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


def main() -> None:
    """Run every case; the sanitizer reports what they touch."""
    for block_bytes in BLOCK_BYTES:
        copy_and_check(block_bytes, num_blocks=5)
    torch.cuda.synchronize()
    print(f"{len(BLOCK_BYTES)} block sizes passed")


if __name__ == "__main__":
    main()
