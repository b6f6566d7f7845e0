"""The fewest SMs with which the kernel saturates the host link, by measurement.

SMs beyond those that fill the link copy no faster: they only wait for it, and the forward pass
lacks them. :func:`find_link_sms` tries the numbers of SMs in turn, round after round, and takes the
fewest that reach :data:`SATURATED` of the best speed of all.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from kvheap.calibration.measure import LinkMeasure
from kvheap.device.directions import Direction
from kvheap.planning.link_sms import LINK_DIRECTIONS

__all__ = ["LINK_PIECE_BYTES", "SATURATED", "TRIED_SMS", "find_link_sms"]

SATURATED = 0.95
"""The link is saturated from this share of the best speed on. On an H200, 2 SMs to the device reach
94 % of it and 3 all; to the host 2 reach 98 %, and a third one slows a matrix product by half."""

TRIED_SMS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""The numbers of SMs that are tried; those between two of them only where the answer lies there.
More than a quarter of a large GPU is no budget."""

LINK_PIECE_BYTES = 16 << 10
"""Bytes of the pieces that are copied: a block of 16 tokens of MLA, or of 8 heads of GQA."""

ROUNDS = 3
"""The most times that each number is tried. All its samples are pooled."""


Samples = dict[int, list[float]]
"""Seconds of copies by the number of their SMs."""


def find_link_sms(measure: LinkMeasure, is_late: Callable[[], bool]) -> dict[Direction, int]:
    """The fewest SMs that saturate the link in each direction.

    Numbers are tried in turn, so that a clock that drifts changes them alike.

    Args:
        measure: measures a number of SMs.
        is_late: whether no further measurement may begin.

    Returns:
        Without a direction in which a number could not be measured, or not in time.
    """
    samples: dict[Direction, Samples] = {direction: {} for direction in LINK_DIRECTIONS}
    for _ in range(ROUNDS):
        for direction, by_number in samples.items():
            for num_sms in TRIED_SMS:
                if not is_late():
                    _try(measure, direction, num_sms, by_number)
    return {
        direction: _fewest(measure, is_late, direction, by_number)
        for direction, by_number in samples.items()
        if set(by_number) == set(TRIED_SMS)
    }


def _try(measure: LinkMeasure, direction: Direction, num_sms: int, samples: Samples) -> None:
    seconds = measure(direction, num_sms)
    if seconds:
        samples.setdefault(num_sms, []).extend(seconds)


def _fewest(
    measure: LinkMeasure, is_late: Callable[[], bool], direction: Direction, samples: Samples
) -> int:
    """The fewest SMs that saturate the link, found between two numbers that were tried."""
    most_s = min(map(median, samples.values())) / SATURATED
    high = next(number for number in TRIED_SMS if median(samples[number]) <= most_s)
    low = max((number for number in TRIED_SMS if number < high), default=0)
    while high - low > 1 and not is_late():
        middle = (low + high) // 2
        _try(measure, direction, middle, samples)
        if middle in samples and median(samples[middle]) > most_s:
            low = middle
        else:
            high = middle
    return high
