"""What the pointer copy's kernel compiles to, for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from kvheap.kernels import pointer_copy
from kvheap.kernels.launch import triton
from kvheap.kernels.pointer_copy import NUM_WARPS, SMALL_TILE_WORDS, TILE_WORDS
from kvheap.kernels.tiles import TilePlan

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin" if triton else Path()

pytestmark = [
    pytest.mark.skipif(triton is None, reason="needs the triton package"),
    pytest.mark.skipif(not (NVIDIA_TOOLS / "ptxas").exists(), reason="needs triton's ptxas"),
]

ON_ALL_DEVICES = pytest.mark.parametrize("capability", [80, 90, 100])
BOTH_FORMS = pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "ragged"])
NUM_THREADS = 32 * NUM_WARPS


@lru_cache
def compiled_for(plan: TilePlan, uniform: bool, capability: int) -> Any:
    """The specialization that a run asks for with this plan."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = pointer_copy._copy_pieces_kernel
    constants = {**plan.constants(), "UNIFORM": uniform}
    signature = {
        name: "constexpr" if name in constants else "*i64" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index("descriptor_ptr"),): [["tt.divisibility", 16]]},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": NUM_WARPS})
    assert compiled.asm["cubin"]
    return compiled


def accesses(ptx: str) -> list[tuple[str, int]]:
    """Loads and stores of data in their order, each with its bytes; descriptors are left out."""
    found = re.findall(r"\b(ld|st)\.global\.L1::evict_first[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [(kind, int(count or 1) * int(bits) // 8) for kind, count, bits in found]


def require_lean(compiled: Any, directory: Path) -> None:
    """No spills and no stack; registers for a program's threads are there."""
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
    assert registers * NUM_THREADS <= 65536
    assert (stack_bytes, local_bytes) == (0, 0)


@BOTH_FORMS
@ON_ALL_DEVICES
@pytest.mark.parametrize("row_bytes", [32, 128, 512, 4096, 16384, 1 << 20])
def test_aligned_tiles_have_eight_16_byte_loads_a_thread_before_the_first_store(
    row_bytes, capability, uniform, tmp_path
):
    plan = TilePlan.of(1000, row_bytes, 16, TILE_WORDS)
    compiled = compiled_for(plan, uniform, capability)
    assert accesses(compiled.asm["ptx"]) == [("ld", 16)] * 8 + [("st", 16)] * 8
    assert compiled.asm["ptx"].count("st.global") == 8
    require_lean(compiled, tmp_path)


@BOTH_FORMS
@ON_ALL_DEVICES
def test_small_tiles_have_two(capability, uniform, tmp_path):
    compiled = compiled_for(TilePlan.of(1000, 4096, 16, SMALL_TILE_WORDS), uniform, capability)
    assert accesses(compiled.asm["ptx"]) == [("ld", 16)] * 2 + [("st", 16)] * 2
    require_lean(compiled, tmp_path)


@BOTH_FORMS
@ON_ALL_DEVICES
@pytest.mark.parametrize("alignment", [1, 2, 4, 8])
@pytest.mark.parametrize("row_words", [4, 16, 256, 2048])
def test_words_are_as_wide_as_the_alignment(alignment, row_words, capability, uniform, tmp_path):
    plan = TilePlan.of(1000, row_words * alignment, alignment, TILE_WORDS)
    compiled = compiled_for(plan, uniform, capability)
    each = TILE_WORDS // NUM_THREADS
    assert accesses(compiled.asm["ptx"]) == [("ld", alignment)] * each + [("st", alignment)] * each
    require_lean(compiled, tmp_path)
