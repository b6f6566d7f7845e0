"""The heap over time, for a plot: how full each range of addresses is, and how old its chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["HeapSample", "mean_by_bin", "occupancy"]

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeapSample:
    """The heap after one request.

    Attributes:
        timestamp_ms: when the request arrived.
        utilization: allocated share of the heap, 0.0 to 1.0.
        hits: chunks found so far.
        block_refs: chunks requested so far.
        occupancy: allocated share of each of a number of equal address ranges, 0.0 to 1.0.
        age_ms: mean time since the chunks of each range were stored; NaN for a range without any.
    """

    timestamp_ms: int
    utilization: float
    hits: int
    block_refs: int
    occupancy: Float64Array
    age_ms: Float64Array


def occupancy(
    free_starts: npt.NDArray[np.int64],
    free_sizes: npt.NDArray[np.int64],
    heap_bytes: int,
    num_bins: int,
) -> Float64Array:
    """Allocated share of each of ``num_bins`` equal address ranges. O(F + bins).

    Args:
        free_starts: start of each of F free extents in address order, int64 ``[F]``.
        free_sizes: their bytes, int64 ``[F]``.
        heap_bytes: bytes of the heap.
        num_bins: number of ranges.

    >>> occupancy(np.array([0, 6]), np.array([2, 2]), 8, 4)
    array([0., 1., 1., 0.])
    """
    edges = np.linspace(0, heap_bytes, num_bins + 1)
    # Free bytes below an address: linear inside an extent, flat between extents.
    corners = np.stack((free_starts, free_starts + free_sizes), axis=1).reshape(-1)
    free_at_end = np.cumsum(free_sizes)
    free_below = np.stack((free_at_end - free_sizes, free_at_end), axis=1).reshape(-1)
    if not len(corners):
        return np.ones(num_bins)
    free_in_bin = np.diff(np.interp(edges, corners, free_below))
    return 1.0 - free_in_bin / np.diff(edges)


def mean_by_bin(values: Float64Array, num_bins: int) -> Float64Array:
    """Mean of the values that are not NaN in each of ``num_bins`` equal stretches; NaN if none.

    >>> mean_by_bin(np.array([1.0, 3.0, np.nan, np.nan]), 2)
    array([ 2., nan])
    """
    known = ~np.isnan(values)
    bins = np.arange(len(values)) * num_bins // max(len(values), 1)
    counts = np.bincount(bins[known], minlength=num_bins)
    sums = np.bincount(bins[known], weights=values[known], minlength=num_bins)
    means = np.full(num_bins, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means
