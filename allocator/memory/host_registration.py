"""``HostRegistrations``: which pieces of one range of host memory are page-locked for CUDA.

A very large registration fails on current drivers, so a range is registered in pieces, and each
piece is unregistered by its own pointer.

The record is exact at every moment: it contains a piece from the return of ``register`` to the
return of ``unregister``, even if calls fail or the caller is interrupted.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import round_up
from kvheap.forks import starts_over_after_fork
from kvheap.memory.pages import PAGE_BYTES
from kvheap.memory.registrar import HostRegistrar

__all__ = ["REGISTRATION_BYTES", "HostRegistrations"]

REGISTRATION_BYTES = 64 << 30
"""The most bytes of one registration: current drivers refuse a very large one."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Registered bytes ``[start, end)`` of the range, and the rest of their last page."""

    start: int
    end: int
    registrar: HostRegistrar


class HostRegistrations:
    """The registered pieces of one range of host memory.

    Thread-safe: one thread at a time registers or unregisters, and the look-ups never wait for it.
    The lock is reentrant: a finalizer or a signal handler may close the heap in the middle of a
    call on the same thread. What is being registered is then unregistered by the call that does it,
    and what is being unregistered is left to the call that does it. This object does not keep the
    memory mapped.

    Args:
        pointer: address of the range's first byte, a multiple of the page size.
    """

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer
        self._lock = threading.RLock()
        starts_over_after_fork(self)
        # By start, in order of registration. The look-ups read it with one list(), which is
        # atomic, instead of under the lock.
        self._pieces: dict[int, _Piece] = {}
        self._known: tuple[tuple[int, int], Int64Array] = ((0, 0), np.empty((0, 2), np.int64))
        self._leaving: set[int] = set()  # the starts of pieces that are being unregistered
        self._changes = 0
        self._closed = False
        self._pid = os.getpid()

    def start_over_after_fork(self) -> None:
        """Release the lock in a forked child, which inherits no registration."""
        self._lock = threading.RLock()

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The registered pieces, ``(start, end)`` in bytes of the range, in address order."""
        return sorted((piece.start, piece.end) for piece in list(self._pieces.values()))

    @property
    def absolute_ranges(self) -> Int64Array:
        """The pieces as absolute addresses, int64 ``[R, 2]``; cached until the pieces change."""
        changes = (self._changes, len(self._pieces))
        known_changes, found = self._known
        if known_changes != changes:
            found = np.array(self.ranges, np.int64).reshape(-1, 2) + self._pointer
            self._known = (changes, found)
        return found

    @property
    def num_bytes(self) -> int:
        """How many bytes are registered."""
        return sum(piece.end - piece.start for piece in list(self._pieces.values()))

    def register(
        self,
        pieces: Sequence[tuple[int, int]],
        registrar: HostRegistrar,
        allow_unpinned: bool,
        cancelled: threading.Event,
        commit: Callable[[int, int], None] = lambda start, end: None,
    ) -> int:
        """Register all pieces or none; with ``allow_unpinned``, register those that do not fail.

        Args:
            pieces: ``(start, end)`` in bytes, disjoint. ``start`` is a multiple of the page size;
                the last page of a piece is registered whole.
            registrar: registers the pieces, and later unregisters them.
            allow_unpinned: skip a piece that fails, and continue.
            cancelled: set when nobody waits for the result any more. The call then ends after the
                piece in progress, and unregisters what it registered.
            commit: called with each piece before it is registered.

        Returns:
            Bytes registered by this call.

        Raises:
            ValueError: a piece overlaps a registered one; nothing is registered.
            RuntimeError: a piece failed, or the range is closed. Nothing is registered by this
                call, unless unregistering failed too; the message then says so.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the host buffer is closed")
            self._require_unregistered(pieces)
            done: list[_Piece] = []
            try:
                failure = self._register_each(
                    pieces, registrar, allow_unpinned, cancelled, commit, done
                )
            except BaseException:
                self._unregister(done)
                raise
            done_bytes = sum(piece.end - piece.start for piece in done)
            if failure is None and not cancelled.is_set() and not self._closed:
                return done_bytes
            undo_errors = [*map(str, self._unregister(done))]
            done_bytes -= sum(
                piece.end - piece.start for piece in done if self._pieces.get(piece.start) is piece
            )
            if self._closed:
                raise RuntimeError("the host buffer was closed while it was being pinned")
            if failure is None:
                return 0
            try:
                raise self._failed(pieces, failure[0], failure[1], done_bytes, undo_errors)
            finally:
                # The error's traceback refers to this frame. If the frame referred to the error,
                # the cycle would keep the memory until the garbage collector ran.
                del failure

    def _failed(
        self,
        pieces: Sequence[tuple[int, int]],
        index: int,
        cause: RuntimeError,
        undone_bytes: int,
        undo_errors: list[str],
    ) -> RuntimeError:
        start, end = pieces[index]
        error = RuntimeError(
            f"cannot pin bytes [{start}, {end}) of the buffer, piece {index + 1} of "
            f"{len(pieces)}: {cause}; {undone_bytes} bytes pinned before it in this call were "
            f"unpinned, {self.num_bytes} bytes of the buffer are pinned"
            + "".join(f"; unpinning failed: {undo_error}" for undo_error in undo_errors)
        )
        error.__cause__ = cause
        return error

    def _require_unregistered(self, pieces: Sequence[tuple[int, int]]) -> None:
        for start, end in pieces:
            for piece in self._pieces.values():
                if start < piece.end and piece.start < end:
                    raise ValueError(
                        f"bytes [{start}, {end}) are pinned already, in part or in whole: "
                        f"[{piece.start}, {piece.end}) is pinned"
                    )

    def _register_each(
        self,
        pieces: Sequence[tuple[int, int]],
        registrar: HostRegistrar,
        allow_unpinned: bool,
        cancelled: threading.Event,
        commit: Callable[[int, int], None],
        done: list[_Piece],
    ) -> tuple[int, RuntimeError] | None:
        for index, (start, end) in enumerate(pieces):
            if cancelled.is_set() or self._closed:
                break
            commit(start, end)
            if cancelled.is_set():
                break
            try:
                registrar.register(self._pointer + start, round_up(end - start, PAGE_BYTES))
            except RuntimeError as error:
                if not allow_unpinned:
                    return index, error
            else:
                self._changes += 1
                piece = _Piece(start, end, registrar)
                self._pieces[start] = piece
                done.append(piece)
        return None

    def close(self) -> None:
        """Unregister everything, and refuse to register more. Idempotent.

        Raises:
            RuntimeError: the first error of ``unregister``. The other pieces were tried as well;
                those that failed stay in :attr:`ranges`.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            errors = self._unregister(list(self._pieces.values()))
        _raise_first(errors)

    def close_unshared(self) -> None:
        """:meth:`close` for a finalizer: takes no lock, because nothing else can use this object.

        Tries once more to unregister the pieces that :meth:`close` could not.

        Raises:
            RuntimeError: as for :meth:`close`.
        """
        self._closed = True
        errors = self._unregister(list(self._pieces.values()))
        _raise_first(errors)

    def _unregister(self, pieces: list[_Piece]) -> list[RuntimeError]:
        if os.getpid() != self._pid:
            # A forked child inherits the record, but neither registrations nor a usable CUDA.
            self._pieces.clear()
            return []
        return [error for error in map(self._try_unregister, pieces) if error is not None]

    def _try_unregister(self, piece: _Piece) -> RuntimeError | None:
        start = piece.start
        if self._pieces.get(start) is not piece or start in self._leaving:
            return None  # a call in the middle of this one, or around it, sees to it
        self._leaving.add(start)
        try:
            piece.registrar.unregister(self._pointer + start)
        except RuntimeError as error:
            return error
        else:
            self._changes += 1
            self._pieces.pop(start, None)
        finally:
            self._leaving.discard(start)
        return None


def _raise_first(errors: list[RuntimeError]) -> None:
    # Popped: the error's traceback refers to this frame, which must not refer to the error.
    if errors:
        del errors[1:]
        raise errors.pop()
