"""``CudaDevice``: ``CopyDevice`` for CUDA; ``device_of`` finds the device of a tensor.

Streams and events are torch's. The SM kernel is chosen by ``kernels/piece_copy.py``, and the copy
engine is in ``kernels/copy_engine.py``.
"""

from __future__ import annotations

import re
import threading
from contextlib import AbstractContextManager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from kvheap.device.copy_device import CopyDevice, PreparedCopy
from kvheap.device.events import DeviceEvent
from kvheap.kernels import launch
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.copy_engine import LEGACY_STREAMS, Driver, Location, driver
from kvheap.kernels.piece_copy import prepare_pieces
from kvheap.kernels.pieces import Pieces

__all__ = ["CudaDevice", "device_of", "find_device", "module_version"]

MODULE_VERSION_FILE = Path("/proc/driver/nvidia/version")

MAX_BATCH_PIECES = 32_768
"""Maximum pieces of one batch call; 51,828 crashed a driver of 2025 (vLLM #49276)."""


class CudaDevice:
    """A CUDA device, driven through torch and the CUDA driver. See ``CopyDevice``.

    Args:
        index: the device's ordinal.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self._driver: Driver | None = None
        self._side: Any = None
        self._threads = threading.local()

    @cached_property
    def driver_version(self) -> str:
        """Such as ``580.95.05``, or the newest CUDA that the driver supports if that is unknown."""
        with suppress(OSError):
            found = module_version(MODULE_VERSION_FILE.read_text(errors="replace"))
            if found is not None:
                return found
        version = self._bound_driver().version
        return f"CUDA {version // 1000}.{version % 1000 // 10}"

    @property
    def has_kernel(self) -> bool:
        """Whether Triton is installed."""
        return launch.triton is not None

    @property
    def has_batch(self) -> bool:
        """Whether the driver has ``cuMemcpyBatchAsync``, new in CUDA 12.8."""
        return self._bound_driver().has_batch

    def _bound_driver(self) -> Driver:
        """The driver, with this device's context current on this thread."""
        if self._driver is None:
            self._driver = driver()
        if not getattr(self._threads, "is_bound", False):
            # The driver's functions need a current context; this torch call creates it.
            with Relaxed():
                torch.cuda.mem_get_info(self.torch_device)
            self._threads.is_bound = True
        return self._driver

    def current_stream(self) -> torch.cuda.Stream:
        """See ``CopyDevice.current_stream``."""
        return torch.cuda.current_stream(self.index)  # of a device, torch looks up its number

    def require_stream(self, stream: Any) -> torch.cuda.Stream:
        """See ``CopyDevice.require_stream``."""
        if stream is None:
            return self.current_stream()
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"stream must be a torch.cuda.Stream, got {stream!r}")
        if stream.device != self.torch_device:
            raise ValueError(f"the stream is on {stream.device}, the copy on {self.torch_device}")
        return stream

    def is_legacy(self, stream: torch.cuda.Stream) -> bool:
        """See ``CopyDevice.is_legacy``."""
        return stream.cuda_stream in LEGACY_STREAMS

    def is_capturing(self, stream: torch.cuda.Stream) -> bool:
        """See ``CopyDevice.is_capturing``."""
        return self._bound_driver().is_capturing(stream.cuda_stream)

    def using(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """See ``CopyDevice.using``."""
        return torch.cuda.stream(stream)

    def record_event(self, stream: torch.cuda.Stream) -> DeviceEvent:
        """See ``CopyDevice.record_event``."""
        event: DeviceEvent = stream.record_event()
        return event

    def wait_event(self, stream: torch.cuda.Stream, event: DeviceEvent) -> None:
        """See ``CopyDevice.wait_event``."""
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"stream must be a torch.cuda.Stream, got {stream!r}")
        assert isinstance(event, torch.cuda.Event)
        if self.is_capturing(stream):  # CUDA would refuse, and end the capture
            raise RuntimeError(
                f"{stream} is being captured, and cannot wait for work outside of the graph: wait "
                f"for the transfer before the capture"
            )
        stream.wait_event(event)

    def synchronize(self) -> None:
        """See ``CopyDevice.synchronize``."""
        with Relaxed():
            torch.cuda.synchronize(self.torch_device)

    def side_stream(self) -> torch.cuda.Stream:
        """See ``CopyDevice.side_stream``."""
        if self._side is None:
            with Relaxed():
                self._side = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        side: torch.cuda.Stream = self._side
        return side

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See ``CopyDevice.empty``."""
        with Relaxed():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def prepare(self, pieces: Pieces, *, over_link: bool) -> PreparedCopy:
        """See ``CopyDevice.prepare``."""
        return prepare_pieces(pieces, self.torch_device, over_link=over_link)

    def copy_batch(self, pieces: Pieces, stream: torch.cuda.Stream, *, over_link: bool) -> None:
        """See ``CopyDevice.copy_batch``."""
        bound = self._bound_driver()
        for first in range(0, len(pieces), MAX_BATCH_PIECES):
            part = pieces[first : first + MAX_BATCH_PIECES]
            bound.copy_batch(part, stream.cuda_stream, over_link=over_link)

    def copy_each(self, pieces: Pieces, stream: torch.cuda.Stream) -> None:
        """See ``CopyDevice.copy_each``."""
        self._bound_driver().copy_each(pieces, stream.cuda_stream)

    def locate(self, address: int) -> Location | None:
        """See ``CopyDevice.locate``."""
        return self._bound_driver().locate(address)

    def is_own(self, location: Location) -> bool:
        """See ``CopyDevice.is_own``."""
        return location.kind == "device" and location.device == self.index


def module_version(text: str) -> str | None:
    """The driver's version in the text of ``MODULE_VERSION_FILE``; None if there is none.

    >>> module_version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Jan 1")
    '580.95.05'
    """
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text + " ")
    return None if found is None else found[1]


def device_of(tensor: torch.Tensor) -> CopyDevice | None:
    """The device that a tensor is on; None for host memory. Raises like ``find_device``."""
    return None if tensor.is_cpu else find_device(tensor.device)


def find_device(device: torch.device) -> CopyDevice | None:
    """The ``CopyDevice`` of a torch device; None for host memory.

    Raises:
        ValueError: ``device`` is neither a CPU nor a CUDA device.
    """
    if device.index is None and launch.is_cuda(device):
        device = torch.device("cuda", torch.cuda.current_device())
    return _numbered_device(device)


@lru_cache(maxsize=64)
def _numbered_device(device: torch.device) -> CudaDevice | None:
    """As :func:`find_device`, for one that does not depend on which one is current."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"memory must be on a CPU or a CUDA device, got {device}")
    return CudaDevice(device.index)
