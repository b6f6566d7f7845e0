"""How the kernels number the accesses of a copy and cut them into tiles.

A copy is a matrix of equal rows; a row is a run of a token, a block, or a piece. Its accesses, of
up to 16 bytes each, are numbered row by row, and one tile is ``VECTORS`` consecutive ones, wherever
rows begin and end. So no lane is idle, whatever the length of a row, and a kernel is compiled for a
width of access and a size of tile, not for a length: a few variants serve all copies.

Rows are found by division. What a kernel divides by is the same for a whole launch, so the host
turns each divisor into a multiplication (:class:`Divisor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from kvheap.kernels.arrays import INT32_END
from kvheap.kernels.launch import jit, tl

__all__ = [
    "ACCESS_BYTES",
    "MAX_ROW_VECTORS",
    "Divisor",
    "TileShape",
    "Variant",
    "locate_vectors",
    "num_tiles",
    "quotient",
    "variant_of",
]

ACCESS_BYTES = (16, 8, 4, 2, 1)
"""The widths of access that kernels are compiled for."""

MAX_ROW_VECTORS = 1 << 30
"""Longer rows are not copied: an index in a row plus one tile must stay below 2**31."""


class Divisor(NamedTuple):
    """A divisor as three arguments of a kernel, each of 32 bits, for :func:`quotient`.

    For ``0 <= n < 2**31``, ``n // value`` is ``(2 * n * magic >> 32) >> shift`` (Granlund and
    Montgomery, "Division by invariant integers using multiplication", PLDI 1994).

    Attributes:
        value: 1 to 2**31 - 1.
        magic: ``2**(31 + shift) / value``, rounded up, as a signed number.
        shift: the binary logarithm of ``value``, rounded up.

    >>> seven = Divisor.of(7)
    >>> [(2 * n * (seven.magic % 2**32) >> 32) >> seven.shift for n in (0, 6, 7, 2**31 - 1)]
    [0, 0, 1, 306783378]
    """

    value: int
    magic: int
    shift: int

    @classmethod
    def of(cls, value: int) -> Divisor:
        """The arguments for one divisor.

        Raises:
            ValueError: ``value`` is less than 1, or 2**31 or more.
        """
        return _divisor(value)


@lru_cache(maxsize=4096)
def _divisor(value: int) -> Divisor:
    if not 0 < value < INT32_END:
        raise ValueError(f"a kernel divides by 1 to 2**31 - 1, got {value}")
    shift = (value - 1).bit_length()
    magic = -(-(1 << (31 + shift)) // value)
    return Divisor(value, magic - (1 << 32), shift)


@jit()
def quotient(number, magic, shift):  # type: ignore[no-untyped-def]
    """``number // divisor`` for int32 numbers of at least 0; see :class:`Divisor`."""
    doubled = number.to(tl.uint32, bitcast=True) << 1
    high = tl.umulhi(doubled, magic.to(tl.uint32, bitcast=True))
    return (high >> shift).to(tl.int32, bitcast=True)


@jit()
def locate_vectors(  # type: ignore[no-untyped-def]
    tile, row_vectors, row_magic, row_shift, VECTORS: tl.constexpr
):
    """The row of each access of a tile, and its index in the row; both int32."""
    number = tile  # the interpreter makes a tensor of an int that is assigned
    first = number.to(tl.int64) * VECTORS
    row = first // row_vectors
    at = (first - row * row_vectors).to(tl.int32) + tl.arange(0, VECTORS)
    more = quotient(at, row_magic, row_shift)
    return row.to(tl.int32) + more, at - more * row_vectors


class TileShape(NamedTuple):
    """A tile: so many accesses, of any width, by so many warps of a program."""

    vectors: int
    warps: int


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """What a kernel is compiled for. There is one object for each, so they compare by identity.

    Attributes:
        access_bytes: bytes of one load or store: 16, 8, 4, 2 or 1.
        vectors: accesses of a tile.
        num_warps: warps of a program.
        constants: the kernel's constexpr arguments, in their order.
    """

    access_bytes: int
    vectors: int
    num_warps: int
    constants: dict[str, object]


@lru_cache(maxsize=256)
def variant_of(access_bytes: int, shape: TileShape) -> Variant:
    """The variant for a width of access and a shape of tile."""
    word_bytes = min(access_bytes, 8)
    vector = access_bytes // word_bytes
    word = getattr(tl, f"int{8 * word_bytes}", None)  # None without Triton: the launch will say so
    constants = {"WORD": word, "VECTOR": vector, "SHIFT": access_bytes.bit_length() - 1}
    constants["VECTORS"] = shape.vectors
    return Variant(access_bytes, shape.vectors, shape.warps, constants)


def num_tiles(num_rows: int, row_vectors: int, variant: Variant) -> int:
    """How many tiles the rows fill.

    >>> num_tiles(1000, 36, variant_of(16, TileShape(512, 4)))
    71
    """
    return -(-num_rows * row_vectors // variant.vectors)
