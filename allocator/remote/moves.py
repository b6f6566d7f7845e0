"""``Moves``: how the bytes of reads arrive, and when nothing more can.

Used on the reader's thread only.
"""

from __future__ import annotations

from collections.abc import Callable

from kvheap.remote.agent import Agent
from kvheap.remote.deadlines import Deadline
from kvheap.remote.errors import PeerError, PeerTimeoutError, StaleReadError
from kvheap.remote.link import Link
from kvheap.remote.reads import Read

__all__ = ["Moves", "too_late"]

SETTLE_S = 0.5
"""Seconds after a peer is gone, and NIXL has reported it, in which what the network still holds is
received before blocks are given back."""


class Moves:
    """Posts the requests of reads, and follows them.

    Args:
        agent: NIXL.
        look_for: finds out whether a peer is gone.
        ended: is told of a read of which nothing can arrive any more.
    """

    def __init__(
        self,
        agent: Agent,
        look_for: Callable[[Link], None],
        ended: Callable[[Link, Read], None],
    ) -> None:
        self._agent = agent
        self._look_for = look_for
        self._ended = ended

    def post(self, link: Link, read: Read) -> None:
        """Post the next part of a read, if there is one."""
        pieces = next(read.groups, None) if read.groups is not None else None
        if pieces is None:
            read.groups = None
            return
        try:
            request = self._agent.read(link.welcome.agent, pieces, link.welcome.device)
        except PeerError as error:  # nothing was posted
            read.groups = None
            read.event.fail(error)
            return
        self._note(link, read, request, *self._agent.post(request))

    def _note(
        self, link: Link, read: Read, request: int, state: str, error: BaseException | None
    ) -> None:
        """Enter the state of a request that is in neither list."""
        if state == "done":
            self._agent.release(request)
        elif state == "running":
            read.running.append(request)
        else:
            read.groups = None
            read.broken.append(request)
            read.failure = PeerError(f"NIXL could not read from peer {link.name!r}: {error}")
            read.failure.__cause__ = error
            if link.gone is not None:
                read.event.fail(link.gone)
            else:
                self._look_for(link)  # within a second it is known to be gone, or not

    def look_at(self, link: Link, read: Read) -> None:
        """Ask NIXL about a read; post more of it, or end it."""
        if not read.event.is_over and read.limit.has_passed:
            read.event.fail(too_late(link, read))
        if read.event.is_over:
            read.groups = None  # nothing more is posted
        requests, read.running = read.running, []
        for request in requests:
            self._note(link, read, request, *self._agent.state(request))
        if read.groups is not None and not read.running:
            self.post(link, read)
        if read.groups is not None:
            return
        if not read.running and not read.broken:
            self._finish(link, read)
        elif link.gone is not None and (link.is_assumed_gone or not read.running):
            self._settle(link, read)

    def _finish(self, link: Link, read: Read) -> None:
        """NIXL has nothing to do with a read any more."""
        lease_until = read.lease_until
        assert lease_until is not None
        if lease_until.has_passed:
            read.event.fail(
                StaleReadError(
                    f"the bytes from peer {link.name!r} arrived after its lease of "
                    f"{lease_until.seconds:g} s: they may be other chunks'"
                )
            )
        link.running.pop(read)
        self._ended(link, read)

    def _settle(self, link: Link, read: Read) -> None:
        """End a read whose peer is gone, once the network holds nothing of it any more."""
        for request in (*read.broken, *read.running):
            self._agent.state(request)  # receives what there is
        if read.settle_until is None:
            read.settle_until = Deadline(SETTLE_S)
        elif read.settle_until.has_passed:
            for request in (*read.broken, *read.running):
                self._agent.release(request)
            read.broken, read.running = [], []
            link.running.pop(read)
            self._ended(link, read)


def too_late(link: Link, read: Read) -> PeerTimeoutError:
    """The error of a read whose time is over."""
    if read.lease:
        what = "the bytes have not arrived"
    elif link.line is None:
        what = "it cannot be reached"
    else:
        what = "it has not answered"
    return PeerTimeoutError(f"peer {link.name!r}: {what} in {read.limit.seconds:g} s")
