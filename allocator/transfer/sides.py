"""The two sides of a copy: their device, blocks and addresses, and the limits of single copies.

A side is host memory or memory of a device. While a copy uses it, its blocks are protected from
reuse and its tensors are kept alive. Host memory that a device reads or writes must be pinned, and
no single copy may straddle two registrations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.heap import BlockObjects, Heap, heap_of, layout_and_addresses
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.rows import Rows, rows_of
from kvheap.device import cuda
from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice, known_ranges
from kvheap.device.directions import Direction
from kvheap.kernels.arguments import require_memory, require_values
from kvheap.kernels.pieces import Pieces, first_outside, is_covered

__all__ = [
    "NOWHERE",
    "Blocks",
    "Side",
    "are_apart",
    "layer_offsets",
    "paired",
    "protect_sides",
    "walls_of",
]

MAX_PADDING = 1 / 8
"""Padding up to this share of a block is copied too, so that neighbouring blocks form runs."""

MAX_RUNS_PER_BLOCK = 1 / 96
"""Pair run by run up to this many runs per block; see benchmarks/NOTES.md."""

NOWHERE = np.empty(0, np.int64)


@dataclass(slots=True, eq=False)  # each copy makes two, and frozen ones take four times as long
class Side:
    """One side of a copy.

    Attributes:
        device: the device that owns the memory; None for host memory.
        blocks: blocks of a heap, protected from reuse until the copy has ended.
        memory: the tensors that own the memory, kept alive until the copy has ended.
        heap: the heap of the blocks, if there is one.
        is_unknown: whether the side is given by pointers, so that the memory's owner is unknown.
    """

    device: CopyDevice | None
    blocks: tuple[Rows, ...] = ()
    memory: tuple[torch.Tensor, ...] = ()
    heap: Heap | None = None
    is_unknown: bool = False

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> Side:
        """The memory of a tensor."""
        return cls(cuda.device_of(tensor), memory=(tensor.detach(),))

    @property
    def is_one_batch(self) -> bool:
        """Whether the side is one whole batch, whose blocks cannot overlap."""
        return len(self.blocks) == 1 and self.blocks[0].rows is None

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The addresses of the first byte and behind the last one, if the side is one buffer."""
        if self.is_unknown or len(self.memory) != 1 or not self.memory[0].is_contiguous():
            return None
        start = self.memory[0].data_ptr()
        return start, start + self.memory[0].nbytes

    def has_lone_blocks(self, num_pieces: int) -> bool:
        """Whether the side is one whole batch of so many blocks, none of which follows another."""
        if not self.is_one_batch:
            return False
        batch = self.blocks[0].batch
        return batch.num_runs == len(batch) == num_pieces


