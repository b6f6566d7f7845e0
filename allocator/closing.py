"""``Closer``: how something ends that has threads, locks or registered memory.

The classes that use one make the same promise:

- ``close()`` may be repeated, and made by several threads at once. Each call returns when the end
  is complete, or raises ``TimeoutError`` after its own time; it can then be made again.
- From the first ``close()`` on, everything else is refused by name with ``ClosedError``: also
  ``with``, and also after a ``close()`` that ran out of time.
- Finalizers and signal handlers may close. Inside a ``close()`` of their own thread they return at
  once, and that one goes on. On a thread of the object itself, or inside a call that the end waits
  for, they get ``NestedWaitError``: a later ``close()`` elsewhere completes the end.
- In a forked child nothing is closed, and everything is refused with the parent's process id.
- At the end of the program, what is open is closed, the last one opened first, each for a limited
  time. That includes processes that ``multiprocessing`` has forked, which run no ``atexit``.

>>> class Tap:
...     def __init__(self):
...         self._closer = Closer(self, exit_s=1.0)
...     def close(self, timeout_s=None):
...         self._closer.close(timeout_s, wait=lambda seconds: None, release=lambda: print("shut"))
...     def __repr__(self):
...         return "Tap()"
>>> tap = Tap()
>>> tap.close(), tap.close()
shut
(None, None)
>>> tap._closer.require_open()
Traceback (most recent call last):
...
kvheap.errors.ClosedError: Tap() is closed
"""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.util import Finalize
from typing import Protocol

from kvheap.addresses.arguments import as_seconds
from kvheap.claims import Claim
from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import ClosedError
from kvheap.forks import starts_over_after_fork
from kvheap.kernels.latch import Latch

__all__ = ["Closable", "Closer", "NestedWaitError", "never_opened"]

LOGGER = logging.getLogger("kvheap")

LOOK_S = 0.05
"""Seconds between two looks at whether another thread goes on closing."""

EXIT_PRIORITY = 100
"""Among the finalizers of ``multiprocessing``: those with a priority run before its own end."""

_numbers = itertools.count()

_kept: dict[int, Closable] = {}
"""What must not be dropped before it is closed."""

_closers: weakref.WeakSet[Closer] = weakref.WeakSet()


class Closable(Protocol):
    """What has an end."""

    def close(self, timeout_s: float | None = None) -> None:
        """End it."""


