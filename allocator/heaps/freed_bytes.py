"""``FreedBytes``: where a heap's bytes are, and how freed ones return to its free list.

A part of its own so that no cycle of references holds the buffers: a heap's ``Lifetime`` calls this
object, and this object knows neither of the two. A dropped heap frees its memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvheap.addresses.address_manager import AddressManager
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.release import Release, WipedLaterError, WipingError
from kvheap.device.captures import is_capturing
from kvheap.heaps.ownership import Ownership
from kvheap.heaps.segments import Segments
from kvheap.heaps.wiping import Wiping
from kvheap.interrupts import is_interrupt

__all__ = ["FreedBytes"]


class FreedBytes:
    """Puts the bytes of releases into the free list, wiped if configured.

    Args:
        address_manager: the free list.
        segments: the heap's buffers.
        wiping: what is done to freed bytes; None: nothing.
        ownership: whether this process keeps the heap's books. What it drops of another's books is
            neither wiped nor free.
        has_pages: every block takes one unit of the free list, so that any of them fits any other.
    """

    def __init__(
        self,
        address_manager: AddressManager,
        segments: Segments,
        wiping: Wiping | None,
        ownership: Ownership,
        has_pages: bool = False,
    ) -> None:
        self._space = space = address_manager.space
        self.give_back_whole = space.give_back_spare if has_pages else space.give_back_batch
        """Frees the bytes of a whole batch, in the step that sets its receipt. Call it with the
        guard of the address manager held, and only if :attr:`is_plain`."""
        self._has_pages = has_pages
        self.segments = segments
        """The heap's buffers now; replaced as a whole when the heap grows or closes."""
        self.wiping = wiping
        """What is done to freed bytes; None: nothing."""
        self._ownership = ownership
        self.is_plain = wiping is None and not ownership.is_view_only
        """Whether freed bytes become free and nothing else is done to them."""

    def start_over_after_fork(self) -> None:
        """In a forked child: leave the books of shared memory to the parent."""
        self._ownership.start_over_after_fork(self.segments.buffers)
        self.is_plain = self.is_plain and not self._ownership.is_view_only

    def give_back_together(self, records: Sequence[OwnedBlocks]) -> bool:
        """:attr:`give_back_whole` of all batches or of none; whether it was of all.

        Of none if each is cheap by itself, as a page is, or if somebody else has freed one.
        """
        if self._has_pages or len(records) < 2:
            return False
        addresses = [record.addresses for record in records]
        return self._space.give_back_batches(addresses, records)

    def give_back(self, release: Release) -> None:
        """Free the bytes of a release, in the step that sets ``release.done``.

        Call with the guard of the address manager held.

        Raises:
            WipingError: the bytes could not be wiped, and are not free.
            WipedLaterError: this thread captures a CUDA graph, which must not repeat the wiping.
            InvalidFreeError: somebody else has freed the bytes, by their addresses.
        """
        if self._ownership.is_view_only:
            release.done = True
            return
        segments = self.segments
        if self.wiping is not None and len(segments):  # none once the heap is closed
            if segments.device.type == "cuda" and is_capturing():
                raise WipedLaterError
            try:
                self.wiping.freed(release, segments)
            except Exception as error:
                if is_interrupt(error):
                    raise
                raise WipingError from error
        self._space.give_back(release.freed, release.sizes, release)

    def was_given_back(self, record: OwnedBlocks) -> bool:
        """After :meth:`finish`: whether an interrupted :meth:`give_back_whole` has freed them."""
        return record.done or self._space.was_given_back(record.addresses)

    def finish(self) -> None:
        """Undo an allocation that an exception interrupted. Call with the guard held."""
        self._space.finish()
