"""Rows of a paged copy on a CPU that are at equal distances, as where layers share one storage.

A unit is then a grid of rows, planes by layers by heads, in the cache and in a chunk. One NumPy
assignment copies it, without an index and without a temporary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.kernels.arrays import MAX_ACCESS_BYTES, Int64Array
from kvheap.kernels.paged_plan import Pairing
from kvheap.kernels.words import memory_at

__all__ = ["Grid", "span_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The rows of a unit as a grid ``[planes, layers, heads]`` on both sides.

    Attributes:
        cache_rows: the rows of each block, or of each slot, ``[places, planes, layers, heads]``.
        are_blocks: whether the places are blocks.
        chunk_offset: bytes to the first row in a chunk.
        chunk_strides: bytes between rows in a chunk.
        span: bytes from the first row in a chunk to the end of the last one.
    """

    cache_rows: npt.NDArray[np.void]
    are_blocks: bool
    chunk_offset: int
    chunk_strides: tuple[int, ...]
    span: int

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
        shape = (*bases.shape, heads)
        row_bytes = first.run_bytes * unit_tokens
        strides = (*steps[0], first.head_stride)
        place_stride = first.block_stride if are_blocks else first.slot_stride
        places = cache.num_blocks if are_blocks else cache.num_slots
        start, end = span_of(pairing)
        rows: npt.NDArray[np.void] = np.ndarray(
            (places, *shape),
            f"V{row_bytes}",
            memory_at(start, end - start, "u1", 1),
            int(bases[0, 0]) - start,
            (place_stride, *strides),
        )
        chunk_strides = (*steps[1], pairing.chunk_head_stride)
        span = sum((n - 1) * step for n, step in zip(shape, chunk_strides, strict=True))
        return cls(rows, are_blocks, int(offsets[0, 0]), chunk_strides, span + row_bytes)

    def copy(self, addresses: list[int], places: list[int], to_heap: bool) -> None:
        """Copy unit after unit, each by one assignment.

        Args:
            addresses: absolute address of each unit's first row in a chunk.
            places: the block or slot of each.
            to_heap: whether the chunks are written.
        """
        rows, strides, span = self.cache_rows, self.chunk_strides, self.span
        shape, dtype = rows.shape[1:], rows.dtype
        lowest = min(addresses)
        memory = memory_at(lowest, max(addresses) - lowest + span, "u1", 1)
        for address, place in zip(addresses, places, strict=True):
            in_chunk: npt.NDArray[np.void] = np.ndarray(
                shape, dtype, memory, address - lowest, strides
            )
            if to_heap:
                in_chunk[...] = rows[place]
            else:
                rows[place] = in_chunk


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
