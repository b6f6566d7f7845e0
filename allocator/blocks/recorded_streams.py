"""``RecordedStreams``: which streams use which rows of a batch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import cast

from kvheap.addresses.extents import Int64Array
from kvheap.device.events import Stream, has_let_go

__all__ = ["RecordedStreams"]

MIN_PRUNED = 8
"""Ended streams are pruned at this many records, then each time the number has doubled."""

Streams = dict[Hashable, Stream]
"""Streams by themselves, so that equal ones count once: ``torch.cuda.current_stream()`` returns a
new object at each call. Streams that cannot be hashed are told apart by their ``id``."""


class RecordedStreams:
    """The streams recorded for a batch: for all rows, for one row, or for a set of rows.

    Adding a record costs O(its rows). Looking up a row costs O(its streams + sets of rows),
    regardless of how many rows have streams. Not thread-safe.
    """

    __slots__ = ("_num_records", "_of_all", "_of_row", "_of_set", "_prune_at")

    def __init__(self) -> None:
        self._of_all: Streams = {}
        self._of_row: dict[int, Streams] = {}
        self._of_set: dict[frozenset[int], Streams] = {}
        self._num_records = 0
        self._prune_at = MIN_PRUNED

    def add(self, stream: Stream, rows: Int64Array | None) -> None:
        """Record that a stream uses ``rows`` (None: all)."""
        if self._num_records >= self._prune_at:
            self._prune()
        if rows is None:
            streams = self._of_all
        elif len(rows) == 1:
            streams = self._of_row.setdefault(int(rows[0]), {})
        else:
            streams = self._of_set.setdefault(frozenset(rows.tolist()), {})
        can_be_hashed = type(stream).__hash__ is not None
        key = cast("Hashable", stream) if can_be_hashed else id(stream)
        self._num_records += key not in streams
        streams[key] = stream

    def of(self, rows: Int64Array | None) -> tuple[Stream, ...]:
        """The streams that use any of ``rows`` (None: all)."""
        found = dict(self._of_all)
        if rows is None:
            for streams in (*self._of_row.values(), *self._of_set.values()):
                found |= streams
            return tuple(found.values())
        wanted = rows.tolist()
        if self._of_row:
            for row in wanted:
                found |= self._of_row.get(row, {})
        for used, streams in self._of_set.items():
            if not used.isdisjoint(wanted):
                found |= streams
        return tuple(found.values())

    def _prune(self) -> None:
        """Drop the streams that have ended, such as finished transfers."""
        self._of_all = _in_use(self._of_all)
        self._of_row = {row: kept for row, all_ in self._of_row.items() if (kept := _in_use(all_))}
        self._of_set = {
            rows: kept for rows, all_ in self._of_set.items() if (kept := _in_use(all_))
        }
        kept_of_parts = (*self._of_row.values(), *self._of_set.values())
        self._num_records = len(self._of_all) + sum(map(len, kept_of_parts))
        self._prune_at = max(MIN_PRUNED, 2 * self._num_records)


def _in_use(streams: Streams) -> Streams:
    return {key: stream for key, stream in streams.items() if not has_let_go(stream)}
