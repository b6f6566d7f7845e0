"""The quick ways of one block and one page, slices, reads, writes, leases and snapshots together.

A model knows the owner, the counts and the bytes of every page; random traffic goes through both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from small_heaps import FakeStream, no_debug

from kvheap import (
    BatchLease,
    BlockInUseError,
    MemoryBatch,
    PagedTensorMemoryAllocator,
    TensorMemoryAllocator,
)
from kvheap.snapshots import STATES

__all__ = ["no_debug"]

NUM_PAGES = 40
SHAPE = [32, 9]
PAGE = 576


@dataclass(eq=False)
class Block:
    """What is known of a live block."""

    content: torch.Tensor
    references: int = 1
    leases: int = 0
    streams: list[FakeStream] = field(default_factory=list)


class World:
    """A heap and its model: the live blocks of each batch, by row."""

    def __init__(self, kind: str, seed: int) -> None:
        self.random = random.Random(seed)
        buffer = torch.zeros(NUM_PAGES * PAGE, dtype=torch.uint8)
        options: dict[str, Any] = {"on_full": None, "stream_wait_s": 0.0}
        if kind in ("debug", "scrub"):
            options[kind] = True
        self.heap: TensorMemoryAllocator
        if kind == "blocks":
            self.heap = TensorMemoryAllocator(buffer, 64, **options)
        else:
            self.heap = PagedTensorMemoryAllocator(buffer, SHAPE, torch.int16, **options)
        self.live: list[tuple[MemoryBatch, dict[int, Block]]] = []
        self.leases: list[tuple[BatchLease, list[Block]]] = []
        self.streams: list[FakeStream] = []
        self.used: dict[int, list[FakeStream]] = {}  # what used the block that was freed there

    def rows(self, count: int) -> torch.Tensor:
        values = np.frombuffer(self.random.randbytes(count * PAGE), np.int16).copy()
        return torch.from_numpy(values).view(count, *SHAPE)

    def some(self, blocks: dict[int, Block]) -> list[int]:
        return self.random.sample(list(blocks), self.random.randint(1, len(blocks)))

    def allocate(self) -> None:
        count = self.random.choice([1, 1, 1, 2, 4])
        rows = self.rows(count)
        if self.random.random() < 0.5:
            batch = self.heap.batched_allocate(SHAPE, torch.int16, count, source=rows)
        else:
            obj = self.heap.allocate(SHAPE, torch.int16)
            rows = rows[:1]
            batch = None if obj is None else obj.batch
            if batch is not None:
                self.heap.batched_write(batch[:], rows)
        if batch is not None:
            self.live.append((batch, {row: Block(each) for row, each in enumerate(rows)}))

    def free(self) -> None:
        batch, blocks = self.random.choice(self.live)
        chosen = self.some(blocks)
        held = [row for row in chosen if blocks[row].references > 1 or blocks[row].leases]
        objs: Any = [batch[row] for row in chosen]
        if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
            objs = batch[chosen[0] : chosen[-1] + 1]
        if held:
            with pytest.raises(BlockInUseError):
                self.heap.batched_free(objs)
            return
        way = self.random.choice(["one by one", "count down", "together", "into out", "whole"])
        if way == "one by one":
            for obj in objs:
                self.heap.free(obj)
        elif way == "count down":
            for obj in objs:
                obj.ref_count_down()
        elif way == "into out":
            out = torch.zeros(len(chosen), *SHAPE, dtype=torch.int16)
            self.heap.batched_free(objs, out=out)
            assert torch.equal(out, torch.stack([blocks[row].content for row in chosen]))
        else:
            self.heap.batched_free(batch if len(chosen) == len(batch) else objs)
        self.forget(batch, blocks, chosen)

    def forget(self, batch: MemoryBatch, blocks: dict[int, Block], rows: list[int]) -> None:
        for row in rows:
            self.used[int(batch.addresses[row])] = blocks.pop(row).streams

    def drop(self) -> None:
        batch, blocks = self.random.choice(self.live)
        if not any(block.leases for block in blocks.values()):
            self.forget(batch, blocks, list(blocks))

    def count(self) -> None:
        batch, blocks = self.random.choice(self.live)
        row = self.random.choice(list(blocks))
        if blocks[row].references == 1:
            batch[row].ref_count_up()
            blocks[row].references = 2
        else:
            batch[row].ref_count_down()
            blocks[row].references = 1

    def lease(self) -> None:
        if self.leases and self.random.random() < 0.7:
            lease, held = self.leases.pop()
            lease.release()
            for block in held:
                block.leases -= 1
            return
        batch, blocks = self.random.choice(self.live)
        chosen = self.some(blocks)
        lease = self.heap.lease([batch[row] for row in chosen], 3600)
        self.leases.append((lease, [blocks[row] for row in chosen]))
        for row in chosen:
            blocks[row].leases += 1

    def stream(self) -> None:
        if self.streams and self.random.random() < 0.7:
            self.streams.pop().finish()
            return
        batch, blocks = self.random.choice(self.live)
        row = self.random.choice(list(blocks))
        self.streams.append(FakeStream())
        self.streams[-1].submit()
        batch[row : row + 1].record_stream(self.streams[-1])
        blocks[row].streams.append(self.streams[-1])

    def write(self) -> None:
        batch, blocks = self.random.choice(self.live)
        chosen = self.some(blocks)
        rows = self.rows(len(chosen))
        self.heap.batched_write([batch[row] for row in chosen], rows)
        for row, content in zip(chosen, rows, strict=True):
            blocks[row].content = content

    def check(self) -> None:
        heap = self.heap
        pages: dict[int, Block] = {}
        for batch, blocks in self.live:
            addresses = batch.addresses.tolist()
            assert batch[::-1].live.tolist() == [row in blocks for row in range(len(batch))][::-1]
            rows = sorted(blocks)
            found = heap.batched_read([batch[row] for row in rows])
            assert torch.equal(found, torch.stack([blocks[row].content for row in rows]))
            for row in rows:
                assert addresses[row] not in pages
                pages[addresses[row]] = blocks[row]
        snapshot, stats = heap.snapshot(), heap.stats()
        sizes = snapshot.bytes_by_state()
        assert sum(sizes.values()) == stats.heap_bytes == NUM_PAGES * PAGE
        assert (sizes["free"], sizes["pending"]) == (stats.free_bytes, stats.pending_bytes)
        assert snapshot.free_extents.tolist() == heap.free_extents().tolist()
        assert sizes["live"] + sizes["pinned"] == len(pages) * PAGE
        for start, size, state in zip(
            snapshot.starts.tolist(), snapshot.sizes.tolist(), snapshot.states, strict=True
        ):
            for address in range(start, start + size, PAGE):
                block = pages.get(address)
                if block is not None:
                    self.used.pop(address, None)
                    assert STATES[state] == ("pinned" if block.leases else "live")
                else:
                    is_used = any(each.done < 1 for each in self.used.get(address, []))
                    assert STATES[state] in (("pending",) if is_used else ("free", "pending"))
        heap.check()


@pytest.mark.parametrize("kind", ["pages", "blocks", "debug", "scrub"])
@pytest.mark.parametrize("seed", range(2))
def test_any_traffic(kind: str, seed: int) -> None:
    world = World(kind, seed)
    calls = [World.allocate] * 6 + [World.free] * 5
    calls += [World.drop, World.count, World.lease, World.stream, World.write]
    for number in range(400):
        call = world.random.choice(calls) if world.live else World.allocate
        call(world)
        world.live = [each for each in world.live if each[1]]
        if number % 5 == 0:
            world.check()
    for stream in world.streams:
        stream.finish()
    for lease, _ in world.leases:
        lease.release()
    world.live.clear()
    world.heap.close()
