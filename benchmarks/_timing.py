"""Timing: methods are compared within rounds.

Each round times every method once, in turn. A method is reported against a peer by the ratio of
their times, median over the rounds. Load from other processes, or a drifting clock, then affects
both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from _spread import is_noisy

NOISY_REPEATS = 2

Call = Callable[[], object]
"""Does the work that is timed, once."""

Measure = Callable[[], float]
"""Runs a method once and returns the microseconds of one call."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Microseconds of one method, one sample per round."""

    microseconds: tuple[float, ...]

    def percentile(self, percent: int) -> float:
        """Microseconds; the only sample if there is one."""
        if len(self.microseconds) == 1:
            return self.microseconds[0]
        return statistics.quantiles(self.microseconds, n=100, method="inclusive")[percent - 1]

    def percentiles(self) -> dict[str, float]:
        """The 20th, 50th and 80th percentile, as columns of a row."""
        return {f"p{percent}_us": round(self.percentile(percent), 3) for percent in (20, 50, 80)}

    @property
    def spread(self) -> float:
        """The 80th percentile over the 20th."""
        return self.percentile(80) / max(self.percentile(20), 1e-9)

    def speed_against(self, peer: Samples, work_share: float = 1.0) -> float:
        """The peer's time over this method's, median of the rounds.

        Args:
            peer: times of the peer, from the same rounds.
            work_share: the share of the peer's work that this method did.
        """
        rounds = zip(self.microseconds, peer.microseconds, strict=True)
        return statistics.median(work_share * theirs / own for own, theirs in rounds)


def time_in_rounds(measures: Mapping[str, Measure], rounds: int) -> dict[str, Samples]:
    """One sample of every method in each round, after a first round that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for round_number in range(rounds + 1):
        for name, measure in measures.items():
            microseconds = measure()
            if round_number:
                samples[name].append(microseconds)
    return {name: Samples(tuple(values)) for name, values in samples.items()}


def time_in_calm_rounds(measures: Mapping[str, Measure], rounds: int) -> dict[str, Samples]:
    """As :func:`time_in_rounds`; if a method is noisy, all are timed again, twice at most.

    The rounds whose noisiest method is the calmest are kept. For calls that can be repeated.
    """
    found = []
    for _ in range(1 + NOISY_REPEATS):
        samples = time_in_rounds(measures, rounds)
        found.append(samples)
        if not any(is_noisy(each.percentiles()) for each in samples.values()):
            break
    return min(found, key=lambda samples: max(each.spread for each in samples.values()))


def on_the_host(calls: Sequence[Call]) -> Measure:
    """Wall-clock time of the mean call; does not wait for a device."""

    def measure() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)

    return measure


def on_the_stream(calls: Sequence[Call]) -> Measure:
    """Device time of the mean call, by events before the first and after the last.

    Submission is included: if it takes longer than the work, this is the time of the submission.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / len(calls)

    return measure


def in_a_graph(calls: Sequence[Call]) -> Measure:
    """Device time of the mean call in a replayed CUDA graph, without submission."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replay = on_the_stream([graph.replay])
    return lambda: replay() / len(calls)


def submission(call: Call) -> Measure:
    """Host time of one call on an idle device."""
    measure = on_the_host([call])

    def measure_when_idle() -> float:
        torch.cuda.synchronize()
        return measure()

    return measure_when_idle
