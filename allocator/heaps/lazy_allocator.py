"""``LazyMemoryAllocator``: a host heap that starts small and grows to its size in the background.

The constructor reserves the whole address range, which costs nothing, and commits and pins the
first bytes. A thread (``BackgroundGrowth``) commits and pins the rest piece by piece, and each
piece joins the heap once it is usable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.arguments import require_count, require_function
from kvheap.addresses.integers import as_integer
from kvheap.heaps.host_allocators import HostHeap, empty_address_space
from kvheap.memory.growth import BackgroundGrowth, GrowthProgress
from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.pages import HugePages
from kvheap.memory.registrar import CudaHostRegistrar, HostRegistrar, require_registrar
from kvheap.renamed import renamed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvheap.blocks.memory_allocator import HeapOptions

__all__ = ["LazyMemoryAllocator"]

PINNED_PIECE_BYTES = 1 << 30
"""Bytes pinned at a time. No block straddles two pieces: 64 MiB blocks waste 3 % of 1 GiB."""

PLAIN_PIECE_BYTES = 256 << 20
"""Bytes committed at a time without pinning. Blocks may straddle such pieces."""

POPULATE_STEP_BYTES = 128 << 20
"""Bytes populated between two checks for ``close``; see benchmarks/NOTES.md."""

Pinning = Literal["required", "if possible", "no"]


class LazyMemoryAllocator(HostHeap):
    """A heap in host memory that grows to ``final_size`` in the background.

    Args:
        init_size: initial bytes; rounded up to the alignment and to whole pages of memory.
        final_size: final bytes; rounded down to the alignment.
        align_bytes: a power of two; blocks and the memory's base address are multiples of it. The
            base address is also a multiple of the page size.
        pin: ``"required"``: pin all memory for CUDA, or raise; ``"if possible"``: leave memory
            that cannot be pinned unpinned (see ``stats().pinned_bytes``); ``"no"``: do not pin.
        huge_pages: ``"none"``, ``"if possible"``, ``"transparent"`` or ``"explicit"``; see
            ``HostBuffer``. None: ``"if possible"`` if memory is pinned, else ``"none"``.
        numa_node: take memory of this node only.
        piece_bytes: bytes by which the heap grows at a time, rounded down to the same units, at
            least one; None: 1 GiB if memory is pinned, else 256 MiB.
        on_progress: called on the growing thread after each piece.
        registrar: pins the memory; None: CUDA does.
        options: see ``TensorMemoryAllocator``.

    Raises:
        ValueError: an argument is wrong.
        OSError: the system does not provide the memory.
        RuntimeError: the initial bytes cannot be pinned. A later failure ends growth and is
            reported in ``progress.error``.

    >>> with LazyMemoryAllocator(1 << 20, 64 << 20, pin="no") as heap:
    ...     heap.wait_until_grown(), heap.stats().heap_bytes >> 20
    (True, 64)
    """

    def __init__(
        self,
        init_size: int,
        final_size: int,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        *,
        pin: Pinning = "required",
        huge_pages: HugePages | None = None,
        numa_node: int | None = None,
        piece_bytes: int | None = None,
        on_progress: Callable[[GrowthProgress], None] | None = None,
        registrar: HostRegistrar | None = None,
        **options: Unpack[HeapOptions],
    ) -> None:
        if not isinstance(pin, str) or pin not in ("required", "if possible", "no"):
            raise ValueError(f"pin must be 'required', 'if possible' or 'no', got {pin!r}")
        require_function("on_progress", on_progress)
        require_registrar(registrar)
        manager, granule = empty_address_space(align_bytes, options.get("page_layout"))
        init_size = -(-require_count("init_size", init_size) // granule) * granule
        unit = manager.align_bytes
        final_size = as_integer("final_size", final_size) // unit * unit
        if not 0 <= init_size <= final_size or not final_size:
            raise ValueError(
                f"init_size must be between 0 and final_size, got {init_size} and {final_size}"
            )
        if piece_bytes is None:
            piece_bytes = PLAIN_PIECE_BYTES if pin == "no" else PINNED_PIECE_BYTES
        piece_bytes = require_count("piece_bytes", piece_bytes, at_least=1)
        piece_bytes = max(piece_bytes // granule, 1) * granule
        self._pin = pin
        if registrar is None and pin != "no" and torch.cuda.is_available():
            # Created here: it registers for the device that is current on this thread.
            registrar = CudaHostRegistrar()
        self._registrar = registrar
        if huge_pages is None:
            huge_pages = "none" if pin == "no" else "if possible"
        self.host_buffer = HostBuffer(
            final_size, align_bytes=align_bytes, huge_pages=huge_pages, numa_node=numa_node
        )
        self.closed = False  # ``_commit`` asks
        try:
            self._commit(0, init_size)
            manager.sbrk(init_size)
            super().__init__(self.host_buffer.tensor, address_manager=manager, **options)
            self._growth = BackgroundGrowth(
                self._commit,
                self._publish,
                start_bytes=init_size,
                final_bytes=final_size,
                piece_bytes=piece_bytes,
                on_progress=on_progress,
            ).start()
        except BaseException:
            self.host_buffer.close()
            raise

    @property
    def progress(self) -> GrowthProgress:
        """How far the heap has grown so far; never waits."""
        return self._growth.progress

    @renamed(timeout="timeout_s")
    def wait_until_grown(self, timeout_s: float | None = None) -> bool:
        """Wait until growth has ended; return whether it has.

        Args:
            timeout_s: the most seconds to wait; None: no limit.

        Raises:
            BaseException: the error that ended growth early.
        """
        return self._growth.wait(timeout_s)

    def _commit(self, start: int, end: int) -> None:
        for step in range(start, end, POPULATE_STEP_BYTES):
            if self.closed:  # growth ends without publishing
                return
            self.host_buffer.populate(step, min(step + POPULATE_STEP_BYTES, end))
        if self._pin != "no" and start < end:
            allow_unpinned = self._pin == "if possible"
            self.host_buffer.pin(
                start, end, registrar=self._registrar, allow_unpinned=allow_unpinned
            )

    def _publish(self, num_bytes: int) -> None:
        # A new segment if pinned: CUDA cannot copy a range that straddles two registrations.
        self.address_manager.sbrk(num_bytes, new_segment=self._pin != "no")

    def close_memory(self, timeout_s: float) -> None:
        """Stop growing, wait until no stream uses the buffer, and close it."""
        self._growth.stop()
        super().close_memory(timeout_s)
