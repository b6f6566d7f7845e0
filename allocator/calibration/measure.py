"""``Measure``, the function by which a calibration measures a device, and its error."""

from __future__ import annotations

from collections.abc import Callable

from kvheap.device.directions import Direction, Path

__all__ = ["MAX_COPY_BYTES", "CalibrationError", "Measure"]

Measure = Callable[[Direction, Path, int, int], "list[float] | None"]
"""``measure(direction, path, num_pieces, piece_bytes)`` repeats one copy and returns the seconds of
each repetition. None: the path cannot be taken, or there is not enough memory for the copy."""

MAX_COPY_BYTES = 1 << 30
"""Bytes of the largest copy: beyond it, bandwidth is the limit, and time grows with the bytes."""


class CalibrationError(RuntimeError):
    """Nothing could be measured."""
