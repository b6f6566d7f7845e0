"""``TensorMemoryAllocator``: an ``AddressManager`` over buffers.

Allocating is the address manager's answer wrapped as arrays; filling and emptying a batch is one
kernel (:mod:`kvheap.kernels.block_copy`). A full heap is an answer (None), not an error: the
caller evicts and tries again. A caller's mistake raises, and nothing is allocated or freed.

Copies run on the current stream of the buffer's device. A block that is freed may be handed out
at once, to work on that stream: blocks that another stream still uses need ``record_stream``.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.heap_stats import HeapStats
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.heap_blocks import heap_of
from kvheap.blocks.lifetime import FullReport, Lifetime, Release, log_full_report
from kvheap.blocks.memory_allocator import (
    DEBUG_TRACE_FRAMES,
    MemoryAllocatorInterface,
    Rows,
    debug_by_environment,
)
from kvheap.blocks.memory_batch import FREED, MemoryBatch
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryBatchMetadata
from kvheap.blocks.memory_object import MemoryObj
from kvheap.device.copy_device import CopyDevice, known_ranges
from kvheap.engine import chunks as paged_batches
from kvheap.errors import ForeignObjectError, OutOfMemoryError
from kvheap.heaps.poison import Poison
from kvheap.kernels.block_copy import fill_blocks, gather_blocks, scatter_blocks
from kvheap.kernels.launch import alignment_of
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_slots import Slots

__all__ = ["AllocatorStats", "TensorMemoryAllocator"]

CLOSE_WAIT_S = 60.0
"""How long ``close`` waits for streams: longer than any copy takes, shorter than a person's."""


@dataclass(frozen=True, slots=True)
class AllocatorStats(HeapStats):
    """The heap at one moment, and where it lives."""

    device: str
    align_bytes: int
    segments: int
    """How many buffers the heap consists of."""
    pinned_bytes: int
    """Bytes of the heap that are page-locked host memory."""
    pending_bytes: int
    """Freed bytes that wait for a stream; they count as allocated."""
    dropped_blocks: int
    """Blocks that were dropped without being freed, and reclaimed, so far."""
    expired_leases: int
    """Pins with a time to live that have ended by themselves, so far."""


