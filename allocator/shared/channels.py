"""How a process reaches the keeper of a segment: in its own process, or in the owner's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM
from functools import partial
from typing import Protocol, TypeVar

from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import ClosedError
from kvheap.interrupts import is_interrupt, suppress_own
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

SAME_TIMEOUT = 0.9
"""A time-out that is up to so much shorter than the last one is not set anew."""

LONGEST_S = 1e6
"""Of one wait for a socket: the system counts milliseconds in 31 bits."""

SHORTAGES = frozenset({EMFILE, ENFILE, ENOBUFS, ENOMEM})
"""Errors of a connection that say that this process or machine has run out of something."""

READ_BYTES = 1 << 16

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

    def give_back(self) -> None:
        """Give up the stores that nobody has any more; does not wait, and costs little."""

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

    def give_back(self) -> None:
        """Wake the thread if it has stores to give up."""
        if self._stores.has_any:
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
        self._received = b""
        self._timeout_s = 0.0
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(state.socket_name, end_s)
        except BaseException:
            self.socket.close()
            raise

    def _connect(self, name: str, end_s: float) -> None:
        while True:
            self._set_timeout(_left(end_s))
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
        with suppress_own(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def tell(self, message: bytes) -> None:
        """Send a message, and leave its answer for later."""
        self._set_timeout(TELL_S)
        self.socket.sendall(message)
        self._unread += 1

    def call(self, message: bytes, end_s: float) -> bytes:
        """The answer to a message."""
        self._set_timeout(_left(end_s))
        self.socket.sendall(message)
        while self._unread:
            self._answer(end_s)
            self._unread -= 1
        return self._answer(end_s)

    def _answer(self, end_s: float) -> bytes:
        received = self._received
        while True:
            if len(received) >= LENGTH.size:
                end = LENGTH.size + LENGTH.unpack_from(received)[0]
                if len(received) >= end:
                    self._received = received[end:]
                    return received[LENGTH.size : end]
            part = self.socket.recv(READ_BYTES)
            if not part:
                raise ConnectionResetError("the owner has closed the connection")
            received += part
            self._set_timeout(_left(end_s))

    def _set_timeout(self, timeout_s: float) -> None:
        """How long a call of the socket may take. Roughly: each setting is a call of the system."""
        if not SAME_TIMEOUT * self._timeout_s < timeout_s <= self._timeout_s:
            self._timeout_s = timeout_s
            self.socket.settimeout(timeout_s)


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
        self.give_back()

    def give_back(self) -> None:
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
                except BaseException as error:  # nobody knows how much was sent
                    self._disconnect()
                    if not isinstance(error, OSError) or is_interrupt(error):
                        raise
                finally:
                    self._holder = 0

    def remove(self, keys: Sequence[bytes]) -> list[bytes]:
        """See ``Keeper.remove``."""
        return self._call(Kind.REMOVE, encode_keys(keys), lambda body, link: decode_keys(body))

    def report(self, place: int, generation: int) -> None:
        """See ``Keeper.drop_damaged``; without an owner, nothing."""
        with suppress_own(NoOwnerError, OSError):
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
        if self._is_here:
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
            self.give_back()  # what was given up meanwhile

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
            except OSError as error:
                if is_interrupt(error):
                    raise
                if isinstance(error, TimeoutError):
                    raise self._timed_out() from None
                if error.errno in SHORTAGES:
                    raise OSError(error.errno, error.strerror, self._path) from None
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

    @property
    def _is_here(self) -> bool:
        """Whether a call was interrupted on this thread, and must go on first."""
        # What an exception of a signal handler has left there, without the lock, is nobody.
        return self._holder == threading.get_ident() and self._lock.locked()

    def _require_outside(self) -> None:
        if self._is_here:
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
    return min(max(end_s - time.monotonic(), 0.001), LONGEST_S)


def _nothing() -> None:
    pass
