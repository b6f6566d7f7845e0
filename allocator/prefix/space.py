"""``ChunkSpace``: a store's side of the heap: room for new chunks, and freeing what has ended."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.errors import BlockInUseError, ClosedError, DoubleFreeError
from kvheap.prefix.index import Hold, PendingStore, PrefixIndex

if TYPE_CHECKING:
    from kvheap.addresses.address_manager import AddressManager
    from kvheap.heaps.tensor_allocator import AllocatorStats
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
        """Rounds sizes up to the alignment."""

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
    """A heap, and the index of the chunks that live in it; all of one layout.

    Two lists, ``unclaimed`` and ``ended``, keep what an exception would otherwise lose. Every call
    of a store begins with :meth:`settle`, which empties them.

    Args:
        heap: where the chunks live.
        layout: what each chunk holds.
        index: which chunks there are; its values are the chunks.

    Attributes:
        heap, layout, index: as given.
        evicted_chunks: how many chunks were evicted so far.
        unclaimed: handles of the index that have not reached a user yet; ``settle`` ends them.
        ended: lists of chunks that the index returned; ``settle`` frees them.
    """

    def __init__(
        self, heap: ChunkHeap, layout: BlockLayout, index: PrefixIndex[K, MemoryObj]
    ) -> None:
        for method in ("batched_allocate", "batched_free", "max_batch"):
            if not callable(getattr(heap, method, None)):
                raise TypeError(f"heap must be a TensorMemoryAllocator, got {heap!r}")
        if not isinstance(layout, BlockLayout):
            raise TypeError(
                f"layout must be a BlockLayout, got {layout!r}: make one with "
                f"BlockLayout.of(shapes, dtypes, fmt)"
            )
        self.heap = heap
        self.layout = layout
        self.index = index
        self.evicted_chunks = 0
        self.unclaimed: list[Hold[K, MemoryObj] | PendingStore[K, MemoryObj]] = []
        self.ended: list[list[tuple[K, MemoryObj]]] = []
        self.chunk_bytes = heap.address_manager.compute_aligned_size(layout.size_bytes)
        """Bytes that a chunk takes in the heap."""

    # -- room ----------------------------------------------------------------------------------

    def allocate(
        self,
        num_chunks: int,
        make_batch: Callable[[], MemoryBatch | None],
        poll: Callable[[], object],
    ) -> MemoryBatch:
        """Make a batch of new chunks, and evict others where there is no room for it.

        Freed bytes that wait for a stream count as room: ``make_batch`` waits for them.

        Args:
            num_chunks: chunks of the batch.
            make_batch: allocates it; None when it does not fit.
            poll: called when too little can be evicted: it may make pending chunks ready.

        Raises:
            RequestTooLargeError: there is no room; too little can be evicted, or what was freed
                has waited for its stream in vain.
        """
        stats = self.heap.stats()
        wanted_bytes = num_chunks * self.chunk_bytes
        missing_bytes = wanted_bytes - stats.free_bytes - stats.pending_bytes
        if missing_bytes > 0:
            self._evict(missing_bytes, num_chunks, poll)
        while True:
            batch = make_batch()
            if batch is not None:
                return batch
            # Free bytes are scattered among the heap's other users, or still wait for a stream.
            pending_bytes = self.heap.stats().pending_bytes
            usable_bytes = self._usable_bytes() + pending_bytes
            if usable_bytes >= wanted_bytes and pending_bytes:
                raise self._too_large(num_chunks)
            self._evict(max(wanted_bytes - usable_bytes, 1), num_chunks, poll)

    def _usable_bytes(self) -> int:
        """Free bytes in extents that hold a chunk. O(free extents)."""
        layout = self.layout
        return self.chunk_bytes * self.heap.max_batch(list(layout.shapes), list(layout.dtypes))

    def _evict(self, num_bytes: int, num_chunks: int, poll: Callable[[], object]) -> None:
        """Evict and free chunks of so many bytes, to make room for ``num_chunks``."""
        if self.index.evictable_bytes < num_bytes:
            poll()
        if self.index.evictable_bytes < num_bytes:
            raise self._too_large(num_chunks)
        self.ended.append(self.index.evict(num_bytes) or [])
        self.evicted_chunks += len(self.ended[-1])
        self.settle()

    def _too_large(self, num_chunks: int) -> RequestTooLargeError:
        heap, index = self.heap.stats(), self.index.stats()
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

    # -- freeing -------------------------------------------------------------------------------

    def settle(self) -> None:
        """End the handles that reached no user, and free what has ended by one ``batched_free``."""
        for handle in self.unclaimed:
            self.ended.append(handle.release() if isinstance(handle, Hold) else handle.abort())
        self.unclaimed.clear()
        self.ended.append(self.index.take_ended())  # by ``with`` blocks and interrupted changes
        ended = [pair for pairs in self.ended for pair in pairs]
        if ended:
            try:
                self.heap.batched_free([chunk for _, chunk in ended])
            except (BlockInUseError, DoubleFreeError):
                self.ended = [ended]
                _drop_references(ended)
            except ClosedError:  # the bytes are gone with the heap
                pass
        self.ended.clear()


def _drop_references(ended: list[tuple[K, MemoryObj]]) -> None:
    """Drop the store's reference to each chunk, because others pin some of them or freed them."""
    while ended:
        _, chunk = ended.pop()  # first, so that no reference is dropped twice
        if chunk.is_valid():
            chunk.ref_count_down()
