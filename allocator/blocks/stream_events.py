"""``StreamEvents``: the events that a free waits for, recorded before it is made.

Recording an event, and asking a stream whether it still uses bytes, calls code of the user's or of
the driver. That must not happen inside a section (``kvheap/guards.py``), and a free is one. So a
free first finds the streams that lack an event, and is tried again once they have one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from kvheap.blocks.recorded_streams import stream_key
from kvheap.device.events import Event, Stream, has_let_go
from kvheap.errors import LifetimeError
from kvheap.interrupts import is_interrupt

__all__ = ["StreamEvents", "StreamGoneError"]


class StreamGoneError(LifetimeError):
    """A stream cannot record an event, for the reason in ``__cause__``."""


class StreamEvents:
    """An event of each stream, or the knowledge that it needs none."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: dict[Hashable, Event | None] = {}

    def record(self, streams: Sequence[Stream], is_wrapped: bool = False) -> None:
        """Record an event of each stream that may still use bytes. Call it outside sections.

        Args:
            streams: the streams.
            is_wrapped: raise a ``StreamGoneError`` from the stream's error.

        Raises:
            Exception: a stream cannot record an event.
        """
        try:
            self._record(streams)
        except Exception as error:
            if is_wrapped and not is_interrupt(error):
                raise StreamGoneError(str(error)) from error
            raise

    def _record(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            # No event for a transfer that has ended: it would only have to be checked again.
            event = None if has_let_go(stream) else stream.record_event()
            self._events[stream_key(stream)] = event

    def missing(self, streams: Sequence[Stream]) -> list[Stream]:
        """The streams of which nothing is known."""
        return [stream for stream in streams if stream_key(stream) not in self._events]

    def of(self, streams: Sequence[Stream]) -> tuple[Event, ...]:
        """The events of those streams that still use bytes."""
        if not streams:
            return ()
        found = (self._events.get(stream_key(stream)) for stream in streams)
        return tuple(event for event in found if event is not None)
