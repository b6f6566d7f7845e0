"""The errors of kvheap, besides ``ValueError`` and ``TypeError`` for wrong arguments.

========================  ==========================================================
error                     raised when
========================  ==========================================================
OutOfMemoryError          the free list cannot serve a request
ReentrantCallError        a finalizer or signal handler, run inside an operation of the
                          same thread, asks for what cannot wait until it has ended
NegativeBatchSizeError    a batch of fewer than zero blocks is requested
InvalidFreeError          bytes are freed that are not allocated, in whole or in part
DoubleFreeError           bytes that are free already are freed again
ForeignObjectError        an allocator receives an object of another allocator
ForeignProcessError       a process changes a heap whose books another process keeps
LifetimeError             a reference or pin count would go below zero, or a freed
                          object is used
BlockInUseError           a block is freed that is referenced or pinned elsewhere
WriteAfterFreeError       debug mode finds that freed bytes have changed
ClosedError               a closed allocator is used
TransferError             a transfer was started but did not complete
InUseError                somebody else has the file or folder of a heap or tier
MismatchError             a file or folder has chunks of another model or layout
HeapCorruptionError       ``check()`` finds a broken invariant: a bug in kvheap
========================  ==========================================================
"""

from __future__ import annotations

import os
from typing import Any

__all__ = [
    "BlockInUseError",
    "ClosedError",
    "DoubleFreeError",
    "ForeignObjectError",
    "ForeignProcessError",
    "HeapCorruptionError",
    "InUseError",
    "InvalidFreeError",
    "LifetimeError",
    "MismatchError",
    "NegativeBatchSizeError",
    "OutOfMemoryError",
    "ReentrantCallError",
    "TransferError",
    "WriteAfterFreeError",
]


class OutOfMemoryError(RuntimeError):
    """No extent, or no set of extents, can hold the request; nothing was allocated.

    A ``RuntimeError``, as ``torch.OutOfMemoryError`` is.

    Attributes:
        requested_bytes: bytes of the whole request, rounded up to the alignment.
        free_bytes: free bytes in the heap at that moment.
        largest_free_bytes: the largest free extent at that moment.
    """

    def __init__(self, requested_bytes: int, free_bytes: int, largest_free_bytes: int) -> None:
        super().__init__(
            f"no memory is available for {requested_bytes} bytes: {free_bytes} bytes are free, "
            f"the largest free extent has {largest_free_bytes}"
        )
        self.requested_bytes = requested_bytes
        self.free_bytes = free_bytes
        self.largest_free_bytes = largest_free_bytes

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[Any, ...]]:
        return type(self), (self.requested_bytes, self.free_bytes, self.largest_free_bytes)


class ReentrantCallError(OutOfMemoryError):
    """A call from inside another operation of the same thread; nothing was changed.

    The garbage collector runs finalizers, and the interpreter signal handlers, in the middle of an
    operation. What they free is freed afterwards; but an allocation can be served only then. An
    ``OutOfMemoryError``, since whoever allocates expects that.

    Attributes:
        call: the method that was called.
    """

    def __init__(
        self, call: str, requested_bytes: int, free_bytes: int, largest_free_bytes: int
    ) -> None:
        super().__init__(requested_bytes, free_bytes, largest_free_bytes)
        self.call = call
        self.args = (
            f"{call} was called by a finalizer or a signal handler while its thread was inside "
            f"another operation: call it again afterwards",
        )

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[Any, ...]]:
        sizes = self.requested_bytes, self.free_bytes, self.largest_free_bytes
        return type(self), (self.call, *sizes)


