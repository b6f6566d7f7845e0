"""``KVHeapMemoryAllocator``: a kvheap heap as one of LMCache's own allocators.

Its objects are LMCache's ``TensorMemoryObj``, with LMCache's counts, pins and monitors; only their
bytes are kvheap's. LMCache decides when an object is freed, and this module then returns the
object's block to the heap, exactly once.

An object that is dropped without being freed can be finalized at any point of the program, possibly
while its thread holds a lock. A finalizer that took a lock could wait for its own thread. So it
only moves the block from a dict to a queue, in two atomic operations, and the next call of the
allocator frees it. The dict belongs to the allocator, and the object has only a number. If the
object held its block, the garbage collector could finalize the block's batch before the object, and
the bytes would have two owners.

Importing this module does not import LMCache; :func:`lmcache_classes` does. Written for 0.5.6.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kvheap.blocks.block_layout import Dtypes, Shapes
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.errors import ClosedError, ForeignObjectError
from kvheap.forks import starts_over_after_fork

if TYPE_CHECKING:
    import torch

    from kvheap.addresses.address_manager import AddressManager
    from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
    from kvheap.heaps.tensor_allocator import TensorMemoryAllocator

__all__ = ["LMCacheClasses", "lmcache_classes"]


class LMCacheClasses(NamedTuple):
    """The classes that derive from LMCache's.

    Attributes:
        allocator: ``KVHeapMemoryAllocator``, a subclass of LMCache's ``MemoryAllocatorInterface``;
            see :class:`HeapCalls` for its methods.
        memory_obj: the class of its objects, a subclass of LMCache's ``TensorMemoryObj``.
    """

    allocator: type[Any]
    memory_obj: type[Any]


class BlockEnd:
    """The finalizer of ``KVHeapMemoryObj``; everything else in that class is LMCache's."""

    number: int
    """The key of its block in the allocator; unique among all objects of that allocator."""

    home: HeapCalls
    """The allocator that has its block. LMCache may change ``parent_allocator``, but not this."""

    def __del__(self) -> None:
        # Takes no lock: this thread may hold any.
        try:
            self._drop()
        finally:  # once more, if a signal handler raised in there: nobody else would
            self._drop()

    def _drop(self) -> None:
        home = getattr(self, "home", None)  # missing if __init__ or batched_allocate failed
        if home is not None:
            home._drop(self.number)


