"""What a thread of the soak does, and how often."""

from __future__ import annotations

from soak_contests import begin_contest, end_contest, take_part
from soak_internals import batch_of
from soak_lifetimes import (
    count_up_and_down,
    free_with_a_broken_stream,
    hold_by_pin_alone,
    lease,
    record_stream,
)
from soak_looks import collect_garbage, list_leaks, look, view
from soak_mistakes import free_twice, free_wrongly
from soak_worker import Operation, Worker
from soak_world import LAYOUTS, MAX_BLOCKS, Holding


def allocate_one(worker: Worker) -> None:
    """One block."""
    layout = worker.random.choice(LAYOUTS)
    obj = worker.heap.allocate(layout.shapes, layout.dtypes, layout.fmt)
    if obj is None:
        worker.make_room()
    else:
        worker.keep(worker.adopt(batch_of(obj), worker.fresh_values(1), is_filled=False))


def allocate_batch(worker: Worker) -> None:
    """A small or a large batch."""
    holding = worker.new_batch(worker.random.choice((1, 3, MAX_BLOCKS)))
    if holding is not None:
        worker.keep(holding)


def free_holding(worker: Worker) -> None:
    """All that is left of a batch."""
    if worker.holdings:
        worker.give_up(worker.take_holding())


def free_some_rows(worker: Worker) -> None:
    """Blocks of one batch."""
    found = worker.some_row()
    if found is None:
        return
    holding, _ = found
    rows = worker.random.sample(holding.live, worker.random.randint(1, len(holding.live)))
    holding.check(rows)
    worker.heap.batched_free([holding.batch[row] for row in rows])
    worker.gone(holding, rows)


def free_one(worker: Worker) -> None:
    """One block."""
    found = worker.some_row()
    if found is None:
        return
    holding, row = found
    holding.check([row])
    worker.heap.free(holding.batch[row])
    worker.gone(holding, [row])


def free_mixed(worker: Worker) -> None:
    """Blocks of several batches and layouts in one call."""
    chosen: dict[int, tuple[Holding, set[int]]] = {}
    for _ in range(worker.random.randint(2, 12)):
        found = worker.some_row()
        if found is not None:
            chosen.setdefault(id(found[0]), (found[0], set()))[1].add(found[1])
    objs = [holding.batch[row] for holding, rows in chosen.values() for row in rows]
    worker.random.shuffle(objs)
    worker.heap.batched_free(objs)
    for holding, rows in chosen.values():
        worker.gone(holding, list(rows))


OPERATIONS: dict[Operation, int] = {
    allocate_one: 8,
    allocate_batch: 14,
    free_holding: 8,
    free_some_rows: 5,
    free_one: 5,
    free_mixed: 4,
    count_up_and_down: 3,
    hold_by_pin_alone: 2,
    lease: 3,
    record_stream: 6,
    free_with_a_broken_stream: 2,
    free_wrongly: 5,
    free_twice: 3,
    look: 2,
    list_leaks: 2,
    view: 2,
    collect_garbage: 1,
    begin_contest: 3,
    end_contest: 1,
    take_part: 16,
}
"""Each operation with its weight."""
