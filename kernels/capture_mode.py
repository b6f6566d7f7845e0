"""``Relaxed``: calls into CUDA that must not end the capture of a graph, on this or another thread.

While a thread captures a CUDA graph in the default mode, ``global``, CUDA refuses calls that it
counts as potentially unsafe, on every thread, and the graph is lost: queries of and waits for
events and streams, allocations, registrations of host memory, copies that wait. No such call of
kvheap is part of what a graph must repeat, so each is made while its thread is in the mode
``relaxed`` (``cudaThreadExchangeStreamCaptureMode`` in the CUDA Runtime API). That permits all but
two kinds: calls for an event or a stream that is itself being captured, and waits for a whole
device.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import TracebackType

import torch

from kvheap.kernels.copy_engine import driver

__all__ = ["RELAXED", "Exchange", "Relaxed", "exchange_of_driver", "uses_cuda"]

RELAXED = 2
"""``CU_STREAM_CAPTURE_MODE_RELAXED``."""

Exchange = Callable[[object], int]
"""``cuThreadExchangeStreamCaptureMode``: swaps this thread's mode with the one that is pointed to,
and returns a status."""


class _Thread(threading.local):
    is_relaxed = False


_thread = _Thread()


class Relaxed:
    """A context in which calls into CUDA end no capture.

    It costs two calls of the driver, and none where CUDA is not in use or this thread is in such a
    context already. An exception that strikes anywhere, also one of a signal handler, leaves the
    thread's own mode as it was.

    >>> with Relaxed():
    ...     pass
    """

    __slots__ = ("_exchange", "_mode")

    def __enter__(self) -> None:
        self._exchange: Exchange | None = None
        if _thread.is_relaxed:
            return
        exchange = exchange_of_driver()
        if exchange is None:
            return
        # It holds ``RELAXED`` whenever there is nothing to give back.
        self._mode = ctypes.c_int(RELAXED)
        self._exchange = exchange
        try:
            exchange(ctypes.byref(self._mode))
            _thread.is_relaxed = True
        except BaseException:
            self._give_back()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._exchange is not None:
            try:
                self._give_back()
            finally:  # once more, if a signal handler raised in there
                self._give_back()

    def _give_back(self) -> None:
        _thread.is_relaxed = False
        if self._exchange is not None and self._mode.value != RELAXED:
            self._exchange(ctypes.byref(self._mode))


def exchange_of_driver() -> Exchange | None:
    """The driver's function; None while this process does not use CUDA through torch."""
    return driver().exchange_capture_mode if uses_cuda() else None


def uses_cuda() -> bool:
    """Whether this process uses CUDA through torch, so that there can be streams and events."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
