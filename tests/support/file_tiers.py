"""Tiers of files for tests: chunks whose bytes follow from their keys; a process that is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvheap import BlockLayout, HostMemoryAllocator, MemoryBatch, MemoryFormat
from kvheap.files import FileTier

__all__ = ["LAYOUT", "PLACE", "fill", "key_of", "make_heap", "open_tier", "stored", "wrong_rows"]

LAYOUT = BlockLayout.of([2048], torch.int64, MemoryFormat.UNDEFINED)
PLACE = LAYOUT.size_bytes
"""16 KiB, a multiple of 4096."""

NAMESPACE = "a model"


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "big")


def expected(key: bytes) -> torch.Tensor:
    """The chunk of a key."""
    return torch.arange(2048) * 7919 + int.from_bytes(key, "big") * 1_000_003


def make_heap(num_chunks: int = 64) -> HostMemoryAllocator:
    return HostMemoryAllocator(num_chunks * PLACE, stream_wait_s=0.0)


def fill(heap: Any, keys: Sequence[bytes]) -> MemoryBatch:
    """A batch with the chunks of keys."""
    source = torch.stack([expected(key) for key in keys])
    batch = heap.batched_allocate(
        list(LAYOUT.shapes[0]), torch.int64, len(keys), LAYOUT.fmt, source=source
    )
    assert batch is not None
    return batch


def open_tier(folder: Path | str, num_chunks: int = 16, **options: Any) -> FileTier:
    options = {"namespace": NAMESPACE, **options}
    return FileTier(folder, num_chunks * PLACE, LAYOUT, **options)


def stored(tier: FileTier, heap: Any, numbers: Sequence[int]) -> list[bytes]:
    """Store chunks, free their blocks, and return their keys."""
    keys = [key_of(number) for number in numbers]
    batch = fill(heap, keys)
    tier.store(keys, batch).result(60)
    heap.batched_free(batch)
    return keys


def wrong_rows(keys: Sequence[bytes], blocks: Any, rows: Sequence[bool] | None = None) -> list[int]:
    """The rows of blocks that do not have the bytes of their keys, among ``rows``."""
    return [
        row
        for row, key in enumerate(keys)
        if (rows is None or rows[row]) and not torch.equal(blocks[row].tensor, expected(key))
    ]


# -- a process that is killed ------------------------------------------------------------------

NUM_CHUNKS, BATCH = 32, 6


def index_first() -> None:
    """Spoil the order of a store: the index is written before the bytes are."""
    from kvheap.files.chunk_file import ChunkFile

    write = ChunkFile._write

    def write_late(self: Any, keys: Any, chunks: Any, blocks: Any, *rest: Any) -> Any:
        row_of = {key: row for row, key in enumerate(keys)}
        for chunk in chunks:
            chunk.digest = self._digest_of(chunk.key, blocks.block(row_of[chunk.key]))
        self._commit(chunks)
        return write(self, keys, chunks, blocks, *rest)

    ChunkFile._write = write_late  # type: ignore[method-assign]


def work(folder: str, seed: int, report: int) -> None:
    """Store, load and remove until killed, and report what has ended."""
    rng = random.Random(seed)
    heap = make_heap(64)
    tier = open_tier(folder, NUM_CHUNKS, threads=2)
    number = seed * 100_000
    known: list[bytes] = []
    while True:
        keys = [key_of(number + i) for i in range(BATCH)]
        number += BATCH
        batch = fill(heap, keys)
        transfer = tier.store(keys, batch)
        heap.batched_free(batch)  # in flight
        if known and rng.random() < 0.5:
            loading = tier.load(rng.sample(known, min(len(known), 4)), heap)
            assert loading is not None
            loading.succeeded(60)
            heap.batched_free(loading.batch)
        if known and rng.random() < 0.2:
            key = rng.choice(known)
            os.write(report, b"?" + key)
            tier.remove([key])
            os.write(report, b"-" + key)
        transfer.result(60)
        os.write(report, b"".join(b"+" + key for key in keys))
        known = (known + keys)[-3 * BATCH :]
        if rng.random() < 0.1:
            tier.close()
            tier = open_tier(folder, NUM_CHUNKS, threads=2)


def main(folder: str, kind: str) -> None:
    """Fork a worker for each line of the input, a seed, and print its number."""
    if kind == "index-first":
        index_first()
    report = os.dup(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                work(folder, int(line), report)
            finally:
                os._exit(1)
        os.write(report, b"#" + child.to_bytes(8, "big"))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        os.write(report, b"." + bytes(8))


if __name__ == "__main__":
    main(*sys.argv[1:])
