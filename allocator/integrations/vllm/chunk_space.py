"""``ChunkSpace``: addresses for chunks of unlike sizes, without holes between them.

A heap of unlike chunks fragments: what an 8 MiB chunk leaves serves a 7 MiB chunk, and the last MiB
serves nobody. After some turnovers 5 to 10 % of the heap are such holes. Therefore chunks of one
size share *spans*: extents of one length, which an ``AddressManager`` hands out. A span serves one
size at a time, and its length is chosen so that every size fills it nearly. What one chunk leaves,
the next of its size takes; a span that is empty can serve another size. Where free places of the
wrong sizes add up, the emptiest span can be emptied (:meth:`ChunkSpace.emptiest`).

Needs no vLLM.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.extents import Int64Array
from kvheap.errors import HeapCorruptionError
from kvheap.integrations.vllm.groups import CHUNK_ALIGN_BYTES

__all__ = ["PENDING", "Chunk", "ChunkSpace", "Span", "place_bytes_of", "span_bytes_of"]

K = TypeVar("K")

PENDING = -1
"""What a chunk has for a number of loads until its store has ended."""

MOST_PLACES = 256
"""Of the largest size in one span. Longer spans are emptied at a higher price."""

FEWEST_SPANS = 64
"""In a heap, if it has room for so many chunks: so that sizes can share it in any proportion."""

ACCEPTED_REST = 1 / 256
"""Of a span: what a size may leave unused at its end, if a shorter span leaves more."""


NEARLY_EQUAL = 1 / 64
"""Of a place: what a chunk may leave unused to share the spans of a slightly larger size.

