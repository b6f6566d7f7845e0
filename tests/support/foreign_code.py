"""Foreign code at any place of a call: what a finalizer or a signal handler does there.

The garbage collector runs finalizers, and CPython runs signal handlers, only where the interpreter
looks at its ``eval_breaker``: after calls, at the start of functions and at backward jumps. The
tests run a call at each of these places in turn.
"""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CHECKED = ("CALL", "RESUME", "JUMP_BACKWARD")


class Foreign:
    """Runs ``call`` at the N-th place of the code under test where foreign code could run.

    Args:
        number: of the place, from zero.
        call: the foreign code.
        modules: prefixes of the modules whose places count.
        but_not_inside: prefixes of modules; a place that is reached through one does not count.
    """

    def __init__(
        self,
        number: int,
        call: Callable[[], object],
        modules: tuple[str, ...] = ("kvheap.",),
        but_not_inside: tuple[str, ...] = (),
    ) -> None:
        self.left = number
        self.call = call
        self.modules = modules
        self.but_not_inside = but_not_inside
        self._last: dict[FrameType, int] = {}  # the opcode that each frame ran last

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_globals.get("__name__", "").startswith(self.modules):
            return None
        frame.f_trace_opcodes = True
        return self._at_opcode

    def _at_opcode(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_code.co_code[frame.f_lasti]
            is_place = last is not None and dis.opname[last].startswith(CHECKED)
            if is_place and not self._is_inside(frame):
                self.left -= 1
                if self.left < 0:
                    sys.settrace(None)
                    self._last.clear()
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


def raise_interrupted() -> None:
    raise Interrupted


def interrupts(number: int, task: Callable[[], object], **options: Any) -> bool:
    """Whether ``task`` was interrupted at the N-th place; False if it has fewer places."""
    foreign = Foreign(number, raise_interrupted, **options)
    try:
        foreign.strikes(task)
    except Interrupted:
        return True
    return foreign.left < 0


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
