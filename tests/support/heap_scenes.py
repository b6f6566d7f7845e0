"""A heap with batches in every state, operations on it, and what must be true after each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from small_heaps import PAGE, FakeStream, heap_of

from kvheap import Lease, MemoryBatch

__all__ = ["OPERATIONS", "PAGES", "Scene", "require_that_every_byte_is_accounted_for"]

PAGES = 32


class Scene:
    """A heap with batches in every state, and what an operation may do to them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.heap = heap_of(PAGES, on_full=None, stream_wait_s=0.0, **options)
        self.whole = self.take(3)
        self.batch = self.take(4)
        self.other = self.take(2)
        self.single = self.take(1)
        self.lone = self.take(1)
        self.stream = FakeStream()
        self.stream.submit()
        self.streamed = self.take(2)
        self.streamed.record_stream(self.stream)
        self.leased = self.take(2)
        self.lease: Lease = self.leased[0].pin(ttl=3600)
        self.leased[0].ref_count_down()
        self.held = self.take(3)
        self.batch_lease = self.heap.lease(self.held, 3600)
        for row in (0, 2):
            self.held[row].ref_count_down()
        self.pinned = self.take(1)
        self.pinned[0].pin()
        self.pinned[0].ref_count_down()
        self.dropped: MemoryBatch | None = self.take(2)
        self.pending = self.take(1)
        self.waiting = FakeStream()
        self.waiting.submit()
        self.pending.record_stream(self.waiting)
        self.heap.batched_free(self.pending)
        self.kept: list[Any] = []
        self.foreign = self.other  # what foreign code frees
        self.out = torch.zeros(4, PAGE, dtype=torch.uint8)

    def take(self, number: int) -> MemoryBatch:
        batch = self.heap.batched_allocate([PAGE], torch.uint8, number)
        assert batch is not None
        return batch

    @property
    def batches(self) -> list[MemoryBatch]:
        held = [self.whole, self.batch, self.other, self.single, self.streamed, self.leased]
        held += [self.lone, self.held, self.pinned, self.pending]
        return held + [each for each in self.kept if isinstance(each, MemoryBatch)]

    def live_pages(self) -> list[int]:
        return [
            address // PAGE
            for batch in self.batches
            for address, is_live in zip(batch.addresses.tolist(), batch.live, strict=True)
            if is_live
        ]


