"""``RecordedStreams``: which streams work on which rows of a batch."""

from __future__ import annotations

from kvheap.addresses.extents import Int64Array
from kvheap.device.events import Stream, has_let_go

__all__ = ["RecordedStreams"]


class RecordedStreams:
    """The streams recorded for a batch, each for some rows or for all. Not thread-safe."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[tuple[frozenset[int] | None, Stream]] = []

    def add(self, stream: Stream, rows: Int64Array | None) -> None:
        """Note that a stream works on ``rows`` (None: all)."""
        entry = (None if rows is None else frozenset(rows.tolist()), stream)
        # Transfers are streams that end: look for ended ones each time the number doubles.
        count = len(self._entries)
        if count >= 8 and not count & (count - 1):
            self._entries = [kept for kept in self._entries if not has_let_go(kept[1])]
        if entry not in self._entries:
            self._entries.append(entry)

    def of(self, rows: Int64Array | None) -> tuple[Stream, ...]:
        """The streams that work on any of ``rows`` (None: all)."""
        wanted = None if rows is None else set(rows.tolist())
        streams = {
            id(stream): stream
            for used, stream in self._entries
            if used is None or wanted is None or not used.isdisjoint(wanted)
        }
        return tuple(streams.values())
