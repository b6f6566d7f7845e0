"""``TensorMemoryAllocator``: an ``AddressManager`` over buffers.

The address manager finds the addresses of a batch; one kernel (``kernels/block_copy.py``) fills or
gathers it. A full heap returns None instead of raising: the caller evicts and tries again. A wrong
argument raises, and nothing is allocated or freed.

Copies run on the current stream of the buffer's device. The bytes of a freed block may be allocated
again at once, for work on that stream. A block that another stream still uses needs
``record_stream``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.arguments import require_flags
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.heap_stats import HeapStats
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.heap import Heap, await_filling
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.memory_allocator import debug_by_environment
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.release import Release, merged
from kvheap.blocks.report import FullReport, FullReporter, weakly
from kvheap.blocks.rows import Rows
from kvheap.device.copy_device import CopyDevice
from kvheap.engine import chunks
from kvheap.errors import HeapCorruptionError
from kvheap.heaps.added_buffers import AddedBuffers
from kvheap.heaps.allocator_stats import AllocatorStats
from kvheap.heaps.block_tensors import (
    new_tensor,
    require_apart,
    require_gatherable,
    require_matching,
    require_writable_from,
)
from kvheap.heaps.capture import capture
from kvheap.heaps.freed_bytes import FreedBytes
from kvheap.heaps.one_owner import check_one_owner
from kvheap.heaps.options import require_heap_options, require_units
from kvheap.heaps.ownership import Ownership
from kvheap.heaps.segments import Segments, as_buffer
from kvheap.heaps.views import ViewedBlocks, read_view, require_fitting
from kvheap.heaps.waiting_space import WaitingSpace
from kvheap.heaps.wiping import Poison, Scrub
from kvheap.memory.sharing import is_of_another_process
from kvheap.snapshots.heap_snapshot import HeapSnapshot

__all__ = ["TensorMemoryAllocator"]

DEBUG_SITE_FRAMES = 4
"""Number of callers that debug mode records for each allocation."""


_Known = tuple[object, object, object, BlockLayout | None]
"""The shape, dtype and format that a caller has passed, and the checked layout of such a block."""

_NOTHING_KNOWN: _Known = (None, None, None, None)


class TensorMemoryAllocator(Heap):
    """Allocates tensors, one by one or in batches, from one heap.

    One process keeps a heap's books. In a child that is forked, a heap over shared memory (or a
    device's) is view-only: it reads, but allocating, freeing and filling blocks raise
    ``ForeignProcessError``, and its statistics are those at the fork. A heap over private memory,
    which the fork copies, goes on as a heap of the child's own.

    Thread-safe. The holders of an object should free it; a later operation reclaims dropped ones
    and counts them in ``stats().dropped_blocks``.

    - allocate: ``allocate``, ``batched_allocate``, ``max_batch``; ``view`` for blocks that another
      process allocated;
    - free: ``free``, ``batched_free``;
    - contents: ``batched_read``, ``batched_write``;
    - an engine's cache: ``batched_store``, ``batched_load``, ``batched_evict``;
    - inspect: ``stats``, ``snapshot``, ``free_extents``, ``leaks``, ``full_report``,
      ``memcheck``, ``check``, ``buffer``, ``segments``, ``device``, ``is_view_only``;
    - grow and close: ``add_buffer``, ``close``.

    Args:
        tensor: the buffer: contiguous, any dtype and shape, CPU or GPU. The heap uses its bytes and
            keeps it alive. Bytes after the last whole unit of ``align_bytes`` stay unused.
        align_bytes: a power of two; every block starts at a multiple of it.
        page_layout: divide the buffer into pages that hold one block of this layout each; a smaller
            block takes a whole page too. Replaces ``align_bytes``.
        address_manager: an address space of your own, no larger than the buffer, with nothing
            allocated; its alignment replaces ``align_bytes``.
        idempotent_free: freeing a freed block does nothing instead of raising.
        scrub: zero the bytes of freed blocks, with one launch for each block size and call.
        debug: poison freed bytes, check that they are unchanged when they are allocated again, and
            record allocation sites. Slow. None: ``KVHEAP_DEBUG`` decides.
        trace_frames: number of callers to record for each allocation; None: 4 in debug mode, else
            0.
        stream_wait_s: seconds that an allocation that does not fit waits for freed blocks that
            streams still use.
        on_full: called with a ``FullReport`` when an allocation fails, on its thread and at most
            once in ``on_full_interval_s`` seconds; ``log_full_report`` logs it. None: a full heap
            is normal, as for a cache; ``stats().failed_allocations`` counts.
        on_full_interval_s: minimum seconds between two reports.
        view_only: whether another process keeps the books of this memory: the heap then wraps its
            blocks (``view``) and reads them, and raises ``ForeignProcessError`` for the rest. None:
            if the tensor is torch's shared memory that another process created, or of a
            ``HostBuffer`` that maps a file by ``fd``. Other memory does not say whose it is: set
            this for a block of ``multiprocessing.shared_memory``, a file that is mapped by other
            means, or GPU memory that another process's heap is in.

    Raises:
        ValueError: the tensor is not contiguous or smaller than ``align_bytes`` but not empty,
            ``align_bytes`` is not a power of two, or the address space is larger than the buffer.
        TypeError: an argument has a wrong type.

    >>> heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
    >>> source = torch.arange(8, dtype=torch.float32).reshape(4, 2)
    >>> batch = heap.batched_allocate([2], torch.float32, 4, source=source)
    >>> batch[3].tensor
    tensor([6., 7.])
    >>> out = torch.empty(4, 2)
    >>> heap.batched_free(batch, out=out)
    >>> torch.equal(out, source), heap.stats().allocated_bytes, batch[3].tensor
    (True, 0, None)
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        *,
        page_layout: BlockLayout | None = None,
        address_manager: AddressManager | None = None,
        idempotent_free: bool = False,
        scrub: bool = False,
        debug: bool | None = None,
        trace_frames: int | None = None,
        stream_wait_s: float = 1.0,
        on_full: Callable[[FullReport], None] | None = None,
        on_full_interval_s: float = 60.0,
        view_only: bool | None = None,
    ) -> None:
        super().__init__()
        require_heap_options(
            page_layout=page_layout,
            address_manager=address_manager,
            idempotent_free=idempotent_free,
            scrub=scrub,
            debug=debug,
            trace_frames=trace_frames,
            stream_wait_s=stream_wait_s,
            on_full_interval_s=on_full_interval_s,
            view_only=view_only,
        )
        buffer = as_buffer(tensor)
        if address_manager is None and page_layout is not None:
            page_bytes = page_layout.size_bytes
            require_units("a tensor", buffer.numel(), page_bytes)
            address_manager = AddressManager.of_pages(buffer.numel() // page_bytes, page_bytes)
        elif address_manager is None:
            address_manager = AddressManager(buffer.numel(), align_bytes)
            require_units("a tensor", buffer.numel(), align_bytes)
        elif address_manager.get_heap_size() > buffer.numel():
            raise ValueError(
                f"an address space of {address_manager.get_heap_size()} bytes needs a buffer at "
                f"least as large, got {buffer.numel()}"
            )
        debug = debug_by_environment() if debug is None else debug
        if trace_frames is None:
            trace_frames = DEBUG_SITE_FRAMES if debug else 0
        self.address_manager = address_manager
        """The address space. Use it for inspection, not to free the blocks of live objects."""
        self.page_layout = page_layout
        self.idempotent_free = idempotent_free
        wiping = Poison() if debug else Scrub() if scrub else None
        self._ownership = Ownership(
            is_of_another_process(buffer) if view_only is None else view_only
        )
        segments = Segments((buffer,), (0,))
        has_pages = (
            page_layout is not None and page_layout.size_bytes <= address_manager.align_bytes
        )
        self._bytes = FreedBytes(address_manager, segments, wiping, self._ownership, has_pages)
        self.lifetime = Lifetime(address_manager.guard, self._bytes, trace_frames)
        self._checked_layout: BlockLayout | None = None
        self._known_layout: _Known = _NOTHING_KNOWN
        self._added_buffers = AddedBuffers(address_manager, self._bytes)
        self._full_reporter = FullReporter(on_full, on_full_interval_s)
        self._space = WaitingSpace(
            address_manager,
            self._bytes,
            self.lifetime,
            self._full_reporter,
            stream_wait_s,
            has_pages,
        )

    # -- allocate ------------------------------------------------------------------------------

    def allocate(
        self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat | str = MemoryFormat.KV_2LTD
    ) -> MemoryObj | None:
        """Allocate one block; see ``MemoryAllocatorInterface.allocate``."""
        if self.closed:
            self.require_open()
        # As ``layout_of`` begins, without the call.
        known_shape, known_dtype, known_fmt, layout = self._known_layout
        is_known = known_shape is shape and known_dtype is dtype and known_fmt is fmt
        if layout is None or not is_known:
            layout = self.layout_of(shape, dtype, fmt)
        batch = self.allocate_blocks(layout, 1)
        return None if batch is None else self.object_type(batch, 0)

    def layout_of(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat | str) -> BlockLayout:
        """The layout of a block, checked against the page size and the heap's alignment."""
        known = self._known_layout
        if known[0] is shape and known[1] is dtype and known[2] is fmt and known[3] is not None:
            return known[3]
        layout = BlockLayout.of(shape, dtype, fmt)
        if layout is self._checked_layout:  # equal layouts are usually the same object
            if type(shape) is torch.Size:  # which nobody can change
                self._known_layout = shape, dtype, fmt, layout
            return layout
        page = self.page_layout
        if page is not None and layout.size_bytes > page.size_bytes:
            raise ValueError(
                f"{layout} has {layout.size_bytes} bytes, more than a page of {page.size_bytes}"
            )
        self._open_segments().require_readable(layout, self.address_manager.align_bytes)
        self._checked_layout = layout
        return layout

    def allocate_blocks(
        self,
        layout: BlockLayout,
        batch_size: int,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """``batched_allocate`` for a layout that :meth:`layout_of` made."""
        if self._ownership.is_view_only and batch_size:
            self.require_owner("allocate blocks")
        if source is not None and batch_size >= 0:
            require_matching("source", source, batch_size, layout, self.device, cpu_is_fine=True)
        batch = self._space.allocate(self, layout, batch_size, allow_partial)
        if batch is None or source is None or not len(batch):
            return batch
        try:
            source = source if len(batch) == batch_size else source[: len(batch)]
            self._open_segments().scatter(source, batch.runs)
        except BaseException:
            # Part of the source may have been written: wipe it, as any free does.
            self.lifetime.discard(batch)
            raise
        return batch

    def max_batch(self, shape: Shapes, dtype: Dtypes) -> int:
        """How many blocks of this shape and dtype one ``batched_allocate`` could return now.

        Raises:
            ValueError: as for :meth:`allocate`.
        """
        self.require_open()
        layout = self.layout_of(shape, dtype, MemoryFormat.UNDEFINED)
        if self.is_view_only:
            return 0
        return self.address_manager.max_batch(layout.size_bytes)

    def view(
        self,
        blocks: ViewedBlocks,
        shape: Shapes | None = None,
        dtype: Dtypes | None = None,
        fmt: MemoryFormat | str = MemoryFormat.KV_2LTD,
        *,
        writable: bool | None = None,
    ) -> MemoryBatch:
        """Wrap blocks that another process allocated in a heap of the same size and alignment.

        The view cannot know what the owner does afterwards: once it frees the blocks, their bytes
        are other blocks', and the view still shows them as live. The owner must hold the blocks
        until this process has said that it is done with them.

        Args:
            blocks: the ``metadata`` of a batch, of an object or of several objects of one layout,
                which needs no other argument; or where the blocks are: an ``AddressBatch``, or
                addresses, integers ``[N]``. They may be in any order, such as that of a prefix.
            shape: logical shape of each block, if ``blocks`` says only where they are.
            dtype: logical dtype of each block, if ``blocks`` says only where they are.
            fmt: what the dimensions mean, if ``blocks`` says only where they are.
            writable: whether ``store`` and transfers may fill the blocks. None: unless this heap is
                view-only; there, say True for blocks that the owner has allocated for this process
                to fill. Tensors over the blocks can be written to in any case.

        Returns:
            A batch on this heap's bytes, in the order of ``blocks``; this process cannot free its
            blocks. It knows the tokens that its metadata knew; of mere addresses, nothing is known,
            and a load from them brings what is there.

        Raises:
            ValueError: a block is smaller than its contents, not aligned to this heap's
                ``align_bytes``, or not within the heap; two blocks overlap; a number is not an
                integer; or shape and dtype are missing. The message names the block.
            TypeError: ``blocks`` is none of the above.
            ClosedError: the allocator is closed.
        """
        self.require_open()
        if writable is not None:
            require_flags(writable=writable)
        manager = self.address_manager
        view = read_view(blocks, shape, dtype, fmt, self.layout_of, manager.compute_aligned_size)
        heap_bytes = manager.get_heap_size()
        require_fitting(view, manager.align_bytes, heap_bytes, self._open_segments())
        batch = MemoryBatch(self, view.blocks, view.layout, writable=writable)
        batch.set_num_tokens(view.num_tokens)
        if view.stored is not None:
            batch.stored_tokens.set_rows(view.stored)
        batch.stored_tokens.form = view.form
        if view.origins is not None:
            batch.stored_tokens.set_origins(view.origins)
        return batch

    # -- free, read and write ------------------------------------------------------------------

    def require_gatherable(self, parts: Sequence[Rows], out: torch.Tensor) -> None:
        """Raise if the ``out`` of ``batched_read`` or ``_free`` does not match the blocks."""
        require_gatherable(parts, out, self.device)
        self._require_apart("out", out, parts)

    def gather(self, objs: MemoryBatch | Sequence[MemoryObj], out: torch.Tensor) -> None:
        """Copy the contents of blocks into ``out``, already checked by ``require_gatherable``."""
        segments = self._open_segments()
        await_filling(objs, segments.device)
        if isinstance(objs, (MemoryBatch, BatchSlice)):
            segments.gather(objs.runs, out)
        else:
            segments.gather(np.array([obj.address for obj in objs], np.int64), out)

    def require_writable_from(self, parts: Sequence[Rows], source: torch.Tensor) -> None:
        """Raise if the ``source`` of ``batched_write`` does not match the blocks."""
        require_writable_from(parts, source, self.device)
        self._require_apart("source", source, parts)

    def _require_apart(self, name: str, tensor: torch.Tensor, parts: Sequence[Rows]) -> None:
        segments = self._open_segments()
        if segments.has_memory_of(tensor):
            require_apart(name, tensor, parts, lambda part: self.absolute(part.addresses)[0])

    def scatter(self, source: torch.Tensor, objs: MemoryBatch | Sequence[MemoryObj]) -> None:
        """Copy ``source`` into blocks, checked, which no transfer uses any more."""
        segments = self._open_segments()
        if isinstance(objs, (MemoryBatch, BatchSlice)):
            segments.scatter(source, objs.runs)
        else:
            segments.scatter(source, np.array([obj.address for obj in objs], np.int64))

    def new_tensor(self, layout: BlockLayout, num_blocks: int) -> torch.Tensor:
        """A new tensor on the heap's device for the contents of blocks."""
        return new_tensor(layout, num_blocks, self.device)

    def merged_releases(self, releases: list[Release]) -> list[Release]:
        """Combine the releases that wait for no stream, unless debug mode needs each owner."""
        wiping = self._bytes.wiping
        if wiping is not None and wiping.tells_owners_apart:
            return releases
        return merged(releases)

    # -- an engine's cache ---------------------------------------------------------------------

    batched_store = chunks.batched_store
    batched_load = chunks.batched_load
    batched_evict = chunks.batched_evict

    # -- inspect -------------------------------------------------------------------------------

    @property
    def buffer(self) -> torch.Tensor:
        """The heap's bytes, uint8 ``[heap bytes or more]``; addresses are offsets in it.

        Raises:
            ValueError: the heap consists of several buffers; see ``segments``.
            ClosedError: the allocator is closed.
        """
        segments = self._open_segments()
        if len(segments) > 1:
            raise ValueError(f"the heap has {len(segments)} buffers: use segments")
        return segments.buffers[0]

    @property
    def segments(self) -> list[tuple[int, torch.Tensor]]:
        """The heap's buffers, each after the heap address of its first byte."""
        return self._open_segments().pairs

    @property
    def device(self) -> torch.device:
        """The device that the buffers are on."""
        return self._open_segments().device

    @property
    def debug(self) -> bool:
        """Whether freed bytes are poisoned, and arguments on a device are checked."""
        return isinstance(self._bytes.wiping, Poison)

    @property
    def is_view_only(self) -> bool:
        """Whether another process keeps the books: this one allocates, frees and fills nothing."""
        return self._ownership.is_view_only

    def require_owner(self, action: str) -> None:
        """Raise if another process keeps the books; see ``BlockAllocator.require_owner``."""
        self._ownership.require(action)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the heap that are page-locked host memory."""
        return self._bytes.segments.pinned_bytes

    @property
    def total_allocated_size(self) -> int:
        """Allocated bytes."""
        return self.address_manager.total_allocated_size

    def stats(self) -> AllocatorStats:
        """A consistent snapshot of the counters. O(1)."""
        segments = self._open_segments()
        if self.lifetime.reclaimer.has_work and not self.is_view_only:
            self.lifetime.reclaimer.settle()
        heap = self.address_manager.stats()
        return AllocatorStats(
            **{field.name: getattr(heap, field.name) for field in fields(HeapStats)},
            device=str(segments.device),
            align_bytes=self.address_manager.align_bytes,
            segments=len(segments),
            pinned_bytes=self.pinned_bytes,
            pending_bytes=self.lifetime.reclaimer.pending_bytes,
            dropped_blocks=self.lifetime.dropped_blocks,
            expired_leases=self.lifetime.leases.num_expired,
            failed_allocations=self._full_reporter.total_failures,
            view_only=self.is_view_only,
        )

    def free_extents(self) -> Int64Array:
        """Start and size of all free extents, int64 ``[F, 2]``, in address order. O(F)."""
        self.require_open()
        return self.address_manager.snapshot()

    def snapshot(self) -> HeapSnapshot:
        """The heap's map: which bytes are live, pinned, pending or free, how old, and whose.

        ``save("heap.html")`` writes a page to look at it, ``save("heap.json")`` a file for a bug
        report, and ``plot()`` draws it. Consistent; O(batches) and O(F) while other threads wait
        for the heap, then O(extents) while they do not. Sites are known with ``trace_frames``.

        Where another process keeps the books, the snapshot says so: it is that of the fork, and of
        a heap that is attached, an empty one.

        Raises:
            ReentrantCallError: the calling thread is inside an operation, as in a finalizer or a
                signal handler that interrupted one: ask for ``stats()`` there.
            HeapCorruptionError: bytes belong to two blocks, or to a block while they are free.
            ClosedError: the allocator is closed.
        """
        segments = self._open_segments()
        if self.lifetime.reclaimer.has_work and not self.is_view_only:
            self.lifetime.reclaimer.settle()
        return capture(
            self.address_manager,
            self.lifetime.ledger,
            heap=type(self).__name__,
            device=str(segments.device),
            segments=segments.starts,
            is_view_only=self.is_view_only,
        )

    def memcheck(self) -> bool:
        """Whether :meth:`check` finds that every invariant of the heap holds."""
        try:
            self.check()
        except HeapCorruptionError:
            return False
        return True

    def check(self) -> None:
        """Assert every invariant of the heap. O(blocks + F log F) for F free extents.

        Those of its address space (``AddressManager.check``); and that no byte belongs to two live
        blocks, and none of a live block is free. Allocated bytes that belong to no block are in
        order: the address space may have other users. Inside an operation of the same thread, only
        the address space is checked.

        Raises:
            HeapCorruptionError: an invariant is broken; the message names it.
        """
        self.require_open()
        if self.lifetime.reclaimer.has_work:
            self.lifetime.reclaimer.settle()
        self.address_manager.check()
        check_one_owner(self.address_manager, self.lifetime.ledger)

    def full_report(self, num_blocks: int = 0, requested_bytes: int = 0) -> FullReport:
        """What is free, and which live blocks hold the rest. O(1); its ``live`` is O(batches)."""
        self.require_open()
        heap = self.address_manager.stats()
        return FullReport(
            requested_bytes=requested_bytes,
            num_blocks=num_blocks,
            heap_bytes=heap.heap_bytes,
            free_bytes=heap.free_bytes,
            largest_free_bytes=heap.largest_free_bytes,
            free_extents=heap.free_extents,
            pending_bytes=self.lifetime.reclaimer.pending_bytes,
            failures=self._full_reporter.failures,
            find_live=weakly(self.lifetime.live),
        )

    def block_bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block, uint8 ``[size_bytes]``, without a copy."""
        return self._open_segments().bytes_at(address, size_bytes)

    def absolute(self, addresses: Int64Array) -> tuple[Int64Array, int]:
        """The absolute addresses of blocks, and their alignment; see ``Heap.absolute``."""
        return self._open_segments().absolute(addresses, self.address_manager.align_bytes)

    def pinned_addresses(self, device: CopyDevice) -> Int64Array:
        """The absolute ranges of a host heap that ``device`` can reach, int64 ``[R, 2]``."""
        return self._open_segments().pinned_addresses(device)

    def _open_segments(self) -> Segments:
        """The current segments; holding them keeps the buffers alive.

        Raises:
            ClosedError: the heap is closed.
        """
        # Read before the check: ``close`` first sets ``closed``, and empties the segments later.
        segments = self._bytes.segments
        self.require_open()
        return segments

    def __repr__(self) -> str:
        """The counters and the device."""
        return f"{type(self).__name__}({'closed' if self.closed else self.stats()})"

    # -- grow and close ------------------------------------------------------------------------

    def add_buffer(self, tensor: torch.Tensor) -> None:
        """Grow the heap by another buffer; no block straddles two buffers.

        Args:
            tensor: contiguous, on the device of the first buffer. Kept alive.

        Raises:
            ValueError: the tensor is not contiguous, on another device, smaller than
                ``align_bytes``, or shares memory with the heap; or the heap does not yet cover the
                whole last buffer.
            ReentrantCallError: the calling thread is inside an operation; nothing changes.
            ForeignProcessError: another process keeps the books of the heap.
            ClosedError: the allocator is closed.
        """
        self.require_open()
        self.require_owner("add a buffer")
        if isinstance(tensor, torch.Tensor) and tensor.device != self.device:
            raise ValueError(f"the buffer must be on {self.device}, got {tensor.device}")
        buffer = as_buffer(tensor)
        unit = self.address_manager.align_bytes
        usable = buffer.numel() // unit * unit
        if not usable:
            raise ValueError(f"the buffer must have at least {unit} bytes, got {buffer.numel()}")
        self._added_buffers.add(buffer, usable, self._forget_layouts)

    def _forget_layouts(self) -> None:
        """Check layouts again: the buffers that blocks may be in have changed."""
        self._checked_layout = None
        self._known_layout = _NOTHING_KNOWN

    def start_over_after_fork(self) -> None:
        """In a forked child: leave the books of shared memory to the parent."""
        super().start_over_after_fork()
        freed = getattr(self, "_bytes", None)  # None: a thread was making the heap at the fork
        if freed is not None:
            freed.start_over_after_fork()

    def close_memory(self, timeout_s: float) -> None:
        """Wait until no stream uses the heap, then drop the buffers."""
        if not self.lifetime.reclaimer.wait_until_unused(timeout_s):
            pending_bytes = self.lifetime.reclaimer.pending_bytes
            raise TimeoutError(
                f"a stream has not finished its work on this heap in {timeout_s:.3g} s "
                f"({pending_bytes} freed bytes are still in use): the buffers are not released; "
                f"close the heap again later"
            )
        self._bytes.segments = Segments((), ())
