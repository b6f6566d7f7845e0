"""What all kernel launches share: Triton, if it is installed, and uploads of arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.capture_mode import Relaxed

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has wheels for Linux only; CPU tensors do not need it.
    triton = None
    tl = None

_JIT_OPTIONS = () if triton is None else inspect.signature(triton.jit).parameters
"""What ``triton.jit`` takes, in other versions perhaps less."""

__all__ = [
    "anchor_on",
    "current",
    "is_cuda",
    "jit",
    "number_jit",
    "require_no_capture",
    "resident",
    "runs_kernels",
    "send",
    "staging",
    "tl",
    "triton",
    "upload",
]


class _NoTriton:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        raise RuntimeError(f"{self.function.__name__} needs the triton package, which is missing")


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``; if Triton is missing, a stand-in kernel whose launch raises RuntimeError."""
    if triton is None:
        return _NoTriton
    return triton.jit(**options)  # type: ignore[no-any-return]


def number_jit(*unaligned: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` for a kernel that is compiled for its constexpr arguments and nothing else.

    Triton would compile it again for numbers that are 1 or multiples of 16.

    Args:
        unaligned: its pointers that need not be multiples of 16 bytes. They end in ``_ptr``, as the
            others do.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        numbers = [
            each.name
            for each in parameters
            if "constexpr" not in str(each.annotation) and not each.name.endswith("_ptr")
        ]
        options: dict[str, Any] = {"do_not_specialize": numbers}
        if unaligned and "do_not_specialize_on_alignment" in _JIT_OPTIONS:
            options["do_not_specialize_on_alignment"] = list(unaligned)
        return jit(**options)(function)

    return decorate


CPU = torch.device("cpu")
"""What a tensor in host memory names as its device. To compare takes a fifth of the time that
``device.type`` takes."""


def runs_kernels(device: torch.device) -> bool:
    """Whether copies on ``device`` are done by Triton kernels; on a CPU, torch and NumPy do them.

    Tests replace this function to run the kernels in the interpreter, on CPU tensors.
    """
    return device != CPU and device.type != "cpu"  # "cpu:0" is one, too


@lru_cache(maxsize=64)
def is_cuda(device: torch.device) -> bool:
    """Whether a device is of CUDA."""
    return device.type == "cuda"


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one; does nothing if it is, or for a CPU.

    A launch ends no capture of a graph. What it may need around it (memory, uploads, a kernel that
    has to be loaded, events) is asked for in :class:`Relaxed`, each where it is.
    """
    if not is_cuda(device) or device.index in (None, torch.cuda.current_device()):
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()


def send(words: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of words of :func:`staging` on ``device``, made in stream order without waiting.

    For a CPU, it is the words.
    """
    if device == CPU:
        return words
    with Relaxed():
        return words.to(device, non_blocking=True)


def upload(array: Int64Array, device: torch.device) -> torch.Tensor:
    """A copy of a host array on ``device``, made in stream order without waiting for the device.

    Raises:
        RuntimeError: as :func:`staging`.
    """
    with Relaxed():
        words = staging(len(array), device)
        words.numpy()[:] = array  # a copy: the caller may change its array before it is read
        return words.to(device, non_blocking=True)


def resident(array: Int64Array, device: torch.device) -> torch.Tensor:
    """A copy of a host array on ``device`` that any stream may read once this returns.

    Uploaded on a stream of its own: this waits for the upload, and not for what the current stream
    has yet to do. On a CPU, it may share the array's memory.
    """
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    using = torch.cuda.current_stream(device)
    with Relaxed(), torch.cuda.stream(_upload_stream(device)):
        found = host.to(device)
    found.record_stream(using)  # which may still read it when it is dropped
    return found


@lru_cache(maxsize=64)
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    found: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return found


def staging(num_words: int, device: torch.device) -> torch.Tensor:
    """Host memory for words that will be uploaded to ``device``, int64 ``[num_words]``.

    The caller writes the words and uploads them by :func:`send`, which is ordered by the current
    stream.

    Raises:
        RuntimeError: the current stream is being captured. Each replay of the graph would copy
            the words again, from memory that has long been reused.
    """
    if device == CPU:
        return torch.empty(num_words, dtype=torch.int64, device=CPU)
    require_no_capture()
    with Relaxed():
        return torch.empty(num_words, dtype=torch.int64, device="cpu", pin_memory=True)


def require_no_capture() -> None:
    """Refuse words of the host while the current stream is being captured.

    Raises:
        RuntimeError: as :func:`staging`.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "addresses on the host cannot be captured in a CUDA graph: a replay would read them "
            "again; copy before or after the capture"
        )


@lru_cache(maxsize=64)
def anchor_on(device: torch.device) -> torch.Tensor:
    """Two words at a multiple of 16 bytes, int64, from which kernels count; see ``tiles``."""
    with Relaxed():
        found = torch.zeros(2, dtype=torch.int64, device=device)
    if found.data_ptr() % 16:
        raise RuntimeError(
            f"an allocation of {device} must be at a multiple of 16 bytes, got address "
            f"{found.data_ptr()}"
        )
    return found
