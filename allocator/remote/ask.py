"""``AskLine``: requests to a peer that the caller waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvheap.device.host_queue import NestedWaitError
from kvheap.forks import starts_over_after_fork
from kvheap.interrupts import is_interrupt
from kvheap.remote.deadlines import Deadline
from kvheap.remote.errors import PeerError, PeerGoneError, PeerTimeoutError, ProtocolError
from kvheap.remote.handshake import call
from kvheap.remote.line import Line
from kvheap.remote.messages import Fields, packed, unpacked
from kvheap.remote.turn import Turn, Visit

__all__ = ["AskLine"]

HANGING_UP_S = 0.7
"""Seconds for which a peer that hangs up on whoever connects is tried again."""

AGAIN_S = 0.01
"""Seconds between two attempts."""


class _OthersAskError(Exception):
    """Others have had the connection for all the time that there was."""


class AskLine:
    """A control connection for one request at a time, made anew when it breaks.

    Args:
        line: connected.
        address: host and port.
        key: of the first frames.
        name: of this node.
        peer: the peer's name.
        uuid: of the peer's life.
    """

    def __init__(
        self, line: Line, address: tuple[str, int], key: bytes, name: str, peer: str, uuid: str
    ) -> None:
        self._line: Line | None = line
        self._address = address
        self._key = key
        self._name = name
        self._peer = peer
        self._uuid = uuid
        self._number = 0
        self._turn = Turn()
        starts_over_after_fork(self)

    def start_over_after_fork(self) -> None:
        """Close this process's copy of the socket, in a forked child."""
        self._turn = Turn()
        self.close()

    def ask(
        self,
        kind: str,
        timeout_s: float,
        again: Callable[[], dict[str, Any]] = dict,
        **fields: Any,
    ) -> Fields:
        """The answer to a request.

        Args:
            kind: of the request.
            timeout_s: for everything.
            again: called if the connection broke, before the request is made anew on another one:
                it may have been carried out. Returns the fields that change.
            fields: of the request.

        Raises:
            PeerTimeoutError: it has not come in time.
            NestedWaitError: the code below, on this thread, waits for an answer.
            PeerGoneError: the peer's process has ended, or its node was closed.
            PeerError: the peer could not answer; the message says why.
            ProtocolError: what came is no answer.
            ConnectionError: the connection broke, and no new one could be made.
        """
        deadline = Deadline(timeout_s)
        if self._turn.is_here:
            raise NestedWaitError(
                f"a finalizer or signal handler cannot ask peer {self._peer!r} in the middle of "
                f"another question"
            )
        visit = Visit()
        try:
            answer = self._ask_in_turn(visit, deadline, again, dict(kind=kind, **fields))
        except _OthersAskError:
            raise PeerTimeoutError(
                f"peer {self._peer!r}: others have asked it for {timeout_s:g} s"
            ) from None
        except (PeerTimeoutError, TimeoutError) as error:
            self.close()
            if is_interrupt(error):
                raise
            raise PeerTimeoutError(
                f"peer {self._peer!r} has not answered in {timeout_s:g} s"
            ) from None
        except ProtocolError as error:
            self.close()
            raise type(error)(f"peer {self._peer!r}: {error}") from None
        except BaseException:
            if visit.has_turn:
                self.close()  # an answer may still be on its way
            raise
        finally:
            self._turn.free.extend(visit.back)
        if "error" in answer:
            wrong = PeerGoneError if "gone" in answer else PeerError
            raise wrong(f"peer {self._peer!r}: {answer.text('error')}")
        return answer

    def _ask_in_turn(
        self,
        visit: Visit,
        deadline: Deadline,
        again: Callable[[], dict[str, Any]],
        fields: dict[str, Any],
    ) -> Fields:
        if not self._turn.take_before(visit, deadline):
            raise _OthersAskError
        return self._ask(deadline, again, fields)

    def _ask(
        self, deadline: Deadline, again: Callable[[], dict[str, Any]], fields: dict[str, Any]
    ) -> Fields:
        self._number += 1
        fields["number"] = self._number
        if self._line is not None:
            try:
                return self._exchange(self._line, packed(**fields), deadline)
            except (ProtocolError, TimeoutError):
                raise
            except OSError as error:
                if is_interrupt(error):
                    raise
                self.close()
            fields.update(again())
        self._line = self._connected(deadline)
        return self._exchange(self._line, packed(**fields), deadline)

    def _exchange(self, line: Line, payload: bytes, deadline: Deadline) -> Fields:
        line.send(payload, deadline)
        answer = unpacked(line.receive(deadline))
        if answer.integer("number") != self._number:
            raise ProtocolError("an answer belongs to another request")
        return answer

    def _connected(self, deadline: Deadline) -> Line:
        again_until = Deadline(HANGING_UP_S)
        while True:
            try:
                return self._connected_once(deadline)
            except (ConnectionResetError, BrokenPipeError, ConnectionAbortedError) as error:
                if again_until.has_passed or deadline.has_passed:
                    raise ConnectionError(
                        f"peer {self._peer!r} cannot be reached: {error}"
                    ) from error
            # A process that ends closes its sockets one after another, the listening one last.
            time.sleep(AGAIN_S)

    def _connected_once(self, deadline: Deadline) -> Line:
        where = f"{self._address[0]}:{self._address[1]}"
        try:
            line, welcome = call(self._address, self._key, self._name, deadline.left_s)
        except ConnectionRefusedError:
            raise PeerGoneError(
                f"peer {self._peer!r} is gone: nobody listens at {where} any more"
            ) from None
        except (ProtocolError, TimeoutError, ConnectionError):
            raise
        except OSError as error:
            if is_interrupt(error):
                raise
            raise ConnectionError(f"peer {self._peer!r} cannot be reached: {error}") from error
        if welcome.uuid != self._uuid:
            line.close()
            raise PeerGoneError(
                f"peer {self._peer!r} is gone: another node, {welcome.name!r}, listens at {where}"
            )
        return line

    def close(self) -> None:
        """Close the connection; may be repeated."""
        line, self._line = self._line, None
        if line is not None:
            line.close()
