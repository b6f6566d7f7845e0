"""What the block copy's kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
from compiled import ON_ALL_CAPABILITIES, accesses, compiled, needs_compiler, require_lean

from kvheap.kernels import block_copy
from kvheap.kernels.block_copy import TILE
from kvheap.kernels.tiles import ACCESS_BYTES, variant_of

pytestmark = needs_compiler

MAX_REGISTERS = 64
"""Room for eight programs of 128 threads on a multiprocessor."""

LONG = ("source_base", "target_base", "source_stride", "target_stride", "value")


def compiled_for(kernel: Any, access_bytes: int, capability: int) -> Any:
    """The kernel as it is launched for accesses of this width."""
    variant = variant_of(access_bytes, TILE)
    types = dict.fromkeys(set(LONG) & set(kernel.arg_names), "i64")
    return compiled(kernel, variant.constants, capability, TILE.warps, types)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("access_bytes", ACCESS_BYTES)
def test_all_loads_of_a_tile_are_in_flight_before_its_first_store(
    access_bytes: int, capability: int
) -> None:
    kernel = compiled_for(block_copy._copy_blocks_kernel, access_bytes, capability)
    count = TILE.vectors // (32 * TILE.warps)
    assert accesses(kernel, "st") == [access_bytes] * count
    # Those before are of addresses.
    assert accesses(kernel, "ld", until="st.global")[-count:] == [access_bytes] * count
    assert not accesses(kernel, "ld", until="$")[3 * count :]
    require_lean(kernel, MAX_REGISTERS)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("access_bytes", ACCESS_BYTES)
def test_fills_store_as_much_at_once(access_bytes: int, capability: int) -> None:
    kernel = compiled_for(block_copy._fill_blocks_kernel, access_bytes, capability)
    count = TILE.vectors // (32 * TILE.warps)
    assert accesses(kernel, "st") == [access_bytes] * count
    require_lean(kernel, MAX_REGISTERS)
