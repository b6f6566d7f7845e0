"""The global memory that kernels access: the process's own.

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

__all__ = ["WARP", "Bits", "GlobalMemory", "require_aligned"]

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

    def read_bytes(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes that :meth:`require_readable` accepted."""
        first = address - FIRST_ADDRESS
        found: npt.NDArray[np.uint8] = _address_space()[1][first : first + size].copy()
        return found

    def write_bytes(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        """Write bytes where :meth:`require_writable` accepted them."""
        first = address - FIRST_ADDRESS
        _address_space()[1][first : first + len(data)] = data

    def require_readable(self, address: int, size: int, what: object) -> None:
        """Refuse bytes that may not be read."""
        self._require_bytes(self._readable, "read", address, size, what)

    def require_writable(self, address: int, size: int, what: object) -> None:
        """Refuse bytes that may not be written."""
        self._require_bytes(self._writable, "written", address, size, what)

    @staticmethod
    def _require_bytes(ranges: Ranges, verb: str, address: int, size: int, what: object) -> None:
        if not ranges.contain(np.array([address], np.int64), size).all():
            raise KernelError(f"{size} bytes at {address:#x} may not be {verb}: {what}")

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
