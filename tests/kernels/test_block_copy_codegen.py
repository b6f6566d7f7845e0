"""What the block copy kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import re

import pytest
from kvheap.kernels import block_copy
from kvheap.kernels.block_copy import NUM_WARPS, TilePlan
from kvheap.kernels.launch import triton

pytestmark = pytest.mark.skipif(triton is None, reason="needs the triton package")

CAPABILITIES = [80, 90, 100]
ADDRESS_ARGUMENTS = ("src_address_ptr", "dst_address_ptr")


def ptx_of(kernel, plan: TilePlan, unindexed: tuple[str, ...], capability: int) -> str:
    """PTX of the specialization that the launcher asks for with this plan."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = plan.constants() | dict.fromkeys(unindexed)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ADDRESS_ARGUMENTS:
            signature[name] = "*i64"
        else:
            signature[name] = "*u8" if name.endswith("_ptr") else "i64" if name == "value" else "i32"
    aligned = plan.word_bytes * plan.words_per_vector == 16
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and (aligned or name in ADDRESS_ARGUMENTS)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS}
    )
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


def widths(ptx: str, operation: str) -> set[int]:
    """Bytes of each global load or store of data; ``operation`` is "ld" or "st"."""
    found = re.findall(rf"{operation}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block_bytes", [576, 4096, 131072])
@pytest.mark.parametrize("unindexed", [(a,) for a in ADDRESS_ARGUMENTS] + [()])
def test_aligned_copies_use_16_byte_accesses(
    capability: int, block_bytes: int, unindexed: tuple[str, ...]
) -> None:
    plan = TilePlan.of(1000, block_bytes, 4096)
    ptx = ptx_of(block_copy._copy_blocks_kernel, plan, unindexed, capability)
    assert 16 in widths(ptx, "ld")  # addresses are loaded with narrower ones
    assert widths(ptx, "st") == {16}
    assert ".local" not in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_aligned_fills_use_16_byte_stores(capability: int) -> None:
    plan = TilePlan.of(1000, 4096, 4096)
    ptx = ptx_of(block_copy._fill_blocks_kernel, plan, (), capability)
    assert widths(ptx, "st") == {16}
    assert ".local" not in ptx


@pytest.mark.parametrize("alignment", [1, 2, 4, 8])
def test_unaligned_copies_never_access_more_than_the_alignment(alignment: int) -> None:
    plan = TilePlan.of(1000, 4096, alignment)
    ptx = ptx_of(block_copy._copy_blocks_kernel, plan, ("src_address_ptr",), 90)
    assert widths(ptx, "st") == {alignment}
    assert ".local" not in ptx


@pytest.mark.parametrize(
    ("block_bytes", "alignment", "word_bytes", "words_per_vector"),
    [(4096, 4096, 8, 2), (4096, 8, 8, 1), (132, 16, 4, 1), (656, 16, 8, 2), (7, 16, 1, 1)],
)
def test_the_widest_word_that_divides_everything_is_taken(
    block_bytes: int, alignment: int, word_bytes: int, words_per_vector: int
) -> None:
    plan = TilePlan.of(10, block_bytes, alignment)
    assert (plan.word_bytes, plan.words_per_vector) == (word_bytes, words_per_vector)


@pytest.mark.parametrize("num_blocks", [1, 1000, 1 << 20])
@pytest.mark.parametrize("block_bytes", [1, 72 * 8, 5000, 1 << 30])
def test_tiles_cover_every_word_once(num_blocks: int, block_bytes: int) -> None:
    plan = TilePlan.of(num_blocks, block_bytes, 16)
    words = plan.vectors * plan.words_per_vector
    assert words * plan.word_bytes == block_bytes
    assert (plan.col_tiles - 1) * plan.cols < words <= plan.col_tiles * plan.cols
    assert plan.rows * plan.cols == block_copy.TILE_WORDS
    row_tiles = plan.num_tiles // plan.col_tiles
    assert (row_tiles - 1) * plan.rows < num_blocks <= row_tiles * plan.rows
