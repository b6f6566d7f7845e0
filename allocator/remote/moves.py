"""``Moves``: how the bytes of reads arrive, and when nothing more can.

Used by whoever has the reader's turn: its thread, or one that waits for a read. An exception of a
signal handler may end a look anywhere; the next look goes on from there. So a request is in
``read.running`` before it is posted and until it is known to be done, and a part is left out of
``read.parts`` only after that.
"""

from __future__ import annotations

from collections.abc import Callable

from kvheap.device.host_queue import NestedWaitError
from kvheap.remote.agent import Agent
from kvheap.remote.deadlines import Deadline, now_s
from kvheap.remote.errors import PeerError, PeerTimeoutError, StaleReadError
from kvheap.remote.link import Link
from kvheap.remote.reads import Read

__all__ = ["SETTLE_S", "Moves", "too_late"]

FOLLOW_S = 50e-6
"""Longest time for which whoever waits for a read asks NIXL without giving the turn to others."""

SETTLE_S = 0.5
"""Seconds after a peer is gone, and NIXL has reported it, in which what the network still holds is
received before blocks are given back."""


class Moves:
    """Posts the requests of reads, and follows them.

    Args:
        agent: NIXL.
        look_for: finds out whether a peer is gone.
        ended: is told of a read of which nothing can arrive any more; may be told again.
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
        self.looking: list[Read] = []
        """Reads that this thread looks at; to be emptied by whoever takes the turn anew."""

    def look_at(self, link: Link, read: Read) -> None:
        """Ask NIXL about a read; post more of it, or end it.

        Raises:
            NestedWaitError: the code that was interrupted on this thread looks at it.
        """
        if read in self.looking:
            raise NestedWaitError(
                "a finalizer or signal handler cannot wait for the read in whose middle it runs"
            )
        self.looking.append(read)
        try:
            self._look_at(link, read)
        finally:
            self.looking.pop()

    def begin(self, link: Link, read: Read) -> None:
        """:meth:`look_at` for a read of one part that has just begun, in the fewest steps.

        The read is in ``link.running``: whatever strikes here, the next look goes on from there.
        """
        self.looking.append(read)
        try:
            # A signal handler may have waited for it just before, and so posted it.
            is_new = read.parts and not read.running and link.gone is None
            if not is_new or not read.right.take(read):
                self._look_at(link, read)
                return
            read.posted_at = read.begun_at
            request = self._created(link, read)
            if request is None:
                self._finish(link, read)
                return
            state, why = self._agent.post(request)
            if state == "done":
                read.running.clear()
                self._agent.release(request)
                self._finish(link, read)
            elif state != "running":
                self._note(link, read, request, state, why)
        finally:
            self.looking.pop()

    def follow(self, link: Link, read: Read) -> None:
        """Ask NIXL without a pause whether it is done with a request; for a moment at most."""
        self.looking.append(read)  # else a signal handler could end it, and give the request up
        try:
            if read.running:
                self._follow(link, read, read.running[0])
        finally:
            self.looking.pop()

    def _follow(self, link: Link, read: Read, request: int) -> None:
        until = now_s() + FOLLOW_S
        while True:
            state, error = self._agent.state(request)
            if state != "running":
                break
            if now_s() >= until:
                return
        self._note(link, read, request, state, error)
        if not (read.parts or read.running or read.broken):
            self._finish(link, read)

    def _look_at(self, link: Link, read: Read) -> None:
        event, now = read.event, now_s()
        if event.cause is None:
            if now >= read.limit.at:
                event.fail(too_late(link, read))
            elif link.gone is not None:
                event.fail(link.gone)
        if event.cause is not None:
            event.fail(event.cause)  # again: an exception may have struck in it
            read.parts.clear()  # nothing more is posted
        if read.running:
            for request in [*read.running]:
                self._note(link, read, request, *self._agent.state(request))
        if read.parts:
            if not read.running:
                self._post(link, read, now)
            if read.parts:
                return
        if not read.running and not read.broken:
            self._finish(link, read)
        elif link.gone is not None and (link.is_assumed_gone or not read.running):
            self._settle(link, read)

    def _post(self, link: Link, read: Read, now: float) -> None:
        """Post the next part of a read, unless it was withdrawn."""
        if not read.right.take(read):
            read.parts.clear()
            return
        if not read.posted_at:
            read.posted_at = now
        request = self._created(link, read)
        if request is None:
            return
        state, why = self._agent.post(request)
        if state != "running":
            self._note(link, read, request, state, why)

    def _created(self, link: Link, read: Read) -> int | None:
        """The request for the next part, in ``read.running``; None if NIXL refuses it."""
        welcome, hold = link.welcome, read.hold
        known = None if hold is None else hold.known
        try:
            request = self._agent.read(
                welcome.agent, read.parts[-1], welcome.device, read.running, known
            )
        except PeerError as error:  # nothing was posted
            read.parts.clear()
            read.event.fail(error)
            return None
        read.parts.pop()
        return request

    def _note(
        self, link: Link, read: Read, request: int, state: str, error: BaseException | None
    ) -> None:
        """Enter the state of one of the requests in ``read.running``."""
        if state == "done":
            read.running.remove(request)
            self._agent.release(request)
        elif state == "created":  # an exception struck before it was posted
            if read.event.is_over:
                read.running.remove(request)
                self._agent.release(request)
            else:
                self._note(link, read, request, *self._agent.post(request))
        elif state == "failed":
            read.parts.clear()
            if request not in read.broken:
                read.broken.append(request)
            read.running.remove(request)
            if read.failure is None:
                failure = PeerError(f"NIXL could not read from peer {link.name!r}: {error}")
                failure.__cause__ = error
                read.failure = failure
            if link.gone is not None:
                read.event.fail(link.gone)
            else:
                self._look_for(link)  # within a second it is known to be gone, or not

    def _finish(self, link: Link, read: Read) -> None:
        """NIXL has nothing to do with a read any more."""
        lease_until = read.lease_until
        assert lease_until is not None
        if now_s() >= lease_until.at:
            read.event.fail(
                StaleReadError(
                    f"the bytes from peer {link.name!r} arrived after its lease of "
                    f"{lease_until.seconds:g} s: they may be other chunks'"
                )
            )
        self._ended(link, read)

    def _settle(self, link: Link, read: Read) -> None:
        """End a read whose peer is gone, once the network holds nothing of it any more."""
        requests = {*read.broken, *read.running}
        for request in requests:
            self._agent.state(request)  # receives what there is
        if read.settle_until is None:
            read.settle_until = Deadline(SETTLE_S)
        elif read.settle_until.has_passed:
            read.broken, read.running = [], []
            for request in requests:
                self._agent.release(request)
            self._ended(link, read)


def too_late(link: Link, read: Read) -> PeerTimeoutError:
    """The error of a read whose time is over."""
    if read.lease or read.hold is not None:
        what = "the bytes have not arrived"
    elif link.line is None:
        what = "it cannot be reached"
    else:
        what = "it has not answered"
    return PeerTimeoutError(f"peer {link.name!r}: {what} in {read.limit.seconds:g} s")