@dataclass(slots=True, eq=False)  # as Side
class Blocks:
    """N blocks of equal size on one side, before they are paired with the other side's.

    Attributes:
        side: the side that they are on.
        size_bytes: bytes of each block.
        allocated_bytes: bytes of each block, including the padding after it.
        kind: shape and dtype of each; None for blocks of several groups.
        layout: the block layout, for blocks of a heap.
        runs: the runs of a whole batch in one buffer, relative to ``base``; else None.
        base: absolute address of that buffer.
    """

    side: Side
    size_bytes: int
    allocated_bytes: int
    kind: tuple[tuple[int, ...], torch.dtype] | None
    layout: BlockLayout | None
    runs: AddressBatch | None
    base: int
    _starts: Int64Array | None

    @classmethod
    def of(cls, name: str, blocks: BlockObjects | Rows | torch.Tensor) -> Blocks:
        """From a batch, a slice or some rows of one, objects, or the rows of a tensor.

        Raises:
            ValueError: a tensor's rows are not contiguous, or objects have several block layouts.
            TypeError: ``blocks`` is none of these.
            LifetimeError: a block is freed.
        """
        if isinstance(blocks, torch.Tensor):
            return cls._of_tensor(name, blocks)
        if not isinstance(blocks, (MemoryBatch, Rows, Sequence)):
            raise TypeError(f"{name} must be a MemoryBatch, objects or a tensor, got {blocks!r}")
        heap = heap_of(blocks.batch if isinstance(blocks, Rows) else blocks)
        segments = heap.segments
        runs: AddressBatch | None = None
        starts: Int64Array | None = None
        if isinstance(blocks, (MemoryBatch, BatchSlice)):
            rows = rows_of(blocks) if isinstance(blocks, BatchSlice) else [Rows(blocks, None)]
            rows[0].batch.counts.require_live(rows[0].rows, rows[0].batch)
            layout, allocated_bytes = blocks.layout, blocks.allocated_bytes
            if len(segments) == 1:
                runs = blocks.runs
            else:
                starts = heap.absolute(blocks.addresses)[0]
        elif isinstance(blocks, Rows):
            batch = blocks.batch
            batch.counts.require_live(blocks.rows, batch)
            layout, allocated_bytes, rows = batch.layout, batch.allocated_bytes, [blocks]
            starts = heap.absolute(batch.addresses[blocks.rows])[0]
        else:
            layout, addresses = layout_and_addresses(blocks)
            starts = heap.absolute(addresses)[0]
            rows = heap.rows_by_batch(blocks)
            sizes = {part.batch.allocated_bytes for part in rows}
            allocated_bytes = sizes.pop() if len(sizes) == 1 else layout.size_bytes
        memory = tuple([buffer for _, buffer in segments])
        side = Side(cuda.device_of(memory[0]), tuple(rows), memory, heap)
        kind = (tuple(layout.shapes[0]), layout.dtypes[0]) if len(layout.shapes) == 1 else None
        base = memory[0].data_ptr()
        return cls(side, layout.size_bytes, allocated_bytes, kind, layout, runs, base, starts)

    @classmethod
    def _of_tensor(cls, name: str, tensor: torch.Tensor) -> Blocks:
        if tensor.dim() == 0:
            raise ValueError(f"{name} must be [N, ...], got a scalar")
        require_values(name, tensor)
        require_memory(name, tensor)
        if len(tensor) and not tensor[0].is_contiguous():
            raise ValueError(
                f"each row of {name} must be contiguous, got strides {tensor.stride()}"
            )
        size_bytes = math.prod(tensor.shape[1:]) * tensor.element_size()
        stride_bytes = tensor.stride(0) * tensor.element_size() if len(tensor) > 1 else size_bytes
        starts = tensor.data_ptr() + np.arange(len(tensor), dtype=np.int64) * stride_bytes
        kind = (tuple(tensor.shape[1:]), tensor.dtype)
        return cls(Side.of_tensor(tensor), size_bytes, size_bytes, kind, None, None, 0, starts)

    def __len__(self) -> int:
        """Number of blocks."""
        if self.runs is not None:
            return len(self.runs)
        assert self._starts is not None
        return len(self._starts)

    @property
    def starts(self) -> Int64Array:
        """Absolute address of each block, int64 ``[N]``."""
        if self.runs is not None:
            return self.runs.addresses + self.base
        assert self._starts is not None
        return self._starts

    def require_same(self, target: Blocks) -> None:
        """Raise if the target has another number or kind of blocks.

        Raises:
            ValueError: names the difference.
        """
        if len(self) != len(target):
            raise ValueError(f"the source has {len(self)} blocks, the target {len(target)}")
        if self.layout is not None and target.layout is not None:
            if self.layout != target.layout:
                raise ValueError(
                    f"the source's blocks are {self.layout}, the target's {target.layout}"
                )
        elif self.kind != target.kind:
            as_bytes = ((self.size_bytes,), torch.uint8)
            if as_bytes not in (self.kind, target.kind) or self.size_bytes != target.size_bytes:
                raise ValueError(
                    f"blocks must be the same on both sides, or uint8 on one side: the source's "
                    f"are {self._name()}, the target's {target._name()}"
                )

    def _name(self) -> str:
        if self.kind is None:
            return f"{self.layout}, {self.size_bytes} bytes"
        return f"{self.kind[0]} of {self.kind[1]}, {self.size_bytes} bytes"


def paired(source: Blocks, target: Blocks) -> Pieces:
    """Pieces from block ``i`` to block ``i``, with padding if that merges them into runs."""
    size_bytes, allocated_bytes = source.size_bytes, source.allocated_bytes
    if not size_bytes:
        return Pieces(NOWHERE, NOWHERE, 1)
    if allocated_bytes == target.allocated_bytes <= size_bytes * (1 + MAX_PADDING):
        size_bytes = allocated_bytes
        if source.runs is not None and target.runs is not None:
            num_runs = source.runs.num_runs + target.runs.num_runs
            if 0 < num_runs <= max(MAX_RUNS_PER_BLOCK * len(source), 2):
                return _paired_runs(source, target, size_bytes)
    return Pieces(source.starts, target.starts, size_bytes)


def direction_of(source: Side, target: Side) -> Direction:
    """The direction of a copy between two sides."""
    here, there = source.device, target.device
    if here is None:
        return "h2h" if there is None else "h2d"
    if there is None:
        return "d2h"
    return "d2d" if here is there else "p2p"


def are_apart(source: Side, target: Side) -> bool:
    """Whether no byte of one side can be one of the other, since they are in other storages. O(1).

    False for memory that is given by pointers, and for heaps of many buffers.
    """
    if source.is_unknown or target.is_unknown or len(source.memory) != 1 or len(target.memory) != 1:
        return False
    one, other = source.memory[0].untyped_storage(), target.memory[0].untyped_storage()
    first, second = one.data_ptr(), other.data_ptr()
    return first + one.nbytes() <= second or second + other.nbytes() <= first


