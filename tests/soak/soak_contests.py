"""Operations of many threads on one batch: see ``soak_world`` for the rules."""

from __future__ import annotations

from collections import deque

import torch
from soak_checks import SoakError, holds, require
from soak_lifetimes import end, grant
from soak_worker import Worker, source_of
from soak_world import MAX_BLOCKS, Contest

from kvheap import BlockInUseError, DoubleFreeError, LifetimeError

MAX_CONTESTS = 6


def begin_contest(worker: Worker) -> None:
    """Put a batch on the board."""
    board = worker.world.board
    if len(board) >= MAX_CONTESTS:
        return
    holding = worker.new_batch(MAX_BLOCKS)
    if holding is None or not holding.live:
        return
    if worker.random.random() < 0.3:
        holding.batch.record_stream(worker.random.choice(worker.world.streams))
    is_race = worker.random.random() < 0.5
    tickets = worker.random.sample(holding.live, len(holding.live))
    with worker.world.board_lock:
        board.append(Contest(holding, is_race, deque(tickets)))


def end_contest(worker: Worker) -> None:
    """Take one off the board. What nobody has freed is dropped by the last thread at it."""
    board = worker.world.board
    with worker.world.board_lock:
        if not board:
            return
        contest = board.pop(worker.random.randrange(len(board)))
    freed = list(contest.freed)
    require(len(set(freed)) == len(freed), "a block was freed twice")


def take_part(worker: Worker) -> None:
    """Do a few things to a batch on the board, mostly to the newest, so that threads meet."""
    board = worker.world.board
    with worker.world.board_lock:
        if not board:
            return
        newest = worker.random.random() < 0.7
        contest = board[-1] if newest else worker.random.choice(board)
    for _ in range(worker.random.randint(1, 6)):
        if contest.is_race:
            race(worker, contest)
        elif worker.random.random() < 0.25:
            use_ticket(worker, contest)
        else:
            visit(worker, contest)


def race(worker: Worker, contest: Contest) -> None:
    """Free a few blocks, unless another thread was faster; they must come out as they went in."""
    holding = contest.holding
    count = worker.random.randint(1, min(3, len(holding.batch)))
    left = sorted(set(range(len(holding.batch))) - set(contest.freed.copy()))
    if len(left) < count:
        return
    rows = worker.random.sample(left[: count + 2], count)
    objs = [holding.batch[row] for row in rows]
    want = source_of(holding.batch.layout, holding.values[rows])
    out = torch.zeros_like(want) if worker.random.random() < 0.5 else None
    try:
        worker.heap.batched_free(objs, out=out)
    except DoubleFreeError:
        worker.counts["races lost"] += 1
        return
    except SoakError:
        worker.counts["failed: gather"] += 1
        return
    contest.freed.extend(rows)
    worker.counts["blocks freed"] += len(rows)
    worker.counts["races won"] += 1
    if out is not None:
        same = torch.equal(out.view(torch.uint8), want.view(torch.uint8))
        require(same, "a race was won, but the contents were another's")


def use_ticket(worker: Worker, contest: Contest) -> None:
    """Drop the reference that a block was born with: this never fails."""
    try:
        row = contest.tickets.pop()
    except IndexError:
        return
    obj = contest.holding.batch[row]
    worker.counts["blocks freed"] += 1
    if worker.random.random() < 0.5:
        try:
            worker.heap.free(obj)
        except BlockInUseError:
            worker.counts["refused: BlockInUseError"] += 1
        else:
            return
    obj.ref_count_down()


def visit(worker: Worker, contest: Contest) -> None:
    """Hold a block by a count or lease; while it is held, its contents stay."""
    row = worker.random.randrange(min(3, len(contest.holding.batch)))
    obj, value = contest.holding.batch[row], contest.holding.value(row)
    way = worker.random.randrange(3)
    try:
        lease = grant(worker, obj) if way == 0 else None
        if way == 1:
            obj.pin()
        elif way == 2:
            obj.ref_count_up()
    except LifetimeError:
        worker.counts["visits to freed blocks"] += 1
        return
    block = obj.raw_tensor
    same = block is not None and holds(block, value)
    if lease is not None:
        was_held = end(worker, lease)
        require(same or not was_held, f"{obj!r} changed under a lease")
        return
    require(same, f"{obj!r} changed while it was held")
    for _ in range(8):  # so fast that threads meet inside
        obj.ref_count_up()
        obj.pin()
        obj.ref_count_down()
        obj.unpin()
    if way == 1:
        obj.unpin()
    else:
        obj.ref_count_down()
