"""What kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvheap.kernels.launch import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin" if triton else Path()
CAPABILITIES = (80, 90, 100)
ON_ALL_CAPABILITIES = pytest.mark.parametrize("capability", CAPABILITIES)

needs_compiler = [
    pytest.mark.skipif(triton is None, reason="needs the triton package"),
    pytest.mark.skipif(not (NVIDIA_TOOLS / "ptxas").exists(), reason="needs triton's ptxas"),
]


def compiled(
    kernel: Any,
    constants: Mapping[str, object],
    capability: int,
    num_warps: int,
    types: Mapping[str, str],
    aligned: bool = True,
) -> Any:
    """The kernel as a launch compiles it.

    Args:
        kernel: a Triton kernel.
        constants: its constexpr arguments, and those that are None.
        capability: of the device, 80 for sm_80.
        num_warps: of one program.
        types: of the arguments that are neither int64 pointers nor 32-bit integers.
        aligned: whether byte pointers are at multiples of 16 bytes, as int64 ones always are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: types.get(name, "*i64" if name.endswith("_ptr") else "i32") for name in names
    }
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name] == "*i64" or (aligned and signature[name].startswith("*"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options={"num_warps": num_warps})
    assert found.asm["cubin"]
    return found


def require_lean(kernel: Any, max_registers: int) -> None:
    """No spills and no stack, and at most so many registers for each thread."""
    assert ".local" not in kernel.asm["ptx"]
    if not (NVIDIA_TOOLS / "cuobjdump").exists():
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack_bytes, local_bytes = map(int, found.groups())
    assert registers <= max_registers
    assert (stack_bytes, local_bytes) == (0, 0)


def accesses(kernel: Any, kind: str, qualifier: str = "", until: str = "$") -> list[int]:
    """Bytes of each global load ("ld") or store ("st") with such a qualifier, in their order.

    With ``until``, only of those before the first place that fits this pattern.
    """
    pattern = rf"\b{kind}\.global{re.escape(qualifier)}[.\w:]*?(?:\.v(\d))?\.b(\d+)"
    end = re.search(until, kernel.asm["ptx"])
    assert end, f"nothing fits {until}"
    found = re.findall(pattern, kernel.asm["ptx"][: end.start()])
    return [int(count or 1) * int(bits) // 8 for count, bits in found]
