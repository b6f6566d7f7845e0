"""Operations that only look at the heap while others change it."""

from __future__ import annotations

import gc
import pickle

import torch
from soak_checks import holds, require
from soak_worker import Worker
from soak_world import HEAP_PAGES, PAGE


def look(worker: Worker) -> None:
    """Statistics, the free extents and the report agree with each other."""
    heap = worker.heap
    stats = heap.stats()
    total = stats.allocated_bytes + stats.free_bytes
    require(total == stats.heap_bytes == HEAP_PAGES * PAGE, stats)
    starts, sizes = heap.free_extents().T
    require(bool((sizes > 0).all()), "an empty extent is free")
    require(bool((starts[1:] > (starts + sizes)[:-1]).all()), "free extents touch")
    require(heap.memcheck(), "memcheck")
    require("bytes are free" in str(heap.full_report()), "the report says nothing")
    require(heap.max_batch([PAGE], torch.uint8) <= HEAP_PAGES, "max_batch")
    repr(heap)


def list_leaks(worker: Worker) -> None:
    """What is live includes what this thread holds."""
    own_bytes = sum(len(h.live) * h.batch.allocated_bytes for h in worker.holdings)
    groups = worker.heap.leaks()
    require(sum(group.num_bytes for group in groups) >= own_bytes, "live blocks are missing")
    require(all(group.num_pinned <= group.num_blocks for group in groups), "more pins than blocks")
    is_traced = worker.world.options["debug"]
    require(all(bool(group.site) == is_traced for group in groups), "allocation sites")


def view(worker: Worker) -> None:
    """A view made from pickled metadata shows the same bytes, and frees nothing."""
    holding = worker.some_holding()
    if holding is None:
        return
    seen = worker.heap.view(pickle.loads(pickle.dumps(holding.batch.metadata)))
    row = worker.random.choice(holding.live)
    block = seen[row].raw_tensor
    require(block is not None and holds(block, holding.value(row)), "a view differs")
    if worker.random.random() < 0.3:
        seen[row].ref_count_down()
    require(holding.batch[row].is_valid(), "a view freed its original")


def collect_garbage(worker: Worker) -> None:
    """Finalizers run, in this thread."""
    gc.collect(worker.random.randrange(3))
