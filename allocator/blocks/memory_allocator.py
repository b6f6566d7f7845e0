"""``MemoryAllocatorInterface``: the interface of all allocators of kvheap.

``blocks/block_allocator.py`` adds the common base of allocators that create their own blocks.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from kvheap.addresses.arguments import as_seconds, require_flags
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.report import FullReport, LiveBlocks
from kvheap.device.events import POLL_SECONDS
from kvheap.errors import ClosedError
from kvheap.forks import starts_over_after_fork
from kvheap.guards import is_inside_section
from kvheap.kernels.untraced import untraced_class

if TYPE_CHECKING:
    from typing import Self

__all__ = ["HeapOptions", "MemoryAllocatorInterface", "debug_by_environment"]


CLOSE_TIMEOUT_S = 60.0
"""Default seconds that ``close`` waits for streams; any copy of KV takes far less."""


class HeapOptions(TypedDict, total=False):
    """Keyword options of every allocator that has a heap; see ``TensorMemoryAllocator``."""

    page_layout: BlockLayout | None
    idempotent_free: bool
    scrub: bool
    debug: bool | None
    trace_frames: int | None
    stream_wait_s: float
    on_full: Callable[[FullReport], None] | None
    on_full_interval_s: float
    view_only: bool | None


def debug_by_environment() -> bool:
    """Whether ``KVHEAP_DEBUG`` turns debug mode on: it is set, and neither empty nor 0."""
    return os.environ.get("KVHEAP_DEBUG", "") not in ("", "0")


@untraced_class
class MemoryAllocatorInterface(ABC):
    """Allocates and frees blocks, one by one or in batches.

    It is a context manager; leaving it closes the allocator. A full allocator returns None and a
    wrong argument raises; in both cases nothing has changed.

    - allocate: ``allocate``, ``batched_allocate``;
    - free: ``free``, ``batched_free``;
    - contents: ``batched_read``, ``batched_write``;
    - inspect: ``leaks``, ``memcheck``, ``closed``;
    - close: ``close``;
    - for subclasses: ``layout_of``, ``allocate_blocks``, ``close_memory``, ``require_open``.
    """

    closed: bool
    """Whether :meth:`close` was called."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Keep ``torch.compile`` from tracing any allocator."""
        super().__init_subclass__(**arguments)
        untraced_class(cls)

    def __init__(self) -> None:
        self.closed = False  # here, not in the class, where it is looked up more slowly
        self._is_released = False
        self._close_lock = threading.RLock()
        self._closed_by: int | None = None
        starts_over_after_fork(self)

    # -- allocate ------------------------------------------------------------------------------

    def allocate(
        self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat | str = MemoryFormat.KV_2LTD
    ) -> MemoryObj | None:
        """Allocate one block; its contents are undefined.

        Args:
            shape: logical shape, at least one element; or a list of them, one for each group.
            dtype: logical dtype or its name, such as ``"bfloat16"``; or a list of them.
            fmt: what the dimensions mean; a ``MemoryFormat`` or its name.

        Returns:
            The object, with one reference; None if it does not fit.

        Raises:
            ValueError: the shape is empty or negative, or the heap's alignment is too small for
                the dtype.
            ClosedError: the allocator is closed.
        """
        batch = self.batched_allocate(shape, dtype, 1, fmt)
        return None if batch is None else batch[0]

    def batched_allocate(
        self,
        shape: Shapes,
        dtype: Dtypes,
        batch_size: int,
        fmt: MemoryFormat | str = MemoryFormat.KV_2LTD,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """Allocate ``batch_size`` equal blocks, and fill them from ``source``.

        Does no Python work per block.

        Args:
            shape: logical shape of each block, at least one element; or a list of them, one for
                each group of a block.
            dtype: logical dtype of each block or its name; or a list of them.
            batch_size: number of blocks N; 0 gives an empty batch.
            fmt: what the dimensions mean; a ``MemoryFormat`` or its name.
            source: ``[N, *shape]`` of ``dtype``, on the allocator's device or the CPU, each block
                contiguous: block ``i`` is filled from ``source[i]``, by one kernel on the current
                stream. For blocks of several groups: ``[N, size_bytes]`` of uint8. None leaves
                the contents undefined.
            allow_partial: if not all blocks fit, allocate as many as fit, possibly none, and fill
                them from the first blocks of ``source``.

        Returns:
            The batch, each block with one reference; None if the blocks do not all fit and
            ``allow_partial`` is false.

        Raises:
            ValueError, TypeError: an argument is wrong; nothing is allocated.
            NegativeBatchSizeError: ``batch_size`` is negative.
            WriteAfterFreeError: in debug mode, freed bytes were written to.
            ClosedError: the allocator is closed.
        """
        if self.closed:
            self.require_open()
        if type(batch_size) is not int:
            batch_size = as_integer("batch_size", batch_size)
        if allow_partial is not False:
            require_flags(allow_partial=allow_partial)
        layout = self.layout_of(shape, dtype, fmt)
        return self.allocate_blocks(layout, batch_size, source, allow_partial)

    # -- free ----------------------------------------------------------------------------------

    def free(self, obj: MemoryObj) -> None:
        """Free one block.

        Raises:
            DoubleFreeError: it is already freed.
            BlockInUseError: it is pinned or has more than one reference.
            ForeignObjectError: it belongs to another allocator.
            TypeError: it is not a MemoryObj.
            ClosedError: the allocator is closed.
        """
        if not isinstance(obj, MemoryObj):
            more = ": free a batch by batched_free()" if isinstance(obj, MemoryBatch) else ""
            raise TypeError(f"only a MemoryObj can be freed, got {obj!r}{more}")
        self.batched_free([obj])

    @abstractmethod
    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free many blocks, all or none; with ``out``, gather their contents first.

        A whole :class:`MemoryBatch` costs no Python work per block.

        Args:
            objs: a batch, or objects of any batches of this allocator, of any sizes.
            out: ``[N, *shape]`` of the blocks' dtype on the allocator's device: block ``i`` is
                gathered into ``out[i]``, by one kernel on the current stream, before the bytes
                are released. The blocks must then have one layout; for blocks of several groups,
                ``out`` is ``[N, size_bytes]`` of uint8.

        Raises:
            DoubleFreeError: a block is already freed, or named twice; nothing is freed.
            BlockInUseError: a block is pinned or has more than one reference; nothing is freed.
            ForeignObjectError: a block belongs to another allocator; nothing is freed.
            TypeError: an element is not a MemoryObj; nothing is freed.
            ValueError: ``out`` does not match the blocks or shares memory with one; nothing is
                freed.
            ClosedError: the allocator is closed.
        """

    # -- contents ------------------------------------------------------------------------------

    @abstractmethod
    def batched_read(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gather the contents of many blocks into a tensor, by one kernel; the blocks stay.

        It runs on the current stream, behind the transfer that fills a batch. Blocks may be pinned,
        shared, another process's, and named twice. Whoever frees them must do so in the order of
        that stream, or ``record_stream`` first.

        Args:
            objs: a batch, a slice of one, or objects of any batches of this allocator, of one
                layout.
            out: ``[N, *shape]`` of the blocks' dtype on the allocator's device, each row
                contiguous: block ``i`` is gathered into ``out[i]``. For blocks of several groups:
                ``[N, size_bytes]`` of uint8. None: a new tensor.

        Returns:
            ``out``.

        Raises:
            LifetimeError: a block is freed; nothing is read.
            ForeignObjectError: a block belongs to another allocator; nothing is read.
            TypeError: an element is not a MemoryObj, or ``out`` is not a tensor; nothing is read.
            ValueError: ``out`` does not match the blocks or shares memory with one, the blocks
                differ in layout, or the list is empty and there is no ``out``; nothing is read.
            TransferError: the transfer that was to fill a block has failed; nothing is read.
            ClosedError: the allocator is closed.
        """

    @abstractmethod
    def batched_write(self, objs: MemoryBatch | Iterable[MemoryObj], source: torch.Tensor) -> None:
        """Fill many blocks from a tensor, by one kernel: ``source=`` for blocks that exist.

        It runs on the current stream, behind the transfer that fills a batch, and waits on the host
        for other transfers in flight that use the blocks. Work of your own on other streams is not
        waited for. What stores have recorded of the blocks' tokens is forgotten, as with any
        ``source=``.

        Args:
            objs: a batch, a slice of one, or objects of any batches of this allocator, of one
                layout, none named twice.
            source: ``[N, *shape]`` of the blocks' dtype, on the allocator's device or the CPU, each
                row contiguous: block ``i`` is filled from ``source[i]``. For blocks of several
                groups: ``[N, size_bytes]`` of uint8.

        Raises:
            LifetimeError: a block is freed; nothing is written.
            ForeignObjectError: a block belongs to another allocator, or is another process's that
                this one may only read (``ForeignProcessError`` in a heap whose books another
                process keeps); nothing is written.
            TypeError: an element is not a MemoryObj, or ``source`` is not a tensor; nothing is
                written.
            ValueError: ``source`` does not match the blocks or shares memory with one, the blocks
                differ in layout, or one is named twice; nothing is written.
            TransferError: the transfer that was to fill a block has failed; nothing is written.
            ClosedError: the allocator is closed.
        """

    # -- inspect -------------------------------------------------------------------------------

    @abstractmethod
    def leaks(self) -> tuple[LiveBlocks, ...]:
        """All live blocks, grouped by allocation site (if recorded) and block layout, oldest first.

        A block that should have been freed by now is a leak. O(batches); meant for debugging.
        """

    def memcheck(self) -> bool:
        """Whether every invariant of the allocator holds."""
        return True

    # -- close ---------------------------------------------------------------------------------

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Refuse new calls, wait until streams have finished with the blocks, and free the memory.

        Other calls then raise ``ClosedError``. If the wait times out, call ``close`` again.
        Several threads may close at once, and so may a signal handler during a ``close``.

        Args:
            timeout_s: maximum number of seconds to wait, for streams and other threads that close.

        Raises:
            TimeoutError: a stream or another ``close`` has not finished in time; this call frees no
                memory, and other calls keep raising ``ClosedError``.
            ValueError: ``timeout_s`` is negative or not a number; nothing changes.
        """
        timeout_s = as_seconds("timeout_s", timeout_s)
        self.closed = True
        deadline = time.monotonic() + timeout_s
        me = threading.get_ident()
        while self._closed_by not in (None, me):
            # Inside an operation, the other thread may wait for what this one holds.
            if time.monotonic() >= deadline or is_inside_section():
                raise TimeoutError(
                    f"another thread is still closing this; close waits for {timeout_s:g} s, and "
                    f"not at all inside an operation of a heap"
                )
            time.sleep(POLL_SECONDS)
        # Not ``acquire(timeout=...)``: an exception right after it would keep the lock.
        with self._close_lock:
            before, self._closed_by = self._closed_by, me
            try:
                if not self._is_released:
                    self.close_memory(max(deadline - time.monotonic(), 0.0))
                    self._is_released = True
            finally:
                self._closed_by = before

    def __enter__(self) -> Self:
        self.require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- for subclasses ------------------------------------------------------------------------

    @abstractmethod
    def layout_of(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat | str) -> BlockLayout:
        """The layout of a block, checked against what this allocator can hold.

        Raises:
            ValueError, TypeError: as :meth:`batched_allocate`.
        """

    @abstractmethod
    def allocate_blocks(
        self,
        layout: BlockLayout,
        batch_size: int,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """:meth:`batched_allocate` for a layout that :meth:`layout_of` made."""

    @abstractmethod
    def close_memory(self, timeout_s: float) -> None:
        """Free the allocator's memory, for :meth:`close`; not called again once it succeeds.

        Raises:
            TimeoutError: a stream has not finished its work in ``timeout_s`` seconds.
        """

    def start_over_after_fork(self) -> None:
        """Replace the allocator's own locks in a forked child."""
        self._close_lock = threading.RLock()
        self._closed_by = None

    def require_open(self) -> None:
        """Raise if the allocator is closed.

        Raises:
            ClosedError: the allocator is closed.
        """
        if self.closed:
            raise ClosedError(f"this {type(self).__name__} is closed")
