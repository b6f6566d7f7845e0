"""What the pointer copy's kernel compiles to, for GPUs that need not be there."""

from __future__ import annotations

import re

import pytest
from compiled import ON_ALL_CAPABILITIES, accesses, compiled, needs_compiler, require_lean

from kvheap.kernels import pointer_copy
from kvheap.kernels.pointer_copy import PIECE_TILE_WORDS, PIECE_WARPS, SMALL_PIECE_TILE_WORDS
from kvheap.kernels.tiles import TilePlan

pytestmark = needs_compiler

BOTH_FORMS = pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "ragged"])
NUM_THREADS = 32 * PIECE_WARPS


def require_accesses(
    plan: TilePlan, uniform: bool, capability: int, count: int, num_bytes: int
) -> None:
    """So many loads of a thread, then as many stores, all of so many bytes, and no spills."""
    constants = {**plan.constants(), "UNIFORM": uniform}
    kernel = compiled(
        pointer_copy._copy_pieces_kernel, constants, capability, PIECE_WARPS, types={}
    )
    # Descriptors are loaded without an eviction policy.
    ptx, policy = kernel.asm["ptx"], ".L1::evict_first"
    order = re.findall(r"\b(ld|st)\.global\.L1::evict_first", ptx)
    assert order == ["ld"] * count + ["st"] * count
    assert accesses(kernel, "ld", policy) == accesses(kernel, "st", policy) == [num_bytes] * count
    assert ptx.count("st.global") == count
    require_lean(kernel, 65536 // NUM_THREADS)


@BOTH_FORMS
@ON_ALL_CAPABILITIES
def test_aligned_tiles_have_eight_16_byte_loads_a_thread_before_the_first_store(
    capability: int, uniform: bool
) -> None:
    for row_bytes in (32, 128, 512, 4096, 16384, 1 << 20) if capability == 90 else (128, 1 << 20):
        plan = TilePlan.of(1000, row_bytes, 16, PIECE_TILE_WORDS)
        require_accesses(plan, uniform, capability, 8, 16)


@BOTH_FORMS
@ON_ALL_CAPABILITIES
def test_small_tiles_have_two(capability: int, uniform: bool) -> None:
    plan = TilePlan.of(1000, 4096, 16, SMALL_PIECE_TILE_WORDS)
    require_accesses(plan, uniform, capability, 2, 16)


@BOTH_FORMS
@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("alignment", [1, 2, 4, 8])
def test_words_are_as_wide_as_the_alignment(alignment: int, capability: int, uniform: bool) -> None:
    for row_words in (4, 16, 256, 2048) if capability == 90 else (16, 2048):
        plan = TilePlan.of(1000, row_words * alignment, alignment, PIECE_TILE_WORDS)
        require_accesses(plan, uniform, capability, PIECE_TILE_WORDS // NUM_THREADS, alignment)
