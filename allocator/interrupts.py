"""Tells exceptions that a signal handler raised from those of the code that it interrupted.

A time-out is often a signal handler that raises. Where it strikes, its exception looks like an
error of whatever happened to run: of a query, of a copy, of an eviction policy. Code that keeps
such errors, or draws conclusions from them, must let a handler's exception pass instead.
"""

from __future__ import annotations

import inspect
import signal
import threading
from functools import partial
from types import CodeType, FrameType, TracebackType

__all__ = ["is_interrupt", "suppress_own"]


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception came from outside: from a signal handler, or no ``Exception`` at all.

    Signal handlers only run on the main thread. A handler is recognized by its frame in the
    traceback: it is in force, or it was called with the frame below it, which a handler gets as its
    second argument. One that is written in C is not recognized.
    """
    if not isinstance(error, Exception):
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    handlers.discard(None)
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code in handlers or _got_the_frame_below(frame):
            return True
        trace = trace.tb_next
    return False


class suppress_own:  # noqa: N801 - as contextlib.suppress
    """``contextlib.suppress`` for errors of the code within, not for those of signal handlers.

    >>> with suppress_own(OSError):
    ...     open("/no such file")
    """

    __slots__ = ("_kinds",)

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        return error is not None and isinstance(error, self._kinds) and not is_interrupt(error)


def _got_the_frame_below(frame: FrameType) -> bool:
    """Whether one of a function's arguments is the frame that it interrupted."""
    below, code = frame.f_back, frame.f_code
    if below is None:
        return False
    named = code.co_argcount + code.co_kwonlyargcount
    names = code.co_varnames[: named + bool(code.co_flags & inspect.CO_VARARGS)]
    if not names:
        return False
    values = frame.f_locals  # up to CPython 3.12 a copy, which the frame keeps
    found = any(
        value is below or (type(value) is tuple and any(each is below for each in value))
        for value in map(values.get, names)
    )
    if type(values) is dict and code.co_flags & inspect.CO_OPTIMIZED:
        values.clear()  # the error may be in it, and would keep itself and the frame alive
    return found


def _code_of(handler: object) -> CodeType | None:
    """The code of a handler; None if it has none, as for ``SIG_DFL``."""
    if isinstance(handler, partial):
        handler = handler.func
    for found in (handler, type(handler).__dict__.get("__call__")):
        code = getattr(found, "__code__", None)  # of a bound method too
        if isinstance(code, CodeType):
            return code
    return None