class HeapCalls:
    """The methods of LMCache's ``MemoryAllocatorInterface``, over a kvheap heap.

    For example ``LocalCPUBackend(config, metadata, memory_allocator=KVHeapMemoryAllocator(heap))``.
    Where LMCache 0.5.6 requires its own ``MixedMemoryAllocator`` (for batches that evict), create
    one of 0 bytes and set its ``pin_allocator`` to a ``KVHeapMemoryAllocator``.

    - Get objects: ``allocate``, ``batched_allocate``.
    - Return them: ``free``, ``batched_free``.
    - Inspect the heap: ``address_manager``, ``align_bytes``, ``buffer``, ``total_allocated_size``,
      ``num_active_allocations``, ``dropped_objects``, ``get_memory_usage``, ``memcheck``.
    - End: ``close``.

    Args:
        heap: the heap that the blocks come from; any kvheap allocator over a heap. Closed with
            this object.
    """

    _classes: LMCacheClasses
    _metadata_type: type[Any]
    _format_type: type[Any]
    _monitor: Any
    _bytes_allocator: Any
    _bytes_type: type[Any]

    def __init__(self, heap: TensorMemoryAllocator) -> None:
        self.heap = heap
        self.dropped_objects = 0
        """How many objects have been dropped without being freed."""
        self._numbers = itertools.count()
        self._held: dict[int, MemoryObj] = {}
        self._freed: deque[MemoryObj] = deque()
        self._dropped: deque[MemoryObj] = deque()
        self._count_lock = threading.Lock()
        starts_over_after_fork(self)
        self._calls = threading.local()  # .outermost: the token of this thread's outermost call

    # -- allocate ------------------------------------------------------------------------------

    def allocate(
        self,
        shapes: Shapes,
        dtypes: Dtypes,
        fmt: Any = MemoryFormat.KV_2LTD,
        allocator_type: str | None = None,
    ) -> Any:
        """Allocate one object; returns None if it does not fit.

        Args:
            shapes: logical shape, or a list of shapes, one for each group.
            dtypes: logical dtype, or a list of dtypes; unused for plain bytes.
            fmt: LMCache's ``MemoryFormat``, or kvheap's. ``BINARY_BUFFER`` means bytes outside the
                heap.
            allocator_type: unused.

        Raises:
            ValueError, ClosedError: as in :meth:`batched_allocate`.
        """
        objs = self.batched_allocate(shapes, dtypes, 1, fmt)
        return None if objs is None else objs[0]

    def batched_allocate(
        self,
        shapes: Shapes,
        dtypes: Dtypes,
        batch_size: int,
        fmt: Any = MemoryFormat.KV_2LTD,
        allocator_type: str | None = None,
    ) -> list[Any] | None:
        """Allocate ``batch_size`` equal objects, all or none; returns None if they do not all fit.

        O(N): LMCache's objects are created one by one. The other arguments are those of
        :meth:`allocate`.

        Raises:
            ValueError: the shape has no element.
            NegativeBatchSizeError: ``batch_size`` is negative. A ``RuntimeError``.
            ClosedError: the heap is closed.
        """
        fmt = self._format_type(fmt.value)
        if fmt is self._format_type.BINARY_BUFFER:
            objs: list[Any] = self._bytes_allocator.batched_allocate(
                shapes, dtypes, batch_size, fmt
            )
            return objs
        me = object()
        try:
            is_outermost = self._enter(me)
            if is_outermost:
                self._settle()
            batch = self.heap.batched_allocate(shapes, dtypes, batch_size, MemoryFormat(fmt.value))
            objs = [] if batch is None else self._objects_of(batch, fmt)
            if is_outermost and objs:
                self._report()
        finally:
            try:
                self._leave(me)
            finally:  # once more, if a signal handler raised in there
                self._leave(me)
        return None if batch is None else objs

    def _objects_of(self, batch: MemoryBatch, fmt: Any) -> list[Any]:
        layout, size = batch.layout, batch.allocated_bytes
        shapes, dtypes = list(layout.shapes), list(layout.dtypes)
        objs = []
        for block, address in zip(batch, batch.addresses.tolist(), strict=True):
            metadata = self._metadata_type(
                shapes[0], dtypes[0], address, size, 1, 0, fmt, shapes=shapes, dtypes=dtypes
            )
            obj = self._classes.memory_obj(block.raw_tensor, metadata, self)
            obj.number = next(self._numbers)
            obj.home = self
            # Last, because the batch's finalizer frees the block if this is interrupted earlier.
            self._held[obj.number] = block
            objs.append(obj)
        return objs

    # -- free ----------------------------------------------------------------------------------

    def free(self, memory_obj: Any, allocator_type: str | None = None) -> None:
        """Free one object, whatever its counts. Does nothing if it is already freed.

        LMCache calls this when the counts have reached zero.

        Args:
            memory_obj: the object.
            allocator_type: unused.

        Raises:
            ForeignObjectError: the object belongs to another allocator.
        """
        self.batched_free([memory_obj])

    def batched_free(
        self,
        memory_objs: Iterable[Any],
        allocator_type: str | None = None,
        update_stats: bool = True,
    ) -> None:
        """Free many objects, whatever their counts. Skips objects that are already freed.

        Args:
            memory_objs: objects of this allocator; plain bytes among them are left as they are.
            allocator_type: unused.
            update_stats: whether to report the new usage to LMCache's monitor.

        Raises:
            ForeignObjectError: one belongs to another allocator; nothing is freed.
        """
        objs = [obj for obj in memory_objs if not isinstance(obj, self._bytes_type)]
        for obj in objs:
            if getattr(obj, "home", None) is not self:
                raise ForeignObjectError(f"{obj!r} belongs to another allocator")
        for obj in objs:
            obj.invalidate()
            block = self._held.pop(obj.number, None)  # if two threads do this, one gets the block
            if block is not None:
                self._freed.append(block)
        me = object()
        try:
            if self._enter(me):
                self._settle()
                if update_stats:
                    self._report()
        finally:
            try:
                self._leave(me)
            finally:  # once more, if a signal handler raised in there
                self._leave(me)

    def _drop(self, number: int) -> None:
        """Queue the block of an object that is being finalized. Takes no lock."""
        block = self._held.pop(number, None)
        if block is not None:
            self._dropped.append(block)

    def _settle(self) -> None:
        """Return the blocks of freed and dropped objects to the heap."""
        dropped = _take_all(self._dropped)
        if dropped:
            with self._count_lock:
                self.dropped_objects += len(dropped)
        blocks = _take_all(self._freed) + dropped
        # LMCache closes its allocator before it frees its objects; nothing is left to free then.
        with suppress(ClosedError):
            if blocks and not self.heap.closed:
                self.heap.batched_free(blocks)

    def start_over_after_fork(self) -> None:
        """Release the lock in a forked child."""
        self._count_lock = threading.Lock()

    # Another object's finalizer may free objects in the middle of a call on the same thread, while
    # that call holds a lock of the heap, of the monitor or the one above. Such a nested call only
    # queues its blocks. So no thread ever waits for itself.

    def _enter(self, me: object) -> bool:
        """Whether this is the outermost call on this thread; ``me`` is an object of the call's."""
        return self._calls.__dict__.setdefault("outermost", me) is me

    def _leave(self, me: object) -> None:
        """End a call; changes nothing unless it is the outermost."""
        calls = self._calls.__dict__
        if calls.get("outermost") is me:
            calls.pop("outermost", None)

    # -- look ----------------------------------------------------------------------------------

    def _report(self) -> None:
        self._monitor.update_local_cache_usage(self.total_allocated_size)
        self._monitor.update_active_memory_objs_count(self.num_active_allocations)

    @property
    def address_manager(self) -> AddressManager:
        """The free list; has LMCache's ``get_heap_size`` and ``get_free_size``."""
        return self.heap.address_manager

    @property
    def align_bytes(self) -> int:
        """Every object starts at a multiple of it."""
        return self.heap.address_manager.align_bytes

    @property
    def buffer(self) -> torch.Tensor:
        """The heap's bytes, uint8."""
        return self.heap.buffer

    @property
    def total_allocated_size(self) -> int:
        """Allocated bytes, including those of objects dropped since the last call."""
        return self.heap.total_allocated_size

    @property
    def num_active_allocations(self) -> int:
        """How many objects are neither freed nor dropped."""
        return len(self._held)

    def get_memory_usage(self) -> tuple[int, int]:
        """Allocated bytes, and the size of the heap in bytes."""
        return self.total_allocated_size, self.address_manager.get_heap_size()

    def memcheck(self) -> bool:
        """Whether every invariant of the heap holds."""
        return self.heap.memcheck()

    def close(self) -> None:
        """Close the heap. Freeing or dropping an object afterwards does nothing."""
        self.heap.close()

    def __str__(self) -> str:
        """The name of the class."""
        return type(self).__name__

    def __repr__(self) -> str:
        """The class, and the heap."""
        return f"{type(self).__name__}({self.heap!r})"


