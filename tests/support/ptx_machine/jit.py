"""Triton's JIT without a GPU: kernels are compiled for one, and their launches end here.

Launchers of kvheap are called with CPU tensors. Everything up to the launch is Triton's own: the
types and alignments that it specializes kernels for, its caches, its compiler down to PTX.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ptx_machine.machine import Grid, execute
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import read_program

try:
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
except ImportError:  # The tests are skipped without Triton.
    CUDABackend = object

__all__ = ["Gpu", "Launch", "jit_functions", "running_ptx"]

NUM_SMS = 3
"""Multiprocessors of the GPU that is not there: few, so that programs copy several tiles each."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch.

    Attributes:
        kernel: its name.
        num_blocks: of the grid.
        ptx: what was executed.
        executed: how often each instruction was; see :func:`~ptx_machine.machine.execute`.
    """

    kernel: str
    num_blocks: int
    ptx: str
    executed: Counter[str]


@dataclass
class Gpu:
    """What kernels run on.

    Attributes:
        capability: 80 for sm_80.
        memory: what kernels may access, beside the arrays of integers that launchers hand to them,
            which they may read; None to compile and not to execute.
        rewrite: changes the PTX before it is executed.
        blocks: chooses the blocks of a grid that are executed.
        division_ulps: see :func:`~ptx_machine.operations.operation_of`.
        launches: all of them.
    """

    capability: int
    memory: GlobalMemory | None
    rewrite: Callable[[str], str] = str
    blocks: Callable[[int], Sequence[int]] = range
    division_ulps: int = 0
    launches: list[Launch] = field(default_factory=list)
    number: int = 0
    """Triton keeps one cache of compiled kernels for each number of a device."""

    def launch(self, ptx: str, num_blocks: int, shared_bytes: int, arguments: list[Any]) -> None:
        """Execute a kernel; scratch memory, its last parameters, is not needed."""
        ptx = self.rewrite(ptx)
        program = read_program(ptx)
        executed: Counter[str] = Counter()
        if self.memory is not None:
            tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
            memory = self.memory.extended(t for t in tensors if t.dtype != torch.uint8)
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else int(a) for a in arguments]
            values += [0] * (len(program.parameters) - len(values))
            grid = Grid(num_blocks, shared_bytes, self.blocks(num_blocks), self.division_ulps)
            executed = execute(program, grid, values, memory)
        self.launches.append(Launch(program.name, num_blocks, ptx, executed))

    @property
    def executed(self) -> Counter[str]:
        """How often each instruction was executed, in all launches."""
        return sum((launch.executed for launch in self.launches), Counter())

    def num_compiled(self) -> dict[str, int]:
        """How many variants of each kernel were compiled for this device."""
        return {
            name: len(function.device_caches[self.number][0])
            for name, function in jit_functions().items()
            if self.number in function.device_caches
        }


class PtxBackend(CUDABackend):  # type: ignore[misc]
    """Triton's compiler for NVIDIA's GPUs, which ends with PTX."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "ptx")

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], *arguments: Any) -> None:
        super().add_stages(stages, *arguments)
        del stages["cubin"]

    def hash(self) -> str:
        return f"ptx-{super().hash()}"


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.utils = self

    def get_current_device(self) -> int:
        return self.gpu.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("ptx", self.gpu.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 160 << 10}

    def load_binary(self, name: str, ptx: bytes, *_: object) -> tuple[object, str, int, int, int]:
        """The module, the kernel, its registers, its spills, and the most threads of a block."""
        return object(), ptx.decode(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        is_constant = [kind == "constexpr" for kind in source.signature.values()]

        def launch(x: int, y: int, z: int, stream: int, ptx: str, *others: Any) -> None:
            assert y == z == 1
            given = others[4:]  # behind the metadata and the hooks
            pairs = zip(given, is_constant, strict=True)
            arguments = [value for value, is_fixed in pairs if not is_fixed]
            driver.active.gpu.launch(ptx, x, metadata.shared, arguments)

        return launch


def jit_functions() -> dict[str, Any]:
    """All kernels of kvheap, by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("kvheap.kernels.")]
    found = [value for module in modules for value in vars(module).values()]
    return {
        function.__name__: function
        for function in found
        if isinstance(function, JITFunction) and function.__name__.endswith("_kernel")
    }


_NUMBERS = itertools.count(1000)


@contextmanager
def running_ptx(
    capability: int, memory: GlobalMemory | None, *, is_new: bool = False, **options: Any
) -> Iterator[Gpu]:
    """kvheap's launchers run kernels on CPU tensors, as compiled for such a GPU.

    Args:
        capability: 80 for sm_80.
        memory: see :class:`Gpu`.
        is_new: whether nothing has been compiled for this GPU yet.
        options: other attributes of :class:`Gpu`.
    """
    number = next(_NUMBERS) if is_new else capability
    gpu = Gpu(capability, memory, number=number, **options)
    replaced = {
        "runs_kernels": lambda device: True,
        "_has_instruction": lambda device: capability >= 89,
        "has_bulk_copies": lambda device: capability >= 90,
        "_num_sms": lambda device: NUM_SMS,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(gpu))
        patch.setitem(backends, "ptx", Backend(PtxBackend, _Driver))
        for name, module in list(sys.modules.items()):
            for function in replaced if name.startswith("kvheap.kernels.") else ():
                if function in vars(module):
                    patch.setattr(module, function, replaced[function])
        yield gpu
