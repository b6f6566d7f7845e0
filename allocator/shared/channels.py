"""How a process reaches the keeper of a segment: in its own process, or in the owner's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import ClosedError
from kvheap.shared.errors import NoOwnerError
from kvheap.shared.header import OwnerState
from kvheap.shared.keeper import Filled, Keeper, Ticket
from kvheap.shared.service import Service
from kvheap.shared.tokens import Dropped, Token
from kvheap.shared.wire import (
    LENGTH,
    Kind,
    decode_keys,
    decode_ticket,
    encode_filled,
    encode_keys,
    framed,
)

__all__ = ["Channel", "Link", "LocalChannel", "RemoteChannel"]

Answer = TypeVar("Answer")

TELL_S = 0.01
"""How long to wait for room in a socket for a few bytes."""

RETRY_S = 0.01
"""Between two tries to connect."""

HERE = "here"
"""Who stores in the owner's process."""


class OwnerRefusedError(Exception):
    """The owner has answered that a call was wrong."""


class Link(Protocol):
    """What a place was given through. If it is not open any more, the place may be another's.

    Attributes:
        is_open: whether it is.
        epoch: of the owner.
    """

    is_open: bool
    epoch: int


class Channel(Protocol):
    """What a heap asks of its keeper. ``NoOwnerError``: there is none, or it has gone."""

    def begin(self, token: Token, keys: Sequence[bytes]) -> tuple[Ticket, Link]:
        """See ``Keeper.begin``. When the token is gone, the store is given up."""

    def publish(self, token: Token, link: Link, number: int, filled: Sequence[Filled]) -> int:
        """See ``Keeper.publish``."""

    def abort(self, token: Token) -> None:
        """See ``Keeper.abort``; does not wait, also for finalizers."""

    def remove(self, keys: Sequence[bytes]) -> list[bytes]:
        """See ``Keeper.remove``."""

    def report(self, place: int, generation: int) -> None:
        """See ``Keeper.drop_damaged``."""

    def stop(self, timeout_s: float | None) -> bool:
        """Give up what is being stored through it; may be repeated.

        Args:
            timeout_s: the most seconds to wait for calls that are under way; None: no limit.

        Returns:
            Whether they have ended.
        """

    def start_over_after_fork(self) -> None:
        """Leave it to the parent, in a forked child."""


class LocalChannel:
    """The keeper in this process.

    Args:
        keeper: the books.
        service: their thread.
        content_of: the bytes of a place's chunk.
    """

    def __init__(
        self, keeper: Keeper, service: Service, content_of: Callable[[int], memoryview]
    ) -> None:
        self._keeper = keeper
        self._service = service
        self._content_of = content_of
        self._stores: Dropped[int] = Dropped()
        service.on_turn = self._give_up

    def _give_up(self) -> None:
        """Abort the stores that nobody has any more; on the thread."""
        for number in self._stores.take():
            self._keeper.abort(HERE, number)

    def begin(self, token: Token, keys: Sequence[bytes]) -> tuple[Ticket, Link]:
        """See ``Keeper.begin``."""

        def begin() -> Ticket:  # on the thread, where no exception of a signal handler strikes
            ticket = self._keeper.begin(HERE, keys)
            self._stores.track(token, ticket.number)
            return ticket

        return self._service.ask(begin), self._service

    def publish(self, token: Token, link: Link, number: int, filled: Sequence[Filled]) -> int:
        """See ``Keeper.publish``."""
        return self._service.ask(partial(self._keeper.publish, HERE, number, filled))

    def abort(self, token: Token) -> None:
        """See ``Keeper.abort``."""
        self._stores.end(token)
        self._service.tell(_nothing)

    def remove(self, keys: Sequence[bytes]) -> list[bytes]:
        """See ``Keeper.remove``."""
        return self._service.ask(partial(self._keeper.remove, keys))

    def report(self, place: int, generation: int) -> None:
        """See ``Keeper.drop_damaged``."""
        content = self._content_of(place)
        self._service.ask(partial(self._keeper.drop_damaged, place, generation, content))

    def stop(self, timeout_s: float | None) -> bool:
        """End the thread; see ``Service.stop``."""
        return self._service.stop(timeout_s)

    def start_over_after_fork(self) -> None:
        """Nothing: the thread is the parent's."""


