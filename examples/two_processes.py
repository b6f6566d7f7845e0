"""Two processes on one heap: a scheduler keeps the books, a worker has the bytes.

The scheduler makes a heap in shared memory, starts the worker, and sends it a line of JSON for each
job: fill these blocks, or read those. The worker attaches the same memory, wraps the blocks by
their metadata, and answers each job. It cannot allocate or free; the scheduler frees a batch only
after the worker has said that it is done with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch

from kvheap import (
    ForeignProcessError,
    HostMemoryAllocator,
    MemoryBatch,
    MemoryBatchMetadata,
    PagedKVCache,
    store,
)

SHAPE = (2, 2, 16, 64)
"""K and V, layers, tokens, 4 heads of 16 elements."""


def tensors_of(batch: MemoryBatch) -> list[torch.Tensor]:
    """The tensors of all blocks, which must be live."""
    return [block.tensor for block in batch if block.tensor is not None]


def work(path: str, size: int) -> None:
    """The worker: answers jobs until its input ends."""
    layers = [torch.zeros(2, 32, 16, 4, 16) for _ in range(2)]
    cache = PagedKVCache.of("vllm-flash-nhd", layers)  # the engine's, which only this process has
    with HostMemoryAllocator.attach(path, size) as heap:
        for line in sys.stdin:
            job = json.loads(line)
            metadata = MemoryBatchMetadata.from_dict(job["blocks"])
            if job["do"] == "fill":
                blocks = heap.view(metadata, writable=True)  # allocated for this process to fill
                for layer in layers:
                    layer.fill_(job["value"])
                store(cache, torch.arange(len(blocks) * SHAPE[2]), blocks)
                answer: Any = "filled"
            elif job["do"] == "sum":
                blocks = heap.view(metadata)
                answer = sum(float(tensor.sum()) for tensor in tensors_of(blocks))
            else:
                try:
                    heap.batched_allocate(SHAPE, torch.float32, 1)
                except ForeignProcessError as error:
                    answer = f"refused: process {error.pid} is not the owner"
            print(json.dumps(answer), flush=True)


class Worker:
    """The scheduler's side of the worker."""

    def __init__(self, heap: HostMemoryAllocator, size: int) -> None:
        path = f"/proc/{os.getpid()}/fd/{heap.host_buffer.fd}"
        command = [sys.executable, os.path.abspath(__file__), "--worker", path, "--size", str(size)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, batch: MemoryBatch, **more: Any) -> Any:
        """Send one job, and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"do": do, "blocks": batch.metadata.to_dict(), **more}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def schedule(size: int, num_blocks: int) -> None:
    """The scheduler: allocates, lets the worker fill and read, and frees."""
    with HostMemoryAllocator(size, shared=True) as heap:
        worker = Worker(heap, size)
        try:
            batch = heap.batched_allocate(SHAPE, torch.float32, num_blocks)
            assert batch is not None, "full: evict something and try again"
            print("the worker says:", worker.ask("fill", batch, value=2.0))
            assert all(bool(tensor.eq(2).all()) for tensor in tensors_of(batch))

            heap.buffer.zero_()  # the same bytes in both processes
            source = torch.ones(num_blocks, *SHAPE)
            other = heap.batched_allocate(SHAPE, torch.float32, num_blocks, source=source)
            assert other is not None
            total = worker.ask("sum", other)
            print(f"the worker reads a sum of {total:,.0f}")
            assert total == source.sum().item()

            print("the worker asks for blocks:", worker.ask("allocate", other))
            heap.batched_free(batch)  # the worker has answered: it uses them no more
            heap.batched_free(other)
        finally:
            worker.close()
        assert heap.stats().allocated_bytes == 0


def main() -> None:
    """Parse the arguments, and be the scheduler or the worker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=8 << 20, help="bytes of the heap")
    parser.add_argument("--blocks", type=int, default=20, help="of a batch (default: 20)")
    parser.add_argument("--worker", metavar="PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.size)
    else:
        schedule(options.size, options.blocks)


if __name__ == "__main__":
    main()
