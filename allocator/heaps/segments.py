"""``Segments``: the buffers behind one address space, and access to blocks by their addresses.

``Segments`` is immutable: a heap that grows publishes a new one. No block straddles two segments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import reduce
from operator import or_

import numpy as np
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.device.copy_device import CopyDevice, known_ranges
from kvheap.kernels.arguments import require_memory, require_tensor
from kvheap.kernels.arrays import MAX_ACCESS_BYTES
from kvheap.kernels.block_copy import fill_blocks, gather_blocks, scatter_blocks
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.few_blocks import HostMemory, copy_run
from kvheap.kernels.pieces import first_outside
from kvheap.kernels.words import as_bytes

__all__ = ["Segments", "as_buffer"]


class Segments:
    """Buffers of one device, each with the address of its first byte.

    - inspect: ``buffers``, ``starts``, ``device``, ``pairs``, ``end``, ``pinned_bytes``;
    - grow: ``with_buffer``;
    - where blocks are: ``bytes_at``, ``absolute``, ``has_memory_of``, ``pinned_addresses``;
    - copy and fill blocks: ``scatter``, ``gather``, ``fill``;
    - checks: ``require_inside``, ``require_readable``.

    Args:
        buffers: uint8 ``[N]`` each, at least one.
        starts: heap address of the first byte of each, ascending; the first is 0.
    """

    __slots__ = (
        "_bits",
        "_memory",
        "_reached",
        "_shift",
        "_shifts",
        "_spans",
        "buffers",
        "device",
        "pairs",
        "starts",
    )

    def __init__(self, buffers: tuple[torch.Tensor, ...], starts: tuple[int, ...]) -> None:
        self.buffers = buffers
        self.starts = starts
        self.pairs = list(zip(starts, buffers, strict=True))
        """The buffers, each after the heap address of its first byte."""
        bases = [buffer.data_ptr() for buffer in buffers]
        self._shifts = np.array(bases, np.int64) - np.array(starts, np.int64)
        # NumPy adds an array without dimensions in half the time that an ``int`` takes.
        self._shift = self._shifts.reshape(()) if len(bases) == 1 else None
        self._bits = reduce(or_, (*bases, *starts), MAX_ACCESS_BYTES)
        self._spans = [(base, base + len(each)) for base, each in zip(bases, buffers, strict=True)]
        self._reached: dict[CopyDevice, Int64Array] = {}
        is_on_host = len(buffers) == 1 and buffers[0].is_cpu
        self._memory = HostMemory.of(buffers[0]) if is_on_host else None
        if buffers:
            self.device = buffers[0].device
            """The device that the buffers are on."""

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.buffers)

    def end(self, align_bytes: int) -> int:
        """The address after the last usable byte; only whole units of ``align_bytes`` are."""
        return self.starts[-1] + self.buffers[-1].numel() // align_bytes * align_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the buffers that are page-locked host memory."""
        return sum(buffer.numel() for buffer in self.buffers if buffer.is_pinned())

    def with_buffer(self, buffer: torch.Tensor, start: int) -> Segments:
        """These segments and one more buffer, whose first byte has the address ``start``.

        Raises:
            ValueError: the buffer shares memory with a segment.
        """
        first, end = buffer.data_ptr(), buffer.data_ptr() + len(buffer)
        for each in self.buffers:
            if first < each.data_ptr() + len(each) and each.data_ptr() < end:
                raise ValueError(
                    f"the buffer at [{first:#x}, {end:#x}) shares memory with the heap's buffer at "
                    f"[{each.data_ptr():#x}, {each.data_ptr() + len(each):#x})"
                )
        return Segments((*self.buffers, buffer), (*self.starts, start))

    # -- where blocks are ----------------------------------------------------------------------

    def bytes_at(self, address: int, size_bytes: int) -> torch.Tensor:
        """The bytes at an address, uint8 ``[size_bytes]``, without a copy."""
        number = 0
        if len(self.buffers) > 1:
            number = bisect_right(self.starts, address) - 1
            address -= self.starts[number]
        return self.buffers[number][address : address + size_bytes]

    def absolute(self, addresses: Int64Array, align_bytes: int) -> tuple[Int64Array, int]:
        """Convert addresses in the heap to absolute addresses.

        Args:
            addresses: addresses in the heap, int64 ``[N]``.
            align_bytes: the heap's alignment; every block address is a multiple of it.

        Returns:
            The absolute addresses, int64 ``[N]``, and a power of two up to 16 that divides the
            absolute address of every block of the heap.
        """
        bits = align_bytes | self._bits
        alignment = bits & -bits
        if self._shift is not None:
            return addresses + self._shift, alignment
        return addresses + self._shifts[self._numbers_of(addresses)], alignment

    def has_memory_of(self, tensor: torch.Tensor) -> bool:
        """Whether a buffer has bytes of a tensor of rows, or bytes between or behind them."""
        start = tensor.data_ptr()
        length = tensor.nbytes
        if not tensor.is_contiguous():
            length = max(length, len(tensor) * tensor.stride(0) * tensor.element_size())
        end = start + length
        if len(self._spans) == 1:
            ((first, last),) = self._spans
            return start < last and first < end
        return any(start < last and first < end for first, last in self._spans)

    def pinned_addresses(self, device: CopyDevice) -> Int64Array:
        """Absolute ranges of the buffers that ``device`` can reach, int64 ``[R, 2]``.

        Once all buffers can be reached, CUDA is not asked again.
        """
        known = self._reached.get(device)
        if known is not None:
            return known
        bounds = np.array(
            sorted((buffer.data_ptr(), buffer.data_ptr() + len(buffer)) for buffer in self.buffers)
        )
        found = [known_ranges(device, bound[:1], bound[1:], on_device=False) for bound in bounds]
        ranges = np.unique(np.concatenate(found), axis=0)  # buffers may share a registration
        if first_outside(bounds[:, 0], bounds[:, 1], ranges) is None:
            self._reached[device] = ranges
        return ranges

    def _numbers_of(self, addresses: Int64Array) -> Int64Array:
        """The index of each address's segment, int64 ``[N]``."""
        return np.searchsorted(self.starts, addresses, side="right") - 1

    def _by_segment(
        self, addresses: Int64Array
    ) -> Iterator[tuple[torch.Tensor, Int64Array, slice | Int64Array]]:
        """For each buffer in use: the buffer, the offsets in it, and their positions."""
        if len(self.buffers) == 1:
            yield self.buffers[0], addresses, slice(None)
            return
        numbers = self._numbers_of(addresses)
        for number in np.unique(numbers):
            found = np.flatnonzero(numbers == number)
            first, last = int(found[0]), int(found[-1])
            in_a_row = last - first + 1 == len(found)
            local = addresses[found] - self.starts[number]
            yield self.buffers[number], local, slice(first, last + 1) if in_a_row else found

    # -- copy and fill blocks ------------------------------------------------------------------

    def scatter(self, source: torch.Tensor, blocks: AddressBatch | Int64Array) -> None:
        """Copy ``source[i]`` to block ``i``, or the block at address ``i``; a kernel a segment."""
        if isinstance(blocks, AddressBatch):
            if self._copy_run(source, blocks, to_heap=True):
                return
            blocks = blocks.addresses
        source = source.detach()
        if source.device != self.device:
            with Relaxed():
                source = source.to(self.device)
        for buffer, local, positions in self._by_segment(blocks):
            scatter_blocks(source[positions], buffer, local)

    def gather(self, blocks: AddressBatch | Int64Array, out: torch.Tensor) -> None:
        """Copy the blocks, or those at addresses, to ``out[i]``, by one kernel for each segment."""
        if isinstance(blocks, AddressBatch):
            if self._copy_run(out, blocks, to_heap=False):
                return
            blocks = blocks.addresses
        for buffer, local, positions in self._by_segment(blocks):
            if isinstance(positions, slice):
                gather_blocks(buffer, local, out[positions])
            else:
                with Relaxed():
                    shape = (len(local), *out.shape[1:])
                    part = torch.empty(shape, dtype=out.dtype, device=out.device)
                    gather_blocks(buffer, local, part)
                    out[torch.from_numpy(positions).to(out.device)] = part

    def _copy_run(self, tensor: torch.Tensor, blocks: AddressBatch, to_heap: bool) -> bool:
        """Copy blocks of host memory that form one run; False if they do not."""
        memory = self._memory
        run = blocks.only_run() if memory is not None else None
        if memory is None or run is None:
            return False
        return copy_run(tensor, memory, run, blocks.block_bytes, to_heap)

    def fill(self, addresses: Int64Array, size_bytes: int, value: int) -> None:
        """Set every byte of blocks of one size to ``value``, by one kernel for each segment."""
        for buffer, local, _ in self._by_segment(addresses):
            fill_blocks(buffer, local, size_bytes, value)

    # -- checks --------------------------------------------------------------------------------

    def require_inside(self, blocks: AddressBatch) -> None:
        """Raise if any block leaves the buffers.

        Raises:
            ValueError: names the first block that leaves them, or straddles two.
        """
        if not len(blocks):
            return
        starts, size = blocks.run_starts, blocks.block_bytes
        ends = starts + blocks.run_counts * size
        limits = np.array(self.starts) + [len(buffer) for buffer in self.buffers]
        wrong = (starts < 0) | (ends > limits[-1])
        if not wrong.any():
            if (ends <= limits[self._numbers_of(starts)]).all():
                return
            # A run may go on in the next buffer, if no block straddles both.
            starts = blocks.addresses
            ends = starts + size
            wrong = ends > limits[self._numbers_of(starts)]
        if wrong.any():
            at = int(np.argmax(wrong))
            limit = limits[max(int(self._numbers_of(starts[at : at + 1])[0]), 0)]
            raise ValueError(
                f"blocks of {size} bytes leave the buffer: [{starts[at]}, {ends[at]}) is not "
                f"within the buffer there, which ends at {limit}"
            )

    def require_readable(self, layout: BlockLayout, align_bytes: int) -> None:
        """Raise if ``layout`` has dtypes that cannot be read at every multiple of ``align_bytes``.

        Raises:
            ValueError: names the alignment that the layout needs and that of the buffer.
        """
        item_bytes = layout.alignment
        for buffer in self.buffers:
            offset_bytes = int(buffer.storage_offset())
            if align_bytes % item_bytes or offset_bytes % item_bytes:
                raise ValueError(
                    f"{layout} needs addresses that are multiples of {item_bytes}: align_bytes is "
                    f"{align_bytes}, the buffer starts at byte {offset_bytes} of its storage"
                )


def as_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 ``[N]``, without a copy.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not contiguous, on neither a CPU nor a CUDA device, or its memory was
            taken away.
    """
    advice = ""
    if isinstance(tensor, int):
        advice = (
            f": for a heap of so many bytes use HostMemoryAllocator({tensor}) or "
            f"GPUMemoryAllocator({tensor})"
        )
    require_tensor("tensor", tensor, advice)
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"the buffer must be on a CPU or a CUDA device, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"the buffer must be contiguous, got shape {tuple(tensor.shape)} with "
            f"strides {tensor.stride()}"
        )
    require_memory("the buffer", tensor)
    return as_bytes(tensor.detach().reshape(-1))
