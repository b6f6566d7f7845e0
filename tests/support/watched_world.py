"""A world with one of each thing that metrics can watch, and its scrape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvheap import (
    AddressManager,
    BlockLayout,
    MemoryFormat,
    PrefixIndex,
    PrefixStore,
    TensorMemoryAllocator,
    offload,
)
from kvheap.metrics import Kind, Metrics
from kvheap.metrics.tables import NODE, SHARED_HEAP

LAYOUT = BlockLayout.of([2, 1, 512, 2], torch.float16, MemoryFormat.KV_2LTD)
"""Chunks of 4096 bytes."""


def heap_of(pages: int = 64, **options: Any) -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(pages * 4096, dtype=torch.uint8), **options)


def chunks(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 1, 512, 2).half()


class Scrape:
    """A scrape as Prometheus would parse it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.text = generate_latest(registry).decode()
        self.families = list(text_string_to_metric_families(self.text))

    def value(self, name: str, /, **labels: str) -> float:
        (found,) = self.values(name, **labels)
        return found

    def values(self, name: str, /, **labels: str) -> list[float]:
        return [
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return {sample.name for family in self.families for sample in family.samples}


class MadeUp:
    """Stands for an object of a kind: each of its numbers is 3."""

    def __init__(self, kind: Kind) -> None:
        fields = [field for metric in kind.metrics for field in metric.fields.values()]
        self._numbers = dict.fromkeys(fields, 3)

    def stats(self) -> dict[str, Any]:
        return {"a part": self._numbers}


@contextmanager
def whole_world(folder: Any) -> Iterator[Scrape]:
    """The scrape of a process that has used everything.

    Shared heaps and nodes, which need other processes and packages, are made up.
    """
    from kvheap.files import FileTier

    registry = CollectorRegistry()
    metrics = Metrics(registry)
    heap, far = heap_of(), heap_of()
    store: PrefixStore[str] = PrefixStore(far, LAYOUT)
    index: PrefixIndex[str, int] = PrefixIndex()
    manager = AddressManager(1 << 20)
    with FileTier(folder, 1 << 20, LAYOUT, namespace="test") as tier:
        for name, each in {
            "near": heap, "far": far, "index": index, "manager": manager, "file": tier, "st": store
        }.items():  # fmt: skip
            metrics.watch(each, name)
        made_up = {kind.name: MadeUp(kind) for kind in (NODE, SHARED_HEAP)}
        for kind in (NODE, SHARED_HEAP):
            metrics.watch(made_up[kind.name], f"a {kind.name}", kind=kind)
        batch = heap.batched_allocate([2, 1, 512, 2], torch.float16, 3, source=chunks(3))
        assert batch is not None
        away = offload(batch, into=far)
        assert away is not None
        away.transfer.result()
        store.store(["a", "b"], chunks(2))
        store.prefix_length(["a", "b", "c"])
        tier.store([b"a"], batch[:1]).result()
        tier.load([b"a"], into=heap).result()
        yield Scrape(registry)
    metrics.close()
