"""Requests to free bytes: reads them as extents, and refuses wrong ones.

:func:`as_extents` reads the arguments of ``batched_free``. :func:`merged` sorts the extents by
address and refuses those that no heap could free. :func:`require_inside` refuses those that this
heap cannot free. Only the free list knows whether bytes are free already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import index as as_index
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import NO_WALLS, Extents, Int64Array, joined
from kvheap.errors import DoubleFreeError, InvalidFreeError

__all__ = ["as_extents", "double_free", "invalid_free", "merged", "require_inside"]


def as_extents(
    blocks: Iterable[tuple[int, int]] | npt.ArrayLike, sizes: npt.ArrayLike | None
) -> Extents:
    """The extents that a caller passes, as pairs or as addresses with sizes.

    Args:
        blocks: ``(address, size)`` pairs, which may be an integer ``[N, 2]`` array; or, with
            ``sizes``, addresses ``[N]``.
        sizes: one for each address, ``[N]``, or one for all.

    Raises:
        TypeError: something is not an integer, or ``blocks`` is not what is said above.
        ValueError: the shapes do not fit each other.
        InvalidFreeError: a number is too large to be an address.

    >>> as_extents([(8, 4), (0, 4)], None)
    Extents(starts=array([8, 0]), sizes=array([4, 4]))
    >>> as_extents([8, 0], 4)
    Extents(starts=array([8, 0]), sizes=array([4, 4]))
    """
    if sizes is None:
        return _from_pairs(blocks)
    addresses = _integer_array("blocks' addresses", _listed(blocks))
    lengths = _integer_array("sizes", sizes)
    if addresses.ndim != 1 or lengths.ndim > 1:
        raise ValueError(
            f"addresses must be one-dimensional with one size each or one for all, "
            f"got shapes {addresses.shape} and {lengths.shape}"
        )
    if lengths.ndim == 1 and len(lengths) != len(addresses):
        raise ValueError(f"got {len(addresses)} addresses but {len(lengths)} sizes")
    return Extents(addresses, np.broadcast_to(lengths, addresses.shape))


def _from_pairs(blocks: Iterable[tuple[int, int]] | npt.ArrayLike) -> Extents:
    pairs: Any = _listed(blocks)
    if isinstance(pairs, np.ndarray):
        table = _integer_array("blocks' (address, size) pairs", pairs)
        if table.size == 0:
            return Extents.of(0, 0)
        if table.ndim != 2 or table.shape[1] != 2:
            raise ValueError(f"blocks must be (address, size) pairs, got shape {table.shape}")
        return Extents(table[:, 0], table[:, 1])
    # Three times as fast as np.array on a list of pairs, which checks the shape of every tuple.
    try:
        lengths = set(map(len, pairs))
    except TypeError:
        lengths = {0}
    if not lengths <= {2}:
        wrong = next(pair for pair in pairs if not _is_pair(pair))
        raise ValueError(f"blocks must be (address, size) pairs, got {wrong!r}")
    try:
        flat = np.fromiter(map(as_index, chain.from_iterable(pairs)), np.int64, 2 * len(pairs))
    except (TypeError, RuntimeError) as error:  # torch raises both
        wrong = next(each for each in chain.from_iterable(pairs) if not _is_integer(each))
        raise TypeError(
            f"blocks' (address, size) pairs must be integers: {error}, got {wrong!r}"
        ) from None
    except OverflowError:
        huge = max(chain.from_iterable(pairs), key=abs)
        raise InvalidFreeError(f"(address, size) pairs must be below 2**63, got {huge}") from None
    return Extents(flat[0::2], flat[1::2])


def _is_pair(value: Any) -> bool:
    try:
        return len(value) == 2
    except TypeError:
        return False


def _is_integer(value: Any) -> bool:
    try:
        as_index(value)
    except (TypeError, RuntimeError):
        return False
    return True


def _listed(values: Any) -> Any:
    """``values`` as a sequence or an array; an iterator is consumed."""
    kind = type(values)
    if kind is list or kind is tuple or isinstance(values, np.ndarray):
        return values
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not hasattr(kind, "__iter__"):
        raise TypeError(
            f"blocks must be an AddressBatch, (address, size) pairs, or addresses with sizes, got "
            f"{values!r}"
        )
    if str(getattr(values, "dtype", "")) == "torch.bool":
        raise TypeError(f"blocks must be integers, got {values!r}")
    return values if isinstance(values, Sequence) else list(values)


def _integer_array(name: str, values: npt.ArrayLike) -> Int64Array:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        raise ValueError(f"{name} must be one-dimensional, got {values!r}") from None
    if array.size == 0 and array.dtype.kind not in "SU":
        return array.astype(np.int64)
    if array.dtype.kind == "O" and all(type(each) is int for each in array.flat):
        huge = max(array.flat, key=abs)
        raise InvalidFreeError(f"{name} must be below 2**63, got {huge}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype} ({array.flat[0]!r}, ...)")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise InvalidFreeError(f"{name} must be below 2**63, got {array.max()}")
    return array.astype(np.int64, copy=False)


def merged(extents: Extents, walls: Int64Array = NO_WALLS) -> Extents:
    """The extents in address order, with those that touch joined into one. O(N log N).

    Args:
        extents: in any order.
        walls: addresses in ascending order at which extents that touch stay apart.

    Raises:
        DoubleFreeError: two extents overlap.
        InvalidFreeError: an extent is empty, contains a wall, or ends beyond 2**63.
    """
    starts, sizes = extents
    if len(starts) > 1 and not (starts[1:] > starts[:-1]).all():
        if sizes.min() == sizes.max():
            starts = np.sort(starts)
        else:
            order = np.argsort(starts, kind="stable")
            starts, sizes = starts[order], sizes[order]
    if len(sizes) and sizes.min() <= 0:
        at = int(sizes.argmin())
        raise _empty_free(int(starts[at]), int(sizes[at]))
    ends = starts + sizes
    if (ends < starts).any():
        at = int(np.argmax(ends < starts))
        raise InvalidFreeError(
            f"cannot free {sizes[at]} bytes at {starts[at]}: they end beyond any heap"
        )
    overlap = ends[:-1] > starts[1:]
    if overlap.any():
        at = int(np.argmax(overlap))
        raise DoubleFreeError(
            f"cannot free [{starts[at + 1]}, {ends[at + 1]}): "
            f"[{starts[at]}, {ends[at]}) is freed in the same call"
        )
    if len(walls) and len(starts):
        holder = np.searchsorted(starts, walls) - 1  # the extent that begins before each wall
        inside = (holder >= 0) & (ends[holder] > walls)
        if inside.any():
            wall = int(walls[np.argmax(inside)])
            at = int(holder[np.argmax(inside)])
            raise InvalidFreeError(
                f"cannot free [{starts[at]}, {ends[at]}): a segment of the heap begins at {wall}"
            )
    return joined(Extents(starts, sizes), walls)


def require_inside(extents: Extents, unit_bytes: int, heap_bytes: int) -> None:
    """Refuse extents that are misaligned or not within the heap. O(N).

    Args:
        extents: at least one, in address order, not empty.
        unit_bytes: the alignment.
        heap_bytes: where the heap ends.

    Raises:
        InvalidFreeError: an extent is refused; the message names the first one.
    """
    starts, sizes = extents
    misaligned = (starts % unit_bytes != 0) | (sizes % unit_bytes != 0)
    if misaligned.any():
        at = int(np.argmax(misaligned))
    elif starts[0] < 0:
        at = 0
    elif starts[-1] + sizes[-1] > heap_bytes:
        at = -1
    else:
        return
    raise invalid_free(int(starts[at]), int(sizes[at]), unit_bytes, heap_bytes)


def invalid_free(start: int, size: int, unit_bytes: int, heap_bytes: int) -> InvalidFreeError:
    """Why this extent cannot be freed: it is empty, misaligned, outside, or spans two segments."""
    if size <= 0:
        return _empty_free(start, size)
    extent = f"[{start}, {start + size})"
    if start % unit_bytes or size % unit_bytes:
        return InvalidFreeError(f"cannot free {extent}: not aligned to {unit_bytes}")
    if start < 0 or start + size > heap_bytes:
        return InvalidFreeError(f"cannot free {extent}: outside the heap [0, {heap_bytes})")
    return InvalidFreeError(f"cannot free {extent}: it spans two segments of the heap")


def _empty_free(start: int, size: int) -> InvalidFreeError:
    return InvalidFreeError(f"cannot free {size} bytes at {start}: size must be positive")


def double_free(start: int, size: int, free_start: int, free_end: int) -> DoubleFreeError:
    """Why this extent cannot be freed: it overlaps ``[free_start, free_end)``, which is free."""
    return DoubleFreeError(
        f"cannot free [{start}, {start + size}): [{free_start}, {free_end}) is free already"
    )
