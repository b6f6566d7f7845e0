"""What the kernels of paged copies compile to, on machines without a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kvheap.kernels import paged_convert, paged_copy  # noqa: E402
from kvheap.kernels.tiles import NUM_WARPS, TilePlan  # noqa: E402

CAPABILITIES = (80, 90, 100)
DIRECTIONS = pytest.mark.parametrize("to_heap", [True, False], ids=["store", "load"])


def ptx_of(kernel: Any, constants: dict[str, object], capability: int) -> str:
    """The kernel for pointers to aligned tensors and 32-bit integers."""
    names = kernel.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*u8" if name in ("cache_ptr", "heap_ptr") else "*i64"
        return "i32"

    pointers = [i for i, name in enumerate(names) if name.endswith("_ptr")]
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": NUM_WARPS})
    return compiled.asm["ptx"]


def copy_constants(run_bytes: int, alignment: int, to_heap: bool, **others: object) -> dict:
    plan = TilePlan.of(1000, run_bytes, alignment)
    sizes = {"UNIT": 1, "PIECES": 1, "BLOCK_SIZE": 16, "CHUNK_TOKENS": 256, "PAGE_TOKENS": 256}
    kinds = {"TO_HEAP": to_heap, "ARE_BLOCKS": False}
    return {**kinds, **sizes, **plan.constants(), **others}


@DIRECTIONS
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("run_bytes", "others"),
    [
        (2048, {}),
        (256, {"PIECES": 8}),
        (1152, {}),
        (16 * 2048, {"UNIT": 16, "ARE_BLOCKS": True}),
    ],
    ids=["token", "head", "latent", "block"],
)
def test_aligned_runs_move_in_accesses_of_16_bytes(run_bytes, others, capability, to_heap):
    constants = copy_constants(run_bytes, 16, to_heap, **others)
    ptx = ptx_of(paged_copy._copy_tokens_kernel, constants, capability)
    accesses = (constants["ROWS"] * constants["COLS"] * 8) // (16 * 32 * NUM_WARPS)
    assert len(re.findall(r"ld\.global\.v2\.b64", ptx)) == accesses
    assert len(re.findall(r"st\.global\.v2\.b64", ptx)) == accesses
    assert len(re.findall(r"st\.global\.", ptx)) == accesses
    assert ".local" not in ptx


@DIRECTIONS
@pytest.mark.parametrize(("alignment", "word"), [(8, "b64"), (4, "b32"), (2, "b16"), (1, "b8")])
def test_words_are_no_wider_than_the_alignment(alignment, word, to_heap):
    constants = copy_constants(132 * 16, alignment, to_heap)
    ptx = ptx_of(paged_copy._copy_tokens_kernel, constants, 90)
    assert set(re.findall(r"st\.global\.(\S+)", ptx)) == {word}
    assert ".local" not in ptx


def convert_constants(capability: int, to_heap: bool) -> dict:
    return {
        "TO_HEAP": to_heap,
        "ARE_BLOCKS": False,
        "INSTRUCTION": capability >= 89,
        "ELEMENT": tl.bfloat16,
        "HEADS": 8,
        "HEAD_DIM": 128,
        "BLOCK_SIZE": 16,
        "CHUNK_TOKENS": 256,
        "TOKENS": 32,
        "DIMS": 128,
        "CACHE_VECTOR": 8,
        "HEAP_VECTOR": 16,
    }


@DIRECTIONS
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_conversion_reads_and_writes_16_bytes_at_a_time(capability, to_heap):
    constants = convert_constants(capability, to_heap)
    ptx = ptx_of(paged_convert._convert_tokens_kernel, constants, capability)
    # 32 elements of a tile a thread: 4 accesses of 2-byte elements, 2 of fp8.
    loads, stores = (4, 2) if to_heap else (2, 4)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores
    assert ("e4m3x2" in ptx) == (capability >= 89)
    assert ".local" not in ptx
