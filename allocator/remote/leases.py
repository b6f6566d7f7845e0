"""``LentBlocks``: the blocks that other nodes may be reading.

A reader has them until it says that it is done, or until the lease has expired. Whether it is
connected does not matter: the network may fail while it reads.
"""

from __future__ import annotations

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
from kvheap.remote.messages import MAX_KEYS, new_lease_number
from kvheap.transfer.pairing import block_runs

__all__ = ["MAX_LEASE_S", "Account", "GivenUpError", "LentBlocks"]

MAX_LEASE_S = 60.0
"""The longest lease that a node gives: how long a reader that vanished keeps blocks."""

MAX_LEASES = 1 << 14
"""Leases at a time."""

MAX_LEASES_EACH = 1 << 12
"""The same for one connection."""

MAX_BLOCKS_EACH = 1 << 20
"""Blocks in the leases of one connection; counted again for each lease."""


FEW_LEASES = MAX_BLOCKS_EACH // MAX_KEYS
"""So few of one connection are never too many."""

MAX_GIVEN_UP = 1 << 12
"""Numbers that are remembered because they were given back before they were lent."""


class GivenUpError(RuntimeError):
    """The reader has given a lease up before it was lent, or has asked for it before."""


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


class Account:
    """The leases of one connection."""

    __slots__ = ("num_blocks",)

    def __init__(self) -> None:
        self.num_blocks: dict[int, int] = {}
        """Of each lease, by its number."""

    def require_room(self, num_blocks: int) -> None:
        """Raise unless the connection may have another lease. O(leases of the connection).

        Raises:
            RuntimeError: it has too many, or too many blocks.
        """
        held = [*self.num_blocks.values()]
        if len(held) >= MAX_LEASES_EACH:
            raise RuntimeError(
                f"this connection holds {len(held)} leases, at most {MAX_LEASES_EACH}: release "
                f"some first"
            )
        if sum(held) + num_blocks > MAX_BLOCKS_EACH:
            raise RuntimeError(
                f"this connection holds leases on {sum(held)} blocks, and asks for {num_blocks}, "
                f"at most {MAX_BLOCKS_EACH}: release some first"
            )


class LentBlocks:
    """Leases for readers elsewhere. Used by the thread that serves, and asked by any.

    Args:
        heap: whose blocks they are.
    """

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._leases: dict[int, tuple[BatchLease, _Reading, Account]] = {}
        self._given_up: dict[int, None] = {}

    def lend(
        self,
        places: list[Place],
        ttl: float,
        account: Account | None = None,
        batches: set[MemoryBatch] | None = None,
        number: int | None = None,
    ) -> tuple[int, BlockRuns] | None:
        """Pin blocks for a reader.

        Args:
            places: the blocks, at least one, in the order in which they are to be read.
            ttl: seconds.
            account: of the connection; None: one of its own.
            batches: those of the blocks, if they are known.
            number: of the lease, which the reader has chosen; None: one of this node's.

        Returns:
            The number of the lease, and where the blocks are; None if one was freed just now.

        Raises:
            GivenUpError: the number is taken, or was given back: the reader has asked again on
                another connection, or asks no more.
            RuntimeError: too many leases are held.
            ValueError: the blocks have several layouts.
            ClosedError: the heap is closed.
        """
        if number is None:
            number = new_lease_number()
        elif number in self._leases or number in self._given_up:
            raise GivenUpError("the reader has given this lease up, or asked for it before")
        if len(self._leases) >= MAX_LEASES and self.num_held >= MAX_LEASES:
            raise RuntimeError(f"{MAX_LEASES} leases are held: the readers must end theirs first")
        account = Account() if account is None else account
        self._require_room(account, len(places))
        try:
            lease, reading, runs = self._lend(places, batches or batches_of(places), ttl)
        except LifetimeError:
            return None
        account.num_blocks[number] = len(places)  # first: another thread may forget the lease
        self._leases[number] = lease, reading, account
        return number, runs

    def _require_room(self, account: Account, num_blocks: int) -> None:
        if len(account.num_blocks) < FEW_LEASES:  # of 65,536 keys at most
            return
        try:
            account.require_room(num_blocks)
        except RuntimeError:
            self.forget_ended()
            account.require_room(num_blocks)

    def _lend(
        self, places: list[Place], batches: set[MemoryBatch], ttl: float
    ) -> tuple[BatchLease, _Reading, BlockRuns]:
        heap, batch = self._heap, places[0][0]
        rows: Int64Array | None = None
        blocks: BlockObjects = batch
        if len(batches) == 1:
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
            lease, reading, account = held
            account.num_blocks.pop(number, None)
            reading.has_ended = True
            lease.release()

    def give_up(self, number: int) -> None:
        """End a lease; one that was not lent will not be: its request may come later than this.

        Requests of one reader come on several connections, which are served in any order.
        """
        if number in self._leases:
            self.take_back(number)
            return
        self._given_up[number] = None
        if len(self._given_up) > MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]

    @property
    def num_held(self) -> int:
        """How many leases are held; forgets those that have ended. O(leases)."""
        self.forget_ended()
        return len(self._leases)

    def forget_ended(self) -> None:
        """Forget leases that have ended. O(leases)."""
        for number, (lease, reading, _) in [*self._leases.items()]:
            if lease.state != "held" or reading.query():
                self.take_back(number)
