"""``Ownership``: what the owner of a segment has beside its readers: books, thread and lock."""

from __future__ import annotations

from collections.abc import Callable

from kvheap.memory.boots import boot_id
from kvheap.memory.file_locks import RangeLocks
from kvheap.prefix.orders import EvictionOrder
from kvheap.shared.channels import LocalChannel
from kvheap.shared.chunk_table import ChunkTable
from kvheap.shared.keeper import Keeper
from kvheap.shared.leases import PlaceLocks
from kvheap.shared.segment import Segment
from kvheap.shared.service import Service
from kvheap.shared.stats import KeeperStats

__all__ = ["Ownership"]

ABANDON_S = 1.0
"""Seconds to wait for a thread that has just been started, if it was."""


class Ownership:
    """The owner's side of a segment; it takes over what an earlier owner has left.

    Args:
        segment: opened as its owner.
        table: its records.
        content_of: the bytes of a place's chunk.
        order: which chunks leave first, a new object.
        lease_s: how long a reader is waited for whose chunk was evicted or removed.

    Attributes:
        place_locks: who reads and fills places.
        service: the thread.
        channel: how this process stores and removes.

    Raises:
        OSError: the locks or the socket cannot be made.
    """

    def __init__(
        self,
        segment: Segment,
        table: ChunkTable,
        content_of: Callable[[int], memoryview],
        order: EvictionOrder[bytes],
        lease_s: float,
    ) -> None:
        self._segment = segment
        boot, state = boot_id(), segment.state
        is_trusted = not state.epoch or state.boot == boot != ""
        state.begin(boot)
        geometry = segment.geometry
        self.place_locks = PlaceLocks(RangeLocks(segment.open_file()), geometry.num_places)
        self._keeper = Keeper(
            table,
            self.place_locks,
            geometry.place_bytes,
            order,
            lease_s,
            is_trusted=is_trusted,
        )
        self.service = Service(self._keeper, state.socket_name, content_of, state.epoch)
        self.channel = LocalChannel(self._keeper, self.service, content_of)

    def start(self) -> None:
        """Begin to serve; once.

        Raises:
            RuntimeError: the system does not let a thread start.
        """
        self.service.start()

    def abandon(self) -> None:
        """Give it up in the middle of an opening: whether the thread runs may not be known."""
        self.service.stop(ABANDON_S)
        self.place_locks.close()

    def stats(self) -> KeeperStats:
        """Counts of the books."""
        return self.service.ask(self._keeper.stats)

    def check(self) -> None:
        """Check the books; see ``Keeper.check``."""
        self.service.ask(self._keeper.check)

    def leave(self) -> None:
        """Let others own the segment, once the thread has ended; may be repeated."""
        if self._segment.is_locked:  # else the state may be another owner's by now
            self._segment.state.end()
        self.place_locks.close()
        self._segment.leave()

    def start_over_after_fork(self) -> None:
        """Leave it all to the parent, in a forked child."""
        self.service.start_over_after_fork()
        self.place_locks.close()
        self._segment.leave()
