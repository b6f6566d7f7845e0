"""``Turn``: one call at a time changes an index or a store, whatever runs in the middle of it.

A finalizer, a signal handler, a key's ``__eq__`` or a policy can call the index in the middle of
another call on the same thread, and a finalizer on any thread at any time. A change that has begun
must end first. So a call takes its turn, and a call that does not get it

- waits, if another thread has the turn, which is short, but not for ever;
- raises :class:`BusyError`, if its own thread has it: it could wait for ever;
- leaves its work to the holder, if the call ends a hold or a store. Finalizers make such calls.

Calls that only look never take a turn.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from types import FrameType

from kvheap.forks import starts_over_after_fork
from kvheap.guards import is_inside_section
from kvheap.interrupts import is_interrupt

__all__ = ["BusyError", "Turn"]

LOGGER = logging.getLogger("kvheap")

WAIT_S = 10.0
"""Seconds to wait for another thread's call."""

PAUSE_S = 50e-6
"""Seconds between two looks at whether it has ended."""

HOLDER = 0


class BusyError(RuntimeError):
    """A call was made in the middle of another call of the same index or store; nothing changed.

    By a finalizer, a signal handler, or another callback. Calls that look, and those that end holds
    and stores, are possible there.
    """


class Turn:
    """Who may change an index or a store now. The holder is the frame of a call.

    A call begins with ``turn.begin(sys._getframe())`` and ends with ``turn.state = {}``, or if it
    fails with ``turn.give_up(sys._getframe())``; no local variable may refer to the frame, which
    would then refer to itself. The assignment is one bytecode, and no signal handler runs between
    it and the ``return`` behind it. So a call can hand over its result and end its turn at once. If
    an exception leaves the turn with a frame that does not run any more, the next call takes it.

    Args:
        name: of whose turn it is, for messages.

    Attributes:
        state: the holder's frame under ``HOLDER``; empty if it is nobody's turn.
        waiting: work that was left to the holder.
    """

    __slots__ = ("__weakref__", "_name", "state", "waiting")

    def __init__(self, name: str) -> None:
        self.state: dict[int, FrameType] = {}
        self._name = name
        self.waiting: deque[Callable[[], object]] = deque()
        starts_over_after_fork(self)

    def start_over_after_fork(self) -> None:
        """End the turn of a thread that does not exist in a forked child."""
        holder = self.state.get(HOLDER)
        if holder is not None and not _is_on_stack(holder):
            self.state = {}

    def begin(self, frame: FrameType) -> None:
        """Take the turn for the call in ``frame``.

        Raises:
            BusyError: a call further up on this thread has the turn; or another thread has had it
                for ``WAIT_S`` seconds.
        """
        if self.state.setdefault(HOLDER, frame) is not frame:
            self._wait(frame)

    def try_begin(self, frame: FrameType) -> bool:
        """Take the turn if nobody has it; returns whether ``frame`` has it now."""
        if self.state.setdefault(HOLDER, frame) is not frame:
            self._take_from_the_dead()
            if self.state.setdefault(HOLDER, frame) is not frame:
                return False
        return True

    def give_up(self, frame: FrameType) -> None:
        """End the turn, if ``frame`` has it."""
        if self.state.get(HOLDER) is frame:
            self.state = {}

    def leave(self, work: Callable[[], object]) -> None:
        """Leave work to whoever has the turn, or has it next.

        It may be done twice, if an exception interrupts it: the second time must change nothing.
        """
        self.waiting.append(work)

    def _wait(self, frame: FrameType) -> None:
        deadline = time.monotonic() + WAIT_S
        while True:
            self._take_from_the_dead()
            holder = self.state.setdefault(HOLDER, frame)
            if holder is frame:
                return
            if _is_on_stack(holder):
                raise BusyError(
                    f"this {self._name} is in the middle of another call, which made this one: by "
                    f"a finalizer, a signal handler or a callback. There, only look at it, or end "
                    f"holds and stores"
                )
            if is_inside_section():
                raise BusyError(
                    f"another thread is in the middle of a call of this {self._name}: a finalizer "
                    f"or a signal handler inside an operation of a heap cannot wait for it"
                )
            if time.monotonic() > deadline:
                raise BusyError(
                    f"another thread has been in the middle of a call of this {self._name} for "
                    f"{WAIT_S:g} s"
                )
            time.sleep(PAUSE_S)

    def _take_from_the_dead(self) -> None:
        """End the turn of a call that an exception has ended."""
        state = self.state
        holder = state.get(HOLDER)
        if holder is None or _is_on_stack(holder):
            return
        try:
            holder.clear()
        except RuntimeError:  # it runs, on another thread
            return
        found = state.pop(HOLDER, None)
        if found is not None and found is not holder:  # another call was faster
            state[HOLDER] = found

    def do_what_waits(self) -> None:
        """Do the work that was left to the holder, who calls this."""
        while self.waiting:
            work = self.waiting[0]
            try:
                work()
            except Exception as error:
                if is_interrupt(error):
                    raise
                # Who left it is gone; the same error would meet everybody who comes after.
                LOGGER.exception("a call that waited for its turn failed")
            self.waiting.popleft()


def _is_on_stack(frame: FrameType) -> bool:
    """Whether a frame is one of this thread's callers."""
    found: FrameType | None = sys._getframe(1)
    while found is not None and found is not frame:
        found = found.f_back
    return found is frame
