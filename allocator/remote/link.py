"""``Link``: what the reader knows of one peer."""

from __future__ import annotations

import weakref
from collections import deque

from kvheap.remote.deadlines import Deadline
from kvheap.remote.errors import PeerGoneError
from kvheap.remote.handshake import Welcome
from kvheap.remote.line import Line
from kvheap.remote.peer_lease import Hold, PeerLease
from kvheap.remote.reads import Read

__all__ = ["Link"]

MAX_UNLOCKS = 1 << 14
"""Leases that a peer gives at most at a time, all together."""


class Link:
    """One life of a peer, as the reader sees it. Changed by whoever has the reader's turn.

    Args:
        welcome: what the peer says of itself.
        address: host and port of its control channel.
        line: the control connection for reads.
    """

    def __init__(self, welcome: Welcome, address: tuple[str, int], line: Line) -> None:
        self.welcome = welcome
        self.address = address
        self.line: Line | None = line
        """None while the connection is lost."""
        self.is_writing = False
        """Whether the reader waits until the connection takes more."""
        self.queued: list[Read] = []
        """Reads that wait for a connection."""
        self.asked: dict[int, Read] = {}
        """Reads that wait for the answer to a lock, by its number."""
        self.running: dict[Read, None] = {}
        """Reads that NIXL has to do with, or soon will, also those in quarantine."""
        self.holds: dict[Hold, weakref.ref[PeerLease]] = {}
        """Leases that were taken before the reads, and who has them."""
        self.unlocks: deque[int] = deque(maxlen=MAX_UNLOCKS)
        """Leases to give back, by number; the oldest ones are over before they would be told."""
        self.gone: PeerGoneError | None = None
        """Why the peer is known to be gone."""
        self.is_assumed_gone = False
        """Whether it is the user who says so."""
        self.is_known = False
        """Whether NIXL knows the peer's agent."""
        self.users: dict[object, None] = {}
        """Each ``Peer`` of it that was not closed."""
        self.is_closed = False
        """Whether all users are done with the peer."""
        self.is_probing = False
        self.probe_after: Deadline | None = None
        """When to look for the peer again."""

    @property
    def name(self) -> str:
        """The peer's name."""
        return self.welcome.name

    @property
    def has_to_tell(self) -> bool:
        """Whether something waits for the peer, or for its answer."""
        return bool(self.unlocks or self.queued or self.asked or self.running)

    @property
    def reads(self) -> list[Read]:
        """All reads that have not ended."""
        return [*self.queued, *self.asked.values(), *self.running]
