"""``WaitingSpace``: allocates addresses, waiting for streams if their blocks make room."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.address_manager import AddressManager
from kvheap.arguments import as_number
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.report import FullReport, FullReporter
from kvheap.errors import OutOfMemoryError

__all__ = ["WaitingSpace"]


class WaitingSpace:
    """An address space whose freed bytes may still be in use by streams.

    Args:
        address_manager: the address space.
        lifetime: knows which freed bytes streams still use.
        reporter: counts and reports allocations that do not fit.
        stream_wait_s: seconds that an allocation that does not fit waits for freed bytes.

    Raises:
        ValueError, TypeError: ``stream_wait_s`` is not a finite number, or negative.
    """

    def __init__(
        self,
        address_manager: AddressManager,
        lifetime: Lifetime,
        reporter: FullReporter,
        stream_wait_s: float,
    ) -> None:
        self._manager = address_manager
        self._lifetime = lifetime
        self._reporter = reporter
        self._stream_wait_s = as_number("stream_wait_s", stream_wait_s)

    def allocate(
        self,
        size_bytes: int,
        batch_size: int,
        allow_partial: bool,
        make_report: Callable[[int, int], FullReport],
    ) -> AddressBatch | None:
        """Allocate addresses for a batch.

        Args:
            size_bytes: bytes of each block.
            batch_size: number of blocks.
            allow_partial: if not all blocks fit, return as many as fit.
            make_report: makes the report of a failure, given the requested blocks and bytes.

        Returns:
            The addresses; None if the space is full.
        """
        lifetime, manager = self._lifetime, self._manager
        if lifetime.has_work:
            lifetime.settle()
        deadline = None
        requested_bytes = 0
        while True:
            try:
                addresses = manager.batched_allocate(size_bytes, batch_size, allow_partial)
            except OutOfMemoryError as error:
                # Do not keep the error: it holds the frames of this call and of all callers.
                addresses, requested_bytes = None, error.requested_bytes
            if addresses is not None and len(addresses) == batch_size:
                return addresses
            # One deadline for the whole call, however many small releases end meanwhile.
            now = time.monotonic()
            deadline = now + self._stream_wait_s if deadline is None else deadline
            if not lifetime.wait_for_streams(deadline - now):
                if addresses is None:
                    self._reporter.failed(partial(make_report, batch_size, requested_bytes))
                return addresses
            if addresses is not None:
                manager.batched_free(addresses)
