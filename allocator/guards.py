"""``Guard``: a lock under which foreign code may run without harm.

While a thread holds a lock, code that is not kvheap's can run on that thread: the garbage collector
calls finalizers and weak-reference callbacks at an allocation, and the interpreter calls signal
handlers between bytecodes. Such code may call kvheap again. If it waited for the lock that its own
thread holds, it would wait for ever; if it waited for the lock of another heap, whose holder waits
for this one in the same way, so would both.

Therefore kvheap holds its locks only inside *sections*: short functions, marked with
:func:`section`, that change one object's state and call nothing of the user's. A thread that is
inside a section waits for no lock. What it asks for meanwhile is put off (a change, see
:class:`Deferred`), refused (an allocation), or answered from the state of the last finished
operation (a statistic).

A section has this form, in which the lock is the only context manager::

    @section
    def change(self):
        guard = self.guard
        if guard.busy and is_inside_section():
            ...  # put off, refuse, or answer
        with guard.lock:
            guard.busy = True
            ...
            guard.busy = False

Nothing follows the ``with`` statement but a ``return``. ``busy`` is a hint, so that the stack is
searched for sections only if somebody is inside one. An exception may leave it set, which costs the
next operation that search and nothing else. It is read right before the lock is taken, and set
right after: CPython switches threads and calls signal handlers at neither place. So no two threads
inside sections ever wait for each other: the last one to look finds the other one's ``busy`` set.

Exceptions from signal handlers strike inside sections too. What they leave unfinished is recorded
by the object that the guard belongs to, and finished by the next section.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from opcode import opmap
from types import CodeType, FrameType
from typing import TypeVar

from kvheap.errors import ClosedError, InvalidFreeError, LifetimeError
from kvheap.forks import starts_over_after_fork

__all__ = ["Deferred", "DeferredCall", "Guard", "is_inside_section", "read_meanwhile", "section"]

LOGGER = logging.getLogger("kvheap")

MAX_READS = 1000
"""How often to read what other threads change."""

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., object])

_sections: dict[CodeType, int | None] = {}
"""The code of all sections, with the offset at which each takes its lock, once that is known."""

ENTERS_WITH = {
    opmap[name] for name in ("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL") if name in opmap
}
"""The instruction that enters a ``with`` statement in CPython 3.10, 3.11 to 3.13, and 3.14."""


def section(function: Function) -> Function:
    """Mark a function that holds a lock; returns the function itself."""
    _sections[function.__code__] = None
    return function


def is_inside_section() -> bool:
    """Whether a function further up the stack than the caller is inside a section. O(stack).

    True as well while the interpreter exits: a thread that it has stopped may hold the lock.
    """
    if sys.is_finalizing():
        return True
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code in _sections and frame.f_lasti > _offset_of_lock(code):
            return True
        frame = frame.f_back
    return False


def _offset_of_lock(code: CodeType) -> int:
    """The offset of the instruction at which a section takes its lock."""
    offset = _sections[code]
    if offset is None:
        opcodes = code.co_code[::2]  # each instruction has two bytes
        _sections[code] = offset = 2 * min(map(opcodes.index, ENTERS_WITH & set(opcodes)))
    return offset


class Guard:
    """The lock of one object's sections, and whether a thread is inside one.

    Attributes:
        lock: to be held in a ``with`` statement only: an exception between ``acquire()`` and the
            next statement would keep it locked. Reentrant, for foreign code that runs before
            ``busy`` is set.
        busy: whether a thread is, or was when an exception struck, inside a section.
    """

    __slots__ = ("__weakref__", "busy", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.busy = False
        starts_over_after_fork(self)

    def start_over_after_fork(self) -> None:
        """Replace the lock in a forked child; the next section finishes what was under way."""
        self.lock = threading.RLock()


def read_meanwhile(read: Callable[[], Result]) -> Result:
    """Read what other threads change: again, as long as a dict has changed while it was read.

    Raises:
        RuntimeError: it changed every time.
    """
    for _ in range(MAX_READS):
        with suppress(RuntimeError):
            return read()
    return read()


class DeferredCall:
    """A call that was put off.

    Args:
        function: what to call, with this object. If the call was interrupted, it is made again;
            the second time must change nothing that the first has changed, or find ``was_made``.

    Attributes:
        was_made: set by ``function`` in the same step as its change.
    """

    __slots__ = ("_function", "_was_begun", "was_made")

    def __init__(self, function: Callable[[DeferredCall], object]) -> None:
        self._function = function
        self._was_begun = False
        self.was_made = False

    def __call__(self) -> None:
        """Make the call. Its own errors are logged: its caller is gone."""
        was_begun, self._was_begun = self._was_begun, True
        try:
            self._function(self)
        except (InvalidFreeError, LifetimeError, ClosedError):
            self.was_made = True
            if was_begun:  # it was interrupted, and had freed the block before
                return
            LOGGER.exception(
                "a call from a finalizer or a signal handler, made while its thread was inside an "
                "operation and therefore put off, has failed"
            )


class Deferred(deque[DeferredCall]):
    """Calls that were put off because their thread was inside a section, in order.

    The next operation makes them before it begins, one after another, on one thread. A call leaves
    the queue once it was made, so an exception that strikes meanwhile loses none.
    """

    __slots__ = ("_guard", "_runs_in")

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard
        self._runs_in = 0  # the process in which a thread is making the calls; a fork ends that

    def add(self, function: Callable[[DeferredCall], object]) -> None:
        """Put a call off. Takes no lock."""
        self.append(DeferredCall(function))

    def run(self) -> None:
        """Make all calls; nothing inside a section, or while they are being made."""
        if self._guard.busy and is_inside_section():
            return
        process = os.getpid()
        if self._runs_in == process:
            return
        try:
            self._runs_in = process
            while self:
                call = self[0]
                if not call.was_made:
                    call()
                self.popleft()
        finally:
            self._runs_in = 0
