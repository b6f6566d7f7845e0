"""``capture``: takes the snapshot of a heap.

Under the heap's guard, only what can change is copied: the free extents, which batches there are,
and the states of their blocks, one number for most batches. The rest is computed afterwards.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.ledger import Ledger
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.release import Release
from kvheap.blocks.sites import Site, site_lines
from kvheap.errors import ReentrantCallError
from kvheap.guards import is_inside_section, section
from kvheap.snapshots.heap_map import STATES, Owner
from kvheap.snapshots.heap_snapshot import HeapSnapshot

__all__ = ["capture"]

FREE, LIVE, PINNED, PENDING, QUARANTINED, OTHER = range(len(STATES))

FEW_RUNS = 64


class _State(NamedTuple):
    """A heap at one moment."""

    heap_bytes: int
    free: Extents
    batches: list[tuple[OwnedBlocks, int | npt.NDArray[np.uint8]]]
    pending: list[Release]
    now: float


def capture(
    manager: AddressManager,
    ledger: Ledger,
    *,
    heap: str,
    device: str,
    segments: tuple[int, ...],
    is_view_only: bool,
) -> HeapSnapshot:
    """The snapshot of a heap; see ``TensorMemoryAllocator.snapshot``.

    Raises:
        ReentrantCallError: the calling thread is inside an operation.
    """
    state = _look(manager, ledger)
    table = _Table(state.now)
    table.add(state.free.starts, state.free.sizes, FREE, -1)
    for record, row_states in state.batches:
        table.add_batch(record, row_states)
    for release in state.pending:
        table.add_release(release)
    sizes, states, batches = table.covering(state.heap_bytes)
    return HeapSnapshot(
        heap=heap,
        device=device,
        heap_bytes=state.heap_bytes,
        align_bytes=manager.align_bytes,
        segments=segments,
        is_view_only=is_view_only,
        time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        pid=os.getpid(),
        version=str(sys.modules["kvheap"].__version__),
        sizes=sizes,
        states=states,
        batches=batches,
        ages_s=np.array(table.ages, np.float64),
        owner_of=np.array(table.owner_of, np.int32),
        block_bytes=np.array(table.block_bytes, np.int64),
        owners=tuple(Owner(str(layout), site_lines(site)) for layout, site in table.owners),
    )


@section
def _look(manager: AddressManager, ledger: Ledger) -> _State:
    guard = manager.guard
    if guard.busy and is_inside_section():
        raise ReentrantCallError("snapshot", 0, 0, 0)
    with guard.lock:
        guard.busy = True
        if ledger.begun or ledger.allocation.done:
            ledger.finish()
        records = ledger.live.copy().values()
        found = _State(
            heap_bytes=manager.heap_bytes,
            free=manager.free_extents(),
            batches=[(record, record.counts.states()) for record in records],
            pending=list(ledger.pending.copy().values()),
            now=time.monotonic(),
        )
        guard.busy = False
    return found


class _Table:
    """Extents with their states, and the batches that they are of."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._single: list[tuple[int, int, int, int]] = []
        self._parts: list[tuple[Int64Array, Int64Array, int | npt.NDArray[np.uint8], int]] = []
        self.ages: list[float] = []
        self.owner_of: list[int] = []
        self.block_bytes: list[int] = []
        self.owners: dict[tuple[BlockLayout | str, Site], int] = {}

    def add(
        self,
        starts: Int64Array,
        sizes: Int64Array,
        states: int | npt.NDArray[np.uint8],
        batch: int,
    ) -> None:
        """Add extents of one batch."""
        self._parts.append((starts, sizes, states, batch))

    def add_batch(self, record: OwnedBlocks, states: int | npt.NDArray[np.uint8]) -> None:
        """Add what is live of a batch."""
        blocks = record.addresses
        if not len(blocks):
            return
        if isinstance(states, int):
            if states != FREE:
                batch = self._batch(record.layout, record.site, record.born, blocks.block_bytes)
                for start, size in _runs(blocks):
                    self._single.append((start, size, states, batch))
            return
        live = states != FREE
        if live.any():
            batch = self._batch(record.layout, record.site, record.born, blocks.block_bytes)
            starts = _addresses(blocks)[live]
            sizes = np.full(len(starts), blocks.block_bytes, np.int64)
            self.add(starts, sizes, states[live], batch)

    def add_release(self, release: Release) -> None:
        """Add blocks that are freed, while something still uses them."""
        is_lost = any(getattr(event, "is_quarantined", False) for event in release.events)
        layout, site = release.owner or ("an allocation that was interrupted", ())
        for addresses, size in release.by_size():
            batch = self._batch(layout, site, math.nan, size)
            sizes = np.full(len(addresses), size, np.int64)
            self.add(addresses, sizes, QUARANTINED if is_lost else PENDING, batch)

    def _batch(self, layout: BlockLayout | str, site: Site, born: float, block_bytes: int) -> int:
        self.owner_of.append(self.owners.setdefault((layout, site), len(self.owners)))
        self.ages.append(self._now - born)
        self.block_bytes.append(block_bytes)
        return len(self.ages) - 1

    def covering(
        self, heap_bytes: int
    ) -> tuple[Int64Array, npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Sizes, states and batches of extents that cover the heap, in address order.

        Neighbours of one batch and state are joined; free extents stay as they are.
        """
        single = np.array(self._single, np.int64).reshape(-1, 4).T
        starts = np.concatenate([single[0], *(part[0] for part in self._parts)])
        sizes = np.concatenate([single[1], *(part[1] for part in self._parts)])
        states = np.concatenate(
            [single[2], *(np.broadcast_to(part[2], len(part[0])) for part in self._parts)]
        ).astype(np.uint8)
        batches = np.concatenate(
            [single[3], *(np.full(len(part[0]), part[3], np.int64) for part in self._parts)]
        ).astype(np.int32)
        order = np.argsort(starts, kind="stable")
        starts, sizes = starts[order], sizes[order]
        states, batches = states[order], batches[order]
        ends = np.append(0, starts + sizes)
        gaps = np.append(starts, heap_bytes) - ends
        holes = np.flatnonzero(gaps > 0)  # allocated by others
        sizes = np.insert(sizes, holes, gaps[holes])
        states = np.insert(states, holes, OTHER)
        batches = np.insert(batches, holes, -1)
        if not len(sizes):
            return sizes, states, batches
        is_first = np.ones(len(sizes), np.bool_)
        is_first[1:] = (
            (states[1:] != states[:-1]) | (batches[1:] != batches[:-1]) | (states[1:] == FREE)
        )
        firsts = np.flatnonzero(is_first)
        return np.add.reduceat(sizes, firsts), states[firsts], batches[firsts]


def _runs(blocks: AddressBatch) -> Iterator[tuple[int, int]]:
    """Start and bytes of each run, without making arrays of a few."""
    if blocks.num_runs <= FEW_RUNS:
        return iter(blocks.run_pairs())
    sizes = blocks.run_counts * blocks.block_bytes
    return zip(blocks.run_starts.tolist(), sizes.tolist(), strict=True)


def _addresses(blocks: AddressBatch) -> Int64Array:
    """The addresses of all blocks, which the batch does not keep."""
    starts, counts = blocks.run_starts, blocks.run_counts
    firsts = np.cumsum(counts) - counts
    found: Int64Array = np.repeat(starts - firsts * blocks.block_bytes, counts)
    found += np.arange(len(blocks), dtype=np.int64) * blocks.block_bytes
    return found
