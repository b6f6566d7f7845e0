"""``Questions``: what a reader asks its peers on the control channel, and what they answer.

It asks for leases on the blocks of reads by keys, and gives leases back. All of it happens under
the reader's turn, most on its thread. A signal handler's exception may end a call between any two
steps; whoever has asked then has the connection closed.
"""

from __future__ import annotations

import itertools
import logging
import selectors
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from kvheap.interrupts import is_interrupt
from kvheap.remote.answers import enter_lease
from kvheap.remote.deadlines import now_s
from kvheap.remote.errors import ProtocolError
from kvheap.remote.line import Line
from kvheap.remote.link import Link
from kvheap.remote.messages import Fields, key_fields, new_lease_number, packed, unpacked
from kvheap.remote.reads import Read

__all__ = ["Questions"]

LOGGER = logging.getLogger("kvheap")


class Questions:
    """Asks peers for leases, and gives leases back.

    Args:
        name: of the node.
        selector: of the reader's thread, which calls :meth:`serve` for connections.
        do_here: does something on that thread: now, if it is this one.
        leased: is told of a read whose blocks are leased now.
        failed: ends a read that NIXL has nothing to do with.
        withdrawn: is told of a read that was given up before it was asked for.
        lost: is told of a peer whose connection is broken.
    """

    def __init__(
        self,
        name: str,
        selector: selectors.BaseSelector,
        do_here: Callable[[Callable[[], None]], None],
        leased: Callable[[Link, Read], None],
        failed: Callable[[Read, BaseException], None],
        withdrawn: Callable[[Read], None],
        lost: Callable[[Link], None],
    ) -> None:
        self._name = name
        self._selector = selector
        self._do_here = do_here
        self._leased = leased
        self._failed = failed
        self._withdrawn = withdrawn
        self._lost = lost
        self._numbers = itertools.count(1)

    def take(self, link: Link, line: Line) -> None:
        """Use a connection."""
        link.line, link.probe_after, link.is_writing = line, None, False
        self._selector.register(line, selectors.EVENT_READ, link)
        self.unlock(link)
        self.request_queued(link)

    def disconnect(self, link: Link) -> None:
        """Close the connection, if there is one."""
        line, link.line = link.line, None
        if line is not None:
            with suppress(KeyError, ValueError, OSError):
                self._selector.unregister(line)
            line.close()

    def request(self, link: Link, read: Read) -> None:
        """Ask for a lock on the blocks, unless the read was withdrawn."""
        line = link.line
        if line is None or line.has_unsent:  # it takes nothing now, or has broken just before
            link.queued.append(read)
            return
        number = next(self._numbers)
        read.asked_at, read.asked_for = now_s(), new_lease_number()
        link.asked[number] = read
        if not read.right.take(read):
            del link.asked[number]
            self._withdrawn(read)
            return
        ttl = max(read.limit.at - read.asked_at, 1e-3)
        fields = dict(number=number, ttl=ttl, lease=read.asked_for, **key_fields(read.keys))
        self._push(link, packed(kind="lock", **fields))
        read.was_asked = True

    def request_queued(self, link: Link) -> None:
        """Ask for what waits for the connection, as far as it takes it."""
        queued, link.queued = link.queued, []
        for read in queued:
            self.request(link, read)

    def not_answered(self, link: Link, read: Read) -> None:
        """Give back the lease that a read has asked for: perhaps it was given."""
        if read.asked_for:
            link.unlocks.append(read.asked_for)
            read.asked_for = 0

    def unlock(self, link: Link) -> None:
        """Give leases back, now or when there is a connection again."""
        while link.unlocks and link.line is not None and not link.line.has_unsent:
            self._push(link, packed(kind="unlock", lease=link.unlocks.popleft()))

    def serve(self, link: Link, mask: int) -> None:
        """Receive and send what the selector says can be."""
        line = link.line
        if line is None:
            return
        try:
            if mask & selectors.EVENT_READ:
                for payload in line.pull():
                    self._answered(link, unpacked(payload))
            if mask & selectors.EVENT_WRITE:
                self._push(link)
        except ProtocolError as error:
            for read in [*link.asked.values()]:
                self.not_answered(link, read)
                self._failed(read, ProtocolError(f"peer {link.name!r}: {error}"))
            link.asked.clear()
            self.lose(link, line, error)
        except OSError as error:
            self.lose(link, line, error)

    def _answered(self, link: Link, answer: Fields) -> None:
        read = link.asked.pop(answer.integer("number"), None)
        if read is None:  # it has waited too long, and given the lease up
            return
        if read.event.is_over:
            self.not_answered(link, read)
            return
        try:
            enter_lease(link.name, read, answer)
        except Exception as error:
            self.not_answered(link, read)
            self._failed(read, error)
            if isinstance(error, ProtocolError):
                raise
        else:
            self._leased(link, read)

    def lose(self, link: Link, line: Line | None, error: BaseException) -> None:
        """Note that a connection is broken: what was asked on it will be asked again."""
        if line is None or link.line is not line:  # there is another one already
            return
        LOGGER.info("node %r lost its connection to peer %r: %s", self._name, link.name, error)
        self.disconnect(link)
        for read in link.asked.values():
            self.not_answered(link, read)
            link.queued.append(read)
        link.asked.clear()
        self._lost(link)

    def _push(self, link: Link, payload: bytes = b"") -> None:
        line = link.line
        if line is None:
            return
        try:
            line.push(payload)
        except OSError as error:
            if is_interrupt(error):
                raise
            self._do_here(partial(self.lose, link, line, error))
        else:
            if line.has_unsent != link.is_writing:
                self._do_here(partial(self._watch, link, line))

    def _watch(self, link: Link, line: Line) -> None:
        """Wait until the connection takes more, if more is to be sent."""
        if link.line is line:
            link.is_writing = line.has_unsent
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.is_writing else 0)
            self._selector.modify(line, events, link)
