"""Streams and events: a queue of asynchronous work, and a point in it."""

from __future__ import annotations

from typing import Protocol

__all__ = [
    "POLL_SECONDS",
    "DeviceEvent",
    "Event",
    "ReleaseVoidError",
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
        """Whether the work up to this point has ended."""
        ...


class DeviceEvent(Event, Protocol):
    """An event that the host can wait for."""

    def synchronize(self) -> None:
        """Wait on the host until the work up to this point has ended."""
        ...


class Stream(Protocol):
    """A queue of asynchronous work, such as a ``torch.cuda.Stream``.

    A stream whose work is finite may have an attribute ``has_let_go``. Once it is true, the stream
    uses no bytes any more, and code that tracks the stream can forget it.
    """

    def record_event(self) -> Event:
        """Mark the end of the work queued so far."""
        ...


def has_let_go(stream: Stream) -> bool:
    """Whether the stream is known to use no bytes any more; False if it cannot tell."""
    return bool(getattr(stream, "has_let_go", False))
