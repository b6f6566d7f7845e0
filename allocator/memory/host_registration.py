"""``HostRegistrations``: which pieces of one host range are page-locked for CUDA.

CUDA copies to and from pageable memory through a staging buffer, and waits for it; registered
(page-locked, "pinned") memory is read and written directly. One very large registration fails on
current drivers, so a range is registered in pieces, and each is unregistered by its own pointer.

The books are exact at every moment: a piece is in them from the return of ``register`` to the
return of ``unregister``, also when calls fail or the caller is interrupted.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array

__all__ = ["CudaHostRegistrar", "HostRegistrar", "HostRegistrations"]

PAGE_BYTES = mmap.PAGESIZE

HOST_REGISTER_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every device of the process."""

CUDA_ERROR_NAMES = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    3: "cudaErrorInitializationError",
    4: "cudaErrorCudartUnloading",
    46: "cudaErrorDevicesUnavailable",
    100: "cudaErrorNoDevice",
    101: "cudaErrorInvalidDevice",
    201: "cudaErrorDeviceUninitialized",
    304: "cudaErrorOperatingSystem",
    700: "cudaErrorIllegalAddress",
    709: "cudaErrorContextIsDestroyed",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    713: "cudaErrorHostMemoryNotRegistered",
    800: "cudaErrorNotPermitted",
    801: "cudaErrorNotSupported",
    999: "cudaErrorUnknown",
}
"""What the two calls are known to answer; torch has the texts, but not the names."""


class HostRegistrar(Protocol):
    """Who page-locks host memory. Called on any thread, one call at a time for one buffer."""

    def register(self, pointer: int, num_bytes: int) -> None:
        """Page-lock ``num_bytes`` bytes at ``pointer``, both multiples of the page size.

        Raises:
            RuntimeError: it could not be done; nothing is page-locked.
        """

    def unregister(self, pointer: int) -> None:
        """Undo the ``register`` of this ``pointer``.

        Raises:
            RuntimeError: it could not be done; the bytes count as page-locked still.
        """


