"""Costs of devices of which others published figures, and what is done with all other devices.

These are derived from published figures. None of them was measured by us, nor with kvheap's own
kernel: ``kvheap calibrate`` replaces them by what is true on a device. vLLM's figures are of its
Triton kernel and of ``cuMemcpyBatchAsync``, scattered pieces, host to device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from kvheap.planning.path_costs import Direction, Path, PathCost

__all__ = ["CAUTIOUS_COSTS", "PUBLISHED_CROSSOVERS", "Crossover", "published_costs"]

SUBMIT_S = 0.5e-6
"""CPU time to submit one piece to the copy engine (vLLM #48434). On an H100 it also explains why
10,000 pieces of 28 KiB move at 27.5 GB/s, and of 64 KiB at 38.8 GB/s, when the link does 52
(vLLM #42212): the sum says 27.2 and 37.2."""

SMALL_PIECE_BYTES = 28 << 10
SMALL_BYTES_PER_S = 8e9
"""Host to device, the copy engine is slow for pieces below 28 KiB (vLLM #42212): 50,000 of 4, 8, 16
and 24 KiB move at 4.0, 5.2, 6.3 and 6.7 GB/s; submission at 0.5 us and bytes at 8 GB/s make
4.0, 5.4, 6.4 and 6.9. The A30's rows of vLLM #57555 show the same cliff at the same size. The
other direction has no such cliff: vLLM stores by the copy engine whatever the size."""

ENGINE_S = 20e-6
KERNEL_S = 60e-6
"""Of a call. The A30's ratios of both paths at 16 pieces (vLLM #57555: 0.49, 0.68 and 0.57 at 1, 8
and 28 KiB) leave about these two values; their difference of 40 us puts the crossovers of all
six sizes on an A30, and of both that are known on an H100, where they were observed."""

KERNEL_PIECE_S = 0.05e-6
"""What of a piece the kernel's programs cannot hide. 4,096 pieces of 1 KiB on an A30 would be 5.7
times as fast as by the copy engine, and are 4.2 times; with larger pieces it does not matter."""

KERNEL_SHARE = 0.9
KERNEL_SHARE_D2H = 0.95
"""Of the link that SMs reach: 91 % and 95 % of the copy engine with 4 SMs, rows of 512 bytes, on a
GB300 (SGLang #40278)."""

LARGE_COPY_S = 10e-6
"""One plain asynchronous copy after a kernel: 5 to 7 us are published for the call alone
(DualPath, arXiv 2602.21548, section 5.2)."""

D2D_ENGINE_BYTES_PER_S = 93e9
"""87 GiB/s: 32 MiB within a device by the copy engine, which SMs copy 18 times as fast
(NCCL #2177)."""

GATHER_SHARE = 0.79
"""Of the peak of device memory that a gather reaches, read and write counted (FBGEMM, H100)."""


def _reasoned_costs(
    link_bytes_per_s: float, memory_bytes_per_s: float
) -> dict[tuple[Direction, Path], PathCost]:
    """Costs of a device by what its host link carries and its memory moves, read plus write."""
    memory_bytes_per_s *= GATHER_SHARE / 2
    costs: dict[tuple[Direction, Path], PathCost] = {
        ("h2d", "copy_engine"): PathCost(
            ENGINE_S, SUBMIT_S, link_bytes_per_s, SMALL_PIECE_BYTES, SMALL_BYTES_PER_S
        ),
        ("d2h", "copy_engine"): PathCost(ENGINE_S, SUBMIT_S, link_bytes_per_s),
        ("d2d", "copy_engine"): PathCost(ENGINE_S, SUBMIT_S, D2D_ENGINE_BYTES_PER_S),
        ("d2d", "kernel"): PathCost(KERNEL_S, KERNEL_PIECE_S, memory_bytes_per_s),
    }
    shares: tuple[tuple[Direction, float], ...] = (("h2d", KERNEL_SHARE), ("d2h", KERNEL_SHARE_D2H))
    for direction, share in shares:
        costs[direction, "kernel"] = PathCost(KERNEL_S, KERNEL_PIECE_S, share * link_bytes_per_s)
        # All gathers but the first are hidden by the copies of what was gathered before.
        costs[direction, "staged"] = PathCost(
            KERNEL_S + LARGE_COPY_S, KERNEL_PIECE_S, min(link_bytes_per_s, memory_bytes_per_s)
        )
    return costs


CAUTIOUS_COSTS = _reasoned_costs(25e9, 933e9)
"""An A30: 16 lanes of PCIe 4, of whose 31.5 GB/s about 25 are reached; HBM2 of 933 GB/s. Of the
devices with published figures it has the slowest link."""

_PUBLISHED = {
    # The fastest that was published over PCIe 5 is 51.8 GB/s (vLLM #42212); HBM by data sheet.
    r"\bH100\b": _reasoned_costs(52e9, 3.35e12),
    r"\bH200\b": _reasoned_costs(52e9, 4.8e12),
    r"\bA30\b": CAUTIOUS_COSTS,
}
"""By what the device's name holds. An H200 has an H100's host link and faster memory; a GH200 has
another link, and is neither here."""


def published_costs(device_name: str) -> Mapping[tuple[Direction, Path], PathCost] | None:
    """The costs of a device that were published; None where there are none."""
    for words, costs in _PUBLISHED.items():
        if re.search(words, device_name):
            return costs
    return None


class Crossover(NamedTuple):
    """Where others observed the kernel overtake the copy engine, host to device.

    Attributes:
        device: what the device's name holds.
        piece_bytes: of each piece.
        slower_at: a number of pieces at which the copy engine was the faster.
        faster_at: a larger one at which the kernel was.
        published: where.
    """

    device: str
    piece_bytes: int
    slower_at: int
    faster_at: int
    published: str


PUBLISHED_CROSSOVERS = (
    Crossover("H100", 8 << 10, 16, 64, "vLLM #57343"),
    Crossover("H100", 28 << 10, 64, 256, "vLLM #57343"),
    Crossover("A30", 1 << 10, 64, 128, "vLLM #57555"),
    Crossover("A30", 4 << 10, 32, 64, "vLLM #57555"),
    Crossover("A30", 8 << 10, 32, 64, "vLLM #57555"),
    Crossover("A30", 16 << 10, 16, 32, "vLLM #57555"),
    Crossover("A30", 24 << 10, 16, 32, "vLLM #57555"),
    Crossover("A30", 28 << 10, 64, 128, "vLLM #57555"),
)
