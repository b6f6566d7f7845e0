"""``HostBlocks``: chunks in host memory, as the buffers that calls into a file read and fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.files.data_file import PLACE_ALIGN_BYTES

__all__ = ["HostBlocks"]


@dataclass(frozen=True, slots=True)
class _Part:
    """One buffer of a heap."""

    start: int
    pointer: int
    memory: memoryview


class HostBlocks:
    """N blocks of one size in one or several buffers of host memory.

    Args:
        segments: the buffers, uint8, each with the address of its first byte.
        addresses: of the blocks, int64 ``[N]``.
        size_bytes: bytes of a block.
        allocated_bytes: bytes of a block with the padding behind it.
        place_bytes: bytes of a chunk's place in the file, at least ``size_bytes``.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, torch.Tensor]],
        addresses: Int64Array,
        size_bytes: int,
        allocated_bytes: int,
        place_bytes: int,
    ) -> None:
        self._parts = [
            _Part(start, buffer.data_ptr(), _bytes_of(buffer.numpy())) for start, buffer in segments
        ]
        starts = np.array([part.start for part in self._parts], np.int64)
        self._part_of = np.searchsorted(starts, addresses, side="right") - 1
        self._offsets = addresses - starts[self._part_of] if len(addresses) else addresses
        self.size_bytes = size_bytes
        self.place_bytes = place_bytes
        # The padding in memory is moved too where it suffices, so that neighbours are one buffer.
        self._is_padded = allocated_bytes >= place_bytes
        self._rest = None if size_bytes == place_bytes else _padding()

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._offsets)

    @property
    def max_buffers_per_block(self) -> int:
        """How many buffers one block can need."""
        return 1 if self._is_padded else 2

    def are_aligned(self, align: int) -> bool:
        """Whether every buffer begins at, and takes, a multiple of ``align``."""
        if not self._is_padded and self.size_bytes % align:
            return False
        pointers = np.array([part.pointer for part in self._parts], np.int64)
        return not ((pointers[self._part_of] + self._offsets) % align).any()

    def block(self, row: int) -> memoryview:
        """The bytes of one block."""
        offset = int(self._offsets[row])
        part = self._parts[int(self._part_of[row])]
        return part.memory[offset : offset + self.size_bytes]

    def buffers(self, rows: Int64Array) -> list[memoryview]:
        """Buffers for blocks that are neighbours in the file, in this order, with padding between.

        Args:
            rows: numbers of the blocks, int64 ``[R]``.
        """
        parts, offsets, place_bytes = self._parts, self._offsets[rows], self.place_bytes
        part_of = self._part_of[rows]
        if not self._is_padded:
            assert self._rest is not None
            rest = self._rest[: place_bytes - self.size_bytes]
            return [each for row in rows.tolist() for each in (self.block(row), rest)]
        if len(rows) == 1:
            offset = int(offsets[0])
            return [parts[int(part_of[0])].memory[offset : offset + place_bytes]]
        is_apart = (np.diff(offsets) != place_bytes) | (np.diff(part_of) != 0)
        firsts: npt.NDArray[np.int64] = np.flatnonzero(np.append(True, is_apart))
        begins = offsets[firsts]
        ends = begins + np.diff(np.append(firsts, len(rows))) * place_bytes
        return [
            parts[part].memory[begin:end]
            for part, begin, end in zip(
                part_of[firsts].tolist(), begins.tolist(), ends.tolist(), strict=True
            )
        ]


def _bytes_of(array: npt.NDArray[np.uint8]) -> memoryview:
    return memoryview(array)  # type: ignore[arg-type]  # an array is a Buffer


@lru_cache(maxsize=1)
def _padding() -> memoryview:
    """Bytes that nobody reads, aligned for every file."""
    raw = np.zeros(2 * PLACE_ALIGN_BYTES, np.uint8)
    skipped = -raw.ctypes.data % PLACE_ALIGN_BYTES
    return _bytes_of(raw)[skipped : skipped + PLACE_ALIGN_BYTES]
