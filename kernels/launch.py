"""What launchers share: Triton where it exists, block addresses, their checks and their upload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has wheels for Linux only; CPU tensors do not need it.
    triton = None
    tl = None

__all__ = [
    "CPU_WORDS",
    "Addresses",
    "alignment_of",
    "bytes_of",
    "host_addresses",
    "jit",
    "require_disjoint",
    "staging",
    "tl",
    "triton",
    "upload",
]

Int64Array = npt.NDArray[np.int64]

Addresses: TypeAlias = "npt.NDArray[np.int64] | torch.Tensor | Sequence[int]"
"""Byte offsets in a buffer, one for each block: a host array, or an int64 tensor on its device."""

CPU_WORDS = {
    16: torch.complex128,
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
    1: torch.uint8,
}
"""CPU: the dtype that moves so many bytes as one element; complex ones are moved, not computed.
Scatter of 16 MiB and more in random blocks of 64 KiB by ``index_copy_``, 2 cores, GB/s read +
write: 24.8, 18.9, 18.7, 12.3 and 5.8; one ``copy_`` of as many bytes 26.1. Gather by
``index_select``: 25.7, 25.8, 25.6, 12.4 and 18.9. For single bytes NumPy's indexing, on one core,
is faster than ``index_copy_``: 13.6. Fill of as many bytes: ``index_fill_`` of int64 14.3, NumPy
9.7, one ``fill_`` 16.1."""

MAX_ACCESS_BYTES = 16
"""The widest load or store of one thread on sm_80 to sm_100."""


class _NoTriton:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        raise RuntimeError(f"{self.function.__name__} needs the triton package, which is missing")


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``, or where Triton is missing a kernel whose launch raises RuntimeError."""
    if triton is None:
        return _NoTriton
    return triton.jit(**options)  # type: ignore[no-any-return]


def alignment_of(*values: int) -> int:
    """The largest power of two up to 16 that divides all ``values``.

    >>> alignment_of(4096, 24), alignment_of(0)
    (8, 16)
    """
    bits = MAX_ACCESS_BYTES
    for value in values:
        bits |= value
    return bits & -bits


def host_addresses(
    name: str, addresses: Addresses, buffer_bytes: int, block_bytes: int
) -> Int64Array:
    """Addresses that the host can see, as int64 ``[N]``, each block inside the buffer.

    Raises:
        TypeError: they are not integers, or are on a device.
        ValueError: they are not one-dimensional, or a block leaves the buffer.
    """
    if isinstance(addresses, torch.Tensor):
        if addresses.device.type != "cpu":
            raise TypeError(f"{name} must be on the host, got a tensor on {addresses.device}")
        array = addresses.detach().numpy()
    else:
        array = np.asarray(addresses)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype} ({array.flat[0]!r}, ...)")
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest + block_bytes > buffer_bytes:
        at = int(array.argmin() if lowest < 0 else array.argmax())
        raise ValueError(
            f"{name}[{at}] is {int(array[at])}: a block of {block_bytes} bytes there leaves the "
            f"buffer of {buffer_bytes}"
        )
    return array.astype(np.int64, copy=False)


def require_disjoint(name: str, addresses: Int64Array, block_bytes: int) -> None:
    """Refuse blocks that overlap each other. O(N) for ascending addresses, else a sort.

    Raises:
        ValueError: names two that overlap, and where they are in the list.
    """
    if len(addresses) < 2:
        return
    gaps = np.diff(addresses)
    if (gaps >= block_bytes).all():
        return
    if (np.diff(np.sort(addresses)) >= block_bytes).all():
        return
    order = np.argsort(addresses, kind="stable")
    at = int(np.argmax(np.diff(addresses[order]) < block_bytes))
    first, second = int(order[at]), int(order[at + 1])
    raise ValueError(
        f"{name} overlap: {name}[{first}] is {addresses[first]}, {name}[{second}] is "
        f"{addresses[second]}, and blocks have {block_bytes} bytes"
    )


def upload(array: Int64Array, device: torch.device) -> torch.Tensor:
    """A host array on ``device``, in stream order and without waiting for the device.

    Raises:
        RuntimeError: as :func:`staging`.
    """
    words = staging(len(array), device)
    words.numpy()[:] = array  # a copy: the caller may change its array before the device reads
    return words.to(device, non_blocking=True)


def staging(num_words: int, device: torch.device) -> torch.Tensor:
    """Host memory to write words to that are on their way to ``device``, int64 ``[num_words]``.

    ``to(device, non_blocking=True)`` takes them there, in stream order.

    Raises:
        RuntimeError: the current stream is being captured: a graph would copy the words again with
            each replay, when their memory is long somebody else's.
    """
    pinned = device.type != "cpu"
    if pinned and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "addresses on the host cannot be captured in a CUDA graph: a replay would read them "
            "again; copy before or after the capture"
        )
    return torch.empty(num_words, dtype=torch.int64, pin_memory=pinned)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A uint8 tensor at the same address: Triton knows few dtypes, and compiles once for each."""
    if tensor.dtype == torch.uint8:
        return tensor
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    offset_bytes = int(tensor.storage_offset()) * tensor.element_size()
    return view.set_(tensor.untyped_storage(), offset_bytes, (1,), (1,))
