"""The paths that a copy can take: CPU code, the Triton kernels interpreted, a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch

from kvheap.engine import few_blocks as few_paged_blocks
from kvheap.kernels import block_copy_cpu, few_blocks, paged_rows_cpu
from kvheap.kernels.launch import triton

T = TypeVar("T")

needs_triton = pytest.mark.skipif(triton is None, reason="needs the triton package")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_a_gpu(test: Callable[..., Any]) -> Any:
    """For tests that only a CUDA device can run."""
    for mark in needs_gpu:
        test = mark(test)
    return test


INTERPRETER = pytest.param("interpreter", marks=needs_triton)
PATHS = ["cpu", INTERPRETER, pytest.param("cuda", marks=needs_gpu)]
BULK_PATHS = ["cpu-bulk", "cpu-direct", *PATHS]
"""The same, and what a CPU does with copies of many bytes."""
ON_ALL_PATHS = pytest.mark.parametrize("path", PATHS)
WITHOUT_A_GPU = pytest.mark.parametrize("path", PATHS[:2])


@contextmanager
def running(path: str) -> Iterator[torch.device]:
    """The device on which launchers take this path; "interpreter" runs kernels on CPU tensors."""
    kernels = interpreted() if path == "interpreter" else nullcontext()
    with kernels, pytest.MonkeyPatch.context() as patch:
        if path in ("cpu-bulk", "cpu-direct", "cpu-moves"):  # as if the blocks were many
            patch.setattr(few_blocks, "MAX_BLOCKS", 0)
            patch.setattr(few_paged_blocks, "MAX_BLOCKS", 0)
            patch.setattr(paged_rows_cpu, "MAX_BYTES", -1)
        if path == "cpu-moves":  # and as large as those that are moved one by one
            patch.setattr(block_copy_cpu, "MOVE_BYTES", 1)
        if path == "cpu-bulk":
            patch.setattr(paged_rows_cpu, "MAX_DIRECT_BYTES", -1)
        elif path == "cpu-direct":  # all that needs no temporary
            patch.setattr(paged_rows_cpu, "MIN_CHUNK_BYTES", 0)
        yield torch.device("cuda" if path == "cuda" else "cpu")


def sample(values: Sequence[T], path: str, at: int, count: int) -> list[T]:
    """All values; for interpreted kernels, which are slow, ``count`` of them, from index ``at``."""
    if path != "interpreter":
        return list(values)
    return [values[(at + more) % len(values)] for more in range(count)]


@contextmanager
def interpreted() -> Iterator[None]:
    """All copies run their Triton kernels, interpreted, on CPU tensors."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("kvheap.kernels.")]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, interpreted_function(value.fn))
                elif name == "runs_kernels":
                    patch.setattr(module, name, lambda device: True)
        for name, value in list(vars(tl).items()):
            if isinstance(value, JITFunction):
                patch.setattr(tl, name, value.fn)
        # Functions of Triton's library that are themselves kernels' code, as tl.max, call tl.core.
        library = interpreter._patch_lang(tl.max)
        try:
            yield
        finally:
            library.restore()


def interpreted_function(function: Callable[..., Any]) -> Any:
    """A kernel to launch; or a function that kernels call, as plain Python."""
    from triton.runtime.interpreter import InterpretedFunction

    found = InterpretedFunction(function)
    return found if function.__name__.endswith("_kernel") else found.rewrite()
