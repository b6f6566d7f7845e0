"""Rows of a paged copy on a CPU that are at equal distances, as where layers share one storage.

A unit is then a grid of rows, planes by layers by heads, in the cache and in a chunk. One NumPy
assignment copies it, without an index and without a temporary. If the units are at equal distances
in the chunks, too, all of them take one call where that is faster; see benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.kernels.arrays import MAX_ACCESS_BYTES, Int64Array
from kvheap.kernels.paged_plan import Pairing
from kvheap.kernels.words import array_at

__all__ = ["Grid", "span_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The rows of a unit as a grid ``[planes, layers, heads]`` on both sides.

    Dimensions of one element are left out: a unit that is one row is a grid without dimensions.

    Attributes:
        cache_rows: the rows of each block, or of each slot, ``[places, *grid]``.
        are_blocks: whether the places are blocks.
        chunk_offset: bytes to the first row in a chunk.
        unit_shape: ``(1, *grid)``.
        unit_strides: bytes between rows in a chunk, after those of a row.
        is_row: whether a unit is one row.
    """

    cache_rows: npt.NDArray[np.void]
    are_blocks: bool
    chunk_offset: int
    unit_shape: tuple[int, ...]
    unit_strides: tuple[int, ...]
    is_row: bool

    @classmethod
    def of(cls, pairing: Pairing, unit_tokens: int) -> Grid | None:
        """The grid; None if entries or places are not at equal distances."""
        cache, entries, heads = pairing.cache, pairing.entries, pairing.runs_per_token
        first, block_size = entries[0][0], pairing.cache.block_size
        are_blocks = unit_tokens == block_size
        is_flat = first.block_stride == first.slot_stride * block_size
        if pairing.chunk.is_per_layer or not (are_blocks or (is_flat and unit_tokens == 1)):
            return None
        bases = np.array([[each.cache_base for each in plane] for plane in entries], np.int64)
        offsets = np.array([[each.chunk_offset for each in plane] for plane in entries], np.int64)
        steps = [_steps(bases), _steps(offsets)]
        if steps[0] is None or steps[1] is None or min(*steps[0], *steps[1]) < 0:
            return None
        dims = zip(
            (*bases.shape, heads),
            (*steps[0], first.head_stride),
            (*steps[1], pairing.chunk_head_stride),
            strict=True,
        )
        kept = [dim for dim in dims if dim[0] > 1]
        row_bytes = first.run_bytes * unit_tokens
        place_stride = first.block_stride if are_blocks else first.slot_stride
        rows = array_at(
            int(bases[0, 0]),
            (cache.num_blocks if are_blocks else cache.num_slots, *(dim[0] for dim in kept)),
            np.dtype(f"V{row_bytes}"),
            (place_stride, *(dim[1] for dim in kept)),
        )
        return cls(
            rows,
            are_blocks,
            int(offsets[0, 0]),
            (1, *rows.shape[1:]),
            (row_bytes, *(dim[2] for dim in kept)),
            not kept,
        )

    def copy_each(self, addresses: Sequence[int], places: list[int], to_heap: bool) -> None:
        """Copy unit after unit, each by one assignment.

        Args:
            addresses: absolute address of each unit's first row in a chunk.
            places: the block or slot of each.
            to_heap: whether the chunks are written.
        """
        rows, shape, strides = self.cache_rows, self.unit_shape, self.unit_strides
        dtype = rows.dtype
        for address, place in zip(addresses, places, strict=True):
            in_chunk = array_at(address, shape, dtype, strides)
            if to_heap:
                in_chunk[...] = rows[place : place + 1]
            else:
                rows[place : place + 1] = in_chunk

    def load_run(self, addresses: range, places: Int64Array) -> None:
        """Load units at equal distances in the chunks by one call.

        A store by one call would take a temporary of all bytes.

        Args:
            addresses: absolute address of each unit's first row in a chunk.
            places: the block or slot of each, int64 ``[units]``.
        """
        rows = self.cache_rows
        strides = (addresses.step, *self.unit_strides[1:])
        shape = (len(addresses), *self.unit_shape[1:])
        in_chunks: npt.NDArray[Any] = array_at(addresses.start, shape, rows.dtype, strides)
        rows[places] = in_chunks


def _steps(places: Int64Array) -> tuple[int, int] | None:
    """The distances between planes and layers of ``[planes, layers]``; None if they differ."""
    steps = [0, 0]
    for axis in (0, 1):
        gaps = np.diff(places, axis=axis)
        if gaps.size:
            steps[axis] = int(gaps.flat[0])
            if (gaps != steps[axis]).any():
                return None
    return steps[0], steps[1]


def span_of(pairing: Pairing) -> tuple[int, int]:
    """The addresses of the cache's first byte and behind its last one, over all its tensors.

    The first one is rounded down to a multiple of any word, so that words can be counted from it.
    """
    kept: dict[object, Any] = pairing.cache.kept
    found: tuple[int, int] | None = kept.get("span")
    if found is None:
        ends = []
        for tensor in pairing.cache.tensors:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            ends.append(tensor.data_ptr() + (last + 1) * tensor.element_size())
        start = min(tensor.data_ptr() for tensor in pairing.cache.tensors)
        found = start // MAX_ACCESS_BYTES * MAX_ACCESS_BYTES, max(ends)
        kept["span"] = found
    return found
