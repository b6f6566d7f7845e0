"""What the kernels of paged copies compile to, for GPUs that need not be there."""

from __future__ import annotations

import re
from typing import Any

import pytest
from compiled import ON_ALL_CAPABILITIES, accesses, compiled, needs_compiler, require_lean

from kvheap.kernels import paged_convert, paged_copy
from kvheap.kernels.launch import tl
from kvheap.kernels.tiles import NUM_WARPS, TilePlan

pytestmark = needs_compiler

BOTH_WAYS = pytest.mark.parametrize("to_heap", [True, False], ids=["store", "load"])
BYTES = {"cache_ptr": "*u8", "heap_ptr": "*u8"}
MAX_REGISTERS = 255
TOKENS_OF_A_TILE, DIMS = 32, 128


def copy_constants(plan: TilePlan, to_heap: bool, **others: object) -> dict[str, object]:
    sizes = {"UNIT": 1, "RUNS": 1, "BLOCK_SIZE": 16, "CHUNK_TOKENS": 256, "PAGE_TOKENS": 256}
    return {"TO_HEAP": to_heap, "ARE_BLOCKS": False, **sizes, **plan.constants(), **others}


def compiled_copy(constants: dict[str, object], capability: int) -> Any:
    kernel = paged_copy._copy_tokens_kernel
    return compiled(kernel, constants, capability, NUM_WARPS, BYTES)


@BOTH_WAYS
@ON_ALL_CAPABILITIES
@pytest.mark.parametrize(
    ("run_bytes", "others"),
    [
        (2048, {}),
        (256, {"RUNS": 8}),
        (1152, {}),
        (16 * 2048, {"UNIT": 16, "ARE_BLOCKS": True}),
    ],
    ids=["token", "head", "latent", "block"],
)
def test_aligned_runs_move_in_accesses_of_16_bytes(
    run_bytes: int, others: dict[str, object], capability: int, to_heap: bool
) -> None:
    plan = TilePlan.of(1000, run_bytes, 16)
    kernel = compiled_copy(copy_constants(plan, to_heap, **others), capability)
    count = plan.rows * plan.cols * 8 // (16 * 32 * NUM_WARPS)
    # Slots and chunks are loaded by accesses of other widths.
    assert accesses(kernel, "ld").count(16) == count
    assert accesses(kernel, "st") == [16] * count
    require_lean(kernel, MAX_REGISTERS)


@BOTH_WAYS
@pytest.mark.parametrize("alignment", [8, 4, 2, 1])
def test_words_are_no_wider_than_the_alignment(alignment: int, to_heap: bool) -> None:
    plan = TilePlan.of(1000, 132 * 16, alignment)
    kernel = compiled_copy(copy_constants(plan, to_heap), 90)
    assert set(accesses(kernel, "st")) == {alignment}
    require_lean(kernel, MAX_REGISTERS)


@BOTH_WAYS
@ON_ALL_CAPABILITIES
def test_conversion_reads_and_writes_16_bytes_at_a_time(capability: int, to_heap: bool) -> None:
    constants = {
        "TO_HEAP": to_heap,
        "ARE_BLOCKS": False,
        "INSTRUCTION": capability >= 89,
        "ELEMENT": tl.bfloat16,
        "HEADS": 8,
        "HEAD_DIM": DIMS,
        "BLOCK_SIZE": 16,
        "CHUNK_TOKENS": 256,
        "TOKENS": TOKENS_OF_A_TILE,
        "DIMS": DIMS,
        "CACHE_VECTOR": 8,
        "HEAP_VECTOR": 16,
    }
    kernel = compiled(paged_convert._convert_tokens_kernel, constants, capability, NUM_WARPS, BYTES)
    elements = TOKENS_OF_A_TILE * DIMS // (32 * NUM_WARPS)
    two_byte, fp8 = elements * 2 // 16, elements // 16
    loads, stores = (two_byte, fp8) if to_heap else (fp8, two_byte)
    assert accesses(kernel, "ld").count(16) == loads
    assert accesses(kernel, "st").count(16) == stores
    assert ("e4m3x2" in kernel.asm["ptx"]) == (capability >= 89)
    # A negation would be "0 - x", which loses the sign of zero.
    assert not re.search(r"\b(sub|neg)\.(f32|rn\.f32)", kernel.asm["ptx"])
    require_lean(kernel, MAX_REGISTERS)
