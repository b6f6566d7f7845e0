"""What ``bench_transfer.py`` measures of copies beside GEMMs, and of copies both ways at once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from _report import Row
from _timing import Call, Measure, Samples, time_in_rounds
from _transfer_cases import Buffers, Case
from _transfer_gpu import (
    KIB,
    LINK_DIRECTIONS,
    SM_BUDGETS,
    Gpu,
    GpuScale,
    by_set,
    clocked,
    figures,
)
from _transfer_peers import contiguous, pointer_list

from kvheap.transfer import copy

GEMM_SIZE = 4096
GEMM_PIECE_BYTES = 16 * KIB


# -- beside GEMMs ----------------------------------------------------------------------------------


@dataclass
class Gemms:
    """A loop of GEMMs on the second stream, timed by events, while copies run on the first.

    Attributes:
        gpu: the device.
        repeats: copies per measurement.
        count: GEMMs per measurement.
        covered: whether the last copies ended after the last GEMMs.
        link_us: microseconds of the copies, of all measurements.
    """

    gpu: Gpu
    repeats: int
    count: int = 8
    covered: bool = True
    link_us: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first, self._second, self._out = bf16_matrices(self.gpu.device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]

    def measure(self, copy_once: Call | None) -> Measure:
        """A measure of the microseconds of the loop, while the call is repeated; None: no call."""

        def sample() -> float:
            start, end, link_start, link_end = self._events
            torch.cuda.synchronize()
            link_start.record(self.gpu.stream)
            if copy_once is not None:
                for _ in range(self.repeats):
                    copy_once()
            link_end.record(self.gpu.stream)
            with torch.cuda.stream(self.gpu.other):
                start.record(self.gpu.other)
                for _ in range(self.count):
                    torch.mm(self._first, self._second, out=self._out)
                end.record(self.gpu.other)
            end.synchronize()
            self.covered = copy_once is None or not link_end.query()
            torch.cuda.synchronize()
            self.link_us.append(float(link_start.elapsed_time(link_end)) * 1e3)
            return float(start.elapsed_time(end)) * 1e3

        return sample


def measure_gemms(gpu: Gpu, scale: GpuScale) -> list[Row]:
    """A loop of GEMMs alone, beside contiguous copies, and beside copies of pieces."""
    count = min(scale.max_bytes, gpu.host.nbytes // 4) // GEMM_PIECE_BYTES
    rows = []
    for direction in LINK_DIRECTIONS:
        case = gpu.cases(direction, GEMM_PIECE_BYTES, count, "scattered")[0]
        prepared, plan = case.plan().prepare(), case.plan()
        calls: dict[str, Call | None] = {
            "alone": None,
            "copy_": contiguous(case, 0),
            "kvheap": partial(copy, plan),
            "prepared": partial(copy, prepared, path="kernel"),
            "copy engine": partial(copy, plan, path="copy_engine"),
            "list": pointer_list(case, gpu.device),
        }
        for budget in (*SM_BUDGETS, gpu.num_sms):
            calls[f"{budget} SM"] = partial(copy, prepared, path="kernel", max_sms=budget)
        gemms = Gemms(gpu, repeats=4)
        # The loop takes half as long as the copies, which begin before it and end after it.
        alone_us = min(gemms.measure(None)() for _ in range(3)) / gemms.count
        gemms.measure(calls["copy_"])()
        gemms.measure(calls["copy_"])()
        gemms.count = max(4, round(0.5 * gemms.link_us[-1] / alone_us))
        seen: dict[str, list[tuple[bool, float]]] = {name: [] for name in calls}

        def watched(
            name: str, call: Call | None, gemms: Gemms = gemms, seen: Any = seen
        ) -> Measure:
            measure = gemms.measure(call)

            def sample() -> float:
                taken = measure()
                seen[name].append((gemms.covered, gemms.link_us[-1]))
                return taken

            return sample

        samples = time_in_rounds({n: watched(n, call) for n, call in calls.items()}, scale.rounds)
        for method, timing in samples.items():
            covered, link_us = zip(*seen[method][1:], strict=True)  # the first round does not count
            beside = gemms.repeats * case.num_bytes / statistics.median(link_us) / 1e3
            rows.append(
                {
                    "direction": direction,
                    "method": method,
                    "gemms": gemms.count,
                    "piece_bytes": GEMM_PIECE_BYTES,
                    "num_pieces": count,
                    **timing.percentiles(),
                    "link_gb_per_s": round(beside, 3) if method != "alone" else None,
                    "copies_outlast_gemms": all(covered),
                    "slower_than_alone": slower(timing, samples["alone"]),
                    "slower_than_copy": slower(timing, samples["copy_"]),
                }
            )
    return rows


def slower(timing: Samples, peer: Samples) -> float:
    """How much longer it takes, as a share of the peer's time, median of the rounds."""
    return round(peer.speed_against(timing) - 1, 4)


def bf16_matrices(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (GEMM_SIZE, GEMM_SIZE)
    first, second = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    return first, second, torch.empty_like(first)


# -- both ways -------------------------------------------------------------------------------------


def measure_both_ways(gpu: Gpu, scale: GpuScale) -> list[Row]:
    """Copies host to device and device to host at the same time, on two streams."""
    half = gpu.host.nbytes // 2
    down = Buffers(gpu.host[:half], gpu.first)
    up = Buffers(gpu.second, gpu.host[half:])
    rows = []
    for piece in scale.link_pieces:
        count = min(scale.max_bytes // 2, half // 4) // piece
        per_set = []
        for seed in range(2):
            cases = [Case.make(ends, piece, count, "scattered", seed) for ends in (down, up)]
            plans = [case.plan() for case in cases]
            prepared = [case.plan().prepare() for case in cases]
            per_set.append(
                {
                    "copy_": on_two_streams(gpu, [contiguous(case, seed) for case in cases]),
                    "kvheap": on_two_streams(gpu, [partial(copy, plan) for plan in plans]),
                    "prepared": on_two_streams(
                        gpu, [partial(copy, plan, path="kernel") for plan in prepared]
                    ),
                    "copy engine": on_two_streams(
                        gpu, [partial(copy, plan, path="copy_engine") for plan in plans]
                    ),
                }
            )
        timings = clocked(gpu, by_set(per_set), scale.rounds)
        for method, timing in timings.items():
            own = figures(timing, timings["copy_"], 2 * count * piece)
            rows.append({"method": method, "piece_bytes": piece, "num_pieces": count} | own)
    return rows


def on_two_streams(gpu: Gpu, calls: Sequence[Call]) -> Call:
    """Run the first call on the current stream and the second on the other, and join them."""
    first, second = calls

    def call() -> None:
        gpu.other.wait_stream(gpu.stream)
        first()
        with torch.cuda.stream(gpu.other):
            second()
        gpu.stream.wait_stream(gpu.other)

    return call
