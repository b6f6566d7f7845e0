"""Costs of the devices for which others published figures, and cautious costs for all others.

None of them was measured by us or with kvheap's own kernel; ``kvheap calibrate`` replaces them with
measurements of the device. vLLM's figures are for its Triton kernel and for ``cuMemcpyBatchAsync``,
with scattered pieces, host to device. ``benchmarks/NOTES.md`` compares the costs with the published
figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from kvheap.device.directions import Direction, Path
from kvheap.planning.path_costs import PathCost

__all__ = ["CAUTIOUS_COSTS", "PUBLISHED_CROSSOVERS", "Crossover", "published_costs"]

SUBMIT_S = 0.5e-6
"""CPU seconds to submit one piece to the copy engine (vLLM #48434)."""

SMALL_PIECE_BYTES = 28 << 10
SMALL_BYTES_PER_S = 8e9
"""Host to device, the copy engine moves pieces below 28 KiB at about 8 GB/s (vLLM #42212, #57555);
device to host it has no such cliff. See benchmarks/NOTES.md."""

ENGINE_S = 20e-6
KERNEL_S = 60e-6
"""Seconds per call, chosen so that all published crossovers come out where they were seen (vLLM
#57555, #57343); see benchmarks/NOTES.md."""

KERNEL_PIECE_S = 0.05e-6
"""Seconds per piece that the kernel cannot hide (vLLM #57555); see benchmarks/NOTES.md."""

KERNEL_SHARE = 0.9
KERNEL_SHARE_D2H = 0.95
"""Share of the link that SMs reach: 4 SMs, rows of 512 bytes, on a GB300 (SGLang #40278)."""

LARGE_COPY_S = 10e-6
"""Seconds of one plain asynchronous copy after a kernel; the call alone takes 5 to 7 us
(DualPath, arXiv 2602.21548, section 5.2)."""

D2D_ENGINE_BYTES_PER_S = 93e9
"""The copy engine within a device: 87 GiB/s for 32 MiB; SMs are 18 times as fast (NCCL #2177)."""

GATHER_SHARE = 0.79
"""Share of the peak memory bandwidth that a gather reaches, read plus write (FBGEMM, H100)."""


def _reasoned_costs(
    link_bytes_per_s: float, memory_bytes_per_s: float
) -> dict[tuple[Direction, Path], PathCost]:
    """Costs of a device from the bandwidth of its host link and of its memory (read plus write)."""
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
        # Every gather after the first overlaps with the copy of the extent before it.
        costs[direction, "staged"] = PathCost(
            KERNEL_S + LARGE_COPY_S, KERNEL_PIECE_S, min(link_bytes_per_s, memory_bytes_per_s)
        )
    return costs


CAUTIOUS_COSTS = _reasoned_costs(25e9, 933e9)
"""Costs of an A30, which has the slowest host link of the devices below: 16 lanes of PCIe 4 reach
about 25 of 31.5 GB/s; HBM2 has 933 GB/s."""

_PUBLISHED = {
    # The fastest published copy over PCIe 5 reaches 51.8 GB/s (vLLM #42212); HBM: data sheet.
    r"\bH100\b": _reasoned_costs(52e9, 3.35e12),
    r"\bH200\b": _reasoned_costs(52e9, 4.8e12),
    r"\bA30\b": CAUTIOUS_COSTS,
}
"""Costs by a pattern in the device's name. An H200 has the host link of an H100 and faster memory.
A GH200 has a different link, and matches neither pattern."""


def published_costs(device_name: str) -> Mapping[tuple[Direction, Path], PathCost] | None:
    """The costs derived from published figures of a device; None if there are none."""
    for pattern, costs in _PUBLISHED.items():
        if re.search(pattern, device_name):
            return costs
    return None


class Crossover(NamedTuple):
    """Where others saw the kernel overtake the copy engine, host to device.

    Attributes:
        device: a word in the device's name.
        piece_bytes: bytes of each piece.
        slower_at: a number of pieces for which the copy engine was faster.
        faster_at: a larger number for which the kernel was faster.
        published: the source.
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
