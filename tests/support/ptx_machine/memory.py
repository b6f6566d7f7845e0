"""The memory that kernels access: the process's own for global memory, and a block's shared memory.

Addresses of global memory are real ones. A test says which bytes may be read and which may be
written; every access is checked for alignment and against those ranges before it is done, so the
rest of the process is safe.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ptx_machine.errors import KernelError

__all__ = ["Bits", "GlobalMemory", "SharedMemory"]

Bits = npt.NDArray[np.uint64]
"""One value for each thread, as raw bits."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""The type of an element of so many bytes."""

FIRST_ADDRESS, END_ADDRESS = 1 << 12, 1 << 48
"""Where programs have memory, on x86-64 and AArch64."""

WARP = 32


@lru_cache(maxsize=1)
def _address_space() -> dict[int, npt.NDArray[Any]]:
    """The process from ``FIRST_ADDRESS`` on, as elements of each size; most of it is not mapped."""
    size = END_ADDRESS - FIRST_ADDRESS
    whole: Any = (ctypes.c_uint8 * size).from_address(FIRST_ADDRESS)
    elements = np.frombuffer(whole, np.uint8)
    return {size: elements.view(kind) for size, kind in UNSIGNED.items()}


class Ranges:
    """Ranges of addresses; those that touch or overlap are one."""

    def __init__(self, pieces: Iterable[tuple[int, int]]) -> None:
        """Of ``(address, bytes)``."""
        merged: list[list[int]] = []
        for start, size in sorted(piece for piece in pieces if piece[1]):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self._starts, self._ends = np.array(merged, np.int64).reshape(-1, 2).T.copy()

    def contain(self, addresses: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.bool_]:
        """Whether each access of ``size`` bytes lies within one range."""
        if not len(self._starts):
            return np.zeros(len(addresses), np.bool_)
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        found: npt.NDArray[np.bool_] = (at >= 0) & (addresses <= self._ends[at] - size)
        return found


class GlobalMemory:
    """The process's memory, of which kernels may read and write only certain elements."""

    def __init__(
        self, reads: Iterable[torch.Tensor] = (), writes: Iterable[torch.Tensor] = ()
    ) -> None:
        """Allow access to the elements of these tensors; each of them is contiguous."""
        self._tensors = tuple(reads), tuple(writes)
        self._readable, self._writable = (
            Ranges((tensor.data_ptr(), _contiguous_bytes(tensor)) for tensor in tensors)
            for tensors in self._tensors
        )

    def extended(self, reads: Iterable[torch.Tensor]) -> GlobalMemory:
        """The same memory, of which more may be read."""
        return GlobalMemory((*self._tensors[0], *reads), self._tensors[1])

    def load(self, addresses: Bits, size: int, count: int, what: object) -> list[Bits]:
        """``count`` elements of ``size`` bytes for each address."""
        self._require(self._readable, "read", addresses, size * count, what)
        words, first = _address_space()[size], (addresses - FIRST_ADDRESS) // size
        return [words[first + at].astype(np.uint64) for at in range(count)]

    def store(self, addresses: Bits, size: int, values: list[Bits], what: object) -> None:
        """Store elements of ``size`` bytes, one of each of ``values``, at each address."""
        self._require(self._writable, "written", addresses, size * len(values), what)
        words, first = _address_space()[size], (addresses - FIRST_ADDRESS) // size
        for at, value in enumerate(values):
            word = value.astype(UNSIGNED[size])
            words[first + at] = word
            if (words[first + at] != word).any():
                raise KernelError(f"threads store different values to one address: {what}")

    @staticmethod
    def _require(ranges: Ranges, verb: str, addresses: Bits, num_bytes: int, what: object) -> None:
        require_aligned(addresses, num_bytes, what)
        is_allowed = ranges.contain(addresses.view(np.int64), num_bytes)
        if not is_allowed.all():
            address = int(addresses[~is_allowed][0])
            raise KernelError(f"{num_bytes} bytes at {address:#x} may not be {verb}: {what}")


