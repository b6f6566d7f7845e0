"""``Metrics``: exports what heaps, prefix stores and file tiers do to Prometheus.

>>> import torch
>>> from prometheus_client import CollectorRegistry, generate_latest
>>> from kvheap import TensorMemoryAllocator
>>> heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
>>> registry = CollectorRegistry()
>>> metrics = Metrics(registry)
>>> metrics.watch(heap, "host")
'host'
>>> batch = heap.batched_allocate([1024], torch.float32, 3)
>>> text = generate_latest(registry).decode()
>>> [line for line in text.splitlines() if line.startswith("kvheap_heap_live")]
['kvheap_heap_live_blocks{heap="host"} 3.0']
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvheap.errors import ClosedError
from kvheap.interrupts import is_interrupt
from kvheap.metrics.call_families import add_calls, declare_calls, declare_lookups
from kvheap.metrics.families import Families
from kvheap.metrics.kinds import HasStats, Kind, kind_of_numbers
from kvheap.metrics.packages import need_prometheus
from kvheap.metrics.tables import ADDRESSES, HEAP, KINDS, PREFIX_INDEX, PREFIX_STORE
from kvheap.metrics.transfer_families import add_transfers, declare_transfers

if TYPE_CHECKING:
    from kvheap.metrics.calls import HeapCalls, StoreLookups
    from kvheap.metrics.transfer_counts import TransferCounts

__all__ = ["Metrics", "watch"]

LOGGER = logging.getLogger("kvheap")


@dataclass(slots=True)
class _Watched:
    """An object that is watched, as long as it lives."""

    reference: weakref.ref[Any]
    kind: Kind
    calls: HeapCalls | StoreLookups | None
    errors: int = 0


class Metrics:
    """A collector for one registry of ``prometheus_client``.

    Collecting takes no lock of its own, asks each object for ``stats()``, which a heap answers in
    O(1), and looks at a heap's batches without its lock, in turns with other threads. Objects are
    referred to weakly: what is dropped vanishes from the next scrape. A closed object has
    ``kvheap_open`` 0, and no other metric. In a forked child, objects go on being watched as the
    child sees them.

    Durations of calls, look-ups and transfers are counted from the moment of :meth:`watch`: a call
    of a heap that is watched then costs about 0.3 microseconds more. Where nothing is watched, all
    costs what it costs without metrics.

    Collectors like this one are not supported in ``prometheus_client``'s multiprocess mode.

    Args:
        registry: the registry to join; None: ``prometheus_client.REGISTRY``.

    Raises:
        ImportError: ``prometheus_client`` is not installed.
        ValueError: the registry has a collector of the same metrics: one ``Metrics`` a registry.
    """

    def __init__(self, registry: Any = None) -> None:
        if registry is None:
            registry = need_prometheus().REGISTRY
        self._registry = registry
        self._watched: dict[str, _Watched] = {}
        self._num_named: dict[str, int] = {}
        self._transfers: TransferCounts | None = None
        self._measures_calls = False
        registry.register(self)

    def watch(
        self,
        obj: HasStats,
        name: str | None = None,
        *,
        kind: Kind | None = None,
        calls: bool = True,
    ) -> str:
        """Export the metrics of an object, for as long as it lives.

        Args:
            obj: a heap, ``PrefixStore``, ``PrefixIndex``, ``FileTier``, ``SharedHeap``, ``Node`` or
                ``AddressManager``; or any other object with ``stats()``, see
                :mod:`kvheap.metrics.kinds`.
            name: the value of its label, such as ``host``; None: its class's name and a number.
            kind: which metrics it has; None: those of its class, or if that is not known, each
                number of its ``stats()``.
            calls: whether to measure how long the calls of a heap take, and how often look-ups of
                a prefix store hit.

        Returns:
            The name.

        Raises:
            ValueError: another object that lives has the name, or the object is watched already.
            TypeError: the object has no ``stats()``, or an argument has a wrong type.
            ClosedError: an object of unknown kind is closed.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a text, got {name!r}")
        if kind is not None and not isinstance(kind, Kind):
            raise TypeError(f"kind must be a Kind, got {kind!r}")
        if isinstance(obj, type) or not callable(getattr(obj, "stats", None)):
            raise TypeError(f"only an object with stats() can be watched, got {obj!r}")
        if hasattr(obj, "pin_allocator"):
            raise TypeError(f"watch the heap of {obj!r}, which is its pin_allocator")
        for other, watched in self._watched.copy().items():
            if watched.reference() is obj:
                raise ValueError(f"{obj!r} is watched already, as {other!r}")
        if kind is None:
            kind = _kind_of(obj)
        if name is None:
            name = self._new_name(type(obj).__name__)
        known = self._watched.get(name)
        if known is not None and known.reference() is not None:
            raise ValueError(
                f"name must differ from those of other objects, got {name!r}, which is "
                f"{known.reference()!r}"
            )
        reference = weakref.ref(obj, self._forgetting(name))
        measured = None
        if calls and kind in (HEAP, PREFIX_STORE):
            from kvheap.metrics.calls import watch_calls  # needs torch, which a scheduler may lack

            measured = watch_calls(obj)
            self._measures_calls = True
        self._watched[name] = _Watched(reference, kind, measured)
        if self._transfers is None and kind not in (ADDRESSES, PREFIX_INDEX):
            from kvheap.metrics.transfer_counts import transfer_counts

            transfer_counts.start()
            self._transfers = transfer_counts
        return name

    def unwatch(self, name: str) -> None:
        """Export an object no more.

        Raises:
            KeyError: no object has the name.
        """
        if name not in self._watched:
            raise KeyError(f"nothing is watched under {name!r}")
        watched = self._watched.pop(name)
        obj = watched.reference()
        if obj is not None and watched.calls is not None:
            from kvheap.metrics.calls import unwatch_calls

            unwatch_calls(obj)

    def close(self) -> None:
        """Unwatch all objects, and leave the registry. A second call does nothing."""
        for name in list(self._watched):
            self.unwatch(name)
        if self._measures_calls:
            from kvheap.metrics.calls import rest

            rest()
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.unregister(self)

    def _new_name(self, stem: str) -> str:
        while True:
            number = self._num_named[stem] = self._num_named.get(stem, -1) + 1
            if f"{stem}-{number}" not in self._watched:
                return f"{stem}-{number}"

    def _forgetting(self, name: str) -> Any:
        watched = self._watched

        def forget(reference: weakref.ref[Any]) -> None:
            known = watched.get(name)
            if known is not None and known.reference is reference:
                watched.pop(name, None)

        return forget

    # -- for the registry ----------------------------------------------------------------------

    def describe(self) -> Iterator[Any]:
        """The families of all known kinds, without values; the registry compares their names."""
        families = Families()
        for kind in {id(kind): kind for kind in KINDS.values()}.values():
            _declare(families, kind)
        declare_calls(families)
        declare_lookups(families)
        declare_transfers(families)
        _declare_own(families)
        return iter(families)

    def collect(self) -> Iterator[Any]:
        """The families with the values of all objects that are watched."""
        began = time.perf_counter()
        families = Families()
        _declare_own(families)
        for name, watched in list(self._watched.items()):
            _add_object(families, name, watched)
        if self._transfers is not None:
            add_transfers(families, self._transfers)
        if self._measures_calls:
            from kvheap.metrics.calls import rest

            rest()
        families.add("kvheap_scrape_duration_seconds", (), time.perf_counter() - began)
        return iter(families)


