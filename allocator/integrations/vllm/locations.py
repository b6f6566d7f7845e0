"""``ChunkLocations``: where chunks are, as the scheduler tells the workers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from vllm.v1.kv_offload.base import LoadStoreSpec

from kvheap.addresses.extents import Int64Array

__all__ = ["ChunkLocations"]


class ChunkLocations(LoadStoreSpec):  # type: ignore[misc,unused-ignore]
    """Chunks by address, in the order of their keys: group after group.

    The workers' heaps are of one size, so the same addresses hold for each of them.

    Args:
        addresses: where each chunk begins in a worker's heap, int64 ``[N]``.
        sizes: the bytes of each, int64 ``[N]``.

    Raises:
        ValueError: the arrays are not of one length.
    """

    __slots__ = ("addresses", "sizes")

    def __init__(self, addresses: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        self.addresses: Int64Array = np.asarray(addresses, np.int64)
        self.sizes: Int64Array = np.asarray(sizes, np.int64)
        shape = self.addresses.shape
        if shape != self.sizes.shape or len(shape) != 1:
            raise ValueError(
                f"addresses and sizes must be [N] of one N, got {list(shape)} and "
                f"{list(self.sizes.shape)}"
            )

    @classmethod
    def of_arrays(cls, addresses: Int64Array, sizes: Int64Array) -> ChunkLocations:
        """From int64 arrays of one length, which are not looked at: it is in the path of a load."""
        locations = cls.__new__(cls)
        locations.addresses, locations.sizes = addresses, sizes
        return locations

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self.addresses)

    def __eq__(self, other: object) -> bool:
        """Whether both name the same chunks in the same order."""
        if not isinstance(other, ChunkLocations):
            return NotImplemented
        return np.array_equal(self.addresses, other.addresses) and np.array_equal(
            self.sizes, other.sizes
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The addresses and sizes."""
        return f"ChunkLocations({self.addresses.tolist()}, {self.sizes.tolist()})"