The states of a hybrid model have 98 to 99.9 % of the bytes of its attention pages. Spans of their
own would cost more: in 64 GiB of Qwen3-Next's chunks, 0.9 % instead of 0.2 %.
"""


class Chunk(Generic[K]):
    """A stored chunk.

    Attributes:
        key: what it is found by.
        address: where it begins in every worker's heap.
        span: where it lies.
        group: the index of its group.
        chunk_bytes: the bytes that are copied.
        loads: how many loads read it now; ``PENDING`` until its store has ended.
        used: the store's clock when it was last used.
    """

    __slots__ = ("address", "chunk_bytes", "group", "key", "loads", "span", "used")

    def __init__(
        self, key: K, span: Span[K], address: int, group: int, chunk_bytes: int, used: int
    ) -> None:
        self.key = key
        self.span = span
        self.address = address
        self.group = group
        self.chunk_bytes = chunk_bytes
        self.loads = PENDING
        self.used = used
        span.chunks[address] = self

    def __repr__(self) -> str:
        """Where it is, and its state."""
        state = "pending" if self.loads == PENDING else f"loads={self.loads}"
        return f"Chunk({self.key!r}, [{self.address}, +{self.chunk_bytes}), {state})"


class Span(Generic[K]):
    """An extent that serves chunks of one size.

    Attributes:
        start, length: of the extent, in bytes.
        size: bytes of each place.
        num_places: how many it has.
        free: addresses of the free places, the highest first.
        chunks: the chunks in the others, by address.
    """

    __slots__ = ("chunks", "free", "length", "num_places", "size", "start")

    def __init__(self, start: int, length: int, size: int) -> None:
        self.start = start
        self.length = length
        self.size = size
        self.num_places = length // size
        last = start + (self.num_places - 1) * size
        self.free = list(range(last, start - 1, -size))
        self.chunks: dict[int, Chunk[K]] = {}

    def __repr__(self) -> str:
        """Its extent and how full it is."""
        return (
            f"Span([{self.start}, +{self.length}), {len(self.chunks)} chunks and "
            f"{len(self.free)} free places of {self.size})"
        )


Place = tuple[Span[K], int]
"""A span, and the address of one of its places."""


class ChunkSpace(Generic[K]):
    """The address space of one heap in spans.

    Args:
        heap_bytes: bytes of the heap, rounded down to ``CHUNK_ALIGN_BYTES``.
        sizes: the sizes of all chunks to come, multiples of ``CHUNK_ALIGN_BYTES``.
        segment_bytes: no chunk crosses a multiple of this many bytes (a registration of pinned
            memory, which no copy may leave); None: there are no such borders.

    Raises:
        ValueError: ``heap_bytes`` is negative or 2**63 or more, or ``segment_bytes`` is not a
            positive multiple of ``CHUNK_ALIGN_BYTES``.

    >>> space = ChunkSpace(1 << 20, {4096, 1024})
    >>> space.span_bytes, [address for span, address in space.take(1024, 2)]
    (4096, [0, 1024])
    """

    def __init__(
        self, heap_bytes: int, sizes: Iterable[int], segment_bytes: int | None = None
    ) -> None:
        if segment_bytes is not None and (segment_bytes <= 0 or segment_bytes % CHUNK_ALIGN_BYTES):
            raise ValueError(
                f"segment_bytes must be a positive multiple of {CHUNK_ALIGN_BYTES}, "
                f"got {segment_bytes}"
            )
        self.heap_bytes = heap_bytes // CHUNK_ALIGN_BYTES * CHUNK_ALIGN_BYTES
        """Bytes of the heap that can be allocated."""
        self._segment_bytes = segment_bytes
        self._sizes = sorted(sizes)
        longest = min(self.heap_bytes, segment_bytes or self.heap_bytes)
        self.span_bytes = span_bytes_of(longest, self._sizes)
        """The length of a span; the last one of a heap or segment may be shorter."""
        self.clear()

    def clear(self) -> None:
        """Make every byte free."""
        step = self._segment_bytes or self.heap_bytes
        self._addresses = AddressManager(0, CHUNK_ALIGN_BYTES)
        for start in range(0, self.heap_bytes, step):
            self._addresses.sbrk(min(step, self.heap_bytes - start), new_segment=True)
        self._spans: dict[int, Span[K]] = {}
        self._open: dict[int, dict[int, Span[K]]] = {size: {} for size in self._sizes}
        self.used_bytes = 0
        """Bytes of the places that are taken."""
        self.idle_bytes = 0
        """Bytes of the free places of all spans."""

    @property
    def free_bytes(self) -> int:
        """Bytes that no chunk has. O(1)."""
        return self.heap_bytes - self.used_bytes

    # -- take and give back --------------------------------------------------------------------

    def take(self, size: int, count: int) -> list[Place[K]]:
        """As many free places of ``size`` as there are, at most ``count``. O(result).

        Takes free places of the oldest spans first, so that younger ones become empty, then new
        spans while there are free ones.
        """
        places: list[Place[K]] = []
        open_spans = self._open[size]
        while len(places) < count:
            if open_spans:
                span = next(iter(open_spans.values()))
            else:
                new = self._new_span(size)
                if new is None:
                    break
                span = new
            free, wanted = span.free, count - len(places)
            if wanted < len(free):
                taken = free[-wanted:]
                del free[-wanted:]
            else:
                taken = free[:]
                free.clear()
                del open_spans[span.start]
            places += [(span, address) for address in reversed(taken)]
        self.used_bytes += size * len(places)
        self.idle_bytes -= size * len(places)
        return places

    def _new_span(self, size: int) -> Span[K] | None:
        """A span of free places; None: the heap has none left."""
        heap = self._addresses.stats()
        length = min(self.span_bytes, heap.largest_free_bytes)
        if length < size:
            return None
        start, length = self._addresses.allocate(length)
        span = self._spans[start] = self._open[size][start] = Span(start, length, size)
        self.idle_bytes += span.num_places * size
        return span

    def give_back(self, places: Iterable[Place[K]]) -> None:
        """Free places that no chunk is in. An empty span can serve another size. O(N)."""
        for span, address in places:
            free, size = span.free, span.size
            self.used_bytes -= size
            self.idle_bytes += size
            if not free:
                free.append(address)
                self._open[size][span.start] = span
            elif free[-1] > address:
                free.append(address)
            else:
                insort(free, address, key=int.__neg__)
            if len(free) == span.num_places:
                del self._spans[span.start], self._open[size][span.start]
                self.idle_bytes -= size * span.num_places
                self._addresses.free(span.start, span.length)

    # -- rearrange -----------------------------------------------------------------------------

    def emptiest(self, size: int, may_go: Callable[[Chunk[K]], bool]) -> Span[K] | None:
        """The span of another size that is emptied at the lowest price. O(spans + chunks of it).

        Args:
            size: what is missing; the span is long enough for it, and serves another size.
            may_go: whether a chunk may be evicted.

        Returns:
            Of the spans whose chunks may all go, the one with the fewest bytes of chunks, among
            equals the one whose youngest chunk is oldest; None: there is none.
        """
        found: Span[K] | None = None
        best = (self.heap_bytes + 1, 0)
        for span in self._spans.values():
            price = len(span.chunks) * span.size
            if span.size == size or span.length < size or price > best[0]:
                continue
            if len(span.chunks) + len(span.free) < span.num_places:
                continue  # a place is taken by a chunk that is still to come
            chunks = span.chunks.values()
            cost = (price, max([chunk.used for chunk in chunks], default=0))
            if cost < best and all(map(may_go, chunks)):
                found, best = span, cost
        return found

    # -- another process -----------------------------------------------------------------------

    def spans_of(self, chunks: Iterable[Chunk[K]]) -> Int64Array:
        """The spans that chunks lie in, as :meth:`restore` takes them: int64 ``[S, 3]``."""
        used = {chunk.span.start for chunk in chunks}
        rows = [(s.start, s.length, s.size) for s in self._spans.values() if s.start in used]
        return np.array(rows, np.int64).reshape(-1, 3)

    def restore(self, spans: Int64Array, addresses: Int64Array, sizes: Int64Array) -> list[Span[K]]:
        """Make spans again as an earlier process had them. O(N log N) for N places.

        The chunks are then entered into the spans, and :meth:`fill` is called.

        Args:
            spans: start, length and size of each, int64 ``[S, 3]``.
            addresses: the places that have chunks, int64 ``[N]``.
            sizes: bytes of each place, int64 ``[N]``.

        Returns:
            The span of each place.

        Raises:
            ValueError: a span is none of this heap, or a place none of a span; it is named.
                Nothing changes.
        """
        starts, lengths, of_places = spans.T
        is_wrong = ~np.isin(of_places, self._sizes) | (lengths < of_places)
        is_wrong |= lengths > self.span_bytes
        if is_wrong.any():
            at = int(np.argmax(is_wrong))
            raise ValueError(
                f"a span of {lengths[at]} bytes for places of {of_places[at]} is none of this "
                f"heap, whose spans have {self.span_bytes} bytes and whose sizes are {self._sizes}"
            )
        by_start = np.argsort(starts, kind="stable")
        ordered = starts[by_start]
        holder = np.searchsorted(ordered, addresses, side="right") - 1
        if len(addresses) and (not len(starts) or holder.min() < 0):
            raise ValueError(f"the place at {addresses.min()} lies in no span")
        row = by_start[holder]
        offsets = addresses - starts[row]
        is_wrong = (of_places[row] != sizes) | (offsets % sizes != 0)
        is_wrong |= offsets + sizes > lengths[row]
        if is_wrong.any():
            at = int(np.argmax(is_wrong))
            raise ValueError(f"{addresses[at]} is no place of {sizes[at]} bytes of a span")
        places, counts = np.unique(addresses, return_counts=True)
        if len(places) < len(addresses):
            raise ValueError(f"the place at {places[counts.argmax()]} has two chunks")
        if len(np.unique(row)) < len(starts):
            raise ValueError("a span without a chunk is recorded")
        self._addresses.reserve(starts, lengths)
        made: list[Span[K]] = [Span(*numbers) for numbers in spans.tolist()]
        self._spans = {span.start: span for span in made}
        self.used_bytes = int(sizes.sum())
        return [made[at] for at in row.tolist()]

    def fill(self) -> None:
        """Take the places of the chunks that have been entered into restored spans. O(places)."""
        for span in self._spans.values():
            span.free = [address for address in span.free if address not in span.chunks]
            self.idle_bytes += span.size * len(span.free)
            if span.free:
                self._open[span.size][span.start] = span

    # -- watch ---------------------------------------------------------------------------------

    def largest_free(self) -> int:
        """The most bytes that one chunk could take. O(sizes)."""
        free = [size for size, spans in self._open.items() if spans]
        return max([self._addresses.stats().largest_free_bytes, *free])

    def num_spans(self) -> int:
        """How many spans serve a size. O(1)."""
        return len(self._spans)

    def check(self, chunks: Sequence[Chunk[K]]) -> None:
        """Check that every byte is free or of exactly one of these chunks. O(n log n).

        Raises:
            HeapCorruptionError: it is not; the message says where.
        """
        self._addresses.check()
        extents = [(s.start, s.length, repr(s)) for s in self._spans.values()]
        extents += [(start, size, "a hole") for start, size in self._addresses.snapshot().tolist()]
        _require_tiling(extents, 0, self.heap_bytes)
        of_span: dict[int, list[Chunk[K]]] = {start: [] for start in self._spans}
        for chunk in chunks:
            if self._spans.get(chunk.span.start) is not chunk.span:
                raise HeapCorruptionError(f"{chunk} lies in {chunk.span}, which has been given up")
            of_span[chunk.span.start].append(chunk)
        used = idle = 0
        for span in self._spans.values():
            held = of_span[span.start]
            places = [(chunk.address, span.size, repr(chunk)) for chunk in held]
            places += [(address, span.size, "a free place") for address in span.free]
            _require_tiling(places, span.start, span.start + span.num_places * span.size)
            used += len(held) * span.size
            idle += len(span.free) * span.size
            if (
                span.chunks != {chunk.address: chunk for chunk in held}
                or any(chunk.chunk_bytes > span.size for chunk in held)
                or span.free != sorted(span.free, reverse=True)
                or not held
                or (span.start in self._open[span.size]) != bool(span.free)
            ):
                raise HeapCorruptionError(f"{span} has wrong books: {held}, free {span.free}")
        if (used, idle) != (self.used_bytes, self.idle_bytes):
            raise HeapCorruptionError(
                f"{self.used_bytes} used and {self.idle_bytes} idle bytes, but spans have {used} "
                f"and {idle}"
            )


def place_bytes_of(sizes: Iterable[int]) -> dict[int, int]:
    """By size of chunks, the bytes of their places: those of the largest nearly equal size.

    >>> place_bytes_of([1000, 990, 500])
    {1000: 1000, 990: 1000, 500: 500}
    """
    places: dict[int, int] = {}
    place = 0
    for size in sorted(sizes, reverse=True):
        if size < place * (1 - NEARLY_EQUAL) or not place:
            place = size
        places[size] = place
    return places


def span_bytes_of(longest: int, sizes: Sequence[int]) -> int:
    """The length of the spans that chunks of these sizes share.

    The shortest that every size fills but for ``ACCEPTED_REST``; if there is none of at most
    ``MOST_PLACES`` of the largest size, and ``FEWEST_SPANS`` of them in the heap, the one that the
    worst size fills best.

    Args:
        longest: the most bytes that a span can have.
        sizes: the sizes in bytes, ascending.

    >>> span_bytes_of(1 << 30, [8 << 10, 9 << 10, 10 << 10]) >> 10  # 35, 31 and 28 places
    280
    >>> span_bytes_of(1 << 30, [1 << 20]) >> 20
    16
    """
    largest = sizes[-1]
    if len(sizes) == 1:
        return max(min(16 * largest, longest // largest * largest), largest)
    most = max(min(MOST_PLACES * largest, longest // FEWEST_SPANS), largest)
    lengths = sorted({k * size for size in sizes for k in range(largest // size, most // size + 1)})
    best, least = largest, 1.0
    for length in lengths:
        if length >= largest:
            rest = max([length % size for size in sizes]) / length
            if rest <= ACCEPTED_REST:
                return length
            if rest < least:
                best, least = length, rest
    return best


def _require_tiling(extents: list[tuple[int, int, str]], start: int, end: int) -> None:
    """Raise unless the extents, with what they are, cover ``[start, end)`` once."""
    at = start
    for address, size, what in sorted(extents):
        if address != at:
            raise HeapCorruptionError(f"{what} begins at {address}, what lies before ends at {at}")
        at = address + size
    if at != end:
        raise HeapCorruptionError(f"what begins at {start} ends at {at} instead of {end}")
