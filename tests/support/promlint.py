"""The rules of Prometheus for names, units and texts of metrics, as promtool's linter has them.

After ``promlint`` (github.com/prometheus/client_golang, ``prometheus/testutil/promlint``), and the
best practices at https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

BASE_UNITS = {"bytes", "seconds", "ratio"}
OTHER_UNITS = {
    *("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "ms", "us", "ns"),
    *("kilobytes", "megabytes", "gigabytes", "kib", "mib", "gib", "kb", "mb", "gb", "bits"),
    *("percent", "percents", "perc"),
}
ABBREVIATIONS = {"s", "sec", "secs", "b", "m", "h", "d", "cnt", "num", "avg"}
TYPES = {"counter", "gauge", "histogram", "summary", "untyped", "metric", "metrics"}


def problems_of(family: Any) -> list[str]:
    """What is wrong with a parsed family, ``prometheus_client.Metric``."""
    name = family.name + "_total" * (family.type == "counter")
    words = name.split("_")
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        found.append("must be lower case with underscores")
    if "__" in name:
        found.append("must not have an empty word")
    if words[0] != "kvheap":
        found.append("must begin with the name of the application")
    if (
        not family.documentation
        or family.documentation[-1] != "."
        or len(family.documentation) < 15
    ):
        found.append("must have a text that explains it, in sentences")
    if family.type != "counter" and name.endswith("_total"):
        found.append("only counters end in _total")
    if family.type != "histogram" and words[-1] in ("bucket", "count", "sum", "info"):
        found.append(f"only a histogram ends in _{words[-1]}")
    found += [f"must use base units, not {word}" for word in words if word in OTHER_UNITS]
    found += [f"must not abbreviate {word}" for word in words if word in ABBREVIATIONS]
    found += [f"must not name its type, {word}" for word in words[1:] if word in TYPES]
    last = words[:-1] if family.type == "counter" else words
    found += [f"must have its unit {word} at the end" for word in last[:-1] if word in BASE_UNITS]
    labels: set[str] = set().union(*(sample.labels for sample in family.samples))
    for label in labels:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", label):
            found.append(f"must have lower-case labels, not {label}")
        if label in ("le", "quantile") and family.type not in ("histogram", "summary"):
            found.append(f"must not have the label {label}")
    for sample in family.samples:
        if family.type in ("counter", "histogram") and sample.value < 0:
            found.append(f"must not be negative: {sample}")
    return [f"{name} {each}" for each in found]


def lint(families: Iterable[Any]) -> list[str]:
    """What is wrong with the families of a scrape."""
    families = list(families)
    found = [problem for family in families for problem in problems_of(family)]
    names = [family.name for family in families]
    found += [f"{name} is there twice" for name in {*names} if names.count(name) > 1]
    for family in families:
        rows = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        if len(rows) != len({*rows}):
            found.append(f"{family.name} has two samples with the same labels")
    return found
