"""Batches move to host memory and back while an event loop goes on.

Each request of this made-up engine fills a batch in the near heap, offloads it when it pauses, and
restores it when it continues. Transfers are awaited, so that other requests run meanwhile, and a
task that ticks shows that nothing blocks the loop. On a machine with a GPU the near heap is in its
memory, and the far one is pinned; elsewhere both are in host memory.
"""

from __future__ import annotations

import argparse
import asyncio

import torch

from kvheap import (
    MemoryBatch,
    PinMemoryAllocator,
    TensorMemoryAllocator,
    offload,
    restore,
)

SHAPE = (2, 4, 16, 128)


async def moved(batch: MemoryBatch, into: TensorMemoryAllocator, away: bool) -> MemoryBatch:
    """A batch in another heap; waits where that one is full. Its old bytes are freed."""
    while True:
        move = offload if away else restore
        there = move(batch, into=into, free=True)
        if there is not None:
            break
        await asyncio.sleep(0.001)  # full: somebody else's batch will leave
    assert there.transfer is not None
    await there.transfer  # raises what failed
    return there


async def request(
    number: int, near: TensorMemoryAllocator, far: TensorMemoryAllocator, num_blocks: int
) -> None:
    """Fill a batch, send it away, take it back, and compare every byte."""
    kv = torch.full((num_blocks, *SHAPE), number + 1, dtype=torch.bfloat16, device=near.device)
    batch = near.batched_allocate(SHAPE, torch.bfloat16, num_blocks, source=kv)
    while batch is None:
        await asyncio.sleep(0.001)
        batch = near.batched_allocate(SHAPE, torch.bfloat16, num_blocks, source=kv)
    batch = await moved(batch, far, away=True)
    await asyncio.sleep(0.005)  # the user thinks
    batch = await moved(batch, near, away=False)
    out = torch.empty_like(kv)
    near.batched_free(batch, out=out)
    assert torch.equal(out, kv)


async def ticks(ended: asyncio.Event) -> int:
    """How often the loop came around."""
    count = 0
    while not ended.is_set():
        await asyncio.sleep(0)
        count += 1
    return count


async def run(options: argparse.Namespace) -> None:
    """All requests at once."""
    gpu = torch.cuda.is_available()
    block_bytes = 2 * torch.Size(SHAPE).numel()
    room = options.blocks * block_bytes * max(options.requests // 2, 1)
    buffer = torch.empty(room, dtype=torch.uint8, device="cuda" if gpu else "cpu")
    # An event loop must not wait inside an allocation: it tries again instead.
    near = TensorMemoryAllocator(buffer, stream_wait_s=0)
    with PinMemoryAllocator(2 * room, allow_unpinned=not gpu, stream_wait_s=0) as far:
        ended = asyncio.Event()
        ticking = asyncio.create_task(ticks(ended))
        await asyncio.gather(
            *(request(n, near, far, options.blocks) for n in range(options.requests))
        )
        ended.set()
        print(f"{options.requests} requests moved away and back, {await ticking} ticks meanwhile")
        assert near.stats().allocated_bytes == far.stats().allocated_bytes == 0
    near.close()


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=8, help="(default: 8)")
    parser.add_argument("--blocks", type=int, default=200, help="of each request (default: 200)")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
