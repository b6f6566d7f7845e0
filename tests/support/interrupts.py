"""Raises an exception at a chosen place of an operation, as a signal handler may.

CPython runs signal handlers only after calls, at the start of functions and at backward jumps
(``eval_breaker`` in ``Python/ceval.c``): also between a call's return and the assignment of its
result. :class:`Interrupt` raises at the N-th of these places in kvheap's code. With
``everywhere``, it raises before the N-th bytecode, whatever it is; only where a ``with`` statement
releases its lock, it waits for the next one, since no code could survive that.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

__all__ = ["Interrupt", "InterruptError", "Visit"]

CHECKED = ("CALL", "RESUME", "JUMP_BACKWARD")
"""Bytecodes after which CPython looks for signals; prefixes of their names."""


class InterruptError(Exception):
    """Stands for KeyboardInterrupt, or for a time-out that a signal handler raises."""


class Interrupt:
    """Raises at one place where kvheap or a function called ``task`` could be interrupted.

    Args:
        number: which place, from 0.
        everywhere: before every bytecode, not only where signal handlers run.
        error: what is raised.
    """

    def __init__(
        self,
        number: int,
        everywhere: bool = False,
        error: type[BaseException] = InterruptError,
    ) -> None:
        self.left = number
        self._everywhere = everywhere
        self._error = error
        self._last: dict[FrameType, int] = {}  # the opcode that each frame ran last

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("kvheap.") and frame.f_code.co_name != "task":
            return None
        frame.f_trace_opcodes = True
        return self._at_opcode

    def _at_opcode(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_code.co_code[frame.f_lasti]
            if self._everywhere:
                can_strike = frame.f_lasti not in _exits_of(frame.f_code)
            else:
                can_strike = last is not None and dis.opname[last].startswith(CHECKED)
            if can_strike:
                self.left -= 1
                if self.left < 0:
                    sys.settrace(None)
                    self._last.clear()  # frames keep what they hold alive
                    self._strike()
                    return None
        elif event == "return":
            self._last.pop(frame, None)
        return self._at_opcode

    def _strike(self) -> None:
        raise self._error

    def strikes(self, task: Callable[[], object]) -> bool:
        """Whether ``task`` was interrupted; False if it has fewer places."""
        sys.settrace(self)
        try:
            task()
        except self._error:
            return True
        finally:
            sys.settrace(None)
        return False


class Visit(Interrupt):
    """Calls ``visitor`` at one place, as a signal handler or a finalizer that raises nothing."""

    def __init__(self, number: int, visitor: Callable[[], object], everywhere: bool = True) -> None:
        super().__init__(number, everywhere)
        self._visitor = visitor
        self.was_called = False

    def _strike(self) -> None:
        self.was_called = True
        self._visitor()


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
