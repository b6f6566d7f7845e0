"""``capture``: takes the snapshot of a heap.

Under the heap's guard, only what can change is copied: the free extents, which batches there are,
and the states of their blocks, one number for most batches. The rest is computed afterwards.
"""

from __future__ import annotations

import math
import os
import sys
import time
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.counts import CopiedStates
from kvheap.blocks.ledger import Ledger
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.release import Release
from kvheap.blocks.sites import Site, site_lines
from kvheap.errors import HeapCorruptionError, ReentrantCallError
from kvheap.guards import is_inside_section, section
from kvheap.snapshots.heap_map import STATES, Owner
from kvheap.snapshots.heap_snapshot import HeapSnapshot

__all__ = ["capture"]

FREE, LIVE, PINNED, PENDING, QUARANTINED, OTHER = range(len(STATES))


class _State(NamedTuple):
    """A heap at one moment."""

    heap_bytes: int
    free: Extents
    records: list[OwnedBlocks]
    states: list[CopiedStates]
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
        HeapCorruptionError: bytes belong to two blocks, or to a block while they are free.
    """
    state = _look(manager, ledger)
    table = _Table(state.now)
    for record, states_of_rows in zip(state.records, state.states, strict=True):
        table.add_batch(record, states_of_rows)
    for release in state.pending:
        table.add_release(release)
    sizes, states, batches = table.covering(state.heap_bytes, state.free)
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
        records = list(ledger.live.values())
        found = _State(
            heap_bytes=manager.space.heap_bytes,
            free=manager.space.free_extents(),
            records=records,
            states=[record.counts.copy_states() for record in records],
            pending=list(ledger.pending.copy().values()),
            now=time.monotonic(),
        )
        guard.busy = False
    return found


class _Table:
    """Blocks with their states, and the batches that they are of.

    What is done for each batch appends to lists; what is done for each block is done for all blocks
    at once, by :meth:`covering`.
    """

    def __init__(self, now: float) -> None:
        self._now = now
        # Runs whose blocks have one state: start, bytes, state, batch.
        self._whole: list[tuple[int, int, int, int]] = []
        # Runs whose blocks differ: start, bytes of a block, number of blocks, batch.
        self._mixed: list[tuple[int, int, int, int]] = []
        self._references: list[bytes] = []
        self._pins: list[bytes] = []
        # Extents of any sizes: starts, sizes, state and batch of all.
        self._released: list[tuple[Int64Array, int, int, int]] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self.ages: list[float] = []
        self.owner_of: list[int] = []
        self.block_bytes: list[int] = []
        self.owners: dict[tuple[BlockLayout | str, Site], int] = {}

    def add_batch(self, record: OwnedBlocks, states: CopiedStates) -> None:
        """Add what is live of a batch."""
        blocks = record.addresses
        size = blocks.block_bytes
        if not len(blocks) or (isinstance(states, int) and states < 0):
            return
        batch = self._batch(record.layout, record.site, record.born, size)
        if isinstance(states, int):
            for start, num_bytes in blocks.run_pairs():
                self._whole.append((start, num_bytes, LIVE, batch))
            return
        for start, num_bytes in blocks.run_pairs():
            self._mixed.append((start, size, num_bytes // size, batch))
        self._references.append(states[0])
        self._pins.append(states[1] or bytes(len(states[0])))

    def add_release(self, release: Release) -> None:
        """Add blocks that are freed, while something still uses them."""
        is_lost = any(getattr(event, "is_quarantined", False) for event in release.events)
        layout, site = release.owner or ("an allocation that was interrupted", ())
        for addresses, size in release.by_size():
            batch = self._batch(layout, site, math.nan, size)
            self._released.append((addresses, size, QUARANTINED if is_lost else PENDING, batch))

    def _batch(self, layout: BlockLayout | str, site: Site, born: float, block_bytes: int) -> int:
        key = id(layout), id(site)  # a layout takes longer to hash
        number = self._numbers.get(key)
        if number is None:
            number = self.owners.setdefault((layout, site), len(self.owners))
            self._numbers[key] = number
        self.owner_of.append(number)
        self.ages.append(self._now - born)
        self.block_bytes.append(block_bytes)
        return len(self.ages) - 1

    def _extents(self, free: Extents) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """Start, bytes, state and batch of all extents that are known, in any order."""
        whole = np.array(self._whole, np.int64).reshape(-1, 4).T
        starts, block_bytes, counts, batches = np.array(self._mixed, np.int64).reshape(-1, 4).T
        firsts = np.cumsum(counts) - counts
        references = np.frombuffer(b"".join(self._references), np.int32)
        pins = np.frombuffer(b"".join(self._pins), np.int32)
        sizes = np.repeat(block_bytes, counts)
        mixed = np.stack(
            [
                np.repeat(starts, counts)
                + (np.arange(len(sizes)) - np.repeat(firsts, counts)) * sizes,
                sizes,
                np.where(pins > 0, PINNED, LIVE),
                np.repeat(batches, counts),
            ]
        )[:, references >= 0]
        parts = [whole, mixed, _rows(free.starts, free.sizes, FREE, -1)]
        parts += [_rows(*released) for released in self._released]
        found = np.concatenate(parts, axis=1)
        return found[0], found[1], found[2], found[3]

    def covering(
        self, heap_bytes: int, free: Extents
    ) -> tuple[Int64Array, npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Sizes, states and batches of extents that cover the heap, in address order.

        Neighbours of one batch and state are joined; free extents stay as they are.

        Raises:
            HeapCorruptionError: two extents overlap.
        """
        starts, sizes, all_states, all_batches = self._extents(free)
        order = np.argsort(starts, kind="stable")
        starts, sizes = starts[order], sizes[order]
        states, batches = all_states[order].astype(np.uint8), all_batches[order].astype(np.int32)
        ends = np.append(0, starts + sizes)
        gaps = np.append(starts, heap_bytes) - ends
        if (gaps < 0).any():
            raise _damage(starts, ends, all_states[order], int(np.argmax(gaps < 0)))
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


def _damage(
    starts: Int64Array, ends: Int64Array, states: Int64Array, at: int
) -> HeapCorruptionError:
    """The error that extent ``at`` begins before ``ends[at]``, where the one before it ends."""
    if at == len(starts):
        return HeapCorruptionError(f"an extent ends at {ends[at]}, behind the end of the heap")
    one, two = (STATES[int(states[number])] for number in (at - 1, at))
    end = min(ends[at], ends[at + 1])
    return HeapCorruptionError(
        f"the heap's books are damaged: the bytes at [{starts[at]}, {end}) are {one} and also "
        f"{two}; check() names their block"
    )


def _rows(starts: Int64Array, sizes: int | Int64Array, state: int, batch: int) -> Int64Array:
    """Start, bytes, state and batch of extents, int64 ``[4, N]``."""
    found: Int64Array = np.empty((4, len(starts)), np.int64)
    for row, value in zip(found, (starts, sizes, state, batch), strict=True):
        row[:] = value
    return found
