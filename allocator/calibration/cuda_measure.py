"""Measures copies on a GPU, made by :func:`kvheap.transfer.copy`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvheap.calibration.link_budget import LINK_PIECE_BYTES
from kvheap.calibration.measure import MAX_COPY_BYTES, CalibrationError
from kvheap.device.directions import Direction, Path
from kvheap.errors import TransferError
from kvheap.transfer import CopyPlan, copy

__all__ = ["CudaMeasure"]

TIMED_S = 0.05
"""Seconds during which a call repeats a copy, within the two limits below."""

MIN_REPETITIONS = 3
MAX_REPETITIONS = 11

LINK_BYTES = 128 << 20
"""The most bytes of a copy that measures SMs: 2.4 ms over PCIe 5; a launch takes a 50th of it."""

MIN_BUFFER_BYTES = 64 << 20
"""If buffers of this size do not fit, calibration fails, unless smaller ones were requested."""


@dataclass(frozen=True, slots=True)
class _Case:
    """What a copy is of, and how it is made."""

    direction: Direction
    path: Path
    num_pieces: int
    piece_bytes: int
    max_sms: int | None
    is_prepared: bool = False


class CudaMeasure:
    """A :data:`~kvheap.calibration.measure.Measure` of copies on a CUDA device.

    It measures how long a caller on an idle stream waits: from just before ``copy`` is called until
    the last byte has arrived. The first event is recorded on the idle stream before the call, so
    the time includes the submission by the host. If the call itself takes the host longer than the
    events show, the host's time is used. The plan, which is the same for every path, and the first
    copy of each kind, which may compile a kernel, are not timed.

    Copies run on a side stream that nothing else uses. On the device, pieces are at random places;
    on the host, they are contiguous, as for an offload into a fresh extent. Copies within the
    device have random places on both sides. Each repetition has new pieces, so that its descriptors
    are never uploaded already, nor the bytes of a small copy in the L2 cache.

    Args:
        device: a CUDA device.
        max_bytes: the most bytes of one copy. Two buffers of this size are allocated on the device,
            and one in pinned host memory. If they do not fit, the size is halved until they do.

    Raises:
        CalibrationError: there is no room for buffers of 64 MiB, or of ``max_bytes`` if that is
            less.

    Attributes:
        max_bytes: the bytes of each buffer.
    """

    def __init__(self, device: torch.device | str, max_bytes: int = MAX_COPY_BYTES) -> None:
        self._device = torch.device(device)
        self._random = np.random.default_rng(0)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):  # memory is pinned for the current device
            self._first, self._second, self._host = self._buffers(max_bytes)
        self.max_bytes = self._host.nbytes

    def __call__(
        self,
        direction: Direction,
        path: Path,
        num_pieces: int,
        piece_bytes: int,
        /,
        max_sms: int | None = None,
    ) -> list[float] | None:
        """Seconds of each repetition; see :class:`~kvheap.calibration.measure.Measure`."""
        if num_pieces * piece_bytes > self.max_bytes:
            return None
        return self._tried(_Case(direction, path, num_pieces, piece_bytes, max_sms))

    def link(self, direction: Direction, num_sms: int) -> list[float] | None:
        """Seconds of each repetition of a copy by the kernel on so many SMs.

        The plan is prepared, so that the times are those of the launch and of the copy alone. See
        :data:`~kvheap.calibration.measure.LinkMeasure`.
        """
        num_pieces = min(LINK_BYTES, self.max_bytes) // LINK_PIECE_BYTES
        if not num_pieces:
            return None
        case = _Case(direction, "kernel", num_pieces, LINK_PIECE_BYTES, num_sms, is_prepared=True)
        return self._tried(case)

    def _tried(self, case: _Case) -> list[float] | None:
        try:
            with torch.cuda.device(self._device):
                return self._repeat(case)
        except torch.cuda.OutOfMemoryError:
            return None
        except TransferError as error:
            if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
                return None
            raise

    def _repeat(self, case: _Case) -> list[float] | None:
        first = self._time(case)  # it may compile
        if first is None:
            return None
        repetitions = min(max(round(TIMED_S / max(first, 1e-6)), MIN_REPETITIONS), MAX_REPETITIONS)
        some = [self._time(case) for _ in range(repetitions)]
        return [seconds for seconds in some if seconds is not None]

    def _buffers(self, max_bytes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Two buffers on the device and one on the host, of equal size."""

        def zeros(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            first = torch.zeros(size, dtype=torch.uint8, device=self._device)
            second = torch.zeros_like(first)
            host = torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            torch.cuda.synchronize(self._device)
            return first, second, host

        size = max_bytes
        while size // 2 >= MIN_BUFFER_BYTES:
            with suppress(RuntimeError):  # torch is out of memory, or cannot pin as much
                return zeros(size)
            size //= 2
        try:
            return zeros(size)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CalibrationError(f"no room for buffers of {size} bytes: {reason}") from None

    def _time(self, case: _Case) -> float | None:
        """Seconds of one copy; None if the path cannot be taken."""
        source, target = self._sides(case.direction)
        plan = CopyPlan.of_addresses(
            source,
            target,
            self._addresses(source, case.num_pieces, case.piece_bytes),
            self._addresses(target, case.num_pieces, case.piece_bytes),
            case.piece_bytes,
        )
        if case.is_prepared:
            if plan.device is None or not plan.device.has_kernel:
                return None
            plan.prepare()
        start, end = _event(), _event()
        self._stream.synchronize()
        start.record(self._stream)
        called = perf_counter()
        try:
            transfer = copy(plan, stream=self._stream, path=case.path, max_sms=case.max_sms)
        except ValueError:
            return None
        submitted = perf_counter() - called
        end.record(self._stream)
        end.synchronize()
        transfer.result()
        return max(submitted, float(start.elapsed_time(end)) / 1e3)

    def _sides(self, direction: Direction) -> tuple[torch.Tensor, torch.Tensor]:
        """The source and the target of a copy."""
        return {
            "h2d": (self._host, self._first),
            "d2h": (self._first, self._host),
            "d2d": (self._first, self._second),
        }[direction]

    def _addresses(
        self, side: torch.Tensor, num_pieces: int, piece_bytes: int
    ) -> npt.NDArray[np.int64]:
        """Byte offsets of the pieces: contiguous on the host, random slots on the device."""
        if side is self._host:
            return np.arange(num_pieces, dtype=np.int64) * piece_bytes
        slots = side.nbytes // piece_bytes
        return self._random.choice(slots, num_pieces, replace=False) * np.int64(piece_bytes)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
