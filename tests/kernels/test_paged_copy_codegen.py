"""What the kernels of paged copies compile to, for GPUs that need not be there."""

from __future__ import annotations

import re

import pytest
from compiled import ON_ALL_CAPABILITIES, accesses, compiled, needs_compiler, require_lean

from kvheap.kernels import paged_convert, paged_copy
from kvheap.kernels.launch import tl
from kvheap.kernels.paged_convert import NUM_WARPS
from kvheap.kernels.paged_copy import BUDGET_TILE, TILE
from kvheap.kernels.tiles import ACCESS_BYTES, TileShape, variant_of

pytestmark = needs_compiler

BOTH_WAYS = pytest.mark.parametrize("to_heap", [True, False], ids=["store", "load"])
TOKENS_OF_A_TILE, DIMS = 32, 128
MAX_CONVERSION_REGISTERS = 80

MAX_REGISTERS = {TILE: 80, BUDGET_TILE: 128}
"""Room for at least six programs on a multiprocessor, or for one with 512 threads."""


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("shape", MAX_REGISTERS, ids=["tile", "budget"])
@pytest.mark.parametrize("access_bytes", ACCESS_BYTES)
def test_all_loads_of_a_tile_are_in_flight_before_its_first_store(
    access_bytes: int, shape: TileShape, capability: int
) -> None:
    """As many accesses of that width as a thread has, of whatever lengths rows are."""
    variant = variant_of(access_bytes, shape)
    kernel = compiled(
        paged_copy._copy_tokens_kernel, variant.constants, capability, shape.warps, types={}
    )
    count = shape.vectors // (32 * shape.warps)
    assert accesses(kernel, "st") == [access_bytes] * count
    # The others are of places, addresses and the table, and need not come before in the text.
    before = accesses(kernel, "ld", until="st.global")
    assert before[-count:] == [access_bytes] * count
    order = re.findall(r"\b(ld|st)\.global", kernel.asm["ptx"])
    assert "".join(kind[0] for kind in order).count("s" * count) == 1
    require_lean(kernel, MAX_REGISTERS[shape])


@BOTH_WAYS
@ON_ALL_CAPABILITIES
def test_conversion_reads_and_writes_16_bytes_at_a_time(capability: int, to_heap: bool) -> None:
    constants = {
        "TO_HEAP": to_heap,
        "INSTRUCTION": capability >= 89,
        "ELEMENT": tl.bfloat16,
        "TOKENS": TOKENS_OF_A_TILE,
        "HEAD_DIM": DIMS,
        "DIMS": DIMS,
        "CACHE_VECTOR": 8,
        "HEAP_VECTOR": 16,
    }
    kernel = compiled(
        paged_convert._convert_tokens_kernel, constants, capability, NUM_WARPS, types={}
    )
    elements = TOKENS_OF_A_TILE * DIMS // (32 * NUM_WARPS)
    two_byte, fp8 = elements * 2 // 16, elements // 16
    loads, stores = (two_byte, fp8) if to_heap else (fp8, two_byte)
    assert accesses(kernel, "ld").count(16) == loads
    assert accesses(kernel, "st").count(16) == stores
    assert ("e4m3x2" in kernel.asm["ptx"]) == (capability >= 89)
    # A negation would be "0 - x", which loses the sign of zero.
    assert not re.search(r"\b(sub|neg)\.(f32|rn\.f32)", kernel.asm["ptx"])
    require_lean(kernel, MAX_CONVERSION_REGISTERS)
