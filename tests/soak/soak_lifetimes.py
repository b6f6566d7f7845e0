"""Operations on who holds a block: counts, leases and streams."""

from __future__ import annotations

import time
from collections.abc import Sequence

from soak_checks import SoakError, must_raise, require
from soak_faults import Blocks, FakeStream
from soak_worker import Worker
from soak_world import Holding

from kvheap import BatchLease, BlockInUseError, Lease, LifetimeError, MemoryObj

LONGEST_LEASE_S = 0.01


def count_up_and_down(worker: Worker) -> None:
    """References and pins are taken and returned; while they are held, no free succeeds."""
    found = worker.some_row()
    if found is None:
        return
    holding, row = found
    obj, times = holding.batch[row], worker.random.randint(1, 3)
    for _ in range(times):
        obj.ref_count_up()
        obj.pin()
    require((obj.ref_count, obj.pin_count) == (1 + times, times), f"wrong counts: {obj!r}")
    with must_raise(BlockInUseError):
        worker.heap.free(obj)
    for _ in range(times):
        obj.unpin()
        obj.ref_count_down()
    with must_raise(LifetimeError):
        obj.unpin()
    holding.check([row])
    holding.check_counts()


def hold_by_pin_alone(worker: Worker) -> None:
    """A block whose last reference was dropped lives until its pin ends."""
    found = worker.some_row()
    if found is None:
        return
    holding, row = found
    obj = holding.batch[row]
    obj.pin()
    obj.ref_count_down()
    with must_raise(LifetimeError):
        obj.ref_count_down()
    holding.check([row])
    obj.unpin()
    worker.gone(holding, [row])


def lease(worker: Worker) -> None:
    """A lease that is released, or that outlives the holding."""
    found = worker.some_row()
    if found is None:
        return
    holding, row = found
    granted = grant(worker, holding.batch[row])
    if worker.random.random() < 0.5:
        time.sleep(worker.random.uniform(0, LONGEST_LEASE_S))
        end(worker, granted)
        holding.check([row])
        return
    holding.check(holding.live)
    worker.holdings.remove(holding)
    if worker.random.random() < 0.5:  # else dropped by the call that lets the lease expire
        for other in holding.live:
            holding.batch[other].ref_count_down()
        worker.counts["blocks freed"] += len(holding.live)


def grant(worker: Worker, obj: MemoryObj) -> Lease | BatchLease:
    """Pin a block for a short random time, by itself or as one of a list."""
    ttl = worker.random.uniform(1e-5, LONGEST_LEASE_S)
    by_itself = worker.random.random() < 0.5
    granted = obj.pin(ttl=ttl) if by_itself else worker.heap.lease([obj], ttl)
    worker.counts["leases granted"] += 1
    return granted


def end(worker: Worker, granted: Lease | BatchLease) -> bool:
    """Release a lease; returns whether it had not expired yet."""
    ended = granted.release()
    worker.counts["leases released"] += ended
    require(not granted.release(), "a lease ended twice")
    return ended


def record_stream(worker: Worker) -> None:
    """A stream works on one block, or on all of a batch, until after it is freed."""
    holding = worker.some_holding()
    if holding is None:
        return
    holding.has_streams = True
    batch, rows = holding.batch, holding.live
    if worker.random.random() < 0.3:
        batch[worker.random.choice(rows)].record_stream(worker.random.choice(worker.world.streams))
    elif worker.random.random() < 0.5 and len(rows) == len(batch):
        holding.only_whole = True
        some = worker.random.sample(rows, min(4, len(rows)))
        batch.record_stream(stream_on(worker, holding, some))
    else:
        row = worker.random.choice(rows)
        batch[row].record_stream(stream_on(worker, holding, [row]))


def free_with_a_broken_stream(worker: Worker) -> None:
    """A stream that cannot record: the free fails, the block lives, the next free works."""
    found = worker.some_row()
    if found is None:
        return
    holding, row = found
    holding.has_streams = True
    obj = holding.batch[row]
    obj.record_stream(stream_on(worker, holding, [row], failures=1))
    free = worker.random.choice((obj.ref_count_down, lambda: worker.heap.free(obj)))
    with must_raise(SoakError):
        free()
    worker.counts["failed: record_event"] += 1
    holding.check_counts()
    holding.check([row])
    free()
    worker.gone(holding, [row])


def stream_on(
    worker: Worker, holding: Holding, rows: Sequence[int], failures: int = 0
) -> FakeStream:
    """A stream that reads these blocks to the end of its work."""
    blocks: Blocks = []
    for row in rows:
        block = holding.batch[row].raw_tensor
        assert block is not None
        blocks.append((block, holding.value(row)))
    return FakeStream(worker.world.device, worker.random.getrandbits(32), blocks, failures)
