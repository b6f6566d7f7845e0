"""Operations that must be refused, and change nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from soak_checks import must_raise
from soak_worker import Worker
from soak_world import HEAP_PAGES, PAGE

from kvheap import DoubleFreeError, ForeignObjectError, InvalidFreeError, LifetimeError


def free_wrongly(worker: Worker) -> None:
    """A free of a live block together with something wrong."""
    found = worker.some_row()
    if found is None:
        return
    holding, row = found
    heap, obj = worker.heap, holding.batch[row]
    view = heap.view(holding.batch.metadata)
    wrong_out = torch.empty(2, 3)
    wrongs: list[tuple[type[Exception], Callable[[], object]]] = [
        (DoubleFreeError, lambda: heap.batched_free([obj, obj])),
        (ForeignObjectError, lambda: heap.batched_free([obj, worker.world.foreign])),
        (ForeignObjectError, lambda: heap.batched_free(view)),
        (ForeignObjectError, lambda: heap.free(view[row])),
        (TypeError, lambda: heap.batched_free([obj, 3])),  # type: ignore[list-item]
        (ValueError, lambda: heap.batched_free([obj], out=wrong_out)),
        (InvalidFreeError, lambda: heap.address_manager.free(obj.address + 1, PAGE)),
        (InvalidFreeError, lambda: heap.address_manager.free(HEAP_PAGES * PAGE, PAGE)),
        (LifetimeError, obj.unpin),
        (ValueError, lambda: obj.pin(ttl=0)),
    ]
    kind, wrong = worker.random.choice(wrongs)
    with must_raise(kind):
        wrong()
    worker.counts[f"refused: {kind.__name__}"] += 1
    holding.check([row])
    holding.check_counts()


def free_twice(worker: Worker) -> None:
    """Something with a block that is freed already."""
    found = worker.some_row()
    if found is None or len(found[0].live) < 2:
        return
    holding, row = found
    obj = holding.batch[row]
    worker.heap.free(obj)
    worker.gone(holding, [row])
    other = holding.batch[worker.random.choice(holding.live)]
    again: list[tuple[type[Exception], Callable[[], object]]] = [
        (DoubleFreeError, lambda: worker.heap.free(obj)),
        (DoubleFreeError, lambda: worker.heap.batched_free([other, obj])),
        (DoubleFreeError, lambda: worker.heap.batched_free(holding.batch)),
        (DoubleFreeError, holding.batch.detach),
        (LifetimeError, obj.ref_count_down),
        (LifetimeError, obj.ref_count_up),
        (LifetimeError, obj.pin),
        (LifetimeError, lambda: obj.pin(ttl=1)),
        (LifetimeError, lambda: obj.record_stream(worker.world.streams[0])),
    ]
    kind, wrong = worker.random.choice(again)
    with must_raise(kind):
        wrong()
    worker.counts[f"refused: {kind.__name__}"] += 1
    holding.check_counts()
