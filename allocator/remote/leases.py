"""``LentBlocks``: the blocks that other nodes may be reading.

A reader has them until it says that it is done, or until the lease has expired. Whether it is
connected does not matter: the network may fail while it reads.
"""

from __future__ import annotations

import itertools
import time
from operator import itemgetter

import numpy as np

from kvheap.addresses.block_runs import BlockRuns
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.batch_lease import BatchLease
from kvheap.blocks.heap import BlockObjects, Heap
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.errors import LifetimeError
from kvheap.remote.catalogue import Place, batches_of
from kvheap.transfer.pairing import block_runs

__all__ = ["MAX_LEASE_S", "LentBlocks"]

MAX_LEASE_S = 60.0
"""The longest lease that a node gives: how long a reader that vanished keeps blocks."""

MAX_LEASES = 1 << 14
"""Leases at a time."""


class _Reading:
    """A stream that uses leased blocks: closing the heap waits for it.

    Args:
        deadline: of the lease, as a ``time.monotonic`` value.
    """

    __slots__ = ("_deadline", "has_ended")

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self.has_ended = False

    def record_event(self) -> _Reading:
        """This object."""
        return self

    def query(self) -> bool:
        """Whether the lease is over."""
        return self.has_ended or time.monotonic() >= self._deadline

    @property
    def has_let_go(self) -> bool:
        """Whether the lease is over."""
        return self.query()


class LentBlocks:
    """Leases for readers elsewhere. Used by the thread that serves, and asked by any.

    Args:
        heap: whose blocks they are.
    """

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._leases: dict[int, tuple[BatchLease, _Reading]] = {}
        self._numbers = itertools.count(1)

    def lend(self, places: list[Place], ttl: float) -> tuple[int, BlockRuns] | None:
        """Pin blocks for a reader.

        Args:
            places: the blocks, at least one, in the order in which they are to be read.
            ttl: seconds.

        Returns:
            The number of the lease, and where the blocks are; None if one was freed just now.

        Raises:
            RuntimeError: too many leases are held.
            ValueError: the blocks have several layouts.
            ClosedError: the heap is closed.
        """
        if len(self._leases) >= MAX_LEASES and self.num_held >= MAX_LEASES:
            raise RuntimeError(f"{MAX_LEASES} leases are held: the readers must end theirs first")
        try:
            lease, reading, runs = self._lend(places, ttl)
        except LifetimeError:
            return None
        number = next(self._numbers)
        self._leases[number] = lease, reading
        return number, runs

    def _lend(self, places: list[Place], ttl: float) -> tuple[BatchLease, _Reading, BlockRuns]:
        heap, batch = self._heap, places[0][0]
        rows: Int64Array | None = None
        blocks: BlockObjects = batch
        if len(batches_of(places)) == 1:
            rows = np.fromiter(map(itemgetter(1), places), np.int64, len(places))
            if len(rows) == len(batch) and rows[0] == 0 and bool((np.diff(rows) == 1).all()):
                rows = None
        else:
            blocks = [owner[row] for owner, row in places]
        lease = heap.lease(blocks, ttl, rows=rows)
        try:
            reading = _Reading(lease.deadline)
            if isinstance(blocks, MemoryBatch):
                runs = batch.block_runs(rows)
                batch.record_stream(reading, rows)
            else:
                runs = block_runs(blocks)
                for part in heap.rows_by_batch(blocks):
                    part.batch.record_stream(reading, part.rows)
        except BaseException:
            lease.release()
            raise
        return lease, reading, runs

    def take_back(self, number: int) -> None:
        """End a lease; one that has ended changes nothing."""
        held = self._leases.pop(number, None)
        if held is not None:
            lease, reading = held
            reading.has_ended = True
            lease.release()

    @property
    def num_held(self) -> int:
        """How many leases are held; forgets those that have ended. O(leases)."""
        for number, (lease, reading) in [*self._leases.items()]:
            if lease.state != "held" or reading.query():
                self.take_back(number)
        return len(self._leases)