_of_registry: weakref.WeakKeyDictionary[Any, Metrics] = weakref.WeakKeyDictionary()


def watch(obj: HasStats, name: str | None = None, *, calls: bool = True) -> str:
    """Export the metrics of an object to ``prometheus_client.REGISTRY``; see ``Metrics.watch``."""
    registry = need_prometheus().REGISTRY
    metrics = _of_registry.get(registry)
    if metrics is None:
        metrics = _of_registry[registry] = Metrics(registry)
    return metrics.watch(obj, name, calls=calls)


def _kind_of(obj: HasStats) -> Kind:
    for each in type(obj).__mro__:
        kind = KINDS.get(f"{each.__module__}.{each.__qualname__}")
        if kind is not None:
            return kind
    return kind_of_numbers(obj)


def _declare(families: Families, kind: Kind) -> None:
    for metric in kind.metrics:
        labels = [kind.name] if metric.label is None else [kind.name, metric.label]
        families.declare(metric.name.removesuffix("_total"), metric.type, metric.help, labels)


def _add_object(families: Families, name: str, watched: _Watched) -> None:
    """Add all metrics of an object; of one that is closed or cannot be read, only that."""
    kind, obj = watched.kind, watched.reference()
    if obj is None:
        return
    of_object = kind.name, name
    try:
        if getattr(obj, "closed", False):
            raise ClosedError(f"{name!r} is closed")
        values = _values(kind, name, kind.read(obj))
    except ClosedError:
        families.add("kvheap_open", of_object, 0)
        return
    except Exception as error:
        if is_interrupt(error):
            raise
        watched.errors += 1
        if watched.errors == 1:
            LOGGER.exception("the metrics of %r cannot be read", name)
        families.add("kvheap_scrape_errors", of_object, watched.errors)
        return
    families.add("kvheap_open", of_object, 1)
    _declare(families, kind)
    for value in values:
        families.add(*value)
    if watched.calls is not None:
        add_calls(families, name, watched.calls)


def _values(
    kind: Kind, name: str, numbers: Mapping[str, Any]
) -> list[tuple[str, tuple[str, ...], float]]:
    """Name, labels and value of each metric of an object that has a number now."""
    return [
        (
            metric.name.removesuffix("_total"),
            (name,) if label is None else (name, label),
            float(value),
        )
        for metric in kind.metrics
        for label, each in metric.fields.items()
        if (value := numbers.get(each)) is not None
    ]


def _declare_own(families: Families) -> None:
    families.declare(
        "kvheap_open",
        "gauge",
        "1 if an object that is watched is open, 0 once it is closed and has no other metrics.",
        ("kind", "name"),
    )
    families.declare(
        "kvheap_scrape_errors",
        "counter",
        "Scrapes in which an object could not be read; the log has the first error.",
        ("kind", "name"),
    )
    families.declare(
        "kvheap_scrape_duration_seconds", "gauge", "Seconds that this scrape of kvheap took.", ()
    )
