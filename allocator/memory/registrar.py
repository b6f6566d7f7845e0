"""``CudaHostRegistrar`` page-locks host memory for CUDA; ``HostRegistrar`` is its interface.

CUDA copies to and from pageable memory through a staging buffer, and waits for it. It reads and
writes registered (page-locked, "pinned") memory directly.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

from kvheap.kernels.capture_mode import Relaxed

__all__ = ["CudaHostRegistrar", "HostRegistrar", "require_registrar"]

HOST_REGISTER_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every device of the process."""

CUDA_ERROR_NAMES = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    3: "cudaErrorInitializationError",
    4: "cudaErrorCudartUnloading",
    46: "cudaErrorDevicesUnavailable",
    100: "cudaErrorNoDevice",
    101: "cudaErrorInvalidDevice",
    201: "cudaErrorDeviceUninitialized",
    304: "cudaErrorOperatingSystem",
    700: "cudaErrorIllegalAddress",
    709: "cudaErrorContextIsDestroyed",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    713: "cudaErrorHostMemoryNotRegistered",
    800: "cudaErrorNotPermitted",
    801: "cudaErrorNotSupported",
    999: "cudaErrorUnknown",
}
"""The errors that the two calls can return; torch has their texts, but not their names."""


class HostRegistrar(Protocol):
    """Page-locks host memory. Called on any thread, but only one call at a time for one buffer."""

    def register(self, pointer: int, num_bytes: int) -> None:
        """Page-lock ``num_bytes`` bytes at ``pointer``, both multiples of the page size.

        Raises:
            RuntimeError: it failed; nothing is page-locked.
        """

    def unregister(self, pointer: int) -> None:
        """Undo the ``register`` of this ``pointer``.

        Raises:
            RuntimeError: it failed; the bytes still count as page-locked.
        """


class CudaHostRegistrar:
    """Page-locks with ``cudaHostRegister``, for every device of the process.

    Args:
        device: the device whose context is used, and created if there is none; None: this thread's
            current device. Each thread has its own current device, so without a fixed device, a
            thread that never set one would create a context on device 0.

    Raises:
        RuntimeError: there is no CUDA device.
    """

    def __init__(self, device: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("host memory cannot be pinned: torch sees no CUDA device")
        self.device = torch.cuda.current_device() if device is None else device

    def register(self, pointer: int, num_bytes: int) -> None:
        """See :meth:`HostRegistrar.register`."""
        with Relaxed(), torch.cuda.device(self.device):
            code = _cudart().cudaHostRegister(pointer, num_bytes, HOST_REGISTER_PORTABLE)
            _require_success("cudaHostRegister", int(code))

    def unregister(self, pointer: int) -> None:
        """See :meth:`HostRegistrar.unregister`."""
        with Relaxed(), torch.cuda.device(self.device):
            code = _cudart().cudaHostUnregister(pointer)
            _require_success("cudaHostUnregister", int(code))


def _cudart() -> Any:
    cuda: Any = torch.cuda  # its cudart is not typed
    return cuda.cudart()


def _require_success(call: str, code: int) -> None:
    if code == 0:
        return
    # CUDA also keeps the error, and this thread's next kernel launch would report it: clear it.
    forget_last_error = getattr(ctypes.CDLL(None), "cudaGetLastError", None)
    if forget_last_error is not None:
        forget_last_error()
    cudart = _cudart()
    text = cudart.cudaGetErrorString(cudart.cudaError(code))
    name = CUDA_ERROR_NAMES.get(code, "a CUDA error")
    raise RuntimeError(f"{call}: {name} ({code}): {text}")


def require_registrar(registrar: Any) -> None:
    """Raise if a registrar cannot register host memory.

    Raises:
        TypeError: names what was given.
    """
    if registrar is None:
        return
    for method in ("register", "unregister"):
        if not callable(getattr(registrar, method, None)):
            raise TypeError(f"a registrar must have register() and unregister(), got {registrar!r}")
