"""``Server``: the thread that answers other nodes on the control channel.

Whoever connects may be slow, silent, wrong or malicious: it costs a socket and a bounded buffer for
a few seconds, and never a thread.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from kvheap.interrupts import suppress_own
from kvheap.kernels.latch import Latch
from kvheap.remote.complaints import Complaints
from kvheap.remote.deadlines import Deadline, now_s
from kvheap.remote.errors import ProtocolError
from kvheap.remote.handshake import ServerHandshake
from kvheap.remote.leases import Account
from kvheap.remote.line import RECEIVE_BYTES, prepare
from kvheap.remote.messages import unpacked
from kvheap.remote.service import Service

__all__ = ["Server"]

LOGGER = logging.getLogger("kvheap")

PATIENCE_S = 5.0
"""Seconds for a handshake, for the rest of a frame that has begun, and to take an answer."""

ACCEPT_PAUSE_S = 0.1
"""Seconds without new connections after one could not be accepted."""

MAX_STRANGERS = 64
"""Connections without a finished handshake; the oldest makes way."""

MAX_CONNECTIONS = 1024
"""Connections in all."""

MAX_UNSENT_BYTES = 1 << 20
"""No more requests of a connection are answered while so much of its answers waits."""


class _Connection:
    """One client."""

    __slots__ = ("account", "deadline", "handshake", "is_open", "peer", "sock", "unsent")

    def __init__(self, sock: socket.socket, key: bytes) -> None:
        self.sock = sock
        self.handshake = ServerHandshake(key)
        self.is_open = False
        """Whether the handshake is done."""
        self.peer = "a client"
        self.account = Account()
        self.unsent = bytearray(self.handshake.greeting())
        self.deadline: Deadline | None = Deadline(PATIENCE_S)
        """Until when it must do what it has begun; None: it has begun nothing."""


class Server:
    """Listens, and answers requests, on a thread of its own.

    Args:
        listener: bound and listening.
        key: of the first frames.
        welcome: makes the answer to a hello.
        service: answers requests.
        name: of the node.
    """

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        welcome: Callable[[], bytes],
        service: Service,
        name: str,
    ) -> None:
        self._listener = listener
        self._key = key
        self._welcome = welcome
        self._service = service
        self._name = name
        self._connections: dict[int, _Connection] = {}
        self._accept_after: Deadline | None = None  # None: connections are accepted
        self._is_stopping = False
        self._has_stopped = Latch()
        self.num_refused = 0
        """Connections that were ended because of what they sent, or did not send."""
        self._refusals = Complaints(name, "has ended %d more connections")
        self._full = Complaints(name, "could not accept connections %d more times")
        self._bugs = Complaints(name, "could not serve %d more connections", logging.ERROR)
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        # Sockets, not a pipe: whatever an interrupted opening leaves closes itself, and a thread
        # that is late does not read from a descriptor that is somebody else's by then.
        self._wake_reading, self._wake_writing = socket.socketpair()
        self._wake_writing.setblocking(False)
        self._selector.register(self._wake_reading, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"kvheap-serve-{name}", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def is_here(self) -> bool:
        """Whether the calling thread is the one that serves."""
        return threading.current_thread() is self._thread

    @property
    def num_connections(self) -> int:
        """Connections with a finished handshake."""
        return sum(each.is_open for each in [*self._connections.values()])

    def stop(self) -> None:
        """End the thread, and close all connections."""
        self._ask_to_stop()
        self._has_stopped.wait()

    def call_off(self) -> None:
        """End it in the middle of an opening: whether the thread runs may not be known."""
        self._ask_to_stop()
        with suppress(RuntimeError):  # it was not started, or begins later, and ends at once
            self._thread.join()
        self._close_all()

    def _ask_to_stop(self) -> None:
        self._is_stopping = True
        with suppress_own(OSError):
            self._wake_writing.send(b"!")

    def abandon(self) -> None:
        """Close this process's copies of the sockets, in a forked child without the thread."""
        self._close_all()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                for key, mask in self._selector.select(self._pause()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif (connection := self._connections.get(key.fd)) is not None:
                        self._serve(connection, mask)  # unless it made way for one just accepted
                self._drop_late()
                self._accept_again()
                for complaints in self._complaints:
                    complaints.tell()
        except BaseException:
            LOGGER.exception("node %r serves no more", self._name)
            self._close_connections()
            # The memory is still registered. If nobody listened, readers would take the node for
            # gone, and use blocks again that NIXL may still fill.
            while not self._is_stopping:
                self._wake_reading.recv(1)
        finally:
            for complaints in self._complaints:
                complaints.tell(is_last=True)
            self._close_all()
            self._has_stopped.open()

    @property
    def _complaints(self) -> tuple[Complaints, ...]:
        return self._refusals, self._full, self._bugs, self._service.complaints

    def _pause(self) -> float | None:
        ends = [each.deadline.at for each in self._connections.values() if each.deadline]
        if self._accept_after is not None:
            ends.append(self._accept_after.at)
        pauses = [max(min(ends) - now_s(), 0.0)] if ends else []
        pauses += [each.pause_s for each in self._complaints if each.pause_s is not None]
        return min(pauses, default=None)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone already
            return
        except OSError as error:  # no descriptor or no memory is left; who is connected goes on
            self._full.add("node %r cannot accept connections now: %s", self._name, error)
            self._selector.unregister(self._listener)
            self._accept_after = Deadline(ACCEPT_PAUSE_S)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self.num_refused += 1
            self._refusals.add(
                "node %r refuses a connection: it has %d already", self._name, MAX_CONNECTIONS
            )
            sock.close()
            return
        strangers = [each for each in self._connections.values() if not each.is_open]
        if len(strangers) >= MAX_STRANGERS:
            self._refuse(strangers[0], "too many clients have not finished their handshake")
        try:
            prepare(sock)
            connection = _Connection(sock, self._key)
            self._connections[sock.fileno()] = connection
            self._selector.register(sock, selectors.EVENT_READ)
        except OSError:
            self._connections.pop(sock.fileno(), None)
            sock.close()
            return
        self._send(connection)

    def _accept_again(self) -> None:
        if self._accept_after is not None and self._accept_after.has_passed:
            self._accept_after = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _serve(self, connection: _Connection, mask: int) -> None:
        try:
            if mask & selectors.EVENT_READ:
                data = connection.sock.recv(RECEIVE_BYTES)
                if not data:
                    self._close(connection)
                    return
                connection.handshake.incoming.feed(data)
            self._send(connection)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
        except Exception as error:  # a bug of ours must not end the thread
            self._bugs.add("node %r cannot serve %s", self._name, connection.peer, error=error)
            self._refuse(connection, repr(error))

    def _send(self, connection: _Connection) -> None:
        """Answer what has arrived, and send as much as the socket takes."""
        try:
            while self._flush(connection) and self._answer_next(connection):
                continue
        except ProtocolError as error:
            self._refuse(connection, str(error))
            return
        except OSError:
            self._close(connection)
            return
        unsent, incoming = connection.unsent, connection.handshake.incoming
        is_waiting = bool(unsent) or incoming.is_partial or not connection.is_open
        if not is_waiting:
            connection.deadline = None
        elif connection.deadline is None:
            connection.deadline = Deadline(PATIENCE_S)
        events = selectors.EVENT_READ if len(unsent) < MAX_UNSENT_BYTES else 0
        events |= selectors.EVENT_WRITE if unsent else 0
        self._selector.modify(connection.sock, events)

    def _flush(self, connection: _Connection) -> bool:
        """Send; returns whether more answers may be made."""
        unsent = connection.unsent
        with suppress(BlockingIOError):
            while unsent:
                del unsent[: connection.sock.send(unsent)]
        return len(unsent) < MAX_UNSENT_BYTES

    def _answer_next(self, connection: _Connection) -> bool:
        """Answer one request; returns whether there was any.

        Raises:
            ProtocolError: what has arrived is none.
        """
        handshake = connection.handshake
        payload = handshake.incoming.next()
        if payload is None:
            return False
        if connection.is_open:
            answer = self._service.answer(unpacked(payload), connection.account)
            if connection.deadline is not None:  # what it had begun is complete
                connection.deadline = Deadline(PATIENCE_S)
        else:
            connection.peer = f"peer {handshake.accept(payload)!r}"
            connection.is_open = True
            connection.deadline = None
            answer = self._welcome()
        if answer is not None:
            connection.unsent += handshake.outgoing.frame(answer)
        return True

    def _drop_late(self) -> None:
        for connection in [*self._connections.values()]:
            if connection.deadline is not None and connection.deadline.has_passed:
                self._refuse(connection, f"it has not done what it began in {PATIENCE_S:g} s")

    def _refuse(self, connection: _Connection, why: str) -> None:
        self.num_refused += 1
        self._refusals.add("node %r ends a connection of %s: %s", self._name, connection.peer, why)
        self._close(connection)

    def _close(self, connection: _Connection) -> None:
        if self._connections.pop(connection.sock.fileno(), None) is None:
            return
        with suppress(KeyError, ValueError, OSError):
            self._selector.unregister(connection.sock)
        connection.sock.close()

    def _close_connections(self) -> None:
        for connection in [*self._connections.values()]:
            connection.sock.close()
        self._connections.clear()

    def _close_all(self) -> None:
        self._close_connections()
        self._listener.close()
        self._selector.close()
        self._wake_reading.close()
        self._wake_writing.close()
