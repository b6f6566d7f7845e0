"""``Service``: the thread of a segment's owner, which keeps the books for all processes.

Callers of the owner's process put questions into a queue, so they never wait for a lock, and an
exception from a signal handler never strikes inside the books. Other processes ask through a Unix
socket. It has an abstract name: no file, and gone with the process. A connection that ends gives up
what its process was filling.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from queue import Empty, SimpleQueue
from typing import TypeVar

from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import ClosedError
from kvheap.interrupts import suppress_own
from kvheap.kernels.latch import Latch
from kvheap.shared.keeper import Keeper
from kvheap.shared.wire import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    Kind,
    decode_filled,
    decode_keys,
    encode_keys,
    encode_ticket,
    framed,
)

__all__ = ["Service"]

LOGGER = logging.getLogger("kvheap")

Answer = TypeVar("Answer")

MAX_WRITERS = 1024
"""Connections at a time."""

READ_BYTES, WAKE_BYTES = 1 << 18, 1 << 12

LOOK_S = 0.05
"""Seconds between two looks at places that wait for others, while there are any."""

PAUSE_S = 0.1
"""Seconds without new connections after one could not be accepted."""

ALIVE_S = 1.0
"""Seconds between two looks of a caller at whether the thread still runs."""

CREDENTIALS = struct.Struct("3i")


class _Connection:
    """Another process."""

    def __init__(self, peer: socket.socket) -> None:
        self.socket = peer
        self.received = bytearray()
        self.to_send = b""
        self.is_late = False  # whether it has to take an answer before it is heard again


class Service:
    """The thread of one owner; it runs from :meth:`start` until :meth:`stop`.

    Args:
        keeper: the books.
        socket_name: an abstract name.
        content_of: the bytes of a place's chunk.
        epoch: of the owner.

    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(
        self,
        keeper: Keeper,
        socket_name: str,
        content_of: Callable[[int], memoryview],
        epoch: int,
    ) -> None:
        self._keeper = keeper
        self._content_of = content_of
        self.epoch = epoch
        """Of the owner; those of others are void."""
        self.is_open = True
        """Whether stores can still be begun."""
        self.on_turn: Callable[[], object] = _nothing
        """Called in each turn of the thread, before what others ask is answered."""
        self._is_stopping = False
        self._questions: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._connections: set[_Connection] = set()
        self._paused_until_s: float | None = None  # None: connections are accepted
        self._has_ended = Latch()
        wake: list[int] = []
        # Not when the thread ends: somebody may be about to write to it.
        self._close_wake = weakref.finalize(self, _close, wake)
        self._close_wake.atexit = False  # the thread may go on until then
        # One call of the interpreter: no exception of a signal handler can lose them.
        wake.extend(chain.from_iterable(map(os.pipe2, (os.O_CLOEXEC | os.O_NONBLOCK,))))
        self._wake_read, self._wake_write = wake
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(socket_name)
            self._listener.listen(128)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._wake_read, selectors.EVENT_READ)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, name="kvheap-shared", daemon=True)
        except BaseException:
            self._listener.close()
            self._close_wake()
            raise

    # -- this process --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve; once.

        Raises:
            RuntimeError: the system does not let a thread start.
        """
        self._thread.start()

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """What a call on the thread returns or raises.

        Raises:
            ClosedError: the thread has ended.
            NestedWaitError: in a finalizer on the thread.
        """
        if threading.current_thread() is self._thread:
            raise NestedWaitError("a finalizer on the thread of a SharedHeap cannot wait for it")
        answers: list[Answer] = []
        errors: list[BaseException] = []
        is_done = Latch()

        def answer() -> None:
            try:
                answers.append(question())
            except BaseException as error:
                errors.append(error)
            is_done.open()

        self.tell(answer)
        while not is_done.wait(ALIVE_S):
            if self._has_ended.is_open and not is_done.is_open:
                raise ClosedError("this SharedHeap is closed")
        if errors:
            raise errors.pop()
        return answers.pop()

    def tell(self, change: Callable[[], object]) -> None:
        """Let the thread make a call, and do not wait; also for finalizers."""
        self._questions.put(change)
        if not self._has_ended.is_open:
            with suppress_own(OSError):  # full: it is awake anyway
                os.write(self._wake_write, b"\0")

    def stop(self, timeout_s: float | None) -> bool:
        """Answer what was asked so far, and end; returns whether it has ended in time."""
        self.is_open = False
        self._is_stopping = True
        self.tell(_nothing)
        if threading.current_thread() is self._thread:
            raise NestedWaitError("a finalizer on the thread of a SharedHeap cannot wait for it")
        if not self._has_ended.wait(timeout_s):
            return False
        self._thread.join()  # it has nothing left to do
        return True

    def start_over_after_fork(self) -> None:
        """Close what a forked child has inherited; the thread is the parent's."""
        self.is_open = False
        self._has_ended.open()
        self._selector.close()  # but take nothing out of it: it is the parent's too
        self._listener.close()
        for connection in self._connections:
            connection.socket.close()
        self._close_wake()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                is_looking = self._keeper.has_waiting or self._paused_until_s is not None
                timeout_s = LOOK_S if is_looking else None
                for key, events in self._selector.select(timeout_s):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data is not None:
                        self._serve(key.data, events)
                    else:
                        with suppress(BlockingIOError):
                            os.read(self._wake_read, WAKE_BYTES)
                self._answer_questions()
                self.on_turn()
                self._keeper.free_waiting()
                self._accept_again()
                if self._is_stopping:
                    break
        except BaseException:
            LOGGER.exception("the thread of a SharedHeap has failed")
        finally:
            self.is_open = False
            self._end()

    def _answer_questions(self) -> None:
        while True:
            try:
                question = self._questions.get_nowait()
            except Empty:
                return
            self.on_turn()
            try:
                question()
            except Exception:
                LOGGER.exception("a call of a SharedHeap has failed")
            del question  # it may keep memory alive

    def _end(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()
        self._listener.close()
        self._has_ended.open()
        self._answer_questions()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor or no memory is left; who is connected goes on
            LOGGER.warning("a process that stores in a SharedHeap has to wait: %s", error)
            self._selector.unregister(self._listener)
            self._paused_until_s = time.monotonic() + PAUSE_S
            return
        with suppress(ConnectionError):
            peer.setblocking(False)
            found = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            uid = CREDENTIALS.unpack(found)[1]
            if uid not in (0, os.getuid()) or len(self._connections) >= MAX_WRITERS:
                peer.close()
                return
            connection = _Connection(peer)
            self._connections.add(connection)
            self._selector.register(peer, selectors.EVENT_READ, connection)
            self._keeper.note_writers(len(self._connections))

    def _accept_again(self) -> None:
        if self._paused_until_s is not None and time.monotonic() >= self._paused_until_s:
            self._paused_until_s = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._send(connection)
            elif not self._receive(connection):
                self._drop(connection)
                return
            self._reply(connection)
        except (ConnectionError, ValueError) as error:
            if isinstance(error, ValueError):
                LOGGER.warning("a process that stores in a SharedHeap was refused: %s", error)
            self._drop(connection)
        except Exception:  # such as a lack of memory: the others go on
            LOGGER.exception("a process that stores in a SharedHeap cannot be served")
            self._drop(connection)

    def _receive(self, connection: _Connection) -> bool:
        """Whether the other end is there."""
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return True
        connection.received += data
        return bool(data)

    def _reply(self, connection: _Connection) -> None:
        """Answer what has arrived, one after another: who does not read is not answered."""
        received = connection.received
        while not connection.to_send and len(received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received)
            if not 0 < length <= MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes")
            if len(received) < LENGTH.size + length:
                break
            message = bytes(received[LENGTH.size : LENGTH.size + length])
            del received[: LENGTH.size + length]
            connection.to_send = self._answer(connection, message[0], message[1:])
            self._send(connection)

    def _send(self, connection: _Connection) -> None:
        with suppress(BlockingIOError):
            sent = connection.socket.send(connection.to_send)
            connection.to_send = connection.to_send[sent:]
        is_late = bool(connection.to_send)
        if is_late != connection.is_late:
            connection.is_late = is_late
            wanted = selectors.EVENT_WRITE if is_late else selectors.EVENT_READ
            self._selector.modify(connection.socket, wanted, connection)

    def _answer(self, connection: _Connection, kind: int, body: bytes) -> bytes:
        keeper = self._keeper
        try:
            if not self.is_open:
                return framed(Kind.CLOSING, b"")
            if kind == Kind.BEGIN:
                done = encode_ticket(keeper.begin(connection, decode_keys(body)))
            elif kind == Kind.PUBLISH:
                number, filled = decode_filled(body)
                done = LENGTH.pack(keeper.publish(connection, number, filled))
            elif kind == Kind.ABORT:
                keeper.abort(connection, decode_filled(body)[0])
                done = b""
            elif kind == Kind.REMOVE:
                done = encode_keys(keeper.remove(decode_keys(body)))
            elif kind == Kind.REPORT:
                found = decode_filled(body)[1][0]
                content = self._content_of(found.place)
                done = bytes([keeper.drop_damaged(found.place, found.digest, content)])
            else:
                raise ValueError(f"kind {kind} of a message is not known")
        except (ValueError, IndexError) as error:
            return framed(Kind.FAILED, str(error).encode())
        except Exception as error:
            LOGGER.exception("a call of another process has failed")
            return framed(Kind.FAILED, repr(error).encode())
        return framed(Kind.DONE, done)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            with suppress(KeyError, ValueError):
                self._selector.unregister(connection.socket)
            connection.socket.close()
            self._keeper.abort_all(connection)
            self._keeper.note_writers(len(self._connections))


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _nothing() -> None:
    pass
