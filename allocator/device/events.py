"""Streams and events: a queue of asynchronous work, and a point in it.

``torch.cuda.Stream`` and ``torch.cuda.Event`` are such, and so is any object with the same methods:
a queue of a transfer library, a thread that reads files. ``batch.record_stream(stream)`` then keeps
the bytes of freed blocks until the stream's work has passed the point at which they were freed:

>>> import torch
>>> from kvheap import TensorMemoryAllocator
>>> class Read:  # of a file into blocks: a queue that never gets more work
...     ended = False
...     def record_event(self): return self
...     def query(self): return self.ended
...     @property
...     def has_let_go(self): return self.ended
>>> heap, read = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8)), Read()
>>> batch = heap.batched_allocate([1024], torch.float32, 4)
>>> batch.record_stream(read)
>>> heap.batched_free(batch)
>>> heap.stats().pending_bytes
16384
>>> read.ended = True
>>> heap.stats().pending_bytes
0

kvheap calls these methods from any thread, outside of its own locks, whenever an operation looks
whether bytes have become free. They must return at once, without calling the heap, and may be
called again after the end.
What is recorded on a batch stays there until ``has_let_go``: without it, a batch that is read many
times and never freed keeps every stream that ever read it. ``kvheap.foreign_transfer`` records work
as a transfer, which has all of this.
"""

from __future__ import annotations

from typing import Protocol

from kvheap.errors import TransferError

__all__ = [
    "POLL_SECONDS",
    "DeviceEvent",
    "Event",
    "FiniteStream",
    "ReleaseVoidError",
    "ReportingEvent",
    "Stream",
    "has_let_go",
]

POLL_SECONDS = 50e-6
"""Seconds between two queries of an event; copying 1 MiB over PCIe 5 takes 20 us."""


class ReleaseVoidError(Exception):
    """Raised by the event of a conditional release when the condition has failed.

    Blocks can be freed on condition that a copy succeeds. When the copy fails, the release is void
    and the blocks become live again.
    """


class Event(Protocol):
    """A point in a stream's work, such as a ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the work up to this point has ended, and uses no bytes any more.

        An exception means that this cannot be told: the bytes stay allocated, as pending bytes,
        and the event is asked again later.
        """
        ...


class DeviceEvent(Event, Protocol):
    """An event that the host can wait for."""

    def synchronize(self) -> None:
        """Wait on the host until the work up to this point has ended."""
        ...


class ReportingEvent:
    """An event that says itself whether its work failed; asking it raises nothing on that account.

    The base of the events of work that is not a device's.
    """

    __slots__ = ()

    asks_device = True
    """Whether asking may call a device's driver."""

    def query(self) -> bool:
        """As ``Event.query``."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """As ``DeviceEvent.synchronize``; also returns once :attr:`is_stuck`."""
        raise NotImplementedError

    def error(self) -> TransferError | None:
        """Why the work failed; None while it runs, and if it succeeded. A new object each time."""
        raise NotImplementedError

    def require_success(self) -> None:
        """Raise if the work is known to have failed.

        Raises:
            TransferError: it has.
        """
        raise NotImplementedError

    @property
    def is_stuck(self) -> bool:
        """Whether the work has failed and is not known to have ended: it may use bytes for ever."""
        return False


class Stream(Protocol):
    """A queue of asynchronous work, such as a ``torch.cuda.Stream``.

    A stream whose work is finite should also have ``has_let_go``; see :class:`FiniteStream`.
    """

    def record_event(self) -> Event:
        """Mark the end of the work queued so far.

        An exception is raised to whoever frees the blocks, and they stay live.
        """
        ...


class FiniteStream(Stream, Protocol):
    """A stream that gets no more work at some time, such as one transfer."""

    @property
    def has_let_go(self) -> bool:
        """Whether the stream uses no bytes any more, and never will: whoever tracks it forgets it.

        It must not become false again. Raises nothing.
        """
        ...


def has_let_go(stream: Stream) -> bool:
    """Whether the stream is known to use no bytes any more; False if it cannot tell."""
    return bool(getattr(stream, "has_let_go", False))