def _take_all(queue: deque[MemoryObj]) -> list[MemoryObj]:
    """Empty a queue that other threads may fill and empty at the same time."""
    blocks: list[MemoryObj] = []
    with suppress(IndexError):
        while queue:
            blocks.append(queue.popleft())
    return blocks


@cache
def lmcache_classes() -> LMCacheClasses:
    """Create the classes; imports LMCache.

    Raises:
        ImportError: LMCache cannot be imported.
    """
    from lmcache.observability import LMCStatsMonitor
    from lmcache.v1 import memory_management as lmcache
    from lmcache.v1.memory_allocators.buffer_allocator import BufferAllocator

    class KVHeapMemoryObj(BlockEnd, lmcache.TensorMemoryObj):  # type: ignore[misc]
        """A ``TensorMemoryObj`` whose bytes are a block of a kvheap heap."""

    class KVHeapMemoryAllocator(HeapCalls, lmcache.MemoryAllocatorInterface):  # type: ignore[misc]
        __doc__ = HeapCalls.__doc__
        _metadata_type = lmcache.MemoryObjMetadata
        _format_type = lmcache.MemoryFormat
        _monitor = LMCStatsMonitor.GetOrCreate()
        _bytes_allocator = BufferAllocator()
        _bytes_type = lmcache.BytesBufferMemoryObj

    classes = LMCacheClasses(KVHeapMemoryAllocator, KVHeapMemoryObj)
    KVHeapMemoryAllocator._classes = classes
    return classes
