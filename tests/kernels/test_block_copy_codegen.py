"""What the block copy's kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
from compiled import ON_ALL_CAPABILITIES, accesses, compiled, needs_compiler, require_lean

from kvheap.kernels import block_copy
from kvheap.kernels.tiles import NUM_WARPS, TilePlan

pytestmark = needs_compiler

ADDRESS_ARGUMENTS = ("src_address_ptr", "dst_address_ptr")
MAX_REGISTERS = 80
"""Room for at least six programs of 128 threads on a multiprocessor."""


def compiled_for(kernel: Any, plan: TilePlan, unindexed: tuple[str, ...], capability: int) -> Any:
    """The specialization that the launcher asks for with this plan."""
    types = {"src_ptr": "*u8", "dst_ptr": "*u8", "value": "i64"}
    constants = plan.constants() | dict.fromkeys(unindexed)
    aligned = plan.access_bytes == 16
    return compiled(kernel, constants, capability, NUM_WARPS, types, aligned)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("unindexed", [(a,) for a in ADDRESS_ARGUMENTS] + [()])
def test_aligned_copies_use_16_byte_accesses(capability: int, unindexed: tuple[str, ...]) -> None:
    for block_bytes in (576, 4096, 131072):
        plan = TilePlan.of(1000, block_bytes, 4096)
        kernel = compiled_for(block_copy._copy_blocks_kernel, plan, unindexed, capability)
        assert 16 in accesses(kernel, "ld")  # addresses are loaded with narrower ones
        assert set(accesses(kernel, "st")) == {16}
        require_lean(kernel, MAX_REGISTERS)


@ON_ALL_CAPABILITIES
def test_aligned_fills_use_16_byte_stores(capability: int) -> None:
    plan = TilePlan.of(1000, 4096, 4096)
    kernel = compiled_for(block_copy._fill_blocks_kernel, plan, (), capability)
    assert set(accesses(kernel, "st")) == {16}
    require_lean(kernel, MAX_REGISTERS)


@pytest.mark.parametrize("alignment", [1, 2, 4, 8])
def test_unaligned_copies_never_access_more_than_the_alignment(alignment: int) -> None:
    plan = TilePlan.of(1000, 4096, alignment)
    kernel = compiled_for(block_copy._copy_blocks_kernel, plan, ("src_address_ptr",), 90)
    assert set(accesses(kernel, "st")) == {alignment}
    require_lean(kernel, MAX_REGISTERS)
