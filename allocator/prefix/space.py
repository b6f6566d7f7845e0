"""``ChunkSpace``: a store's side of the heap: room for new chunks, and freeing what has ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import torch

from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes, as_block_layout
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.errors import BlockInUseError, ClosedError, DoubleFreeError
from kvheap.prefix.books import Books
from kvheap.prefix.index import PrefixIndex

if TYPE_CHECKING:
    from kvheap.addresses.address_manager import AddressManager
    from kvheap.heaps.allocator_stats import AllocatorStats
    from kvheap.kernels.chunk_shape import ChunkShape
    from kvheap.kernels.paged_layout import PagedKVCache
    from kvheap.kernels.paged_slots import Slots

__all__ = ["ChunkHeap", "ChunkSpace", "RequestTooLargeError"]

K = TypeVar("K", bound=Hashable)


class RequestTooLargeError(RuntimeError):
    """Chunks do not fit the heap, even after everything that may be evicted; none was stored.

    Attributes:
        num_chunks: chunks that were to be stored.
        chunk_bytes: bytes that each takes in the heap.
        heap_bytes: bytes of the heap.
        free_bytes: free bytes of the heap.
        pending_bytes: freed bytes that wait for a stream.
        evictable_bytes: bytes of stored chunks that may be evicted.
        in_use_bytes: bytes of the store's chunks that are held or whose store has not ended.
        others_bytes: bytes that the heap has allocated for others than the store.
    """

    def __init__(
        self,
        num_chunks: int,
        chunk_bytes: int,
        heap_bytes: int,
        free_bytes: int,
        pending_bytes: int,
        evictable_bytes: int,
        in_use_bytes: int,
        others_bytes: int,
    ) -> None:
        super().__init__(
            f"no room for {num_chunks} more chunks of {chunk_bytes} bytes: of the heap's "
            f"{heap_bytes} bytes, {free_bytes} are free, {pending_bytes} wait for streams, and "
            f"only {evictable_bytes} may be evicted; {in_use_bytes} are of chunks in use, and "
            f"others hold {others_bytes}"
        )
        self.num_chunks = num_chunks
        self.chunk_bytes = chunk_bytes
        self.heap_bytes = heap_bytes
        self.free_bytes = free_bytes
        self.pending_bytes = pending_bytes
        self.evictable_bytes = evictable_bytes
        self.in_use_bytes = in_use_bytes
        self.others_bytes = others_bytes

    def __reduce__(self) -> tuple[type[RequestTooLargeError], tuple[int, ...]]:
        return type(self), (
            self.num_chunks,
            self.chunk_bytes,
            self.heap_bytes,
            self.free_bytes,
            self.pending_bytes,
            self.evictable_bytes,
            self.in_use_bytes,
            self.others_bytes,
        )


class ChunkHeap(Protocol):
    """What a store needs of its heap; ``TensorMemoryAllocator`` and its subclasses have it."""

    @property
    def device(self) -> torch.device:
        """Where the chunks' bytes are."""

    @property
    def address_manager(self) -> AddressManager:
        """Rounds sizes up to the alignment, and knows the free extents."""

    def batched_allocate(
        self,
        shape: Shapes,
        dtype: Dtypes,
        batch_size: int,
        fmt: MemoryFormat = ...,
        source: torch.Tensor | None = None,
    ) -> MemoryBatch | None:
        """Allocate blocks and fill them; None when they do not fit."""

    def batched_store(
        self, cache: PagedKVCache, slots: Slots, chunk_tokens: int = ..., fmt: MemoryFormat = ...
    ) -> MemoryBatch | None:
        """Allocate chunks and fill them from an engine's cache; None when they do not fit."""

    def batched_free(self, objs: Iterable[MemoryObj]) -> None:
        """Free blocks, all or none."""

    def max_batch(self, shape: Shapes, dtype: Dtypes) -> int:
        """How many blocks one ``batched_allocate`` could have now."""

    def stats(self) -> AllocatorStats:
        """The heap's counters."""


