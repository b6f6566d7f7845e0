"""``Families``: collects values by metric, and makes Prometheus' families of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvheap.metrics.kinds import MetricType
from kvheap.metrics.packages import need_prometheus

__all__ = ["Families"]


class Families:
    """The metrics of one scrape, each name once, in the order in which they were first named."""

    def __init__(self) -> None:
        core = need_prometheus("core")
        self._types: dict[str, Any] = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "unknown": core.UnknownMetricFamily,
        }
        self._histogram = core.HistogramMetricFamily
        self._families: dict[str, Any] = {}

    def declare(self, name: str, kind: MetricType, text: str, labels: Sequence[str]) -> None:
        """Name a metric, even if there will be no value."""
        if name not in self._families:
            self._families[name] = self._types[kind](name, text, labels=labels)

    def add(self, name: str, labels: Sequence[str], value: float) -> None:
        """Add a value of a declared metric."""
        self._families[name].add_metric(labels, float(value))

    def declare_histogram(self, name: str, text: str, labels: Sequence[str]) -> None:
        """Name a histogram."""
        if name not in self._families:
            self._families[name] = self._histogram(name, text, labels=labels)

    def add_histogram(
        self,
        name: str,
        labels: Sequence[str],
        bounds: Sequence[str],
        counts: Sequence[int],
        total: float,
    ) -> None:
        """Add a histogram.

        Args:
            name: its name.
            labels: values of its labels.
            bounds: upper bounds of its buckets; the last is ``+Inf``.
            counts: for each, the number of values up to it.
            total: sum of all values.
        """
        buckets = list(zip(bounds, map(float, counts), strict=True))
        self._families[name].add_metric(labels, buckets=buckets, sum_value=total)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._families.values())
