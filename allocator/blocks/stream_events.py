"""``StreamEvents``: the events that a free waits for, recorded before it is made.

Recording an event, and asking a stream whether it still uses bytes, calls code of the user's or of
the driver. That must not happen inside a section (``kvheap/guards.py``), and a free is one. So a
free first finds the streams that lack an event, and is tried again once they have one.
"""

from __future__ import annotations

from collections.abc import Hashable

from kvheap.blocks.recorded_streams import Streams
from kvheap.device.captures import end_of_work, is_capturing
from kvheap.device.events import Event, has_let_go
from kvheap.errors import LifetimeError
from kvheap.interrupts import is_interrupt
from kvheap.kernels.capture_mode import Relaxed, uses_cuda

__all__ = ["NO_EVENTS", "StreamEvents", "StreamGoneError"]


class StreamGoneError(LifetimeError):
    """A stream cannot record an event, for the reason in ``__cause__``."""


class StreamEvents(dict[Hashable, "Event | None"]):
    """An event of each stream, by the stream's key, or None for a stream that needs none."""

    __slots__ = ()

    def record(self, streams: Streams, is_wrapped: bool = False) -> StreamEvents:
        """Record an event of each stream that may still use bytes. Call it outside sections.

        Args:
            streams: the streams.
            is_wrapped: raise a ``StreamGoneError`` from the stream's error.

        Returns:
            This object; a new one instead of ``NO_EVENTS``.

        Raises:
            Exception: a stream cannot record an event.
        """
        events = StreamEvents() if self is NO_EVENTS else self
        try:
            if uses_cuda():
                with Relaxed():
                    events._ask(streams, not is_capturing())
            else:
                events._ask(streams, True)
        except Exception as error:
            if is_wrapped and not is_interrupt(error):
                raise StreamGoneError(str(error)) from error
            raise
        return events

    def _ask(self, streams: Streams, can_have_ended: bool) -> None:
        for key, stream in streams.items():
            # No event for a transfer that has ended: it would only be checked again.
            has_ended = can_have_ended and has_let_go(stream)
            self[key] = None if has_ended else end_of_work(stream)

    def of(self, streams: Streams, missing: Streams) -> tuple[Event, ...]:
        """The events of those streams that still use bytes.

        Args:
            streams: the streams.
            missing: to which those are added of which nothing is known.
        """
        found: list[Event] = []
        for key, stream in streams.items():
            if key not in self:
                missing[key] = stream
                continue
            event = self[key]
            if event is not None:
                found.append(event)
        return tuple(found)


NO_EVENTS = StreamEvents()
"""What is known of streams before any was asked."""