class _Connection:
    """A connection to an owner."""

    def __init__(self, state: OwnerState, end_s: float) -> None:
        self.epoch = state.epoch  # first: an owner that comes later makes this one void
        self.is_open = True
        self._unread = 0  # answers that nobody has waited for
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(state.socket_name, end_s)
        except BaseException:
            self.socket.close()
            raise

    def _connect(self, name: str, end_s: float) -> None:
        while True:
            self.socket.settimeout(_left(end_s))
            try:
                self.socket.connect(name)
                return
            except BlockingIOError:  # too many wait for an owner that is stopped or busy
                if time.monotonic() >= end_s:
                    raise TimeoutError from None
            time.sleep(RETRY_S)

    def close(self) -> None:
        self.is_open = False  # before the owner can see it
        self.socket.close()

    def hang_up(self) -> None:
        """Let whoever waits for an answer get none."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def tell(self, message: bytes) -> None:
        """Send a message, and leave its answer for later."""
        self.socket.settimeout(TELL_S)
        self.socket.sendall(message)
        self._unread += 1

    def call(self, message: bytes, end_s: float) -> bytes:
        """The answer to a message."""
        self.socket.settimeout(_left(end_s))
        self.socket.sendall(message)
        while self._unread:
            self._answer(end_s)
            self._unread -= 1
        return self._answer(end_s)

    def _answer(self, end_s: float) -> bytes:
        (length,) = LENGTH.unpack(self._receive(LENGTH.size, end_s))
        return self._receive(length, end_s)

    def _receive(self, num_bytes: int, end_s: float) -> bytes:
        parts = []
        while num_bytes:
            self.socket.settimeout(_left(end_s))
            part = self.socket.recv(num_bytes)
            if not part:
                raise ConnectionResetError("the owner has closed the connection")
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)


class RemoteChannel:
    """The keeper in another process; for all threads, one call at a time.

    Args:
        path: of the segment, for messages.
        state: who owns it.
        timeout_s: how long to wait for an answer.
    """

    def __init__(self, path: str, state: OwnerState, timeout_s: float) -> None:
        self._path = path
        self._state = state
        self._timeout_s = timeout_s
        self._connection: _Connection | None = None
        self._stores: Dropped[tuple[Link, int]] = Dropped()
        self._lock = threading.Lock()
        self._holder = 0
        self._is_closed = False

    def begin(self, token: Token, keys: Sequence[bytes]) -> tuple[Ticket, Link]:
        """See ``Keeper.begin``."""

        def track(body: bytes, link: Link) -> tuple[Ticket, Link]:
            ticket = decode_ticket(body)
            self._stores.track(token, (link, ticket.number))
            return ticket, link

        return self._call(Kind.BEGIN, encode_keys(keys), track)

    def publish(self, token: Token, link: Link, number: int, filled: Sequence[Filled]) -> int:
        """See ``Keeper.publish``."""

        def count(body: bytes, link: Link) -> int:
            self._stores.forget(token)
            found: int = LENGTH.unpack(body)[0]
            return found

        return self._call(Kind.PUBLISH, encode_filled(number, filled), count, link)

    def abort(self, token: Token) -> None:
        """See ``Keeper.abort``."""
        self._stores.end(token)
        self._give_up()

    def _give_up(self) -> None:
        """Abort the stores that nobody has any more; never waits for the lock."""
        # Whoever has the lock looks again afterwards.
        while self._stores.has_any and not self._lock.locked():
            with self._lock:
                self._holder = threading.get_ident()
                try:
                    if self._connection is not None:
                        self._send_aborted(self._connection)
                    else:
                        self._stores.take()
                except OSError:
                    self._disconnect()
                except BaseException:  # of a signal handler: nobody knows how much was sent
                    self._disconnect()
                    raise
                finally:
                    self._holder = 0

    def remove(self, keys: Sequence[bytes]) -> list[bytes]:
        """See ``Keeper.remove``."""
        return self._call(Kind.REMOVE, encode_keys(keys), lambda body, link: decode_keys(body))

    def report(self, place: int, generation: int) -> None:
        """See ``Keeper.drop_damaged``; without an owner, nothing."""
        with suppress(NoOwnerError, TimeoutError):
            message = encode_filled(0, [Filled(place, generation, 0)])
            self._call(Kind.REPORT, message, lambda body, link: None)

    def stop(self, timeout_s: float | None) -> bool:
        """Disconnect, whereupon the owner gives up what is being stored."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_closed = True
        connection = self._connection
        if connection is not None:
            connection.is_open = False
            connection.hang_up()
        if self._holder == threading.get_ident():
            return True  # in a finalizer inside another call, which disconnects
        while self._lock.locked():  # another thread may be about to use the socket's number
            if end_s is not None and time.monotonic() >= end_s:
                return False
            time.sleep(RETRY_S)
        with self._lock:
            self._disconnect()
        return True

    def start_over_after_fork(self) -> None:
        """Leave the connection to the parent, in a forked child."""
        self._lock = threading.Lock()
        self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _call(
        self,
        kind: Kind,
        body: bytes,
        read: Callable[[bytes, Link], Answer],
        link: Link | None = None,
    ) -> Answer:
        """What the owner answers.

        Args:
            kind: of the message.
            body: of the message.
            read: makes it of the answer's body and the connection that it came by.
            link: the connection that must be used; None: any.

        Raises:
            NoOwnerError: there is no owner, or it has gone.
            ClosedError: another thread closes the heap.
            TimeoutError: the owner does not answer; it may be stopped. What this process was
                storing through the connection is given up.
            ValueError: the owner has refused it.
        """
        self._require_outside()
        message = framed(kind, body)
        end_s = time.monotonic() + self._timeout_s
        try:
            with self._lock:  # for so long as the calls of other threads may take
                self._holder = threading.get_ident()
                try:
                    return self._answered(message, read, link, end_s)
                except OwnerRefusedError as error:
                    raise ValueError(str(error)) from None
                except BaseException:  # an answer may be on its way, to nobody
                    self._disconnect()
                    raise
                finally:
                    if self._is_closed:
                        self._disconnect()
                    self._holder = 0
        finally:
            self._give_up()  # what was given up meanwhile

    def _answered(
        self,
        message: bytes,
        read: Callable[[bytes, Link], Answer],
        link: Link | None,
        end_s: float,
    ) -> Answer:
        for attempt in (1, 2):
            is_new = self._connection is None
            try:
                connection = self._connected(end_s)
                if link is not None and link is not connection:
                    raise self._gone()
                self._send_aborted(connection)
                answer = connection.call(message, end_s)
            except TimeoutError:
                raise self._timed_out() from None
            except OSError as error:
                if is_new or attempt == 2 or link is not None:
                    raise self._gone() from error
                self._disconnect()  # of an earlier owner
                continue
            if answer[0] == Kind.DONE:
                return read(answer[1:], connection)
            if answer[0] == Kind.FAILED:
                raise OwnerRefusedError(answer[1:].decode("utf-8", "replace"))
            break
        raise self._gone()

    def _require_outside(self) -> None:
        if self._holder == threading.get_ident():
            raise NestedWaitError("a finalizer inside a call of a SharedHeap cannot ask its owner")

    def _connected(self, end_s: float) -> _Connection:
        if self._is_closed:
            raise ClosedError("this SharedHeap is closed")
        if self._connection is None:
            self._connection = _Connection(self._state, end_s)
        return self._connection

    def _send_aborted(self, connection: _Connection) -> None:
        for link, number in self._stores.take():
            if link is connection:
                connection.tell(framed(Kind.ABORT, encode_filled(number, [])))

    def _gone(self) -> NoOwnerError | ClosedError:
        if self._is_closed:
            return ClosedError("this SharedHeap is closed")
        return NoOwnerError(
            f"nobody owns {self._path} now, or its owner has just gone: chunks can be read, but "
            f"not be stored or removed; open it by SharedHeap(...) to own it"
        )

    def _timed_out(self) -> TimeoutError:
        return TimeoutError(
            f"process {self._state.pid}, which owns {self._path}, has not answered in "
            f"{self._timeout_s:g} s: it may be stopped, or busy"
        )


def _left(end_s: float) -> float:
    return max(end_s - time.monotonic(), 0.001)


def _nothing() -> None:
    pass
