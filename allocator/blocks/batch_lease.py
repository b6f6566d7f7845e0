"""``BatchLease``: pins on many blocks that expire together; see ``heap.lease``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.counts import RowCounts
from kvheap.blocks.lease import LeaseState
from kvheap.blocks.ledger import Ledger
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.recorded_streams import Streams
from kvheap.blocks.release import Release
from kvheap.blocks.stream_events import StreamEvents
from kvheap.blocks.tracked import BlockRows
from kvheap.device.events import Event

__all__ = ["BatchLease", "LeasedRows"]


class BatchLeases(Protocol):
    """The part of ``Leases`` that a lease uses."""

    def end(self, lease: BatchLease, state: LeaseState) -> bool:
        """End a lease; False if it had already ended."""
        ...

    def extend(self, lease: BatchLease, ttl: float) -> bool:
        """Let a lease expire later; False if it has ended."""
        ...


class LeasedRows(NamedTuple):
    """Leased rows of one batch."""

    counts: RowCounts
    """The counts of the batch."""
    record: OwnedBlocks | None
    """What is needed to free its blocks; None for a view."""
    rows: Int64Array | None
    """Their row numbers, int64 ``[R]``, ascending and distinct; None for all."""

    @classmethod
    def of(cls, blocks: BlockRows) -> LeasedRows:
        """Of some blocks, of which some may be named twice."""
        rows = None if blocks.rows is None else np.unique(blocks.rows)
        return cls(blocks.batch.counts, blocks.batch.record, rows)


class BatchLease:
    """Pins on many blocks that expire together; see ``heap.lease``. Usable as a context manager.

    Dropping it changes nothing: the blocks stay pinned until it expires.

    Attributes:
        parts: the leased rows of each batch; empty once the lease has ended.
        deadline: when it expires, as a ``time.monotonic`` value in seconds.
        state: ``held``, ``released`` or ``expired``.
        was_reported: whether the log says that its blocks cannot be freed.
    """

    __slots__ = ("_leases", "deadline", "parts", "state", "was_reported")

    def __init__(self, leases: BatchLeases, parts: Sequence[LeasedRows], deadline: float) -> None:
        # Weak: what ends leases holds the lease, and the heap's buffers with it.
        self._leases = weakref.ref(leases)
        self.parts = tuple(parts)
        self.deadline = deadline
        self.state: LeaseState = "held"
        self.was_reported = False

    def release(self) -> bool:
        """End it now; False if it had already ended.

        Blocks that nothing else holds any more are freed.
        """
        leases = self._leases()
        if leases is not None:
            return leases.end(self, "released")
        was_held, self.state = self.state == "held", "released"
        return was_held

    def extend(self, ttl: float) -> bool:
        """Let it expire ``ttl`` seconds from now, unless it expires later anyway. O(1).

        Returns:
            Whether it is still held; False if it was released or its deadline has passed: the
            blocks may have been freed.

        Raises:
            ValueError: ``ttl`` is not positive.
            ReentrantCallError: the calling thread is inside an operation; nothing is changed.
        """
        leases = self._leases()
        return leases is not None and leases.extend(self, ttl)

    def free_unheld(self, ledger: Ledger, events: StreamEvents) -> tuple[Streams, bool]:
        """Free the blocks that nothing but this lease holds. Call it inside a section.

        Args:
            ledger: who owns which bytes.
            events: the known events of streams.

        Returns:
            The streams without event that use any of them, in which case nothing is freed; and
            whether blocks were freed.
        """
        missing: Streams = {}
        releases: list[Release] = []
        unheld = [part.counts.held_only_by(self, part.rows) for part in self.parts]
        for part, rows in zip(self.parts, unheld, strict=True):
            if part.record is None or (rows is not None and not len(rows)):
                continue
            waits: tuple[Event, ...] = ()
            if part.counts.streams is not None:
                waits = events.of(part.counts.streams_of(rows), missing)
            if not missing:
                releases.append(part.record.release_of(rows, waits))
        if missing:
            return missing, False
        if releases:
            ledger.carry_out(tuple(releases))
        for (counts, record, _), rows in zip(self.parts, unheld, strict=True):
            has_freed = rows is None or bool(len(rows))
            if record is None:  # a view: its bytes are another process's
                if has_freed:
                    counts.set_freed(rows)
            elif (has_freed or record() is None) and not counts.count_live()[0]:
                ledger.forget(record)
        return {}, bool(releases)

    def let_go(self) -> None:
        """Forget the blocks, once the lease has ended."""
        for part in self.parts:
            part.counts.remove_leases(self)
        self.parts = ()

    def __enter__(self) -> BatchLease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        """State and blocks."""
        return f"BatchLease({self.state}, {len(self.parts)} batches)"