def protect_sides(source: Side, target: Side, completion: Completion) -> None:
    """Protect the bytes of both sides from reuse until a copy has ended.

    Raises:
        LifetimeError: a block is freed.
        ClosedError: a heap is closed.
    """
    if source.heap is not None:
        source.heap.require_open()
    for rows in source.blocks:
        rows.record_reading(completion)
    if target.heap is not None:
        target.heap.require_open()
    for rows in target.blocks:
        rows.record_filling(completion)


def _paired_runs(source: Blocks, target: Blocks, size_bytes: int) -> Pieces:
    """The pieces that are contiguous on both sides, for batches with equal block spacing."""
    assert source.runs is not None
    assert target.runs is not None
    one, other = source.runs.only_run(), target.runs.only_run()
    if one is not None and other is not None:
        here = np.array([source.base + one[0]], np.int64)
        there = np.array([target.base + other[0]], np.int64)
        return Pieces(here, there, len(source) * size_bytes)
    ends = [np.cumsum(blocks.runs.run_counts) for blocks in (source, target) if blocks.runs]
    all_ends = np.union1d(*ends)
    firsts = np.concatenate((np.zeros(1, np.int64), all_ends[:-1]))
    places = []
    for blocks, run_ends in zip((source, target), ends, strict=True):
        assert blocks.runs is not None
        run = np.searchsorted(run_ends, firsts, side="right")
        in_run = firsts - (run_ends - blocks.runs.run_counts)[run]
        places.append(blocks.base + blocks.runs.run_starts[run] + in_run * size_bytes)
    return Pieces(places[0], places[1], (all_ends - firsts) * size_bytes)


def layer_offsets(layout: BlockLayout) -> tuple[list[Int64Array], int]:
    """The byte offsets in a block of each layer's pieces, and the bytes of a piece."""
    order = layout.fmt.dim_order or ""
    if "L" not in order or len(layout.shapes) != 1:
        raise ValueError(f"{layout} does not keep its layers apart")
    at = order.index("L")
    shape = layout.shapes[0]
    if len(shape) < at + 2:
        raise ValueError(f"{layout} cannot be read as {' '.join(order)}")
    outer, num_layers = math.prod(shape[:at]), shape[at]
    piece_bytes = math.prod(shape[at + 1 :]) * layout.dtypes[0].itemsize
    numbers = np.arange(outer, dtype=np.int64) * num_layers
    return [(numbers + layer) * piece_bytes for layer in range(num_layers)], piece_bytes


def walls_of(
    side: Side, device: CopyDevice | None, starts: Int64Array, sizes: Int64Array | int
) -> Int64Array:
    """Addresses that no single copy by ``device`` may straddle, ascending.

    Raises:
        ValueError: the device cannot reach a piece; the message names it.
    """
    if device is None or not len(starts):
        return NOWHERE
    if side.device is not None and not side.is_unknown:
        bases = [segment.data_ptr() for segment in side.memory]
        return np.unique(np.array(bases, np.int64)) if len(bases) > 1 else NOWHERE
    on_device, owner = side.device is not None, side.device or device
    if side.heap is None and not side.is_unknown and side.memory[0].is_contiguous():
        start = np.array([side.memory[0].data_ptr()])
        end = start + side.memory[0].nbytes
        ranges = known_ranges(device, start, end, on_device)
        if first_outside(start, end, ranges) is None:  # the whole tensor is reachable
            return ranges[1:, 0]
    if side.heap is not None:
        ranges = side.heap.pinned_addresses(device)
        if _is_whole(side.memory, ranges):  # so its blocks are, wherever
            return ranges[1:, 0]
    ends = starts + sizes
    if side.heap is None:
        ranges = known_ranges(owner, starts, ends, on_device)
    at = first_outside(starts, ends, ranges)
    if at is not None:
        place = f"piece {at} at [{int(starts[at]):#x}, {int(ends[at]):#x})"
        if on_device:
            raise ValueError(f"{place} is not in memory of {owner.name} that CUDA knows")
        raise ValueError(
            f"{place} is in host memory that is not pinned: {device.name} cannot reach it"
        )
    return ranges[1:, 0] if len(ranges) > 1 else NOWHERE


def _is_whole(memory: tuple[torch.Tensor, ...], ranges: Int64Array) -> bool:
    """Whether ranges hold all of a side's memory, if it is one buffer."""
    if len(memory) != 1:
        return False
    start = memory[0].data_ptr()
    return is_covered(start, start + memory[0].nbytes, ranges)
