"""What the block copy kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from kvheap.kernels import block_copy
from kvheap.kernels.launch import triton
from kvheap.kernels.tiles import NUM_WARPS, TILE_WORDS, TilePlan

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin" if triton else Path()

pytestmark = [
    pytest.mark.skipif(triton is None, reason="needs the triton package"),
    pytest.mark.skipif(not (NVIDIA_TOOLS / "ptxas").exists(), reason="needs triton's ptxas"),
]

CAPABILITIES = [80, 90, 100]
ADDRESS_ARGUMENTS = ("src_address_ptr", "dst_address_ptr")


def compiled_for(kernel, plan: TilePlan, unindexed: tuple[str, ...], capability: int):
    """The specialization that the launcher asks for with this plan."""
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
            signature[name] = (
                "*u8" if name.endswith("_ptr") else "i64" if name == "value" else "i32"
            )
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
    return compiled


def require_lean(compiled, directory: Path) -> None:
    """No spills, no stack, and registers for at least six programs of 128 threads at a time."""
    assert ".local" not in compiled.asm["ptx"]
    if not (NVIDIA_TOOLS / "cuobjdump").exists():
        return
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [NVIDIA_TOOLS / "cuobjdump", "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack_bytes, local_bytes = map(int, found.groups())
    assert registers <= 80
    assert (stack_bytes, local_bytes) == (0, 0)


def widths(ptx: str, operation: str) -> set[int]:
    """Bytes of each global load or store of data; ``operation`` is "ld" or "st"."""
    found = re.findall(rf"{operation}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block_bytes", [576, 4096, 131072])
@pytest.mark.parametrize("unindexed", [(a,) for a in ADDRESS_ARGUMENTS] + [()])
def test_aligned_copies_use_16_byte_accesses(
    capability: int, block_bytes: int, unindexed: tuple[str, ...], tmp_path: Path
) -> None:
    plan = TilePlan.of(1000, block_bytes, 4096)
    compiled = compiled_for(block_copy._copy_blocks_kernel, plan, unindexed, capability)
    assert 16 in widths(compiled.asm["ptx"], "ld")  # addresses are loaded with narrower ones
    assert widths(compiled.asm["ptx"], "st") == {16}
    require_lean(compiled, tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_aligned_fills_use_16_byte_stores(capability: int, tmp_path: Path) -> None:
    plan = TilePlan.of(1000, 4096, 4096)
    compiled = compiled_for(block_copy._fill_blocks_kernel, plan, (), capability)
    assert widths(compiled.asm["ptx"], "st") == {16}
    require_lean(compiled, tmp_path)


@pytest.mark.parametrize("alignment", [1, 2, 4, 8])
def test_unaligned_copies_never_access_more_than_the_alignment(
    alignment: int, tmp_path: Path
) -> None:
    plan = TilePlan.of(1000, 4096, alignment)
    compiled = compiled_for(block_copy._copy_blocks_kernel, plan, ("src_address_ptr",), 90)
    assert widths(compiled.asm["ptx"], "st") == {alignment}
    require_lean(compiled, tmp_path)


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
    assert plan.rows * plan.cols == TILE_WORDS
    row_tiles = plan.num_tiles // plan.col_tiles
    assert (row_tiles - 1) * plan.rows < num_blocks <= row_tiles * plan.rows
