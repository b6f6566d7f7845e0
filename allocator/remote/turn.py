"""``Turn``: a right that one thread has at a time, and that no interrupt leaves taken.

Above all: which thread may change what the reader knows, and call NIXL. The reader's thread waits
for its turn. Other threads take it only if it is free, for a moment: to begin a small read, or to
look at one that they wait for. So nobody waits for them but the reader, and nobody waits for a
large read that NIXL moves in one call.

A signal handler or a finalizer may strike while its thread has the turn, and wait for another read:
it shares the turn then (:meth:`Turn.share`), as the code below it goes on only after it.

>>> turn = Turn()
>>> visit = Visit()
>>> try:
...     if turn.take(visit):
...         pass  # the work
... finally:
...     turn.free.extend(visit.back)
>>> turn.is_free
True
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import starmap
from threading import get_ident

from kvheap.remote.deadlines import Deadline

__all__ = ["Turn", "Visit"]

PAUSE_S = 20e-6
MAX_PAUSE_S = 500e-6
"""Least and most seconds between two attempts of whoever waits."""

PATIENCE_S = 100e-6
"""Seconds that a thread waits for the turn, rather than for the reader to do its work."""

END = object()
TOKEN = object()


class Visit:
    """One attempt to have the turn, for the calling thread.

    Attributes:
        back: gives the token out, if the visit has it. Extend ``Turn.free`` by it, in a ``finally``
            and by nothing but that: it is one call in C, so that no exception of a signal handler
            can strike before it.
    """

    __slots__ = ("_bag", "back")

    def __init__(self) -> None:
        self._bag = [END]
        self.back: Iterator[object] = iter(self._bag.pop, END)

    @property
    def has_turn(self) -> bool:
        """Whether it has the turn."""
        return len(self._bag) > 1

    def take_from(self, free: list[object]) -> bool:
        """Take the token, if it is there; no exception strikes between there and here."""
        try:
            self._bag.extend(starmap(free.pop, [()]))
        except IndexError:
            return False
        return True


class Turn:
    """A right that one thread has at a time.

    Attributes:
        free: has the token, while nobody has the turn.
    """

    __slots__ = ("_is_wanted", "_visits", "free")

    def __init__(self) -> None:
        self.free: list[object] = [TOKEN]
        self._visits: dict[int, Visit] = {}
        self._is_wanted = False

    @property
    def is_free(self) -> bool:
        """Whether nobody has it."""
        return bool(self.free)

    @property
    def is_wanted(self) -> bool:
        """Whether the reader waits for it."""
        return self._is_wanted

    @property
    def is_here(self) -> bool:
        """Whether the code below, on this thread, has it."""
        below = self._visits.get(get_ident())
        return below is not None and below.has_turn

    def take(self, visit: Visit) -> bool:
        """Take the turn, if it is free and the reader does not wait; whether ``visit`` has it."""
        return not self._is_wanted and self._take(visit)

    def _take(self, visit: Visit) -> bool:
        free = self.free
        if not free:
            return False
        # Who else holds it is on another thread, since it is free, or has just been taken there.
        self._visits[get_ident()] = visit
        return visit.take_from(free)

    def take_soon(self, visit: Visit) -> bool:
        """As :meth:`take`, and waits for a moment if the turn is not free."""
        free = self.free
        if free and not self._is_wanted:  # as take(), without its steps: a small read counts them
            self._visits[get_ident()] = visit
            if visit.take_from(free):
                return True
        return not self.is_here and self._take_in_a_moment(visit)

    def _take_in_a_moment(self, visit: Visit) -> bool:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(0)
            if self.take(visit):
                return True
        return False

    def share(self, visit: Visit) -> bool:
        """As :meth:`take`, or true if the code below on this thread has the turn."""
        return self.is_here or self.take(visit)

    def wait(self, visit: Visit) -> None:
        """Take the turn, once whoever has it is done; for the reader's thread."""
        self._is_wanted = True
        self._take_before(visit, None)
        self._is_wanted = False

    def take_before(self, visit: Visit, deadline: Deadline) -> bool:
        """Take the turn in time, once whoever has it is done; whether ``visit`` has it."""
        return self._take_before(visit, deadline)

    def _take_before(self, visit: Visit, deadline: Deadline | None) -> bool:
        pause_s = PAUSE_S
        while not self._take(visit):
            if deadline is not None and deadline.has_passed:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        return True
