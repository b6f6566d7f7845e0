"""What the kernel of bulk copies compiles to, for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from compiled import NVIDIA_TOOLS, compiled, needs_compiler, require_lean

from kvheap.kernels import bulk_copy
from kvheap.kernels.bulk_copy import SHARED_BYTES

pytestmark = needs_compiler

MAX_REGISTERS = 40
"""So that 32 threads take 1,280 of the 65,536 registers of a multiprocessor."""

RESERVED_SHARED_BYTES = 1 << 10
"""What CUDA adds to the shared memory of each program since sm_80."""


@pytest.fixture(params=[90, 100])
def kernel(request: pytest.FixtureRequest) -> Any:
    return compiled(bulk_copy._copy_bulk_kernel, {}, request.param, num_warps=1, types={})


def test_a_program_is_one_warp_with_few_registers(kernel: Any) -> None:
    assert ".reqntid 32\n" in kernel.asm["ptx"]
    require_lean(kernel, MAX_REGISTERS)


def test_it_takes_its_shared_memory_and_no_more(kernel: Any, tmp_path: Path) -> None:
    """25 KiB with what is reserved: 228 KiB of an H100 hold that and a program of 200 KiB."""
    assert kernel.metadata.shared == 0  # what a launch adds
    arrays = re.findall(r"\.shared[^;]*\[(\d+)\]", kernel.asm["ptx"])
    assert arrays == [str(SHARED_BYTES)]
    if (NVIDIA_TOOLS / "cuobjdump").exists():
        (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
        command = [NVIDIA_TOOLS / "cuobjdump", "-res-usage", tmp_path / "cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"SHARED:(\d+)", usage)
        assert found
        assert int(found[1]) in (SHARED_BYTES, SHARED_BYTES + RESERVED_SHARED_BYTES)
    assert SHARED_BYTES + RESERVED_SHARED_BYTES <= (228 - 200) << 10


def test_bytes_pass_through_no_register(kernel: Any) -> None:
    """Ordinary loads are of descriptors; nothing is stored to global memory but by bulk copies."""
    ptx = kernel.asm["ptx"]
    assert ptx.count("cp.async.bulk.shared::cluster.global") == 1
    assert ptx.count("cp.async.bulk.global.shared::cta") == 1
    loads = re.findall(r"ld\.global\.(b\d+)", ptx)
    assert loads == ["b64", "b64", "b32"] * 3  # source, target, bytes
    assert ptx.count("ld.global") == len(loads)
    assert "st.global" not in ptx


def test_bytes_are_written_before_a_program_ends(kernel: Any) -> None:
    waits = re.findall(r"cp\.async\.bulk\.wait_group[.\w]* \d+", kernel.asm["ptx"])
    assert waits == [
        f"cp.async.bulk.wait_group.read {bulk_copy.DRAINING}",
        "cp.async.bulk.wait_group 0",
    ]
