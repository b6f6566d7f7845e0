"""``Line``: the client's end of a control connection."""

from __future__ import annotations

import os
import select
import socket

from kvheap.interrupts import is_interrupt
from kvheap.remote.deadlines import Deadline
from kvheap.remote.errors import PeerTimeoutError
from kvheap.remote.frames import Incoming, Outgoing

__all__ = ["Line", "prepare"]

RECEIVE_BYTES = 256 << 10

KEEPALIVE_S = 10
"""Seconds without traffic after which a machine that vanished is looked for."""


class Line:
    """A connection to a server, with its frames. Used by one thread at a time.

    Args:
        sock: connected.
        incoming: takes frames apart.
        outgoing: makes frames.
        where: the other end, for messages.
    """

    def __init__(
        self, sock: socket.socket, incoming: Incoming, outgoing: Outgoing, where: str
    ) -> None:
        self._socket = sock
        self._incoming = incoming
        self._outgoing = outgoing
        self._unsent = bytearray()
        self._pid = os.getpid()
        self.where = where
        prepare(sock)

    def rekey(self, key: bytes, max_bytes: int) -> None:
        """Use the key of the connection in both directions."""
        self._incoming.rekey(key, max_bytes)
        self._outgoing.rekey(key)

    def fileno(self) -> int:
        """The descriptor; -1 once it is closed."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait for the socket."""
        return bool(self._unsent)

    def push(self, payload: bytes = b"") -> None:
        """Send a message, or what is left of those before, as far as the socket takes it.

        Raises:
            OSError: the connection is broken.
        """
        if payload:
            self._unsent += self._outgoing.frame(payload)
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._as_closed(error) from None
            del self._unsent[:sent]

    def pull(self) -> list[bytes]:
        """The messages that have arrived.

        Raises:
            ProtocolError: what has arrived is none.
            ConnectionError: the other end has closed the connection.
            OSError: it is broken.
        """
        self._fill()
        return [*iter(self._incoming.next, None)]

    def _fill(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._as_closed(error) from None
        if not data:
            raise ConnectionResetError(f"{self.where} has closed the connection")
        self._incoming.feed(data)

    def send(self, payload: bytes, deadline: Deadline) -> None:
        """Send a message, and wait until the socket has taken it.

        Raises:
            PeerTimeoutError: it has not, in time.
            OSError: the connection is broken.
        """
        self.push(payload)
        while self._unsent:
            self._wait(select.POLLOUT, deadline)
            self.push()

    def receive(self, deadline: Deadline) -> bytes:
        """The next message.

        Raises:
            PeerTimeoutError: none has arrived in time.
            ProtocolError, OSError: as :meth:`pull`.
        """
        while True:
            payload = self._incoming.next()
            if payload is not None:
                return payload
            self._wait(select.POLLIN, deadline)
            self._fill()

    def _wait(self, event: int, deadline: Deadline) -> None:
        poll = select.poll()
        try:
            poll.register(self._socket, event)
        except ValueError as error:
            raise self._as_closed(error) from None
        if not poll.poll(max(1, int(deadline.left_s * 1e3))) and deadline.has_passed:
            raise PeerTimeoutError(f"{self.where} has not answered in {deadline.seconds:g} s")

    def _as_closed(self, error: Exception) -> Exception:
        """What is raised for an error: another one if this end was closed, by another thread."""
        if self._socket.fileno() >= 0:
            return error
        return ConnectionAbortedError(f"the connection to {self.where} was closed")

    def close(self) -> None:
        """Close it, also while another thread waits for it, which goes on; may be repeated."""
        if os.getpid() == self._pid:  # in a forked child, the parent goes on
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                if is_interrupt(error):
                    raise
        self._socket.close()


def prepare(sock: socket.socket) -> None:
    """Set the options of a control connection."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S // 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
