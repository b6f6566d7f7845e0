"""``BackgroundGrowth``: makes a reserved range usable piece by piece, on a thread of its own.

Committing and page-locking host memory takes seconds for every 10 GiB, which would delay the start
of an engine. So the engine starts with a small heap that grows in the background. Each piece is
first committed (populated, pinned) and then published (the heap's ``sbrk``), so no address is
allocated before there is memory behind it.

No lock is held at any time: a finalizer or a signal handler may close the heap, and so stop its
growth, in the middle of any call, on any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvheap.claims import Claim
from kvheap.forks import starts_over_after_fork
from kvheap.kernels.latch import Latch

__all__ = ["BackgroundGrowth", "GrowthProgress"]

LOGGER = logging.getLogger("kvheap")

GROWTH_BYTES = 256 << 20
"""Bytes of one piece of growth; ``stop`` waits for one piece. See benchmarks/NOTES.md."""

_logger = LOGGER


@dataclass(frozen=True, slots=True)
class GrowthProgress:
    """How far a range has grown.

    Attributes:
        committed_bytes: usable bytes: those at the start, and every published piece.
        final_bytes: bytes that it grows to.
        done: whether growth has ended: everything is published, it was stopped, or it failed.
        error: the error that ``commit`` or ``publish`` raised, if any.
    """

    committed_bytes: int
    final_bytes: int
    done: bool
    error: BaseException | None = None


class BackgroundGrowth:
    """Grows a range from ``start_bytes`` to ``final_bytes`` on a daemon thread.

    Until growth ends, the thread refers to the callables: if they are methods of an allocator, the
    allocator stays alive that long, so stop growth when the allocator is closed. The thread does
    not keep the interpreter from exiting; at exit it begins no further piece.

    Args:
        commit: ``commit(start, end)`` makes bytes ``[start, end)`` usable, and returns when they
            are usable.
        publish: ``publish(num_bytes)`` adds that many bytes to the heap; called once for each
            piece, in address order, after its commit.
        start_bytes: bytes that are usable already.
        final_bytes: bytes that are usable in the end.
        piece_bytes: bytes of each piece; the last one may be smaller.
        on_progress: called on the thread after each piece, and once more if growth ends early, by
            an error or ``stop``. An exception from it does not end growth: it is logged, and the
            first one is kept in :attr:`callback_error`.

    Raises:
        ValueError: the bytes are negative or out of order, or ``piece_bytes`` is not positive.

    >>> growth = BackgroundGrowth(
    ...     lambda start, end: print("commit", start, end), lambda num_bytes: None,
    ...     start_bytes=4096, final_bytes=10000, piece_bytes=4096,
    ... )
    >>> growth.start().wait()
    commit 4096 8192
    commit 8192 10000
    True
    >>> growth.progress
    GrowthProgress(committed_bytes=10000, final_bytes=10000, done=True, error=None)
    """

    def __init__(
        self,
        commit: Callable[[int, int], None],
        publish: Callable[[int], None],
        *,
        start_bytes: int,
        final_bytes: int,
        piece_bytes: int = GROWTH_BYTES,
        on_progress: Callable[[GrowthProgress], None] | None = None,
    ) -> None:
        if not 0 <= start_bytes <= final_bytes:
            raise ValueError(
                f"start_bytes must be between 0 and final_bytes, got {start_bytes} and "
                f"{final_bytes}"
            )
        if piece_bytes <= 0:
            raise ValueError(f"piece_bytes must be positive, got {piece_bytes}")
        self._piece_bytes = piece_bytes
        self._on_progress = on_progress
        self._is_stopped = False
        self._callback_error: BaseException | None = None
        # Only the thread replaces this object, as a whole, so it can be read without a lock.
        self._progress = GrowthProgress(start_bytes, final_bytes, done=False)
        self._thread = threading.Thread(
            target=self._run, args=(commit, publish), name="kvheap-growth", daemon=True
        )
        self._started = Claim()
        self._ended = Latch()
        starts_over_after_fork(self)

    @property
    def progress(self) -> GrowthProgress:
        """How far the range has grown; never waits."""
        return self._progress

    @property
    def callback_error(self) -> BaseException | None:
        """The first error that ``on_progress`` raised."""
        return self._callback_error

    def start(self) -> BackgroundGrowth:
        """Start the thread, and return at once.

        This is not part of the constructor, so that the callables can refer to this object.

        Returns:
            This object.

        Raises:
            RuntimeError: growth was started before.
        """
        me = object()
        if not self._started.take(me):
            raise RuntimeError("growth can only be started once: make another BackgroundGrowth")
        try:
            self._thread.start()
        except BaseException:  # the system's limit of threads
            self._started.give_up(me)
            raise
        return self

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until growth has ended: completed, stopped or failed.

        Args:
            timeout_s: the most seconds to wait; None: as long as it takes.

        Returns:
            Whether growth has ended; :attr:`progress` tells how.

        Raises:
            BaseException: the error of ``commit`` or ``publish`` that ended growth, raised by every
                call.
            RuntimeError: growth was not started, or the growth thread itself called this.
        """
        if not self._started.is_taken:
            raise RuntimeError("growth cannot be waited for before it is started")
        if threading.current_thread() is self._thread:
            raise RuntimeError("the growth thread cannot wait for its own end")
        if not self._ended.wait(timeout_s):
            return False
        if self._progress.error is not None:
            raise self._progress.error
        return True

    def stop(self) -> None:
        """End growth after the piece in progress. Idempotent; may be called before :meth:`start`.

        Waits for the piece in progress. Nothing is published after this returns. If one of the
        callables calls this, it does not wait, and nothing is published after that callable
        returns. A piece whose commit was in progress stays committed but unpublished. The caller
        must not hold a lock that a callable needs.
        """
        self._is_stopped = True
        # A thread that has not begun yet finds that growth is stopped, and publishes nothing.
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._ended.wait()

    def start_over_after_fork(self) -> None:
        """End growth in a forked child, which does not inherit the thread."""
        self._is_stopped = True
        self._ended.open()
        if not self._progress.done and self._thread.ident is not None:
            error = RuntimeError("growth does not continue in a forked child")
            self._progress = replace(self._progress, done=True, error=error)

    def _run(self, commit: Callable[[int, int], None], publish: Callable[[int], None]) -> None:
        error: BaseException | None = None
        try:
            self._grow(commit, publish)
        except BaseException as raised:
            error = raised
        del commit, publish  # they may be methods of a heap, which is free to go now
        try:
            if error is not None and threading.main_thread().is_alive():
                _logger.error(
                    "growth ended at %d of %d bytes: %r",
                    self._progress.committed_bytes,
                    self._progress.final_bytes,
                    error,
                )
            if not self._progress.done:
                self._report(replace(self._progress, done=True, error=error))
        finally:
            self._ended.open()

    def _grow(self, commit: Callable[[int, int], None], publish: Callable[[int], None]) -> None:
        start, final = self._progress.committed_bytes, self._progress.final_bytes
        while start < final and not self._must_end():
            end = min(start + self._piece_bytes, final)
            commit(start, end)
            if self._is_stopped:
                return
            publish(end - start)
            start = end
            self._report(GrowthProgress(start, final, done=start == final))

    def _must_end(self) -> bool:
        # When the main thread has ended, the interpreter is exiting: too late to begin a piece.
        return self._is_stopped or not threading.main_thread().is_alive()

    def _report(self, progress: GrowthProgress) -> None:
        self._progress = progress
        if self._on_progress is None:
            return
        try:
            self._on_progress(progress)
        except BaseException as error:
            if self._callback_error is None:
                self._callback_error = error
            _logger.warning("on_progress raised %r; growth goes on", error)