class CudaHostRegistrar:
    """Page-locks through ``cudaHostRegister``, for every device of the process.

    Args:
        device: the device whose context is used (and created, if need be); None: the current
            one. The current device belongs to a thread, and calls come from several: a thread
            that never chose one would create a context on device 0.

    Raises:
        RuntimeError: there is no CUDA device.
    """

    def __init__(self, device: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("host memory cannot be pinned: torch sees no CUDA device")
        self.device = torch.cuda.current_device() if device is None else device

    def register(self, pointer: int, num_bytes: int) -> None:
        """See :meth:`HostRegistrar.register`."""
        with torch.cuda.device(self.device):
            code = _cudart().cudaHostRegister(pointer, num_bytes, HOST_REGISTER_PORTABLE)
            _require_success("cudaHostRegister", int(code))

    def unregister(self, pointer: int) -> None:
        """See :meth:`HostRegistrar.unregister`."""
        with torch.cuda.device(self.device):
            code = _cudart().cudaHostUnregister(pointer)
            _require_success("cudaHostUnregister", int(code))


def _cudart() -> Any:
    cuda: Any = torch.cuda  # its cudart is not typed
    return cuda.cudart()


def _require_success(call: str, code: int) -> None:
    if code == 0:
        return
    # CUDA also keeps the error for the thread's next launch, which would fail in our place.
    forget_last_error = getattr(ctypes.CDLL(None), "cudaGetLastError", None)
    if forget_last_error is not None:
        forget_last_error()
    cudart = _cudart()
    text = cudart.cudaGetErrorString(cudart.cudaError(code))
    name = CUDA_ERROR_NAMES.get(code, "a CUDA error")
    raise RuntimeError(f"{call}: {name} ({code}): {text}")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Registered bytes ``[start, end)`` of the range; of the last page, all are."""

    start: int
    end: int
    registrar: HostRegistrar


class HostRegistrations:
    """The registered pieces of one range of host memory.

    Thread-safe: one call registers or unregisters at a time. It does not keep the memory mapped.

    Args:
        pointer: address of the range's first byte, a multiple of the page size.
    """

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer
        self._lock = threading.Lock()
        # By start, in order of registration. Read through one list() each, which is atomic, so
        # that looking never waits for a registration.
        self._pieces: dict[int, _Piece] = {}
        self._known: tuple[tuple[int, int], Int64Array] = ((0, 0), np.empty((0, 2), np.int64))
        self._changes = 0
        self._closed = False
        self._pid = os.getpid()

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The registered pieces, ``(start, end)`` in bytes of the range, in address order."""
        return sorted((piece.start, piece.end) for piece in list(self._pieces.values()))

    @property
    def absolute_ranges(self) -> Int64Array:
        """The same as absolute addresses, int64 ``[R, 2]``; made anew when pieces have changed."""
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
    ) -> int:
        """Register pieces, all or none, or all that can be.

        Args:
            pieces: ``(start, end)`` in bytes, disjoint; ``start`` a multiple of the page size,
                the page that ``end`` is in is registered whole.
            registrar: who does it, and will undo it.
            allow_unpinned: leave out a piece that fails, and go on.
            cancelled: set when nobody waits for the answer: the call ends after the piece in
                progress, and undoes what it did.

        Returns:
            Bytes registered by this call.

        Raises:
            ValueError: a piece overlaps a registered one; nothing is registered.
            RuntimeError: a piece failed, or the range is closed; nothing is registered by this
                call, unless undoing it failed too, which the message then tells.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the host buffer is closed")
            self._require_unregistered(pieces)
            bytes_before, num_before = self.num_bytes, len(self._pieces)
            try:
                failure = self._register_each(pieces, registrar, allow_unpinned, cancelled)
            except BaseException:
                self._unregister(list(self._pieces.values())[num_before:])
                raise
            done_bytes = self.num_bytes - bytes_before
            if failure is None and not cancelled.is_set():
                return done_bytes
            undo_errors = [*map(str, self._unregister(list(self._pieces.values())[num_before:]))]
            done_bytes -= self.num_bytes - bytes_before
            if failure is None:
                return 0
            try:
                raise self._failed(pieces, failure[0], failure[1], done_bytes, undo_errors)
            finally:
                # An error holds the frames it went through, and this one would hold it: a cycle,
                # which would keep the memory until the collector comes.
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
                        f"bytes [{start}, {end}) are pinned already, in part or whole: "
                        f"[{piece.start}, {piece.end}) is"
                    )

    def _register_each(
        self,
        pieces: Sequence[tuple[int, int]],
        registrar: HostRegistrar,
        allow_unpinned: bool,
        cancelled: threading.Event,
    ) -> tuple[int, RuntimeError] | None:
        for index, (start, end) in enumerate(pieces):
            if cancelled.is_set():
                break
            try:
                registrar.register(self._pointer + start, round_up(end - start, PAGE_BYTES))
            except RuntimeError as error:
                if not allow_unpinned:
                    return index, error
            else:
                self._changes += 1
                self._pieces[start] = _Piece(start, end, registrar)
        return None

    def close(self) -> None:
        """Unregister everything, and refuse to register more. Idempotent.

        Raises:
            RuntimeError: the first error of ``unregister``; the other pieces were tried all the
                same, and what failed stays in :attr:`ranges`.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            errors = self._unregister(list(self._pieces.values()))
        _raise_first(errors)

    def close_unshared(self) -> None:
        """:meth:`close` for a finalizer: takes no lock, as nobody else can be using this.

        Tries once more what :meth:`close` could not unregister.

        Raises:
            RuntimeError: as for :meth:`close`.
        """
        self._closed = True
        errors = self._unregister(list(self._pieces.values()))
        _raise_first(errors)

    def _unregister(self, pieces: list[_Piece]) -> list[RuntimeError]:
        if os.getpid() != self._pid:
            # A forked child inherits the books, but not the registrations nor a usable CUDA.
            self._pieces.clear()
            return []
        return [error for error in map(self._try_unregister, pieces) if error is not None]

    def _try_unregister(self, piece: _Piece) -> RuntimeError | None:
        try:
            piece.registrar.unregister(self._pointer + piece.start)
        except RuntimeError as error:
            return error
        self._changes += 1
        del self._pieces[piece.start]
        return None


def _raise_first(errors: list[RuntimeError]) -> None:
    # Popped: an error holds the frames it went through, which must not hold it.
    if errors:
        del errors[1:]
        raise errors.pop()


class Worker(threading.Thread):
    """Runs one task on a thread of its own, for a caller who can be interrupted meanwhile.

    A daemon, so that an interrupted program need not wait for a call into the driver to end.
    """

    def __init__(self, task: Callable[[threading.Event], int]) -> None:
        super().__init__(name="kvheap-pin", daemon=True)
        self._task: Callable[[threading.Event], int] | None = task
        self._cancelled = threading.Event()
        self._value = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run the task; the thread's body."""
        task, self._task = self._task, None
        assert task is not None
        try:
            self._value = task(self._cancelled)
        except BaseException as error:
            self._error = error

    def result(self) -> int:
        """Start, and wait for the task's value; when interrupted, tell it to cancel, and leave.

        Raises:
            BaseException: what the task raised, or what interrupted the wait.
        """
        try:
            try:
                self.start()
            except RuntimeError:  # no more threads: at exit, or at the system's limit
                self.run()
            else:
                self.join()
        except BaseException:
            self._cancelled.set()
            raise
        # Taken, not kept: an error's traceback holds this worker, and with it the memory.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._value
        finally:
            del error


def round_up(num_bytes: int, unit_bytes: int) -> int:
    """The least multiple of ``unit_bytes`` that is not below ``num_bytes``."""
    return -(-num_bytes // unit_bytes) * unit_bytes
