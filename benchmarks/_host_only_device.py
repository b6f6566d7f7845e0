"""A stand-in for a GPU: a whole transfer is submitted to it, and nothing is launched or copied."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kvheap.kernels.copy_engine import Driver
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy
from kvheap.transfer.plan import CopyPlan, Side

STAND_IN_NAME = "NVIDIA H100 80GB HBM3"
"""The device's name: the planner then evaluates a table as large as a real GPU's."""


class NoOpLibrary:
    """Stands in for libcuda: every function does nothing and returns success.

    The functions that a transfer calls return only a status, so one C function can stand in for all
    of them: ``pthread_equal`` compares its first two arguments, which always are two different
    addresses, and returns 0.
    """

    def __init__(self) -> None:
        self.cuDriverGetVersion = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._version)
        self._nothing = ctypes.CDLL(None).pthread_equal

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return self._nothing

    @staticmethod
    def _version(out: int) -> int:
        ctypes.c_int.from_address(out).value = 13000
        return 0


class _Ended:
    """An event of work that has ended."""

    def query(self) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


@dataclass(frozen=True, slots=True)
class _Unlaunched:
    """Descriptors in host memory, which no device reads."""

    prepared: PointerCopy

    def run(self, max_sms: int | None = None) -> None:
        """Launch nothing."""

    def warm_up(self) -> None:
        """Compile nothing."""


class HostOnlyDevice:
    """A :class:`~kvheap.device.copy_device.CopyDevice` that does only the host's part of a copy.

    Descriptors are planned and written to host memory; the arguments of the copy engine are passed
    through ctypes.
    """

    name = STAND_IN_NAME
    driver_version = "host only"
    has_kernel = True
    has_batch = True
    stream = 5

    def __init__(self) -> None:
        self.driver = Driver(NoOpLibrary())

    def current_stream(self) -> int:
        """The only stream."""
        return self.stream

    def require_stream(self, stream: object) -> int:
        """The only stream."""
        return self.stream

    def is_legacy(self, stream: object) -> bool:
        """False."""
        return False

    def is_capturing(self, stream: object) -> bool:
        """False."""
        return False

    def using(self, stream: object) -> AbstractContextManager[None]:
        """Nothing to switch: there is one stream."""
        return nullcontext()

    def record_event(self, stream: object) -> _Ended:
        """An event that has ended."""
        return _Ended()

    def wait_event(self, stream: object, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def side_stream(self) -> int:
        """The only stream."""
        return self.stream

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Host memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def prepare(self, pieces: Pieces, *, over_link: bool) -> _Unlaunched:
        """Plan and write the descriptors."""
        return _Unlaunched(PointerCopy.prepare(pieces, torch.device("cpu")))

    def copy_batch(self, pieces: Pieces, stream: int, *, over_link: bool) -> None:
        """Call the stand-in for the batch call."""
        self.driver.copy_batch(pieces, stream, over_link=over_link)

    def copy_each(self, pieces: Pieces, stream: int) -> None:
        """Call the stand-in once per piece."""
        self.driver.copy_each(pieces, stream)

    def locate(self, address: int) -> None:
        """None: no memory is known."""

    def is_own(self, location: object) -> bool:
        """False: no memory is known."""
        return False

    def plan_of(self, pieces: Sequence[Pieces]) -> CopyPlan:
        """A plan of pieces in host memory, as if their targets were on this device."""
        return CopyPlan(Side(None), Side(self), tuple(pieces))
