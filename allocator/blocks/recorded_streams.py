"""``RecordedStreams``: which streams use which rows of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from kvheap.addresses.extents import Int64Array
from kvheap.device.completion import Completion
from kvheap.device.events import Stream
from kvheap.guards import read_meanwhile

__all__ = ["RecordedStreams", "Streams", "stream_key"]

MIN_PRUNED = 8
"""Ended streams are pruned at this many records, then each time the number has doubled."""

Streams = dict[Hashable, Stream]
"""Streams by themselves, so that equal ones count once: ``torch.cuda.current_stream()`` returns a
new object at each call. Streams that cannot be hashed are told apart by their ``id``."""

# Never changed; most batches have streams for all rows only.
NO_ROWS: dict[int, Streams] = {}
NO_SETS: dict[frozenset[int], Streams] = {}


class RecordedStreams:
    """The streams recorded for a batch: for all rows, for one row, or for a set of rows.

    Adding a record costs O(its rows). Looking up a row costs O(its streams + sets of rows),
    regardless of how many rows have streams. Not thread-safe.
    """

    __slots__ = ("_of_all", "_of_row", "_of_set", "has_fillers", "num_unpruned")

    def __init__(self) -> None:
        self._of_all: Streams = {}
        self._of_row = NO_ROWS
        self._of_set = NO_SETS
        self.num_unpruned = MIN_PRUNED
        """How many more records there may be before it is time to :meth:`prune`."""
        self.has_fillers = False
        """Whether transfers that fill rows were recorded: of most batches that are read, none."""

    def add(self, stream: Stream, rows: Int64Array | None) -> None:
        """Record that a stream uses ``rows`` (None: all)."""
        if rows is None:
            streams = self._of_all
        elif len(rows) == 1:
            if self._of_row is NO_ROWS:
                self._of_row = {}
            streams = self._of_row.setdefault(int(rows[0]), {})
        else:
            if self._of_set is NO_SETS:
                self._of_set = {}
            streams = self._of_set.setdefault(frozenset(rows.tolist()), {})
        key = stream_key(stream)
        self.num_unpruned -= key not in streams
        streams[key] = stream

    def of(self, rows: Int64Array | None) -> Streams:
        """The streams that use any of ``rows`` (None: all), by :func:`stream_key`.

        Raises:
            RuntimeError: another thread recorded one meanwhile.
        """
        if not self._of_row and not self._of_set:
            return self._of_all.copy()
        found = self._of_all.copy()
        if rows is None:
            for streams in (*self._of_row.values(), *self._of_set.values()):
                found |= streams
            return found
        wanted = rows.tolist()
        if self._of_row:
            for row in wanted:
                found |= self._of_row.get(row, {})
        for used, streams in self._of_set.items():
            if not used.isdisjoint(wanted):
                found |= streams
        return found

    def now(self, rows: Int64Array | None) -> Streams:
        """:meth:`of`, while other threads may record more."""
        try:
            return self.of(rows)
        except RuntimeError:
            return read_meanwhile(partial(self.of, rows))

    def users(self, rows: Int64Array | None) -> list[Completion]:
        """Those of them that are transfers; see ``RowCounts.users``."""
        return [
            stream
            for stream in self.now(rows).values()
            if isinstance(stream, Completion) and not stream.is_over and stream.is_using
        ]

    def has_others(self, stream: Stream) -> bool:
        """Whether other streams may use any row: false if all others are copies that have ended."""
        if self._of_row or self._of_set:
            return True
        for each in [*self._of_all.values()]:
            if each is not stream and not (type(each) is Completion and each.is_over):
                return True
        return False

    def prune(self, ended: Sequence[Stream]) -> None:
        """Drop streams that have ended, such as finished transfers."""
        if not self._of_row and not self._of_set:
            streams = self._of_all
            for stream in ended:
                streams.pop(stream_key(stream), None)
            self.num_unpruned = max(MIN_PRUNED - len(streams), len(streams))
            return
        keys = {stream_key(stream) for stream in ended}
        of_row = {row: kept for row, all_ in self._of_row.items() if (kept := _but(all_, keys))}
        of_set = {rows: kept for rows, all_ in self._of_set.items() if (kept := _but(all_, keys))}
        self._of_all = _but(self._of_all, keys)
        self._of_row = of_row
        self._of_set = of_set
        num_records = len(self._of_all) + sum(map(len, (*of_row.values(), *of_set.values())))
        self.num_unpruned = max(MIN_PRUNED - num_records, num_records)


def stream_key(stream: Stream) -> Hashable:
    """What tells streams apart: the stream itself if it can be hashed, else its ``id``."""
    key: Hashable = stream  # type: ignore[assignment]  # protocols do not say that they hash
    return id(stream) if type(stream).__hash__ is None else key


def _but(streams: Streams, keys: set[Hashable]) -> Streams:
    return {key: stream for key, stream in streams.items() if key not in keys}
