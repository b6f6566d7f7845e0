"""Launches that skip Triton's binder: the same kernel and arguments, or Triton's own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compiled import needs_compiler
from ptx_machine.jit import Gpu, running_ptx
from ptx_machine.memory import GlobalMemory

from kvheap.kernels import block_copy, direct_launch, scatter_blocks
from kvheap.kernels.direct_launch import compile_ahead, is_compiled
from kvheap.kernels.launch import triton
from kvheap.kernels.tiles import variant_of

pytestmark = needs_compiler

KERNEL = block_copy._copy_blocks_kernel


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each kernel that Triton's binder has looked at, in their order."""
    found: list[str] = []
    run = triton.runtime.jit.JITFunction.run

    def noted(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found.append(f"{self.__name__}{' ahead' if warmup else ''}")
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", noted)
    return found


@pytest.fixture
def world() -> Iterator[tuple[Gpu, Callable[[], None]]]:
    """A GPU, and a copy on it that checks its bytes."""
    blocks = torch.randint(1, 256, (3, 160), dtype=torch.uint8)
    buffer = torch.zeros(1024, dtype=torch.uint8)
    memory = GlobalMemory(reads=[blocks], writes=[buffer])
    with running_ptx(90, memory, is_new=True) as gpu:

        def copy() -> None:
            buffer.zero_()
            scatter_blocks(blocks, buffer, [512, 0, 256])
            places = [buffer[at : at + 160] for at in (512, 0, 256)]
            assert all(map(torch.equal, places, blocks))
            assert int(buffer.count_nonzero()) == 480

        yield gpu, copy


def test_a_kernel_is_bound_once_and_called_directly(
    world: tuple[Gpu, Callable[[], None]], bound: list[str]
) -> None:
    gpu, copy = world
    for _ in range(3):
        copy()
    assert bound == ["_copy_blocks_kernel ahead"]
    assert len(gpu.launches) == 3


def called(*_: Any, **__: Any) -> None:
    pass


def added(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A hook in the chain of this name."""
    monkeypatch.setattr(getattr(triton.knobs.runtime, name), "calls", [called])


def replaced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(triton.knobs.runtime, name, called)


OTHERWISE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a hook at the start of launches": lambda patch: added(patch, "launch_enter_hook"),
    "a hook at their end": lambda patch: added(patch, "launch_exit_hook"),
    "a function as such a hook": lambda patch: replaced(patch, "launch_enter_hook"),
    "a hook before a kernel": lambda patch: patch.setattr(KERNEL, "pre_run_hooks", [called]),
    "a hook of the compiler": lambda patch: replaced(patch, "jit_cache_hook"),
    "an instrumented compiler": lambda patch: patch.setattr(
        triton.knobs.compilation, "instrumentation_mode", "profiled"
    ),
    "another Triton": lambda patch: patch.setattr(direct_launch, "_KNOWN_TRITON", False),
}


@pytest.mark.parametrize("reason", OTHERWISE)
def test_where_triton_would_do_more_its_own_way_is_taken(
    world: tuple[Gpu, Callable[[], None]],
    bound: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, copy = world
    copy()
    bound.clear()
    with monkeypatch.context() as patch:
        OTHERWISE[reason](patch)
        copy()
        copy()
    assert bound == ["_copy_blocks_kernel"] * 2
    copy()
    assert bound == ["_copy_blocks_kernel"] * 2
    assert len(gpu.launches) == 4


def test_a_kernel_for_debugging_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct_launch.is_known(KERNEL)
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    assert not direct_launch.is_known(KERNEL)


EXTRAS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "instrumentation": OTHERWISE["an instrumented compiler"],
    "debugging": lambda patch: patch.setattr(triton.knobs.runtime, "debug", True),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_was_compiled_ahead_with_an_extra_is_not_launched_without_it(
    world: tuple[Gpu, Callable[[], None]], extra: str
) -> None:
    gpu, copy = world
    variant = variant_of(16, block_copy.TILE)
    with pytest.MonkeyPatch.context() as patch:
        EXTRAS[extra](patch)
        compile_ahead(KERNEL, variant)
        assert is_compiled(KERNEL, variant)
    assert not is_compiled(KERNEL, variant)
    copy()
    assert gpu.num_compiled()["_copy_blocks_kernel"] == 2


def test_a_kernel_that_is_compiled_in_the_background_is_waited_for(
    world: tuple[Gpu, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    future = triton.runtime._async_compile.FutureKernel
    monkeypatch.delattr(future, "__getattr__", raising=False)  # as in Triton 3.6
    gpu, copy = world
    with ThreadPoolExecutor(1) as executor, triton.AsyncCompileMode(executor):
        copy()
    assert len(gpu.launches) == 1


def test_both_ways_compile_the_same_variant(world: tuple[Gpu, Callable[[], None]]) -> None:
    gpu, copy = world
    copy()
    with pytest.MonkeyPatch.context() as patch:
        OTHERWISE["another Triton"](patch)
        copy()
    assert gpu.num_compiled()["_copy_blocks_kernel"] == 1


def test_a_kernel_is_kept_for_each_device() -> None:
    variant = variant_of(16, block_copy.TILE)
    for _ in range(2):
        with running_ptx(90, memory=None, is_new=True):
            assert not is_compiled(KERNEL, variant)
            compile_ahead(KERNEL, variant)
            assert is_compiled(KERNEL, variant)