class NegativeBatchSizeError(ValueError, RuntimeError):
    """A batch size below zero.

    A ``ValueError`` because the argument is wrong, and a ``RuntimeError`` because that is what
    code written for LMCache catches.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__(f"batch_size must be non-negative, got {batch_size}")
        self.batch_size = batch_size

    def __reduce__(self) -> tuple[type[NegativeBatchSizeError], tuple[int]]:
        return type(self), (self.batch_size,)


class InvalidFreeError(ValueError):
    """The bytes to free are not allocated, in whole or in part; nothing was freed."""


class DoubleFreeError(InvalidFreeError):
    """The bytes to free are free already, in whole or in part; nothing was freed."""


class ForeignObjectError(InvalidFreeError):
    """The object belongs to another allocator; nothing was freed."""


class ForeignProcessError(ForeignObjectError):
    """Another process keeps the books of the heap; nothing was changed.

    This process has only a view of the heap's bytes: it is a forked child and they are shared, or
    it is attached to them.

    Attributes:
        action: what was refused.
        owner_pid: the process that keeps the books; None if it is not known.
        pid: the process that was refused.
    """

    def __init__(self, action: str, owner_pid: int | None, pid: int) -> None:
        owner = "another process or heap" if owner_pid is None else f"process {owner_pid}"
        super().__init__(
            f"process {pid} cannot {action}: {owner} keeps the books of this heap, which is only a "
            f"view of the bytes; leave it to that process, store by SharedHeap.store if the bytes "
            f"are a SharedHeap's, or make a heap with view_only=False if nobody else allocates in "
            f"this memory"
        )
        self.action = action
        self.owner_pid = owner_pid
        self.pid = pid

    def __reduce__(self) -> tuple[type[ForeignProcessError], tuple[Any, ...]]:
        return type(self), (self.action, self.owner_pid, self.pid)


class LifetimeError(RuntimeError):
    """A reference or pin count would go below zero, or a freed object is used."""


class BlockInUseError(LifetimeError):
    """The block is held elsewhere (reference count above one, or pinned) and was not freed."""


class WriteAfterFreeError(LifetimeError):
    """Debug mode found that bytes were written to while they were free; nothing was allocated."""


class ClosedError(RuntimeError):
    """The allocator is closed."""


class TransferError(RuntimeError):
    """A transfer was started but did not complete; the target's bytes are undefined.

    Raised by the transfer's ``result()``, with the cause chained if there is one.
    """


class InUseError(RuntimeError):
    """Somebody else has the file or folder that chunks are kept in; nothing was opened.

    Raised as ``SegmentInUseError`` by a ``SharedHeap``, and as ``TierInUseError`` by a
    ``FileTier``.

    Attributes:
        path: the file or folder.
        owner_pid: the process that has it, which may be this one; None if it is not known.
    """

    def __init__(
        self,
        path: str,
        owner_pid: int | None,
        state: str = "in use",
        advice: str = "close it there first",
    ) -> None:
        owner = "another process or heap" if owner_pid is None else f"process {owner_pid}"
        if owner_pid == os.getpid():
            owner += ", which is this one"
        super().__init__(f"{path} is {state} by {owner}: {advice}")
        self.path = path
        self.owner_pid = owner_pid

    def __reduce__(self) -> tuple[type[InUseError], tuple[Any, ...]]:
        return type(self), (self.path, self.owner_pid)


class MismatchError(ValueError):
    """A file or folder has chunks of another model, layout, size or version; nothing was opened.

    Raised as ``SegmentMismatchError`` by a ``SharedHeap``, and as ``TierMismatchError`` by a
    ``FileTier``.

    Attributes:
        path: the file that says so.
        field: what differs.
        found: what is there; None if it cannot be read.
        wanted: what it was opened with.
    """

    def __init__(
        self,
        path: str,
        field: str,
        found: object,
        wanted: object,
        what: str = "it",
        advice: str = "use another path",
    ) -> None:
        differs = (
            f"{field} cannot be read as {wanted}"
            if found is None
            else f"{field} is {found!r}, but {what} was opened with {wanted!r}"
        )
        super().__init__(f"{path}: {differs}: its chunks cannot be used; {advice}")
        self.path = path
        self.field = field
        self.found = found
        self.wanted = wanted

    def __reduce__(self) -> tuple[type[MismatchError], tuple[Any, ...]]:
        return type(self), (self.path, self.field, self.found, self.wanted)


class HeapCorruptionError(RuntimeError):
    """An invariant of the heap does not hold. This is a bug in kvheap; please report it."""