def _contiguous_bytes(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous(), f"not contiguous: {tensor.shape}, {tensor.stride()}"
    return tensor.numel() * tensor.element_size()


def require_aligned(addresses: Bits, num_bytes: int, what: object) -> None:
    """Refuse accesses that are not at multiples of their width."""
    misaligned = addresses % num_bytes != 0
    if misaligned.any():
        address = int(addresses[misaligned][0])
        raise KernelError(f"{num_bytes} bytes at {address:#x} are misaligned: {what}")


class SharedMemory:
    """The shared memory of many blocks, which also sees races.

    Two threads that access the same byte, one of them to write it, need a barrier between the two
    accesses: that of the block, or within a warp, that of the warp.
    """

    def __init__(self, num_blocks: int, num_bytes: int, num_threads: int) -> None:
        self._num_bytes = num_bytes
        self._bytes = np.zeros(num_blocks * num_bytes, np.uint8)
        self._is_written = np.zeros(num_blocks * num_bytes, np.bool_)
        # The threads that accessed each byte since the last barrier of its block, as the lowest and
        # the highest, and after which barrier of their warp they did.
        self._writer = _Accesses(num_blocks * num_bytes)
        self._readers = _Accesses(num_blocks * num_bytes)
        self._warp_barriers = np.zeros((num_blocks, -(-num_threads // WARP)), np.int64)

    def load(
        self,
        block: npt.NDArray[np.int64],
        thread: npt.NDArray[np.int64],
        addresses: Bits,
        size: int,
        count: int,
        what: object,
    ) -> list[Bits]:
        """``count`` elements of ``size`` bytes for each address, for threads of blocks."""
        cells = self._cells(block, addresses, size * count, what)
        if not self._is_written[cells].all():
            raise KernelError(f"shared memory is read before it is written: {what}")
        barriers = self._warp_barriers[block, thread // WARP]
        self._writer.require_ordered(cells, thread, barriers, what)
        self._readers.note(cells, thread, barriers)
        elements = self._bytes[cells].reshape(len(addresses), count, size)
        return [_joined(elements[:, at]) for at in range(count)]

    def store(
        self,
        block: npt.NDArray[np.int64],
        thread: npt.NDArray[np.int64],
        addresses: Bits,
        size: int,
        values: list[Bits],
        what: object,
    ) -> None:
        """Store elements of ``size`` bytes, one of each of ``values``, at each address."""
        cells = self._cells(block, addresses, size * len(values), what)
        barriers = self._warp_barriers[block, thread // WARP]
        for earlier in (self._writer, self._readers):
            earlier.require_ordered(cells, thread, barriers, what)
        data = np.concatenate([_split(value, size) for value in values], axis=1)
        self._bytes[cells] = data
        if (self._bytes[cells] != data).any():
            raise KernelError(f"threads store different values to one shared address: {what}")
        self._is_written[cells] = True
        self._writer.note(cells, thread, barriers)

    def block_barrier(self, blocks: npt.NDArray[np.int64]) -> None:
        """All threads of these blocks have met."""
        for block in blocks.tolist():
            cells = slice(block * self._num_bytes, (block + 1) * self._num_bytes)
            self._writer.forget(cells)
            self._readers.forget(cells)

    def warp_barrier(self, block: npt.NDArray[np.int64], warp: npt.NDArray[np.int64]) -> None:
        """All threads of these warps have met."""
        self._warp_barriers[block, warp] += 1

    def _cells(
        self, block: npt.NDArray[np.int64], addresses: Bits, num_bytes: int, what: object
    ) -> npt.NDArray[np.int64]:
        """The index of each byte that is accessed, ``[threads, num_bytes]``."""
        require_aligned(addresses, num_bytes, what)
        if (addresses + num_bytes > self._num_bytes).any():
            raise KernelError(
                f"an access leaves the {self._num_bytes} bytes of shared memory: {what}"
            )
        first = block * self._num_bytes + addresses.view(np.int64)
        cells: npt.NDArray[np.int64] = first[:, None] + np.arange(num_bytes)
        return cells


NOBODY = 1 << 30


class _Accesses:
    """For each byte, the lowest and the highest thread of a block that accessed it."""

    def __init__(self, num_cells: int) -> None:
        self._lowest = np.full(num_cells, NOBODY, np.int64)
        self._highest = np.full(num_cells, -1, np.int64)
        self._barriers = np.zeros(num_cells, np.int64)

    def note(
        self,
        cells: npt.NDArray[np.int64],
        thread: npt.NDArray[np.int64],
        barriers: npt.NDArray[np.int64],
    ) -> None:
        threads = np.broadcast_to(thread[:, None], cells.shape)
        np.minimum.at(self._lowest, cells, threads)
        np.maximum.at(self._highest, cells, threads)
        np.maximum.at(self._barriers, cells, np.broadcast_to(barriers[:, None], cells.shape))

    def forget(self, cells: slice) -> None:
        self._lowest[cells], self._highest[cells], self._barriers[cells] = NOBODY, -1, 0

    def require_ordered(
        self,
        cells: npt.NDArray[np.int64],
        thread: npt.NDArray[np.int64],
        barriers: npt.NDArray[np.int64],
        what: object,
    ) -> None:
        """Refuse an access of threads if another thread may be doing these at the same time."""
        thread, barriers = thread[:, None], barriers[:, None]
        lowest, highest = self._lowest[cells], self._highest[cells]
        by_itself = (lowest == thread) & (highest == thread)
        in_warp = (lowest // WARP == thread // WARP) & (highest // WARP == thread // WARP)
        ordered = (highest < 0) | by_itself | (in_warp & (self._barriers[cells] < barriers))
        if not ordered.all():
            row, column = np.argwhere(~ordered)[0]
            this, others = thread[row, 0], (lowest[row, column], highest[row, column])
            other = others[1] if others[0] == this else others[0]
            raise KernelError(
                f"threads {other} and {this} access a byte of shared memory without a barrier "
                f"between them: {what}"
            )


def _joined(parts: npt.NDArray[np.uint8]) -> Bits:
    """Numbers from their bytes, ``[threads, size]``."""
    whole = np.zeros((len(parts), 8), np.uint8)
    whole[:, : parts.shape[1]] = parts
    return whole.view(np.uint64)[:, 0]


def _split(value: Bits, size: int) -> npt.NDArray[np.uint8]:
    """The bytes of numbers, ``[threads, size]``."""
    return np.ascontiguousarray(value).view(np.uint8).reshape(-1, 8)[:, :size]
