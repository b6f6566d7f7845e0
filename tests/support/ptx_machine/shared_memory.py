"""The shared memory of blocks: races between threads, and what bulk copies do with bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ptx_machine.errors import KernelError, UnknownInstructionError
from ptx_machine.memory import WARP, Bits, require_aligned

__all__ = ["Numbers", "SharedMemory"]

Numbers: TypeAlias = "npt.NDArray[np.int64]"
"""Threads, blocks, or bytes of shared memory, by number."""


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
        self._async = _AsyncCells(num_blocks * num_bytes)

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
        self._async.require_no_copy(cells, what, is_write=False)
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
        self._async.require_no_copy(cells, what, is_write=True)
        barriers = self._warp_barriers[block, thread // WARP]
        for earlier in (self._writer, self._readers):
            earlier.require_ordered(cells, thread, barriers, what)
        self._async.note_store(cells, thread)
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

    # -- what bulk copies and mbarriers do; see ``bulk.py`` ----------------------------------------

    def place_barrier(self, block: int, thread: int, address: int, what: object) -> None:
        """A thread makes 8 bytes an mbarrier, which ordinary accesses may not touch then."""
        cells = self._access(block, thread, address, 8, what, alignment=8, is_write=True)
        self._async.is_barrier[cells] = True
        self._note(self._writer, block, thread, cells)
        self._async.note_store(cells[None], np.array([thread]))

    def require_barrier_known(self, block: int, thread: int, address: int, what: object) -> None:
        """Refuse a thread that uses an mbarrier without having met the one that made it."""
        cells = block * self._num_bytes + address + np.arange(8)
        self._require_ordered((self._writer,), block, thread, cells, what)

    def require_fenced_barrier(self, block: int, address: int, what: object) -> None:
        """Refuse a bulk copy that counts on an mbarrier whose making no fence has ordered."""
        cells = block * self._num_bytes + address + np.arange(8)
        self._async.require_fenced(cells, what)

    def start_landing(
        self, block: int, thread: int, address: int, size: int, what: object
    ) -> Numbers:
        """A bulk copy will write bytes; returns where they are."""
        cells = self._access(block, thread, address, size, what, alignment=16, is_write=True)
        self._async.require_fenced(cells, what)
        self._async.is_landing[cells] = True
        self._async.origin[cells] = -1
        return cells

    def land(self, cells: Numbers, data: npt.NDArray[np.uint8], origin: tuple[int, int]) -> None:
        """The bytes have arrived, as counted by a phase of an mbarrier: its address and number."""
        self._bytes[cells] = data
        self._is_written[cells] = True
        self._async.is_landing[cells] = False
        self._async.origin[cells] = origin
        for earlier in (self._writer, self._readers):  # who waits for the mbarrier comes after it
            earlier.forget(slice(int(cells[0]), int(cells[-1]) + 1))

    def start_reading(
        self, block: int, thread: int, address: int, size: int, what: object
    ) -> tuple[Numbers, set[tuple[int, int]]]:
        """A bulk copy will read bytes; returns where they are, and the phases that brought them."""
        cells = self._access(block, thread, address, size, what, alignment=16, is_write=False)
        if not self._is_written[cells].all():
            raise KernelError(f"shared memory is read before it is written: {what}")
        self._async.require_fenced(cells, what)
        self._async.num_reading[cells] += 1
        origins = np.unique(self._async.origin[cells], axis=0).tolist()
        return cells, {(address, phase) for address, phase in origins if address >= 0}

    def end_reading(self, block: int, thread: int, cells: Numbers) -> npt.NDArray[np.uint8]:
        """The bytes have been read, and the thread that started this has waited for it."""
        self._async.num_reading[cells] -= 1
        self._note(self._readers, block, thread, cells)
        return self._bytes[cells].copy()

    def fence(self, block: int, thread: int) -> None:
        """A thread orders its ordinary stores before bulk copies."""
        cells = slice(block * self._num_bytes, (block + 1) * self._num_bytes)
        self._async.fence(cells, thread)

    def _access(
        self,
        block: int,
        thread: int,
        address: int,
        size: int,
        what: object,
        *,
        alignment: int,
        is_write: bool,
    ) -> Numbers:
        """The index of each of some bytes that one thread accesses, if it may."""
        if address % alignment:
            raise KernelError(f"{size} bytes at {address:#x} are misaligned: {what}")
        self._require_inside(np.array([address]), size, what)
        cells: Numbers = block * self._num_bytes + address + np.arange(size)
        self._async.require_no_copy(cells, what, is_write=is_write, by_copy=True)
        earlier = (self._writer, self._readers) if is_write else (self._writer,)
        self._require_ordered(earlier, block, thread, cells, what)
        return cells

    def _require_ordered(
        self,
        earlier: Iterable[_Accesses],
        block: int,
        thread: int,
        cells: Numbers,
        what: object,
    ) -> None:
        barriers = self._warp_barriers[block, thread // WARP]
        for accesses in earlier:
            accesses.require_ordered(cells[None], np.array([thread]), np.array([barriers]), what)

    def _note(self, accesses: _Accesses, block: int, thread: int, cells: Numbers) -> None:
        barriers = self._warp_barriers[block, thread // WARP]
        accesses.note(cells[None], np.array([thread]), np.array([barriers]))

    def _require_inside(self, addresses: npt.NDArray[Any], num_bytes: int, what: object) -> None:
        if (addresses + num_bytes > self._num_bytes).any():
            raise KernelError(
                f"an access leaves the {self._num_bytes} bytes of shared memory: {what}"
            )

    def _cells(
        self, block: npt.NDArray[np.int64], addresses: Bits, num_bytes: int, what: object
    ) -> npt.NDArray[np.int64]:
        """The index of each byte that is accessed, ``[threads, num_bytes]``."""
        require_aligned(addresses, num_bytes, what)
        self._require_inside(addresses, num_bytes, what)
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


NO_THREAD = -1


class _AsyncCells:
    """For each byte, what bulk copies do with it, and which stores no fence has ordered for them.

    Attributes:
        is_barrier: whether it is part of an mbarrier.
        is_landing: whether a bulk copy is going to write it.
        num_reading: bulk copies that are going to read it.
        origin: the address of the mbarrier, and the number of its phase, that counted the bulk copy
            which wrote it; -1 for none.
    """

    def __init__(self, num_cells: int) -> None:
        self.is_barrier = np.zeros(num_cells, np.bool_)
        self.is_landing = np.zeros(num_cells, np.bool_)
        self.num_reading = np.zeros(num_cells, np.int8)
        self.origin = np.full((num_cells, 2), -1, np.int32)
        self._unfenced = np.full(num_cells, NO_THREAD, np.int32)

    def note_store(self, cells: Numbers, thread: Numbers) -> None:
        """Threads store to bytes, ``[threads, bytes]``."""
        self._unfenced[cells] = thread[:, None]
        self.origin[cells] = -1

    def fence(self, cells: slice, thread: int) -> None:
        """The stores of a thread are ordered before bulk copies."""
        part = self._unfenced[cells]
        part[part == thread] = NO_THREAD

    def require_fenced(self, cells: Numbers, what: object) -> None:
        """Refuse a bulk copy that an ordinary store is not ordered before."""
        if (self._unfenced[cells] != NO_THREAD).any():
            raise KernelError(f"no fence orders an ordinary store before a bulk copy: {what}")

    def require_no_copy(
        self, cells: Numbers, what: object, *, is_write: bool, by_copy: bool = False
    ) -> None:
        """Refuse an access of bytes that a bulk copy uses, or that are an mbarrier."""
        if self.is_landing[cells].any():
            raise KernelError(f"bytes are used while a bulk copy to them is in flight: {what}")
        if is_write and self.num_reading[cells].any():
            raise KernelError(f"bytes are overwritten while a bulk copy reads them: {what}")
        if self.is_barrier[cells].any():
            raise KernelError(f"an mbarrier is accessed as ordinary bytes: {what}")
        if not is_write and not by_copy and (self.origin[cells] >= 0).any():
            raise UnknownInstructionError(
                f"the machine does not know ordinary loads of what a bulk copy brought: {what}"
            )


def _joined(parts: npt.NDArray[np.uint8]) -> Bits:
    """Numbers from their bytes, ``[threads, size]``."""
    whole = np.zeros((len(parts), 8), np.uint8)
    whole[:, : parts.shape[1]] = parts
    return whole.view(np.uint64)[:, 0]


def _split(value: Bits, size: int) -> npt.NDArray[np.uint8]:
    """The bytes of numbers, ``[threads, size]``."""
    return np.ascontiguousarray(value).view(np.uint8).reshape(-1, 8)[:, :size]
