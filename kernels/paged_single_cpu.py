"""Whole blocks on a CPU that are one row each, as those of one layer: copied by a single call.

Beside this stands one ``index_select`` or ``index_copy_``, so what counts is how little the code
around the copy touches: a copy of 1 MiB empties a CPU's caches, and what comes behind it reads its
code and objects from far. NumPy copies up to 512 KiB, and what torch's threads would not share;
``take`` needs no temporary. See benchmarks/NOTES.md.

Each byte of the blocks is read and written once, or twice through a temporary if rows are padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.paged_dense_cpu import (
    MAX_NUMPY_BYTES,
    MIN_SHARED_BYTES,
    DenseRows,
    copy_in_steps,
)
from kvheap.kernels.words import array_at

__all__ = ["SingleRows"]


@dataclass(frozen=True, slots=True, eq=False)
class SingleRows:
    """Blocks that are one row each, which fill the chunks.

    Attributes:
        rows: the row of each block, ``[blocks]``.
        row_bytes: bytes of a row.
        are_adjacent: whether the rows of the cache follow each other.
        per_chunk: blocks of a chunk.
        dense: the same rows, for torch.
    """

    rows: npt.NDArray[np.void]
    row_bytes: int
    are_adjacent: bool
    per_chunk: int
    dense: DenseRows

    @classmethod
    def of(cls, dense: DenseRows, rows: npt.NDArray[np.void], per_chunk: int) -> SingleRows:
        """The same rows by block, ``[blocks]``, in chunks of so many blocks."""
        return cls(rows, rows.itemsize, rows.flags.c_contiguous, per_chunk, dense)

    def copy(self, chunks: range, blocks: list[int] | Int64Array, to_heap: bool) -> bool:
        """Copy whole blocks between the cache and chunks at equal distances.

        Args:
            chunks: absolute address of each chunk.
            blocks: the blocks, all of them real ones of the cache; as many as the chunks have room
                for, but for the last chunk. An array is int64 ``[N]``.
            to_heap: whether the chunks are written.

        Returns:
            Whether they were copied. If not, nothing was: they are too many, or not at equal
            distances.
        """
        count, address, step = len(blocks), chunks.start, chunks.step
        if self.per_chunk > 1:
            if len(chunks) > 1 and step != self.per_chunk * self.row_bytes:
                return False
            step = self.row_bytes
        num_bytes = count * self.row_bytes
        if num_bytes > MIN_SHARED_BYTES:
            if self.dense.is_shared(count):
                self.dense.copy_units(address, step, np.asarray(blocks), to_heap)
                return True
            if num_bytes > MAX_NUMPY_BYTES:
                return False
        rows = self.rows
        run = array_at(address, (count,), rows.dtype, (step,))
        if to_heap and self.are_adjacent and step == self.row_bytes:
            rows.take(blocks, 0, run, "clip")  # any other mode takes a temporary
        else:
            copy_in_steps(rows, blocks, run, to_heap)
        return True
