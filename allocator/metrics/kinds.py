"""``Kind``: which metrics an object has, by name, unit and meaning, and how to read their values.

An object can be watched if it has ``stats()``, which returns a dataclass or a mapping of
numbers, and raises ``ClosedError`` once the object is closed. A :class:`Kind` says what
the numbers mean. Without one, each number is exported under its own name, as a metric of unknown
type.

Names and units follow https://prometheus.io/docs/practices/naming/: bytes and seconds, ``_total``
for counters and for nothing else, the unit at the end of the name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from numbers import Real
from typing import Any, Literal, Protocol

__all__ = ["HasStats", "Kind", "Metric", "MetricType", "counter", "gauge", "kind_of_numbers"]

MetricType = Literal["counter", "gauge", "unknown"]


class HasStats(Protocol):
    """What can be watched."""

    def stats(self) -> Any:
        """Numbers at one moment: a dataclass, or a mapping by name."""
        ...


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a kind of object.

    Attributes:
        name: in full, such as ``kvheap_heap_free_extents``.
        help: what it counts, for people.
        type: ``counter``, ``gauge`` or ``unknown``.
        fields: the values to export: by the value of ``label``, or by None if there is no such
            label, the field of ``stats()``. One that is missing or None is not exported.
        label: a label beside the object's name; None: none.
    """

    name: str
    help: str
    type: MetricType
    fields: Mapping[str | None, str]
    label: str | None = None


def gauge(
    name: str, fields: str | Mapping[str, str], text: str, label: str | None = None
) -> Metric:
    """A metric that goes up and down.

    Args:
        name: its full name.
        fields: the field of ``stats()``; or with ``label``, the fields by the label's value.
        text: what it counts.
        label: a label that tells several fields apart.
    """
    return Metric(name, text, "gauge", _fields(fields), label)


def counter(
    name: str, fields: str | Mapping[str, str], text: str, label: str | None = None
) -> Metric:
    """A metric that only goes up; arguments as for :func:`gauge`. Its name ends in ``_total``."""
    return Metric(name, text, "counter", _fields(fields), label)


def _fields(fields: str | Mapping[str, str]) -> Mapping[str | None, str]:
    if isinstance(fields, str):
        return {None: fields}
    return {label: field for label, field in fields.items()}  # noqa: C416 - the keys' type widens


def numbers_of(obj: HasStats) -> Mapping[str, Any]:
    """The numbers of ``stats()``, by name, and of those within them."""
    stats = obj.stats()
    if is_dataclass(stats) and not isinstance(stats, type):
        stats = asdict(stats)
    if isinstance(stats, Mapping):
        found = dict(stats)
        for value in stats.values():
            if isinstance(value, Mapping):  # statistics of a part of the object
                found.update(value)
        return found
    raise TypeError(f"stats() must return a dataclass or a mapping, got {stats!r} of {obj!r}")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of objects that have the same metrics.

    Attributes:
        name: what it is, such as ``heap``; also the label that the objects' names are under.
        metrics: its metrics.
        read: reads the values by field; by default, those of ``stats()``.

    >>> pool = Kind("pool", (gauge("my_pool_bytes", "num_bytes", "Bytes of a pool."),))
    >>> class Pool:
    ...     def stats(self): return {"num_bytes": 5}
    >>> pool.read(Pool())
    {'num_bytes': 5}
    """

    name: str
    metrics: tuple[Metric, ...]
    read: Callable[[Any], Mapping[str, Any]] = field(default=numbers_of)


def kind_of_numbers(obj: HasStats) -> Kind:
    """A kind that exports each number of ``stats()`` under its own name, of unknown type."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(obj).__name__).lower().lstrip("_")
    metrics = tuple(
        Metric(
            f"kvheap_{name}_{each.removesuffix('_s')}{'_seconds' * each.endswith('_s')}",
            f"The number {each} of the statistics of a {type(obj).__name__}.",
            "unknown",
            {None: each},
        )
        for each, value in numbers_of(obj).items()
        if isinstance(value, Real)
    )
    return Kind(name, metrics)
