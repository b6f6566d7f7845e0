"""``Turn``: which thread may change what the reader knows, and call NIXL.

The reader's thread waits for its turn. Other threads take it only if it is free, for a moment: to
begin a small read, or to look at one that they wait for. So nobody waits for them but the reader,
and nobody waits for a large read that NIXL moves in one call.

A signal handler or a finalizer may strike while its thread has the turn, and wait for another read:
it shares the turn then (:meth:`share`), as the code below it goes on only after it.
"""

from __future__ import annotations

import threading
import time

from kvheap.claims import Claim

__all__ = ["Turn"]

PAUSE_S = 20e-6
"""Seconds between two attempts of the reader."""

PATIENCE_S = 100e-6
"""Seconds that a thread waits for the turn, rather than for the reader to do its work."""


class Turn:
    """A right that one thread has at a time.

    Each holder is a list of the thread's number, made by :meth:`holder` and given to the others.
    """

    __slots__ = ("_claim", "_is_wanted")

    def __init__(self) -> None:
        self._claim = Claim()
        self._is_wanted = False

    @staticmethod
    def holder() -> list[int]:
        """A holder for the calling thread, which has not got the turn yet."""
        return [threading.get_ident()]

    def take(self, me: list[int]) -> bool:
        """Take the turn, if it is free and the reader does not wait; whether ``me`` has it."""
        return not self._is_wanted and self._claim.take(me)

    def take_soon(self, me: list[int]) -> bool:
        """As :meth:`take`, and waits for a moment if the turn is not free."""
        if self.take(me):
            return True
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(0)
            if self.take(me):
                return True
        return False

    def share(self, me: list[int]) -> bool:
        """As :meth:`take`, or true if the code below on this thread has the turn."""
        holder = self._claim.holder
        if isinstance(holder, list) and holder == me:
            return True
        return self.take(me)

    def wait(self, me: list[int]) -> None:
        """Take the turn, once whoever has it is done; for the reader's thread."""
        self._is_wanted = True
        while not self._claim.take(me):
            time.sleep(PAUSE_S)
        self._is_wanted = False

    def give_up(self, me: list[int]) -> None:
        """Give the turn up; changes nothing unless ``me`` has it."""
        self._claim.give_up(me)
