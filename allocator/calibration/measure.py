"""``Measure`` and ``LinkMeasure``, by which a calibration measures a device, and its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvheap.device.directions import Direction, Path

__all__ = ["MAX_COPY_BYTES", "CalibrationError", "LinkMeasure", "Measure"]


class Measure(Protocol):
    """Measures copies by one path."""

    def __call__(
        self,
        direction: Direction,
        path: Path,
        num_pieces: int,
        piece_bytes: int,
        /,
        max_sms: int | None = ...,
    ) -> list[float] | None:
        """Repeat one copy, and return the seconds of each repetition.

        Args:
            direction: which way.
            path: by which path.
            num_pieces: number of pieces.
            piece_bytes: bytes of each.
            max_sms: maximum SMs of its kernels; None: as every copy. It is passed only if a
                :data:`LinkMeasure` is given too.

        Returns:
            None: the path cannot be taken, or there is not enough memory for the copy.
        """
        ...


LinkMeasure = Callable[[Direction, int], "list[float] | None"]
"""``measure(direction, num_sms)`` repeats a copy over the host link by the kernel on so many SMs,
and returns the seconds of each repetition, without what the host does before it. The copy is the
same for every number of SMs. None: the kernel cannot make it."""

MAX_COPY_BYTES = 1 << 30
"""Bytes of the largest copy: beyond it, bandwidth is the limit, and time grows with the bytes."""


class CalibrationError(RuntimeError):
    """Nothing could be measured."""
