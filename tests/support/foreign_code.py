"""Foreign code at any place of a call: what a finalizer or a signal handler does there.

The garbage collector runs finalizers, and CPython runs signal handlers, only where the interpreter
looks at its ``eval_breaker``: after calls, at the start of functions and at backward jumps
(``Python/ceval.c``), so also between a call's return and the assignment of its result. The tests
run a call at each of these places in turn, or let it raise there. With ``everywhere`` they do so
before each bytecode; only where a ``with`` statement releases its lock, it waits for the next one,
since no code could survive that.
"""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

CHECKED = ("CALL", "RESUME", "JUMP_BACKWARD")
"""Bytecodes after which CPython looks for signals; prefixes of their names."""


class Foreign:
    """Runs ``call`` at the N-th place of the code under test where foreign code could run.

    Args:
        number: of the place, from zero.
        call: the foreign code.
        modules: prefixes of the modules whose places count.
        but_not_inside: prefixes of modules; a place that is reached through one does not count.
        function: the name of a test's function whose places count, too.
        everywhere: whether every bytecode is a place.
    """

    def __init__(
        self,
        number: int,
        call: Callable[[], object],
        modules: tuple[str, ...] = ("kvheap.",),
        but_not_inside: tuple[str, ...] = (),
        function: str = "",
        everywhere: bool = False,
    ) -> None:
        self.left = number
        self.call = call
        self.modules = modules
        self.but_not_inside = but_not_inside
        self.function = function
        self.everywhere = everywhere
        self._last: dict[FrameType, int] = {}  # the opcode that each frame ran last

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        is_ours = frame.f_globals.get("__name__", "").startswith(self.modules)
        if not is_ours and frame.f_code.co_name != self.function:
            return None
        frame.f_trace_opcodes = True
        return self._at_opcode

    def _at_opcode(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_code.co_code[frame.f_lasti]
            if self.everywhere:
                is_place = frame.f_lasti not in _exits_of(frame.f_code)
            else:
                is_place = last is not None and dis.opname[last].startswith(CHECKED)
            if is_place and not self._is_inside(frame):
                self.left -= 1
                if self.left < 0:
                    sys.settrace(None)
                    self._last.clear()  # frames keep what they hold alive
                    self.call()
                    return None
        elif event == "return":
            self._last.pop(frame, None)
        return self._at_opcode

    def _is_inside(self, frame: FrameType | None) -> bool:
        while frame is not None and self.but_not_inside:
            if frame.f_globals.get("__name__", "").startswith(self.but_not_inside):
                return True
            frame = frame.f_back
        return False

    def strikes(self, task: Callable[[], object]) -> bool:
        """Run ``task``; whether the foreign code ran in it. False if it has fewer places."""
        sys.settrace(self)
        try:
            task()
        finally:
            sys.settrace(None)
        return self.left < 0


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt."""


class TimeOutError(Exception):
    """Stands for a time-out that a signal handler raises."""


def interrupts(
    number: int,
    task: Callable[[], object],
    error: type[BaseException] = Interrupted,
    **options: Any,
) -> bool:
    """Whether ``task`` was interrupted at the N-th place; False if it has fewer places."""

    def interrupt() -> None:
        raise error

    foreign = Foreign(number, interrupt, **options)
    try:
        foreign.strikes(task)
    except error:
        return True
    return foreign.left < 0


_exits: dict[CodeType, frozenset[int]] = {}


def _exits_of(code: CodeType) -> frozenset[int]:
    """Offsets of the bytecodes with which ``with`` statements call ``__exit__``.

    A ``with`` statement ends with ``__exit__(None, None, None)``: three times LOAD_CONST None and a
    call, which no exception handler covers.
    """
    found = _exits.get(code)
    if found is None:
        offsets: set[int] = set()
        window: list[dis.Instruction] = []
        for each in dis.get_instructions(code):
            window = [*window, each][-5:]
            nones = [i for i in window if i.opname == "LOAD_CONST" and i.argval is None]
            if each.opname.startswith(("CALL", "PRECALL")) and len(nones) >= 3:
                offsets |= {i.offset for i in window}
        _exits[code] = found = frozenset(offsets)
    return found


@contextmanager
def no_deadlock(seconds: float = 30.0) -> Iterator[None]:
    """Fail instead of hanging; for the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"a deadlock: nothing has happened in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
