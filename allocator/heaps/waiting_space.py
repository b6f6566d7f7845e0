"""``WaitingSpace``: allocates batches, waiting for streams if their blocks make room."""

from __future__ import annotations

import time
from typing import Protocol

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.memory_batch import BlockOwner, MemoryBatch
from kvheap.blocks.report import FullReport, FullReporter
from kvheap.errors import NegativeBatchSizeError
from kvheap.guards import is_inside_section, section
from kvheap.heaps.freed_bytes import FreedBytes

__all__ = ["WaitingSpace"]


class ReportingOwner(BlockOwner, Protocol):
    """The allocator of the batches."""

    def full_report(self, num_blocks: int, requested_bytes: int) -> FullReport:
        """What is free, and who holds the rest."""
        ...


class WaitingSpace:
    """An address space whose freed bytes may still be in use by streams.

    Args:
        address_manager: the address space.
        freed: the heap's buffers, and what is done to freed bytes.
        lifetime: knows which freed bytes streams still use, and who owns the others.
        reporter: counts and reports allocations that do not fit.
        stream_wait_s: seconds that an allocation that does not fit waits for freed bytes.
        has_pages: as for ``FreedBytes``.
    """

    def __init__(
        self,
        address_manager: AddressManager,
        freed: FreedBytes,
        lifetime: Lifetime,
        reporter: FullReporter,
        stream_wait_s: float,
        has_pages: bool,
    ) -> None:
        self._manager = address_manager
        self._space = address_manager.space
        self._freed = freed
        self._lifetime = lifetime
        self._reporter = reporter
        self._stream_wait_s = stream_wait_s
        self._has_pages = has_pages

    def allocate(
        self,
        owner: ReportingOwner,
        layout: BlockLayout,
        batch_size: int,
        allow_partial: bool,
    ) -> MemoryBatch | None:
        """Allocate a batch.

        Args:
            owner: the allocator of the batch, which reports failures.
            layout: what each block holds.
            batch_size: number of blocks.
            allow_partial: if not all blocks fit, return as many as fit.

        Returns:
            The batch, which owns its bytes; None if the space is full, or if the calling thread is
            inside an operation (then an empty batch with ``allow_partial``).

        Raises:
            NegativeBatchSizeError: ``batch_size`` is negative.
            WriteAfterFreeError: in debug mode, freed bytes were written to.
        """
        if type(batch_size) is not int:
            batch_size = as_integer("batch_size", batch_size)
        if batch_size < 0:
            raise NegativeBatchSizeError(batch_size)
        lifetime = self._lifetime
        if any(lifetime.reclaimer.waiting):
            lifetime.reclaimer.settle()
        since = lifetime.ledger.num_reclaimed
        batch = self._try_allocate(owner, layout, batch_size, False)
        if batch is not None:
            return batch
        return self._allocate_later(owner, layout, batch_size, allow_partial, since)

    def _allocate_later(
        self,
        owner: ReportingOwner,
        layout: BlockLayout,
        batch_size: int,
        allow_partial: bool,
        since: int,
    ) -> MemoryBatch | None:
        """:meth:`allocate` for a batch that has found no room, when ``num_reclaimed`` was so."""
        lifetime = self._lifetime
        deadline = None
        while True:
            if lifetime.guard.busy and is_inside_section():
                return _empty(owner, layout) if allow_partial else None
            # One deadline for the whole call, however many small releases end meanwhile.
            now = time.monotonic()
            deadline = now + self._stream_wait_s if deadline is None else deadline
            if not lifetime.reclaimer.wait_for_streams(deadline - now, since):
                break
            since = lifetime.ledger.num_reclaimed
            batch = self._try_allocate(owner, layout, batch_size, False)
            if batch is not None:
                return batch
        batch = self._try_allocate(owner, layout, batch_size, True) if allow_partial else None
        if batch is None:
            block_bytes = self._manager.compute_aligned_size(layout.size_bytes)
            self._reporter.failed(lambda: owner.full_report(batch_size, block_bytes * batch_size))
        return batch

    @section
    def _try_allocate(
        self, owner: BlockOwner, layout: BlockLayout, batch_size: int, allow_partial: bool
    ) -> MemoryBatch | None:
        """Allocate a batch from what is free now; None if it does not fit."""
        lifetime = self._lifetime
        guard, ledger = lifetime.guard, lifetime.ledger
        if guard.busy and is_inside_section():
            return None
        with guard.lock:
            guard.busy = True
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            allocation, space = ledger.allocation, self._space
            addresses = None
            if batch_size == 1 and self._has_pages:
                addresses = space.take_spare(allocation)
            if addresses is None:
                addresses = space.take(layout.size_bytes, batch_size, allow_partial, allocation)
            if addresses is None:
                guard.busy = False
                return None
            if self._freed.wiping is not None:
                try:
                    self._freed.wiping.allocated(addresses, self._freed.segments)
                except Exception:
                    space.give_back(addresses)  # the bytes are still poisoned
                    allocation.done = False
                    raise
            batch = MemoryBatch(owner, addresses, layout)
            lifetime.own(batch)
            allocation.done = False
            guard.busy = False
        return batch


def _empty(owner: BlockOwner, layout: BlockLayout) -> MemoryBatch:
    """A batch of no blocks, which needs no section."""
    batch = MemoryBatch(owner, AddressBatch(layout.size_bytes, [], []), layout)
    owner.lifetime.own(batch)
    return batch
