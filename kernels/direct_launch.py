"""Launches that skip Triton's binder, which takes longer than the driver does.

``kernel[grid](...)`` looks at every argument to find out what the kernel is to be compiled for: 10
to 15 microseconds. The kernels here are compiled for a :class:`~kvheap.kernels.tiles.Variant` and
nothing else: their pointers are int64 and aligned, their numbers have 32 bits and are not
specialized. So what Triton compiled is kept by kernel, variant and device, and called as Triton
3.6 and 3.7 call it themselves (``triton/runtime/jit.py``, ``JITFunction.run``). Where anything is
unlike what these versions do (an interpreter, hooks, another Triton), Triton's own way is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.launch import triton
from kvheap.kernels.tiles import Variant

__all__ = ["compile_ahead", "current_stream", "is_compiled", "is_known", "launch"]

try:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
except ImportError:  # no Triton, or one before knobs
    knobs = driver = JITFunction = None


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A kernel that is loaded on a device."""

    run: Callable[..., None]
    function: object
    metadata: object
    constants: tuple[object, ...]


_Key: TypeAlias = "tuple[object, Variant, int, object]"

_KEPT: dict[_Key, _Compiled] = {}
"""By kernel, variant, device, and what else Triton compiles for at that moment; None: nothing."""


def launch(kernel: Any, variant: Variant, num_programs: int, *arguments: Any) -> None:
    """Launch a kernel on the current device, on its current stream.

    Args:
        kernel: of ``launch.jit``. Its parameters are ``arguments``, then ``variant.constants``.
            Those whose names end in ``_ptr`` point to int64, and all but those that it does not
            specialize on alignment to a multiple of 16 bytes; the others are 32-bit integers.
        variant: what it is compiled for.
        num_programs: programs of its grid.
        arguments: tensors on the device, and integers.

    Raises:
        RuntimeError: Triton is missing, or the driver refuses the launch.
    """
    if not is_known(kernel):
        grid = kernel[(num_programs,)]
        with Relaxed():  # it may have to load the kernel
            grid(*arguments, **variant.constants, num_warps=variant.num_warps)
        return
    device, stream = current_stream()
    found = _KEPT.get((kernel.fn, variant, device, None)) or compile_ahead(kernel, variant)
    found.run(
        num_programs,
        1,
        1,
        stream,
        found.function,
        found.metadata,
        None,
        None,
        None,
        *arguments,
        *found.constants,
    )


def current_stream() -> tuple[int, int]:
    """The number of the current CUDA device, and the handle of its current stream.

    Triton asks torch in one call of C each; torch's own way makes objects.
    """
    if driver is None:
        stream = torch.cuda.current_stream()
        return stream.device_index, stream.cuda_stream
    device = driver.active.get_current_device()
    return device, driver.active.get_current_stream(device)


def compile_ahead(kernel: Any, variant: Variant) -> _Compiled:
    """Compile a kernel for the current device, unless it is, and load it there; launch nothing.

    Raises:
        RuntimeError: Triton is missing, or the kernel needs more than the device has.
    """
    if triton is None:
        kernel[(1,)]()  # says that it is missing
    others = [name for name in kernel.arg_names if name not in variant.constants]
    with Relaxed():
        compiled = kernel.warmup(
            *(torch.int64 if name.endswith("_ptr") else 2 for name in others),
            grid=(1,),
            **variant.constants,
            num_warps=variant.num_warps,
        )
        if hasattr(compiled, "result"):  # in an ``AsyncCompileMode`` of the caller's
            compiled = compiled.result()
        run = compiled.run  # loads it
    found = _Compiled(
        run, compiled.function, compiled.packed_metadata, tuple(variant.constants.values())
    )
    _KEPT[kernel.fn, variant, driver.active.get_current_device(), _extras()] = found
    return found


def is_compiled(kernel: Any, variant: Variant) -> bool:
    """Whether a kernel is loaded on the current device; true if it is interpreted instead.

    Call this before several threads compile variants of it: Triton makes the kernel's table for a
    device when it is first asked for, and if two threads ask at once, one of them loses its entry.
    """
    if triton is None:
        return False
    if JITFunction is not None and not isinstance(kernel, JITFunction):
        return True
    device = driver.active.get_current_device()
    kernel.device_caches[device]
    return (kernel.fn, variant, device, _extras()) in _KEPT


def is_known(kernel: Any) -> bool:
    """Whether Triton would do nothing for this launch but look at its arguments."""
    if not _KNOWN_TRITON or type(kernel) is not JITFunction or kernel.pre_run_hooks:
        return False
    runtime = knobs.runtime
    if runtime.debug or runtime.add_stages_inspection_hook or runtime.jit_cache_hook:
        return False
    if knobs.compilation.instrumentation_mode:
        return False
    return _is_unhooked(runtime.launch_enter_hook) and _is_unhooked(runtime.launch_exit_hook)


def _extras() -> object:
    """What Triton compiles a kernel for besides what it is given: profiling, for example."""
    if not _KNOWN_TRITON:
        return None
    found = (
        bool(knobs.runtime.debug),
        knobs.runtime.add_stages_inspection_hook,
        knobs.compilation.instrumentation_mode,
    )
    return found if any(found) else None


def _is_unhooked(hook: Any) -> bool:
    return hook is None or getattr(hook, "calls", None) == []


_KNOWN_TRITON = knobs is not None and triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])
