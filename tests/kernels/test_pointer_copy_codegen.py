"""What the pointer copy's kernel compiles to, for GPUs that need not be there."""

from __future__ import annotations

import re

import pytest
from compiled import ON_ALL_CAPABILITIES, accesses, compiled, needs_compiler, require_lean

from kvheap.kernels import pointer_copy
from kvheap.kernels.pointer_copy import PIECE_TILE, SMALL_PIECE_TILE, piece_variants
from kvheap.kernels.tiles import ACCESS_BYTES, Variant

pytestmark = needs_compiler

MAX_REGISTERS = {PIECE_TILE: 96, SMALL_PIECE_TILE: 32}
"""Room for one program of 512 threads, with a third of the registers to spare; or for four."""


def require_accesses(variant: Variant, capability: int) -> None:
    """All loads of a thread come before its stores, all are of one width, and none is spilled."""
    kernel = compiled(
        pointer_copy._copy_pieces_kernel,
        variant.constants,
        capability,
        variant.num_warps,
        types={},
    )
    count = variant.vectors // (32 * variant.num_warps)
    # Descriptors are loaded without an eviction policy.
    ptx, policy = kernel.asm["ptx"], ".L1::evict_first"
    order = re.findall(r"\b(ld|st)\.global\.L1::evict_first", ptx)
    assert order == ["ld"] * count + ["st"] * count
    widths = [variant.access_bytes] * count
    assert accesses(kernel, "ld", policy) == accesses(kernel, "st", policy) == widths
    assert ptx.count("st.global") == count
    require_lean(kernel, MAX_REGISTERS[variant.vectors, variant.num_warps])


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("access_bytes", ACCESS_BYTES)
def test_all_loads_of_a_tile_are_in_flight_before_its_first_store(
    access_bytes: int, capability: int
) -> None:
    for variant in piece_variants(access_bytes):
        require_accesses(variant, capability)


def test_six_variants_copy_all_pieces() -> None:
    assert [len(piece_variants(access_bytes)) for access_bytes in ACCESS_BYTES] == [2, 1, 1, 1, 1]