class ChunkSpace(Generic[K]):
    """A heap, and the books of the chunks that live in it; all of one layout.

    The chunks that have ended stay in the books until their bytes are free, so that no exception
    loses one. Every call of a store begins with :meth:`enter`, which frees them.

    Args:
        heap: where the chunks live.
        layout: what each chunk holds.
        index: which chunks there are; its values are the chunks. Nobody else changes it.

    Attributes:
        heap, layout: as given.
        books: the chunks by state.
        turn: whose turn it is to change anything.
        evicted_chunks: how many chunks were evicted so far.
    """

    def __init__(
        self, heap: ChunkHeap, layout: BlockLayout | ChunkShape, index: PrefixIndex[K, MemoryObj]
    ) -> None:
        for method in ("batched_allocate", "batched_free", "max_batch"):
            if not callable(getattr(heap, method, None)):
                raise TypeError(f"heap must be a TensorMemoryAllocator, got {heap!r}")
        layout = as_block_layout("layout", layout)
        self.heap = heap
        self.layout = layout
        self.books = index.books
        self.turn = index.books.turn
        self.evicted_chunks = 0
        self.chunk_bytes = heap.address_manager.compute_aligned_size(layout.size_bytes)
        """Bytes that a chunk takes in the heap."""

    # -- turns ---------------------------------------------------------------------------------

    def enter(self, frame: FrameType) -> Books[K, MemoryObj]:
        """Begin a call that changes something, see ``Books.enter``, and free what has ended."""
        books = self.books.enter(frame)
        if books.ended:
            self.free_ended()
        return books

    def try_enter(self, frame: FrameType) -> bool:
        """:meth:`enter` if no other call is in progress; returns whether it did."""
        if not self.books.try_enter(frame):
            return False
        if self.books.ended:
            self.free_ended()
        return True

    def end_turn(self, frame: FrameType) -> None:
        """End the turn of ``frame``, and do what was left for it meanwhile."""
        self.turn.give_up(frame)
        if self.turn.waiting:
            self.look()

    def look(self) -> None:
        """Free what has ended, for a call that only looks, unless a call is in progress."""
        if self.books.ended or self.books.needs_settling:
            try:
                if self.try_enter(sys._getframe()):
                    self.free_ended()
            finally:
                self.turn.give_up(sys._getframe())

    def free_ended(self) -> None:
        """Free the chunks that have ended by one ``batched_free``; at the end of each turn."""
        books = self.books
        if self.turn.waiting:
            self.turn.do_what_waits()
        while books.ended:
            chunks = [chunk.value for chunk in books.ended]
            try:
                self.heap.batched_free(chunks)
            except (BlockInUseError, DoubleFreeError):
                self._drop_references()
            except ClosedError:  # the bytes are gone with the heap
                books.ended, books.ended_bytes = {}, 0
            else:
                books.ended, books.ended_bytes = {}, 0
            if self.turn.waiting:
                self.turn.do_what_waits()

    def _drop_references(self) -> None:
        """Drop the store's reference to each chunk, because others pin some or freed them."""
        books = self.books
        while books.ended:
            chunk, _ = books.ended.popitem()  # first, so that no reference is dropped twice
            books.ended_bytes -= chunk.size_bytes
            if chunk.value.is_valid():
                chunk.value.ref_count_down()

    # -- room ----------------------------------------------------------------------------------

    def allocate(
        self,
        num_chunks: int,
        make_batch: Callable[[], MemoryBatch | None],
        check: Callable[[], object],
        poll: Callable[[], object],
    ) -> MemoryBatch:
        """Make a batch of new chunks, and evict others where there is no room for it.

        Freed bytes that wait for a stream count as room: ``make_batch`` waits for them. Nothing is
        evicted where it would not make enough room.

        Args:
            num_chunks: chunks of the batch.
            make_batch: allocates it; None when it does not fit.
            check: raises if ``make_batch`` would raise; called before anything is evicted.
            poll: called when too little can be evicted: it may make pending chunks ready.

        Raises:
            RequestTooLargeError: there is no room; too little can be evicted, or what was freed
                has waited for its stream in vain.
        """
        stats = self.heap.stats()
        missing_bytes = num_chunks * self.chunk_bytes - stats.free_bytes - stats.pending_bytes
        is_checked = False
        while True:
            if missing_bytes > 0:
                if not is_checked:
                    check()
                    self._require_room(num_chunks, poll)
                    is_checked = True
                self._evict(missing_bytes, num_chunks)
            batch = make_batch()
            if batch is not None:
                return batch
            # Free bytes are scattered among the heap's other users, or still wait for a stream.
            pending_bytes = self.heap.stats().pending_bytes
            usable_bytes = self._usable_bytes() + pending_bytes
            wanted_bytes = num_chunks * self.chunk_bytes
            if usable_bytes >= wanted_bytes and pending_bytes:
                raise self._too_large(num_chunks)
            missing_bytes = max(wanted_bytes - usable_bytes, 1)

    def _usable_bytes(self) -> int:
        """Free bytes in extents that hold a chunk. O(free extents)."""
        layout = self.layout
        return self.chunk_bytes * self.heap.max_batch(list(layout.shapes), list(layout.dtypes))

    def _require_room(self, num_chunks: int, poll: Callable[[], object]) -> None:
        """Raise if there is not enough room even after all evictions.

        Every evicted chunk makes room for one chunk, at least where it was, unless others hold it.
        Where that does not suffice, holes beside evicted chunks may count too: O(n log n).

        Raises:
            RequestTooLargeError: there is not enough room.
        """
        if self.books.evictable_bytes >= num_chunks * self.chunk_bytes:
            return
        for attempt in (1, 2):
            stats = self.heap.stats()
            usable_bytes = self._usable_bytes() + stats.pending_bytes
            missing_bytes = num_chunks * self.chunk_bytes - usable_bytes
            if missing_bytes <= self.books.evictable_bytes:
                return
            if attempt == 1:
                poll()
        waiting = stats.pending_bytes // self.chunk_bytes
        if self._places_after_evictions() + waiting < num_chunks:
            raise self._too_large(num_chunks)

    def _places_after_evictions(self) -> int:
        """How many chunks would fit if everything that may go had gone."""
        idle = [chunk.value for chunk in self.books.ready.values() if not chunk.holds]
        sole = [chunk.address for chunk in idle if chunk.ref_count == 1 and not chunk.pin_count]
        freed = np.array(sole, np.int64).reshape(-1, 1)
        freed = np.hstack([freed, np.full_like(freed, self.chunk_bytes)])
        extents = np.vstack([self.heap.address_manager.snapshot(), freed])
        extents = extents[np.argsort(extents[:, 0])]
        starts, ends = extents[:, 0], extents.sum(axis=1)
        if not len(extents):
            return 0
        begins = np.flatnonzero(np.append(True, starts[1:] != ends[:-1]))
        sizes = np.add.reduceat(extents[:, 1], begins)
        return int((sizes // self.chunk_bytes).sum())

    def _evict(self, num_bytes: int, num_chunks: int) -> None:
        """Evict and free chunks of so many bytes, to make room for ``num_chunks``."""
        books = self.books
        if books.evictable_bytes < num_bytes:
            num_bytes = books.evictable_bytes
        if not num_bytes:
            raise self._too_large(num_chunks)
        num_before = len(books.ended)
        books.evict(num_bytes, [])
        self.evicted_chunks += len(books.ended) - num_before
        self.free_ended()

    def _too_large(self, num_chunks: int) -> RequestTooLargeError:
        heap, index = self.heap.stats(), self.books.stats()
        own_bytes = index.ready_bytes + index.pending_bytes + index.removed_bytes
        return RequestTooLargeError(
            num_chunks,
            self.chunk_bytes,
            heap.heap_bytes,
            heap.free_bytes,
            heap.pending_bytes,
            index.evictable_bytes,
            own_bytes - index.evictable_bytes,
            heap.allocated_bytes - heap.pending_bytes - own_bytes,
        )