class _Closing:
    """One call that closes."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Closer:
    """Whether one object is open, and its end.

    To be made when the object is complete: from then on, the end of the program closes it.

    Args:
        owner: the object. Not kept alive by the closer.
        exit_s: seconds that the end of the program waits for it.
        in_child: what a forked child is told that uses it.
        is_kept: whether the object stays, also when nobody else has it, until it is closed: for one
            whose threads go on.
        give_up: called if the end of the program could not close it, so that what still uses its
            memory does no harm.

    Attributes:
        is_closing: whether ``close`` was called.
        is_foreign: whether it belongs to the process that this one was forked from.
    """

    def __init__(
        self,
        owner: Closable,
        *,
        exit_s: float,
        in_child: str = "a forked child cannot use it",
        is_kept: bool = True,
        give_up: Callable[[], object] | None = None,
    ) -> None:
        self._owner = weakref.ref(owner)
        self._exit_s = exit_s
        self._in_child = in_child
        self._give_up = give_up
        self._pid = os.getpid()
        self._number = next(_numbers)
        self._claim = Claim()
        self._has_ended = Latch()
        self.is_closing = self.is_foreign = False
        starts_over_after_fork(self)
        if is_kept:
            _kept[self._number] = owner
        _closers.add(self)
        _close_with_this_process(self._pid)

    @property
    def has_ended(self) -> bool:
        """Whether a ``close`` has completed the end."""
        return self._has_ended.is_open

    def require_open(self) -> None:
        """Raise unless the object can be used. O(1).

        Raises:
            ClosedError: it is closed, or belongs to the parent of this process.
        """
        if self.is_closing or self.is_foreign:
            raise self.closed_error()

    def closed_error(self) -> ClosedError:
        """What is raised if the object is not open."""
        owner = self._owner()
        if self.is_foreign:
            return ClosedError(f"{owner!r} belongs to process {self._pid}: {self._in_child}")
        return ClosedError(f"{owner!r} is closed")

    def close(
        self,
        timeout_s: float | None,
        *,
        wait: Callable[[float | None], object],
        release: Callable[[], object],
    ) -> None:
        """End the object, unless it has ended, or is a forked child's.

        Args:
            timeout_s: the most seconds to wait; None: no limit.
            wait: waits for what is under way, for so many seconds; each call that closes makes it.
                Raises ``TimeoutError`` or ``NestedWaitError`` if it has to go on.
            release: gives up what the object has; made by one call at a time. If it raises, the
                next ``close`` makes it again.

        Raises:
            TypeError, ValueError: ``timeout_s`` is no number of seconds; nothing changes.
            TimeoutError: the end is not complete in time; a later call can wait for it.
            NestedWaitError: on this thread it cannot be waited for.
        """
        if timeout_s is not None:
            timeout_s = as_seconds("timeout_s", timeout_s)
        if self.is_foreign or self.has_ended:
            return
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self.is_closing = True
        if self._is_inside():
            return
        wait(timeout_s)
        me = _Closing()
        while not self.has_ended:
            try:
                if self._claim.take(me):
                    if not self.has_ended:
                        release()
                        self._end()
                    return
            finally:
                self._claim.give_up(me)
            left_s = LOOK_S if end_s is None else end_s - time.monotonic()
            if not self._has_ended.wait(min(left_s, LOOK_S)) and left_s <= 0:
                raise TimeoutError(
                    f"another thread has not closed {self._owner()!r} in {timeout_s:g} s: close it "
                    f"again later"
                )

    def _is_inside(self) -> bool:
        """Whether this thread is releasing the object already, further up the stack."""
        holder = self._claim.holder
        return isinstance(holder, _Closing) and holder.thread == threading.get_ident()

    def _end(self) -> None:
        self._has_ended.open()
        _kept.pop(self._number, None)

    def close_at_exit(self) -> None:
        """End the object with the program."""
        owner = self._owner()
        if owner is None or self.is_foreign or self.has_ended:
            return
        try:
            owner.close(self._exit_s)
        except BaseException as error:  # also of an impatient user: the others end all the same
            LOGGER.warning("at the end of the program: %s", error)
            if self._give_up is not None:
                self._give_up()

    @property
    def number(self) -> int:
        """Which one of this process it is."""
        return self._number

    def is_of(self, owner: object) -> bool:
        """Whether it ends this object."""
        return self._owner() is owner

    def forget(self) -> None:
        """Take the object for closed: it was never opened."""
        self.is_closing = True
        self._end()

    def start_over_after_fork(self) -> None:
        """Leave the object to the parent, in a forked child."""
        self.is_foreign = not self.has_ended


def never_opened(owner: Closable) -> None:
    """Forget an object whose constructor was interrupted, and that has given up what it had."""
    for closer in [*_closers]:
        if closer.is_of(owner):
            closer.forget()
    for number, kept in [*_kept.items()]:  # the closer itself may have been lost
        if kept is owner:
            del _kept[number]


@atexit.register
def _close_all() -> None:
    for closer in sorted(_closers, key=_number_of, reverse=True):
        closer.close_at_exit()


def _number_of(closer: Closer) -> int:
    return closer.number


@lru_cache(1)
def _close_with_this_process(pid: int) -> None:
    """Also in a process that multiprocessing has forked; once in each."""
    if multiprocessing.parent_process() is not None:
        Finalize(None, _close_all, exitpriority=EXIT_PRIORITY)