class TensorMemoryAllocator(MemoryAllocatorInterface):
    """Allocates tensors, one by one or in batches, from one heap.

    Thread-safe. Every object is freed by its holders; what is dropped instead is reclaimed by a
    later operation and counted in ``stats().dropped_blocks``.

    Args:
        tensor: the buffer: contiguous, any dtype and shape, CPU or GPU. It is used as bytes, and
            kept alive. Bytes beyond the last whole ``align_bytes`` stay unused.
        align_bytes: a power of two; every block starts at a multiple of it.
        page_layout: cut the buffer into pages that hold one block of this layout each; smaller
            blocks take a page too. Instead of ``align_bytes``.
        address_manager: an address space of your own, no larger than the buffer, of which nothing
            is allocated; ``align_bytes`` is then its own.
        idempotent_free: to free a block again is no error, and does nothing.
        scrub: zero the bytes of blocks when they are freed, one launch for each size and call.
        debug: poison freed bytes, and look whether they have changed when they are handed out
            again; remember who allocated what. Slow. None: as ``KVHEAP_DEBUG`` says.
        trace_frames: how many callers of each allocation to remember; None: 4 in debug mode,
            else 0.
        stream_wait_s: for how long an allocation that does not fit waits for blocks that were
            freed while a stream still used them.
        on_full: called when an allocation fails, with who holds what, at most once in
            ``on_full_interval_s`` seconds. None: never.
        on_full_interval_s: seconds between two reports.

    Raises:
        ValueError: the tensor is not contiguous, ``align_bytes`` is not a power of two, or the
            address space is larger than the buffer.

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
        on_full: Callable[[FullReport], None] | None = log_full_report,
        on_full_interval_s: float = 60.0,
    ) -> None:
        buffer = _as_buffer(tensor)
        if address_manager is None and page_layout is not None:
            page_bytes = page_layout.size_bytes
            address_manager = AddressManager.of_pages(buffer.numel() // page_bytes, page_bytes)
        elif address_manager is None:
            address_manager = AddressManager(buffer.numel(), align_bytes)
        elif address_manager.get_heap_size() > buffer.numel():
            raise ValueError(
                f"an address space of {address_manager.get_heap_size()} bytes needs a buffer at "
                f"least as large, got {buffer.numel()}"
            )
        self.address_manager = address_manager
        """What is free; use it to look, not to free what objects hold."""
        self.page_layout = page_layout
        """What a page holds; None where there are no pages."""
        self._segments = [buffer]
        self._segment_starts = [0]
        self._grow_lock = threading.Lock()
        debug = debug_by_environment() if debug is None else debug
        if trace_frames is None:
            trace_frames = DEBUG_TRACE_FRAMES if debug else 0
        self.lifetime = Lifetime(self._give_back, trace_frames)
        self._idempotent_free = idempotent_free
        self._scrub = scrub
        self._poison = Poison() if debug else None
        self._stream_wait_s = stream_wait_s
        self._on_full = on_full
        self._on_full_interval_s = on_full_interval_s
        self._next_report = 0.0
        self._failures = 0

    # -- allocate ------------------------------------------------------------------------------

    def batched_allocate(
        self,
        shape: Shapes,
        dtype: Dtypes,
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """Allocate ``batch_size`` equal blocks, and fill them.

        No Python work per block.

        Args:
            shape: logical shape of each block, at least one element; or a list of them, one for
                each group of a block.
            dtype: logical dtype of each block; or a list of them.
            batch_size: number of blocks N; 0 gives an empty batch.
            fmt: what the dimensions mean.
            source: ``[N, *shape]`` of ``dtype``, on the buffer's device or the CPU, each block
                contiguous: block ``i`` is filled from ``source[i]``, by one kernel on the current
                stream. Blocks of several groups take ``[N, size_bytes]`` of uint8. None leaves
                the contents undefined.
            allow_partial: when they do not all fit, allocate as many as do, also none at all, and
                fill them from as many of the first blocks of ``source``.

        Returns:
            The batch, each block with one reference; None when the blocks do not all fit and
            ``allow_partial`` is false.

        Raises:
            ValueError: an argument is wrong; nothing is allocated.
            NegativeBatchSizeError: ``batch_size`` is negative.
            WriteAfterFreeError: in debug mode, somebody wrote to freed bytes.
            ClosedError: the allocator is closed.
        """
        self._require_open()
        layout = self._layout(shape, dtype, fmt)
        if source is not None and batch_size >= 0:
            self._require_matching("source", source, batch_size, layout, cpu_is_fine=True)
        addresses = self._allocate_addresses(layout.size_bytes, batch_size, allow_partial)
        if addresses is None:
            return None
        if self._poison is not None:
            try:
                self._poison.take(addresses, self._address_bytes)
            except BaseException:  # what was looked at is still poisoned
                self.address_manager.batched_free(addresses)
                raise
        batch = None
        try:
            batch = MemoryBatch(self, addresses, layout)
            if source is not None and len(batch):
                self._scatter(source[: len(batch)], addresses)
        except BaseException:
            if batch is not None:
                batch._set_all_ref_counts(FREED)
            # Part of the source may have been written: as with any free, it is wiped.
            self._give_back(Release(addresses, 0, layout.__str__))
            raise
        return batch

    def _allocate_addresses(
        self, size_bytes: int, batch_size: int, allow_partial: bool
    ) -> AddressBatch | None:
        """Addresses for a batch, after waiting for streams where that helps; None when full."""
        lifetime, manager = self.lifetime, self.address_manager
        if lifetime.has_work:
            lifetime.settle()
        deadline = None
        requested_bytes = 0
        while True:
            try:
                addresses = manager.batched_allocate(size_bytes, batch_size, allow_partial)
            except OutOfMemoryError as error:
                # Not the error itself: it holds the frames of all callers, and they would hold it.
                addresses, requested_bytes = None, error.requested_bytes
            if addresses is not None and len(addresses) == batch_size:
                return addresses
            # The deadline is one for the whole call: many small releases do not prolong it.
            now = time.monotonic()
            deadline = now + self._stream_wait_s if deadline is None else deadline
            if not lifetime.wait_for_streams(deadline - now):
                if addresses is None:
                    self._report_full(requested_bytes, batch_size)
                return addresses
            if addresses is not None:
                manager.batched_free(addresses)

    def max_batch(self, shape: Shapes, dtype: Dtypes) -> int:
        """How many blocks of this shape and dtype one ``batched_allocate`` could have now.

        Raises:
            ValueError: as for :meth:`allocate`.
        """
        self._require_open()
        layout = self._layout(shape, dtype, MemoryFormat.UNDEFINED)
        return self.address_manager.max_batch(layout.size_bytes)

    def view(
        self,
        blocks: MemoryBatchMetadata | AddressBatch | Sequence[int] | Int64Array,
        shape: Shapes | None = None,
        dtype: Dtypes | None = None,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
    ) -> MemoryBatch:
        """Wrap blocks that another process allocated in a heap of the same layout.

        Args:
            blocks: a batch's ``metadata``, which says it all; or the addresses of blocks, in
                ascending order.
            shape: logical shape of each block, where ``blocks`` are addresses.
            dtype: logical dtype of each block.
            fmt: what the dimensions mean.

        Returns:
            A batch whose tensors are this heap's bytes, and which this process never frees.

        Raises:
            ValueError: a block leaves the buffer, addresses are not ascending, or shape and dtype
                are missing.
            ClosedError: the allocator is closed.
        """
        self._require_open()
        if isinstance(blocks, MemoryBatchMetadata):
            layout, addresses = blocks.layout, blocks.blocks
        else:
            if shape is None or dtype is None:
                raise ValueError("addresses say nothing of shape and dtype: name both")
            layout = self._layout(shape, dtype, fmt)
            addresses = self._as_address_batch(blocks, layout)
        self._require_inside(addresses)
        return MemoryBatch(self, addresses, layout, owned=False)

    # -- free ----------------------------------------------------------------------------------

    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free many blocks, all or none, and collect their contents first.

        A whole :class:`MemoryBatch` costs no Python work per block.

        Args:
            objs: a batch, or objects of any batches of this allocator, of any sizes.
            out: ``[N, *shape]`` of the blocks' dtype on the buffer's device: block ``i`` is
                gathered into ``out[i]``, by one kernel on the current stream, before the bytes
                are released. The blocks must then have one layout; of several groups, ``out`` is
                ``[N, size_bytes]`` of uint8.

        Raises:
            DoubleFreeError: a block is freed already, or named twice; nothing is freed.
            BlockInUseError: a block is pinned or has more than one reference; nothing is freed.
            ForeignObjectError: a block belongs to another allocator; nothing is freed.
            TypeError: something else than a MemoryObj is among them; nothing is freed.
            ValueError: ``out`` does not match the blocks; nothing is freed.
            ClosedError: the allocator is closed.
        """
        self._require_open()
        if self.lifetime.has_work:
            self.lifetime.settle()
        if not isinstance(objs, MemoryBatch):
            objs = list(objs)
        parts = self._rows_by_batch(objs)
        if out is not None:
            self._require_gatherable(parts, out)
        claimed: list[Rows] = []
        try:
            for part in parts:
                rows = part.batch._claim(part.rows, self._idempotent_free and out is None)
                claimed.append(Rows(part.batch, rows))
            if out is not None and len(out):
                self._gather(objs, out)
            releases = self._releases_of(claimed)
        except BaseException:
            for part in claimed:
                part.batch._unclaim(part.rows)
            raise
        # From here on the blocks are freed whatever happens: at worst, if this is interrupted
        # before it begins, their bytes are lost to the heap, never handed out twice.
        for release in releases:
            self.lifetime.release(release)

    def _releases_of(self, parts: list[Rows]) -> list[Release]:
        """One release for each part that waits for a stream, and one for all others together."""
        releases = [part.batch._release_of(part.rows) for part in parts if len(part)]
        at_once = [release for release in releases if not release.events]
        if len(at_once) < 2 or self._poison is not None:  # which tells owners apart
            return releases
        starts: list[int] = []
        sizes: list[int] = []
        for release in at_once:
            blocks, size = release.blocks, release.sizes
            if isinstance(blocks, AddressBatch):
                for start, num_bytes in blocks.run_pairs():
                    starts.append(start)
                    sizes.append(num_bytes)
            else:
                starts += blocks.tolist()
                sizes += np.broadcast_to(size, len(blocks)).tolist()
        owner = at_once[0].owner
        together = Release(np.array(starts, np.int64), np.array(sizes, np.int64), owner)
        return [together, *(release for release in releases if release.events)]

    def _give_back(self, release: Release) -> None:
        """Put the bytes of a release into the free list, wiped where that was asked for."""
        if self._scrub or self._poison is not None:
            for addresses, size in _equal_blocks(release):
                for buffer, local, _ in self._by_segment(addresses):
                    if self._poison is not None:
                        self._poison.fill(buffer, local, size)
                    else:
                        fill_blocks(buffer, local, size, 0)
                if self._poison is not None:
                    self._poison.put(addresses, size, release.owner)
        if isinstance(release.blocks, AddressBatch):
            self.address_manager.batched_free(release.blocks)
        else:
            self.address_manager.batched_free(release.blocks, release.sizes)

    # -- paged caches --------------------------------------------------------------------------

    def batched_store(
        self,
        cache: PagedKVCache,
        slots: Slots,
        chunk_tokens: int = 256,
        fmt: MemoryFormat | None = None,
        *,
        layers: range | None = None,
        allow_partial: bool = False,
        convert: bool = False,
    ) -> MemoryBatch | None:
        """Allocate chunks for the KV of tokens, and fill them from an engine's cache.

        Args:
            cache: where from.
            slots: the slot of each token, or :class:`~kvheap.BlockIds`; see :func:`kvheap.store`.
            chunk_tokens: tokens of a chunk; the last chunk may be filled in part.
            fmt: what is where in a chunk; None: KV_2LTD, and KV_MLA_FMT for caches that do not
                keep K and V. Formats of one layer give as many chunks for each layer.
            layers: only these layers, of which the chunks then consist.
            allow_partial: when not all chunks fit, store the first tokens, as many as do.
            convert: keep a cache of bfloat16 or float16 as float8_e4m3fn, with float32 scales in
                a second group; not bit by bit.

        Returns:
            The chunks; None when they do not fit.

        Raises:
            ValueError, TypeError: as :func:`kvheap.store`; nothing is allocated.
            ClosedError: the allocator is closed.
        """
        return paged_batches.batched_store(
            self, cache, slots, chunk_tokens, fmt, layers, allow_partial, convert
        )

    def batched_load(
        self,
        batch: MemoryBatch | Sequence[MemoryObj],
        cache: PagedKVCache,
        slots: Slots,
        *,
        layers: range | None = None,
        heads: slice | None = None,
        convert: bool = False,
    ) -> None:
        """Fill an engine's cache from chunks: :func:`kvheap.load`, which see.

        Raises:
            ForeignObjectError: the chunks are of another allocator; nothing is loaded.
        """
        self._require_open()
        if heap_of(batch) is not self:
            raise ForeignObjectError("the chunks are of another allocator")
        paged_batches.load(batch, cache, slots, layers=layers, heads=heads, convert=convert)

    def batched_evict(
        self, batch: MemoryBatch | Sequence[MemoryObj], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Collect the contents of chunks for the next tier, and free them.

        Args:
            batch: chunks of one layout that nobody else holds.
            out: ``[N, *shape]`` of their dtype, on the heap's device or the host. None: a new
                tensor on the host, pinned where the heap is on a GPU. From a GPU to the host the
                copy is on the current stream: wait for it before you read.

        Returns:
            ``out``.

        Raises:
            As :meth:`batched_free`, and ValueError for ``out`` on another device; nothing is
            freed, but ``out`` may have been written.
        """
        return paged_batches.batched_evict(self, batch, out)

    # -- look ----------------------------------------------------------------------------------

    @property
    def buffer(self) -> torch.Tensor:
        """The heap's bytes, uint8 ``[heap bytes or more]``; addresses are offsets in it.

        Raises:
            ValueError: the heap consists of several buffers; see ``segments``.
            ClosedError: the allocator is closed.
        """
        self._require_open()
        if len(self._segments) > 1:
            raise ValueError(f"the heap has {len(self._segments)} buffers: use segments")
        return self._segments[0]

    @property
    def segments(self) -> list[tuple[int, torch.Tensor]]:
        """The heap's buffers, each with the address of its first byte."""
        self._require_open()
        return list(zip(self._segment_starts, self._segments, strict=True))

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        self._require_open()
        return self._segments[0].device

    @property
    def debug(self) -> bool:
        """Whether freed bytes are poisoned and arguments on a device are looked at."""
        return self._poison is not None

    @property
    def total_allocated_size(self) -> int:
        """Allocated bytes."""
        return self.address_manager.total_allocated_size

    def stats(self) -> AllocatorStats:
        """A consistent snapshot of the counters. O(1)."""
        self._require_open()
        if self.lifetime.has_work:
            self.lifetime.settle()
        heap = self.address_manager.stats()
        return AllocatorStats(
            **{field.name: getattr(heap, field.name) for field in fields(HeapStats)},
            device=str(self.device),
            align_bytes=self.address_manager.align_bytes,
            segments=len(self._segments),
            pinned_bytes=self._pinned_bytes(),
            pending_bytes=self.lifetime.pending_bytes,
            dropped_blocks=self.lifetime.dropped_blocks,
            expired_leases=self.lifetime.expired_leases,
        )

    def _pinned_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._segments if buffer.is_pinned())

    def snapshot(self) -> Int64Array:
        """Start and size of all free extents, int64 ``[F, 2]``, in address order. O(F)."""
        self._require_open()
        return self.address_manager.snapshot()

    def memcheck(self) -> bool:
        """Whether every invariant of the heap holds; ``address_manager.check()`` says which not."""
        self._require_open()
        return self.address_manager.check_consistency()

    def full_report(self, num_blocks: int = 0, requested_bytes: int = 0) -> FullReport:
        """What is free, and who holds the rest. O(batches)."""
        self._require_open()
        heap = self.address_manager.stats()
        return FullReport(
            requested_bytes=requested_bytes,
            num_blocks=num_blocks,
            heap_bytes=heap.heap_bytes,
            free_bytes=heap.free_bytes,
            largest_free_bytes=heap.largest_free_bytes,
            free_extents=heap.free_extents,
            pending_bytes=self.lifetime.pending_bytes,
            live=self.lifetime.live(),
            failures=self._failures,
        )

    def _report_full(self, requested_bytes: int, num_blocks: int) -> None:
        self._failures += 1
        now = time.monotonic()
        if self._on_full is None or now < self._next_report:
            return
        self._next_report = now + self._on_full_interval_s
        report = self.full_report(num_blocks, requested_bytes)
        self._failures = 0
        self._on_full(report)

    def __repr__(self) -> str:
        """The counters and the device."""
        return f"{type(self).__name__}({'closed' if self._closed else self.stats()})"

    # -- grow and end --------------------------------------------------------------------------

    def add_buffer(self, tensor: torch.Tensor) -> None:
        """Grow the heap by another buffer; no block straddles two.

        Args:
            tensor: contiguous, on the device of the first buffer. Kept alive.

        Raises:
            ValueError: the tensor is not contiguous, on another device, or smaller than
                ``align_bytes``; or the first buffer is not yet all in use.
            ClosedError: the allocator is closed.
        """
        self._require_open()
        buffer = _as_buffer(tensor)
        if buffer.device != self.device:
            raise ValueError(f"the buffer must be on {self.device}, got {buffer.device}")
        unit = self.address_manager.align_bytes
        usable = buffer.numel() // unit * unit
        if not usable:
            raise ValueError(f"the buffer must have {unit} bytes or more, got {buffer.numel()}")
        with self._grow_lock:
            start = self.address_manager.get_heap_size()
            last_end = self._segment_starts[-1] + self._segments[-1].numel() // unit * unit
            if start < last_end:
                raise ValueError(
                    f"the last buffer is in use up to {start} only, of {last_end}: it must be "
                    f"grown or cut before another follows"
                )
            # Known before a block of it can be allocated.
            self._segments.append(buffer)
            self._segment_starts.append(start)
            try:
                self.address_manager.sbrk(usable, new_segment=True)
            except BaseException:
                if self.address_manager.get_heap_size() == start:
                    self._segment_starts.pop()
                    self._segments.pop()
                raise

    def _close(self) -> None:
        while self.lifetime.wait_for_streams(CLOSE_WAIT_S):
            continue
        if self.lifetime.pending_bytes or not self.lifetime.wait_for_live(CLOSE_WAIT_S):
            raise RuntimeError(
                f"a stream has not ended its work on this heap in {CLOSE_WAIT_S:g} s "
                f"({self.lifetime.pending_bytes} of its bytes are freed): the buffers are not "
                f"released"
            )
        self._segments = []

    # -- helpers -------------------------------------------------------------------------------

    def _layout(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat) -> BlockLayout:
        layout = BlockLayout.of(shape, dtype, fmt)
        page = self.page_layout
        if page is not None and layout.size_bytes > page.size_bytes:
            raise ValueError(
                f"{layout} has {layout.size_bytes} bytes, more than a page of {page.size_bytes}"
            )
        item_bytes = layout.alignment
        for buffer in self._segments:
            offset_bytes = int(buffer.storage_offset())
            if self.address_manager.align_bytes % item_bytes or offset_bytes % item_bytes:
                raise ValueError(
                    f"{layout} needs addresses that are multiples of {item_bytes}: align_bytes is "
                    f"{self.address_manager.align_bytes}, the buffer starts at byte "
                    f"{offset_bytes} of its storage"
                )
        return layout

    def _bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        return self._address_bytes(address, size_bytes)

    def _address_bytes(self, address: int, size_bytes: int) -> torch.Tensor:
        self._require_open()
        number = 0
        if len(self._segments) > 1:
            number = bisect_right(self._segment_starts, address) - 1
            address -= self._segment_starts[number]
        return self._segments[number][address : address + size_bytes]

    def _absolute(self, addresses: Int64Array) -> tuple[Int64Array, int]:
        """Where blocks are in memory, and a power of two up to 16 that divides all of that."""
        self._require_open()
        bases = [buffer.data_ptr() for buffer in self._segments]
        alignment = alignment_of(self.address_manager.align_bytes, *bases, *self._segment_starts)
        if len(bases) == 1:
            return addresses + bases[0], alignment
        numbers = np.searchsorted(self._segment_starts, addresses, side="right") - 1
        shifts = np.array(bases, np.int64) - np.array(self._segment_starts, np.int64)
        return addresses + shifts[numbers], alignment

    def _pinned_addresses(self, device: CopyDevice) -> Int64Array:
        """What ``device`` can reach of a heap in host memory, absolute, int64 ``[R, 2]``."""
        ranges = [
            known_ranges(device, np.array([start]), np.array([end]), on_device=False)
            for start, end in sorted(
                (buffer.data_ptr(), buffer.data_ptr() + len(buffer)) for buffer in self._segments
            )
        ]
        return np.unique(np.concatenate(ranges), axis=0)  # buffers may share a registration

    def _by_segment(
        self, addresses: Int64Array
    ) -> Iterator[tuple[torch.Tensor, Int64Array, slice | Int64Array]]:
        """Each buffer with the addresses in it, counted from its start, and their positions."""
        if len(self._segments) == 1:
            yield self._segments[0], addresses, slice(None)
            return
        numbers = np.searchsorted(self._segment_starts, addresses, side="right") - 1
        for number in np.unique(numbers):
            found = np.flatnonzero(numbers == number)
            first, last = int(found[0]), int(found[-1])
            in_a_row = last - first + 1 == len(found)
            local = addresses[found] - self._segment_starts[number]
            yield self._segments[number], local, slice(first, last + 1) if in_a_row else found

    def _scatter(self, source: torch.Tensor, addresses: AddressBatch) -> None:
        blocks = source.detach().to(self.device)
        for buffer, local, positions in self._by_segment(addresses.addresses):
            scatter_blocks(blocks[positions], buffer, local)

    def _collect(self, objs: MemoryBatch | Sequence[MemoryObj], out: torch.Tensor) -> torch.Tensor:
        """Gather blocks into ``out``, and free nothing."""
        self._require_gatherable(self._rows_by_batch(objs), out)
        if len(out):
            self._gather(objs, out)
        return out

    def _gather(self, objs: MemoryBatch | Sequence[MemoryObj], out: torch.Tensor) -> None:
        if isinstance(objs, MemoryBatch):
            addresses = objs.addresses
        else:
            addresses = np.array([obj.address for obj in objs], np.int64)
        for buffer, local, positions in self._by_segment(addresses):
            if isinstance(positions, slice):
                gather_blocks(buffer, local, out[positions])
            else:
                part = torch.empty((len(local), *out.shape[1:]), dtype=out.dtype, device=out.device)
                gather_blocks(buffer, local, part)
                out[torch.from_numpy(positions).to(out.device)] = part

    def _require_matching(
        self,
        name: str,
        tensor: torch.Tensor,
        batch_size: int,
        layout: BlockLayout,
        cpu_is_fine: bool,
    ) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {tensor!r}")
        shape, dtype = tuple(layout.shapes[0]), layout.dtypes[0]
        if len(layout.shapes) > 1:
            shape, dtype = (layout.size_bytes,), torch.uint8
        if tensor.shape != (batch_size, *shape):
            raise ValueError(
                f"{name} must have shape {(batch_size, *shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        device = self.device
        if tensor.device != device and not (cpu_is_fine and tensor.device.type == "cpu"):
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
        if batch_size and not tensor[0].is_contiguous():
            raise ValueError(
                f"each block of {name} must be contiguous, got strides {tensor.stride()}"
            )

    def _require_gatherable(self, parts: list[Rows], out: torch.Tensor) -> None:
        total = sum(len(part) for part in parts)
        if not parts:
            if len(out):
                raise ValueError(f"out has {len(out)} rows for no blocks")
            return
        layout = parts[0].batch.layout
        for part in parts:
            if part.batch.layout != layout:
                raise ValueError(
                    f"out needs blocks of one layout, got {layout} and {part.batch.layout}"
                )
        self._require_matching("out", out, total, layout, cpu_is_fine=False)
        if total > 1 and out.stride(0) * out.element_size() < layout.size_bytes:
            raise ValueError(f"the rows of out overlap: strides {out.stride()}")

    def _as_address_batch(
        self, blocks: AddressBatch | Sequence[int] | Int64Array, layout: BlockLayout
    ) -> AddressBatch:
        if isinstance(blocks, AddressBatch):
            return blocks
        addresses = np.asarray(blocks)
        if addresses.ndim != 1 or (addresses.size and addresses.dtype.kind not in "iu"):
            raise ValueError(
                f"addresses must be integers in one dimension, got {addresses.dtype} of shape "
                f"{addresses.shape}"
            )
        return AddressBatch.of_addresses(
            addresses.astype(np.int64), self.address_manager.compute_aligned_size(layout.size_bytes)
        )

    def _require_inside(self, blocks: AddressBatch) -> None:
        """Refuse blocks beyond the buffers; the address space here may be another's."""
        if not len(blocks):
            return
        starts, size = blocks.run_starts, blocks.block_bytes
        ends = starts + blocks.run_counts * size
        numbers = np.searchsorted(self._segment_starts, starts, side="right") - 1
        limits = np.array(self._segment_starts) + [len(buffer) for buffer in self._segments]
        wrong = (starts < 0) | (ends > limits[numbers])
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(
                f"blocks of {size} bytes at [{starts[at]}, {ends[at]}) leave the buffer of "
                f"{limits[-1]} bytes"
            )


def _as_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """A buffer's bytes, uint8 ``[N]``."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"the buffer must be contiguous, got shape {tuple(tensor.shape)} with "
            f"strides {tensor.stride()}"
        )
    return tensor.detach().reshape(-1).view(torch.uint8)


def _equal_blocks(release: Release) -> Iterator[tuple[Int64Array, int]]:
    """The blocks of a release, those of one size together."""
    if isinstance(release.blocks, AddressBatch):
        yield release.blocks.addresses, release.blocks.block_bytes
    elif isinstance(release.sizes, int):
        yield release.blocks, release.sizes
    else:
        for size in np.unique(release.sizes):
            yield release.blocks[release.sizes == size], int(size)