def require_that_every_byte_is_accounted_for(scene: Scene) -> None:
    """What is allocated is what lives in batches that are held; the rest can be allocated."""
    heap = scene.heap
    scene.dropped = None
    scene.stream.finish()
    scene.waiting.finish()
    for _ in range(3):
        heap.stats()
    heap.address_manager.check()
    live = scene.live_pages()
    assert len(set(live)) == len(live)
    detached = [page for each in scene.kept if isinstance(each, tuple) for page in each]
    stats = heap.stats()
    assert stats.pending_bytes == 0
    assert stats.allocated_bytes == (len(live) + len(detached)) * PAGE
    assert sum(group.num_blocks for group in heap.leaks()) == len(live)
    others = []
    while (other := heap.batched_allocate([PAGE], torch.uint8, 1)) is not None:
        others.append(other)
    taken = [int(other.addresses[0]) // PAGE for other in others]
    assert sorted(live + taken + detached) == list(range(PAGES))
    for other in others:
        heap.batched_free(other)
    # What lives can be freed by whoever holds it: nothing is half-freed.
    for _, _, lease in list(heap.lifetime.leases.queue.entries):  # also those nobody received
        lease.release()
    for batch in scene.batches:
        for obj in batch:
            while obj.is_valid() and obj.pin_count:
                obj.unpin()
            while obj.is_valid():
                obj.ref_count_down()
    assert heap.stats().allocated_bytes == len(detached) * PAGE
    assert heap.leaks() == ()
    heap.address_manager.check()


def allocate(scene: Scene) -> None:
    scene.kept.append(scene.heap.batched_allocate([PAGE], torch.uint8, 4))


def allocate_one(scene: Scene) -> None:
    obj = scene.heap.allocate([PAGE], torch.uint8)
    assert obj is not None
    scene.kept.append(obj.batch)


def allocate_in_pieces(scene: Scene) -> None:
    batch = scene.heap.batched_allocate([PAGE], torch.uint8, 99, allow_partial=True)
    scene.kept.append(batch)


def allocate_filled(scene: Scene) -> None:
    source = torch.ones(2, PAGE, dtype=torch.uint8)
    scene.kept.append(scene.heap.batched_allocate([PAGE], torch.uint8, 2, source=source))


def detach(scene: Scene) -> None:
    blocks = scene.batch.detach()
    scene.kept.append(tuple(address // PAGE for address, _ in blocks))


def reclaim_dropped(scene: Scene) -> None:
    scene.dropped = None
    scene.heap.stats()


def reclaim_pending(scene: Scene) -> None:
    scene.waiting.finish()
    scene.heap.stats()


def free_after_stream(scene: Scene) -> None:
    scene.heap.batched_free(scene.streamed)


def expire(scene: Scene) -> None:
    scene.lease.deadline = 0.0
    queue = scene.heap.lifetime.leases.queue
    queue.entries[:] = [(0.0, number, lease) for _, number, lease in queue.entries]
    scene.heap.stats()


def lease_batch(scene: Scene) -> None:
    scene.kept.append(scene.heap.lease(scene.batch, 3600))


def expire_batch(scene: Scene) -> None:
    scene.batch_lease.deadline = 0.0
    queue = scene.heap.lifetime.leases.queue
    queue.entries[:] = sorted(
        (0.0 if lease is scene.batch_lease else deadline, number, lease)
        for deadline, number, lease in queue.entries
    )
    scene.heap.stats()


def grant(scene: Scene) -> None:
    scene.kept.append(scene.batch[1].pin(ttl=3600))


OPERATIONS: dict[str, Callable[[Scene], object]] = {
    "allocate": allocate,
    "allocate one": allocate_one,
    "allocate what fits": allocate_in_pieces,
    "allocate filled": allocate_filled,
    "free a batch": lambda scene: scene.heap.batched_free(scene.whole),
    "free a lone object": lambda scene: scene.heap.free(scene.single[0]),
    "free lone objects": lambda scene: scene.heap.batched_free([scene.lone[0], scene.single[0]]),
    "free rows": lambda scene: scene.heap.batched_free([scene.batch[0], scene.batch[2]]),
    "free a slice": lambda scene: scene.heap.batched_free(scene.batch[3:0:-1]),
    "read": lambda scene: scene.heap.batched_read(scene.batch[::2]),
    "write": lambda scene: scene.heap.batched_write(scene.batch[1:], scene.out[1:]),
    "free of several": lambda scene: scene.heap.batched_free([*scene.batch, scene.other[1]]),
    "free into out": lambda scene: scene.heap.batched_free(scene.batch, out=scene.out),
    "free one": lambda scene: scene.heap.free(scene.other[0]),
    "ref_count_up": lambda scene: scene.batch[0].ref_count_up(),
    "ref_count_down": lambda scene: scene.single[0].ref_count_down(),
    "ref_count_down of a row": lambda scene: scene.batch[3].ref_count_down(),
    "unpin the last": lambda scene: scene.pinned[0].unpin(),
    "pin": lambda scene: scene.batch[0].pin(),
    "grant a lease": grant,
    "lease a batch": lease_batch,
    "lease rows": lambda scene: scene.kept.append(scene.heap.lease(scene.batch[1:3], 3600)),
    "extend a lease": lambda scene: scene.batch_lease.extend(7200),
    "release a lease of a batch": lambda scene: scene.batch_lease.release(),
    "expire a lease of a batch": expire_batch,
    "release a lease": lambda scene: scene.lease.release(),
    "expire a lease": expire,
    "record a stream": lambda scene: scene.batch.record_stream(FakeStream(), np.array([1, 2])),
    "free behind a stream": free_after_stream,
    "count down behind a stream": lambda scene: scene.streamed[0].ref_count_down(),
    "detach": detach,
    "reclaim dropped": reclaim_dropped,
    "reclaim pending": reclaim_pending,
}
