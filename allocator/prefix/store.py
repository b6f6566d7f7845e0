"""``PrefixStore``: chunks of KV in a heap, found by key, evicted when the heap is full.

>>> import torch
>>> from kvheap import BlockLayout, MemoryFormat, TensorMemoryAllocator
>>> heap = TensorMemoryAllocator(torch.zeros(3 * 4096, dtype=torch.uint8), on_full=None)
>>> layout = BlockLayout.of([2, 1, 512, 2], torch.float16, MemoryFormat.KV_2LTD)
>>> store = PrefixStore(heap, layout)
>>> store.store(["a", "b"], torch.ones(2, 2, 1, 512, 2, dtype=torch.float16))
>>> store.prefix_length(["a", "b", "c"])
2
>>> with store.hold(["a"]) as hold:  # evicts b, which is not held
...     store.store(["x", "y"], torch.zeros(2, 2, 1, 512, 2, dtype=torch.float16))
...     hold.chunks[0].tensor.sum(), store.state("b")
(tensor(2048., dtype=torch.float16), 'absent')
>>> store.close()
>>> heap.leaks()
()
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.heap import BlockObjects
from kvheap.blocks.memory_batch import MemoryObj
from kvheap.errors import ClosedError
from kvheap.heaps.block_tensors import require_matching
from kvheap.kernels.arguments import require_tensor
from kvheap.kernels.untraced import untraced_class
from kvheap.prefix.books import Books, IndexStats
from kvheap.prefix.index import ChunkState, PrefixIndex
from kvheap.prefix.keys import as_key_error, require_key_list, require_keys
from kvheap.prefix.policies.base import EvictionPolicy
from kvheap.prefix.sources import engine_chunk_tokens, require_blocks, require_slots
from kvheap.prefix.space import ChunkHeap, ChunkSpace
from kvheap.prefix.store_handles import ChunkHold, StoreInFlight
from kvheap.prefix.storing import Storing
from kvheap.renamed import renamed
from kvheap.transfer.moves import offload, require_movable

if TYPE_CHECKING:
    from typing import Self

    from kvheap.blocks.heap import Heap
    from kvheap.device.directions import Path
    from kvheap.kernels.chunk_shape import ChunkShape
    from kvheap.kernels.paged_layout import PagedKVCache
    from kvheap.kernels.paged_slots import Slots

__all__ = ["PrefixStore", "StoreStats"]

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class StoreStats(IndexStats):
    """Chunks and bytes of a store by state, and counters, at one moment.

    Attributes:
        stores_in_flight: stores that were begun and have not ended.
        evicted_chunks, evicted_bytes: evicted so far.
    """

    stores_in_flight: int
    evicted_chunks: int
    evicted_bytes: int


@untraced_class
class PrefixStore(Generic[K]):
    """A heap and a ``PrefixIndex``: chunks of one layout under keys, their bytes included.

    A look-up finds the chunks of a request's prefix, a hold protects them while they are read,
    and what is missing is stored in one batch. Where the heap has no room, chunks are evicted
    first and freed by one ``batched_free``. Freed bytes that wait for a stream count as room: the
    allocation waits for them as long as the heap's ``stream_wait_s`` says, and nothing else is
    evicted in their place.

    The heap may have other users: the store evicts until its chunks fit beside theirs, or raises.

    The store has one reference to each of its chunks. Whoever pins a chunk or adds a reference
    keeps the bytes alive beyond the chunk's eviction or removal. Nobody else may free a chunk.

    An exception in the middle of a call, for example a ``KeyboardInterrupt``, loses no bytes: what
    the call had allocated or evicted is freed by the next call, or reclaimed by the heap. A store
    that is dropped without :meth:`close` drops its chunks, which the heap reclaims.

    Not thread-safe: it belongs to one scheduler.

    =============  ===========================================================================
    purpose        methods
    =============  ===========================================================================
    look up        ``prefix_length``, ``state``, ``in``, ``len``, ``missing``, ``chunks``,
                   ``addresses``
    use            ``touch``, ``hold``
    store          ``store``, ``store_from_engine``; for copies that end later ``begin``,
                   ``offload`` and ``poll``
    end            ``remove``, ``clear``, ``close``
    watch          ``stats``, ``check``
    =============  ===========================================================================

    Complexities are for N keys; P is what the policy takes for one chunk, see ``PrefixIndex``.
    Wherever keys are taken, a text or a tensor raises ``TypeError``: its parts would be the keys.

    Args:
        heap: where the chunks live.
        layout: what each chunk holds: a ``BlockLayout``, or ``cache.chunk_layout(...)``.
        policy: the order of eviction, a new object or the name of one (``POLICIES``); None:
            ``LRU()``. See :mod:`kvheap.prefix.policies`.

    Raises:
        ValueError: the policy was given to another index or store.
    """

    watched_calls: Any = None
    """What :mod:`kvheap.metrics` counts of this store's look-ups; None: nothing."""

    def __init__(
        self,
        heap: ChunkHeap,
        layout: BlockLayout | ChunkShape,
        policy: EvictionPolicy | str | None = None,
    ) -> None:
        self._index: PrefixIndex[K, MemoryObj] = PrefixIndex(policy, name="PrefixStore")
        self._space = ChunkSpace(heap, layout, self._index)
        self._storing = Storing(self._space)
        self._closed = False

    @property
    def heap(self) -> ChunkHeap:
        """Where the chunks live."""
        return self._space.heap

    @property
    def layout(self) -> BlockLayout:
        """What each chunk holds."""
        return self._space.layout

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has ended."""
        return self._closed

    # -- look up -------------------------------------------------------------------------------

    def prefix_length(self, keys: Iterable[K]) -> int:
        """How many leading keys are ready: what a request need not compute. O(result)."""
        self._require_open()
        return self._index.prefix_length(keys)

    def state(self, key: K) -> ChunkState:
        """Whether the chunk of a key is ready, pending or absent. O(1)."""
        self._require_open()
        return self._index.state(key)

    def __contains__(self, key: K) -> bool:
        """Whether the chunk of a key is ready. O(1)."""
        return key in self._index

    def __len__(self) -> int:
        """How many chunks are ready. O(1)."""
        return len(self._index)

    def missing(self, keys: Iterable[K]) -> list[K]:
        """The keys that are neither ready nor pending, each once: what is to be stored. O(N)."""
        self._require_open()
        return self._index.missing(keys)

    def chunks(self, keys: Iterable[K]) -> list[MemoryObj]:
        """Ready chunks, in the order of the keys. O(N).

        The next store may evict them unless they are held.

        Raises:
            KeyError: a key, which it names, is not ready.
            ClosedError: the store is closed.
        """
        self._require_open()
        return self._index.values(keys)

    def addresses(self, keys: Iterable[K]) -> npt.NDArray[np.int64]:
        """Where ready chunks are in the heap, int64 ``[N]``, in the order of the keys. O(N).

        Raises:
            KeyError: a key, which it names, is not ready.
            ClosedError: the store is closed.
        """
        return np.array([chunk.address for chunk in self.chunks(keys)], np.int64)

    # -- use -----------------------------------------------------------------------------------

    def touch(self, keys: Iterable[K]) -> None:
        """Tell the policy that one request used chunks; see ``PrefixIndex.touch``. O(N * P)."""
        require_keys(keys)
        space = self._space
        try:
            self._enter(sys._getframe()).touch(keys)
        except TypeError as error:
            raise as_key_error(error, keys)  # noqa: B904
        finally:
            space.end_turn(sys._getframe())

    def hold(self, keys: Iterable[K]) -> ChunkHold[K]:
        """Protect ready chunks from eviction until the hold is released. O(N * P).

        Holds nest, and holding a chunk does not count as a use of it; see ``PrefixIndex.hold``.

        Args:
            keys: the head of the prefix first. A key that is named twice is held once.

        Returns:
            The hold, also a context manager.

        Raises:
            KeyError: a key, which it names, is not ready; nothing is held.
            BusyError: another call is in progress; nothing is held.
            ClosedError: the store is closed.
        """
        require_keys(keys)
        space = self._space
        hold = ChunkHold(space)
        try:
            books = self._enter(sys._getframe())
            ready = books.ready
            chunks = {key: ready[key] for key in keys}
            books.unclaimed = (books.release, hold.open_chunks)
            books.hold(hold.open_chunks, chunks)
            # One statement without a call: no signal handler runs before this returns.
            books.unclaimed, space.turn.state = None, {}
        except BaseException as error:
            space.turn.give_up(sys._getframe())
            raise as_key_error(error, keys)  # noqa: B904
        return hold

    # -- store ---------------------------------------------------------------------------------

    def store(self, keys: Sequence[K], source: torch.Tensor) -> None:
        """Store chunks in one batch from a tensor, evicting others where the heap is full.

        They are ready on return: the copy is queued on the current stream of the heap's device,
        and whoever reads them does so in stream order.

        Args:
            keys: N keys, the head of the prefix first, none of them ready or pending.
            source: ``[N, *shape]`` of the layout's dtype, the chunks' contents; for a layout of
                several groups ``[N, size_bytes]`` of uint8.

        Raises:
            ValueError: a key is stored or being stored already or named twice, or ``source`` does
                not match.
            TypeError: ``source`` is not a tensor.
            RequestTooLargeError: the chunks do not fit.
            ClosedError: the store or its heap is closed.
            After any of them nothing is stored.
        """
        require_key_list(keys)
        require_tensor("source", source)
        layout = self.layout

        def check() -> None:
            device = self.heap.device
            require_matching("source", source, len(keys), layout, device, cpu_is_fine=True)

        self._require_open()
        self._storing.store(
            keys,
            lambda: self.heap.batched_allocate(
                list(layout.shapes), list(layout.dtypes), len(keys), layout.fmt, source=source
            ),
            check,
        )

    def store_from_engine(self, keys: Sequence[K], cache: PagedKVCache, slots: Slots) -> None:
        """Store chunks in one batch from an engine's paged cache, as :meth:`store` does.

        Args:
            keys: N keys, the head of the prefix first, none of them ready or pending.
            cache: the engine's KV cache.
            slots: the tokens' slots, or :class:`~kvheap.BlockIds`, chunk after chunk.

        Raises:
            ValueError: as for :meth:`store`; or the cache's chunks differ from the layout, or the
                slots are not those of N chunks.
            RequestTooLargeError: the chunks do not fit.
            ClosedError: the store or its heap is closed.
            After any of them nothing is stored.
        """
        require_key_list(keys)
        layout = self.layout
        self._require_open()
        chunk_tokens = engine_chunk_tokens(layout, len(keys), cache, slots)
        self._storing.store(
            keys,
            lambda: self.heap.batched_store(cache, slots, chunk_tokens, layout.fmt),
            lambda: require_slots(layout, cache, slots, eager=getattr(self.heap, "debug", False)),
        )

    def begin(self, keys: Sequence[K]) -> StoreInFlight[K]:
        """Allocate chunks that a copy of the caller's fills; they are found when it has ended.

        Args:
            keys: N keys, the head of the prefix first, none of them ready or pending.

        Returns:
            The store; block ``i`` of its ``batch`` is for ``keys[i]``, with undefined contents.
            Either assign the ``Transfer`` that fills it to ``batch.transfer``, and :meth:`poll`
            completes or aborts the store; or call its ``complete()`` or ``abort()``.

        Raises:
            ValueError: a key is stored or being stored already or named twice.
            RequestTooLargeError: the chunks do not fit.
            ClosedError: the store or its heap is closed.
            After any of them nothing is allocated.
        """
        require_key_list(keys)
        layout = self.layout
        self._require_open()
        try:
            flight = self._storing.begin(
                sys._getframe(),
                keys,
                lambda moved: self.heap.batched_allocate(
                    list(layout.shapes), list(layout.dtypes), len(keys), layout.fmt
                ),
            )
            self._space.books.unclaimed, self._space.turn.state = None, {}  # see hold
        except BaseException:
            self._space.turn.give_up(sys._getframe())
            raise
        return flight

    @renamed(blocks="batch")
    def offload(
        self,
        keys: Sequence[K],
        batch: BlockObjects,
        stream: torch.cuda.Stream | None = None,
        *,
        free: bool = False,
        path: Path | None = None,
        max_sms: int | None = None,
    ) -> StoreInFlight[K]:
        """Begin to store chunks from blocks of another heap, by :func:`kvheap.offload`.

        Args:
            keys: N keys, the head of the prefix first, none of them ready or pending.
            batch: N blocks of another heap, of this store's layout: a batch, a slice of one, or
                objects.
            stream: as for :func:`kvheap.offload`.
            free: as for :func:`kvheap.offload`.
            path: as for :func:`kvheap.offload`.
            max_sms: as for :func:`kvheap.offload`.

        Returns:
            The store. :meth:`poll` completes it when the transfer has ended.

        Raises:
            ValueError: a key is stored or being stored already or named twice, or the blocks
                differ from the layout or are not N.
            RequestTooLargeError: the chunks do not fit.
            ClosedError: the store or its heap is closed.
            Others as :func:`kvheap.offload`. After any of them nothing is stored or freed.
        """
        require_key_list(keys)
        into = cast("Heap", self.heap)
        self._require_open()
        try:
            flight = self._storing.begin(
                sys._getframe(),
                keys,
                lambda moved: offload(
                    batch, into, stream, free=free, path=path, max_sms=max_sms, moved=moved
                ),
                lambda: require_blocks(self.layout, len(keys), batch),
                lambda: require_movable(batch, into, stream, free=free, path=path, max_sms=max_sms),
            )
            self._space.books.unclaimed, self._space.turn.state = None, {}  # see hold
        except BaseException:
            self._space.turn.give_up(sys._getframe())
            raise
        return flight

    def poll(self) -> list[StoreInFlight[K]]:
        """Look at the transfers of stores in flight, without waiting; call it once a step.

        Chunks whose transfer has ended well become ready. Those whose transfer failed are freed.
        Stores without a transfer are left alone. O(stores in flight).

        Returns:
            The stores that this call has ended; their ``state`` and ``error`` say how.

        Raises:
            ClosedError: the store is closed.
        """
        space = self._space
        try:
            self._enter(sys._getframe())
            ended = self._storing.poll()
            space.free_ended()
        finally:
            space.end_turn(sys._getframe())
        return ended

    # -- end -----------------------------------------------------------------------------------

    def remove(self, keys: Iterable[K]) -> None:
        """Remove ready and pending chunks and free them; other keys are skipped. O(N * P).

        Look-ups no longer find them. The bytes of a chunk that is held are freed with its last
        hold, those of a chunk that is pending when its store ends.

        Raises:
            ClosedError: the store is closed.
        """
        require_keys(keys)
        space = self._space
        try:
            self._enter(sys._getframe()).remove(keys)
            space.free_ended()
        except TypeError as error:
            raise as_key_error(error, keys)  # noqa: B904
        finally:
            space.end_turn(sys._getframe())

    def clear(self) -> None:
        """Remove all chunks, as :meth:`remove` does, and let the policy forget its history. O(n).

        Raises:
            ClosedError: the store is closed.
        """
        space = self._space
        try:
            self._enter(sys._getframe()).clear()
            space.free_ended()
        finally:
            space.end_turn(sys._getframe())

    def close(self) -> None:
        """Abort all stores in flight, free all chunks, and refuse further use.

        The heap stays open; one that is closed already is no error. Chunks that are held are
        freed when their hold is released. A second call does nothing.
        """
        if self._closed:
            return
        space = self._space
        try:
            books = space.enter(sys._getframe())
            self._storing.abort_all()
            books.clear()
            space.free_ended()
            self._closed = True
        finally:
            space.end_turn(sys._getframe())

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- watch ---------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """Chunks and bytes by state, and counters. O(1)."""
        self._space.look()
        index, evicted_chunks = self._space.books.stats(), self._space.evicted_chunks
        return StoreStats(
            **{field.name: getattr(index, field.name) for field in fields(IndexStats)},
            stores_in_flight=self._storing.num_in_flight,
            evicted_chunks=evicted_chunks,
            evicted_bytes=evicted_chunks * self._space.chunk_bytes,
        )

    def check(self) -> None:
        """Check every invariant of the index. O(n).

        Raises:
            HeapCorruptionError: one does not hold.
        """
        space = self._space
        try:
            space.enter(sys._getframe()).check()
        finally:
            space.end_turn(sys._getframe())

    def __repr__(self) -> str:
        """The layout and the index."""
        return f"PrefixStore({self.layout}, {self._index!r})"

    # -- helpers -------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("this PrefixStore is closed")

    def _enter(self, frame: FrameType) -> Books[K, MemoryObj]:
        """Begin a call that changes something."""
        self._require_open()
        return self._space.enter(frame)
