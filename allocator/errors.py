"""What kvheap raises, beside the usual ``ValueError`` and ``TypeError`` for wrong arguments.

========================  ==========================================================
error                     raised when
========================  ==========================================================
OutOfMemoryError          the free list cannot serve a request
NegativeBatchSizeError    a batch of fewer than zero blocks is asked for
InvalidFreeError          a free names bytes that are not allocated, in whole or part
DoubleFreeError           a block that was freed before is freed again
ForeignObjectError        an allocator is handed the object of another one
LifetimeError             a reference or pin count would go below zero, or a freed
                          object is used
BlockInUseError           a block is freed that somebody else still holds
WriteAfterFreeError       debug mode finds freed bytes changed
ClosedError               a closed allocator is used
TransferError             a transfer was begun and did not come to its end
HeapCorruptionError       ``check()`` finds an invariant broken: a bug in kvheap
========================  ==========================================================
"""

from __future__ import annotations

__all__ = [
    "BlockInUseError",
    "ClosedError",
    "DoubleFreeError",
    "ForeignObjectError",
    "HeapCorruptionError",
    "InvalidFreeError",
    "LifetimeError",
    "NegativeBatchSizeError",
    "OutOfMemoryError",
    "TransferError",
    "WriteAfterFreeError",
]


class OutOfMemoryError(RuntimeError):
    """No extent, or no set of extents, can hold the request; nothing was allocated.

    A ``RuntimeError``, as ``torch.OutOfMemoryError`` is.

    Attributes:
        requested_bytes: what was asked for, rounded up to the alignment, over the whole batch.
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

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[int, int, int]]:
        return type(self), (self.requested_bytes, self.free_bytes, self.largest_free_bytes)


class NegativeBatchSizeError(ValueError, RuntimeError):
    """A batch size below zero.

    A ``ValueError`` because the argument is wrong, and a ``RuntimeError`` because callers that
    come from LMCache catch that.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__(f"batch_size must be non-negative, got {batch_size}")
        self.batch_size = batch_size

    def __reduce__(self) -> tuple[type[NegativeBatchSizeError], tuple[int]]:
        return type(self), (self.batch_size,)


class InvalidFreeError(ValueError):
    """A free that names bytes which are not allocated; nothing was freed."""


class DoubleFreeError(InvalidFreeError):
    """A block that was freed before is freed again; nothing was freed."""


class ForeignObjectError(InvalidFreeError):
    """An object of another allocator; nothing was freed."""


class LifetimeError(RuntimeError):
    """A reference or pin count would go below zero, or a freed object is used."""


class BlockInUseError(LifetimeError):
    """A block that others still hold (reference count above one, or pinned) cannot be freed."""


class WriteAfterFreeError(LifetimeError):
    """Somebody wrote to bytes that were free; found in debug mode. Nothing was allocated."""


class ClosedError(RuntimeError):
    """An allocator that was closed is used."""


class TransferError(RuntimeError):
    """A transfer was begun and did not come to its end; the target's bytes are undefined.

    Raised by its ``result()``. The cause is chained where there is one.
    """


class HeapCorruptionError(RuntimeError):
    """An invariant of the heap does not hold. This is a bug in kvheap; please report it."""
