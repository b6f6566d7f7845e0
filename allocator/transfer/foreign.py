"""``foreign_transfer``: a transfer that others make: a library, a thread, another machine.

>>> import torch
>>> from concurrent.futures import ThreadPoolExecutor
>>> from kvheap import TensorMemoryAllocator
>>> heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
>>> batch = heap.batched_allocate([4096], torch.uint8, 2)
>>> def read():  # a file, for example
...     (address,), _ = batch.extents()
...     heap.buffer[: 8192] = 7
>>> with ThreadPoolExecutor() as pool:
...     transfer = foreign_transfer(lambda: pool.submit(read), target=batch, name="a thread")
>>> batch.transfer is transfer, batch[1].tensor[:3]  # waits for it
(True, tensor([7, 7, 7], dtype=torch.uint8))
>>> transfer
Transfer(foreign by a thread, 8192 bytes in 1 runs, ended)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any, TypeAlias

import numpy as np
import torch

from kvheap.blocks.heap import BlockObjects, heap_of
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.rows import Rows
from kvheap.device.completion import Completion, in_flight
from kvheap.device.events import Event, ReportingEvent
from kvheap.device.foreign import ForeignEvent, FutureLike, is_event
from kvheap.device.transfer import Transfer
from kvheap.interrupts import is_interrupt
from kvheap.kernels.untraced import untraced
from kvheap.transfer.pairing import block_runs

__all__ = ["ForeignWork", "fill_batch", "foreign_transfer"]

ForeignWork: TypeAlias = "Event | FutureLike | Callable[[], Event | FutureLike]"
"""An event or a future of work that has begun; or a function that begins it, and returns one."""


@untraced
def foreign_transfer(
    work: ForeignWork,
    *,
    source: BlockObjects | Rows | None = None,
    target: BlockObjects | Rows | None = None,
    name: str = "others",
) -> Transfer:
    """Track a transfer that others make, so that its blocks are protected as those of a copy are.

    Blocks of either side may be freed, dropped, and their heap closed, at any time: their bytes are
    not allocated again before the work has ended. Whatever reads the blocks of a target that is a
    whole batch waits for the work, as it becomes ``target.transfer``; of a target that is a part of
    a batch, wait for the returned transfer yourself. A local copy of blocks that it still fills
    waits on its caller's thread. What stores have recorded of the target's tokens is forgotten.

    How the work ends is told by its event or future, which is asked from any thread, and must
    answer at once:

    - ``query()`` is true, or the future has a result: it has ended;
    - a ``TransferError``, raised by the event or set in the future, or a cancelled
      ``concurrent.futures.Future``: it has failed, and touches the bytes no more;
    - any other exception: it has failed, and may touch the bytes for ever. ``result()`` raises, and
      the blocks are quarantined: they stay allocated, as ``stats().pending_bytes`` once they are
      freed, until ``query()`` is true after all, as when a peer is known to be gone.

    Args:
        work: an object with ``query()``, and with ``synchronize()`` if it can be waited for; a
            future, of ``concurrent.futures`` or ``asyncio``; or a function that begins the work and
            returns one of these. With a function, the blocks are protected before anything begins,
            also from an exception of a signal handler. If the function raises an ``Exception``, the
            work counts as not begun; if a signal handler's exception strikes in it, as lost: its
            blocks are quarantined for good.
        source: blocks of a heap that the work reads: a batch, objects, or rows. None: elsewhere.
        target: blocks of a heap that it writes. None: elsewhere.
        name: who does it, for messages; becomes ``transfer.path``.

    Returns:
        The transfer. Its ``wait_stream`` waits on the host.

    Raises:
        ValueError: neither side is given, or a list is empty.
        TypeError: an argument has a wrong type. If it is the function's result, the work counts as
            lost.
        LifetimeError: a block is freed; nothing has begun.
        ForeignObjectError: the target is a view for reading; nothing has begun.
        ClosedError: a heap is closed; nothing has begun.
        TransferError: the transfer that was to fill a side has failed; nothing has begun.
        RuntimeError: a transfer that fills a side, or reads the target, is in flight: wait for it
            first. Nothing has begun; work that had begun before this call stays protected.
        Exception: what the function raised.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, got {name!r}")
    if source is None and isinstance(work, ReportingEvent) and isinstance(target, MemoryBatch):
        return fill_batch(work, target, name, _memory_of(target))
    is_begun = is_event(work)
    if not is_begun and not callable(work):
        raise TypeError(
            f"work must be an event with query(), a future, or a function that begins the work and "
            f"returns one, got {work!r}"
        )
    if source is None and target is None:
        raise ValueError("a foreign transfer needs blocks: pass its source, its target, or both")
    begin: Callable[[], Any] = (lambda: work) if is_begun else work  # type: ignore[assignment]
    sides = [side for side in (source, target) if side is not None]
    num_bytes, num_runs = _size_of(sides[-1])
    read = [] if source is None else _rows_of(source)
    written = [] if target is None else _rows_of(target)
    for rows in written:
        rows.batch.require_writable()
    completion = Completion([buffer for side in sides for buffer in _memory_of(side)])
    transfer = Transfer(
        completion,
        path=name,
        direction="foreign",
        num_bytes=num_bytes,
        num_runs=num_runs,
        device=None,
    )
    found: list[Any] = []
    was_called = False
    try:
        for rows in read:
            rows.record_reading(completion)
        for rows in written:
            rows.record_filling(completion)
        _require_idle(read, written)
        for rows in written:
            rows.batch.stored_tokens.forget(rows.rows)
        in_flight.add(completion)
        call = starmap(begin, [()])
        was_called = True
        found.extend(call)  # in C: the result is in the list before a signal handler can raise
        event = _event_of(found[0], name)
        transfer.begun((event,))
        completion.queued(event)
        for rows in written:
            if rows.rows is None:
                rows.batch.transfer = transfer
    except BaseException as error:
        _give_up(completion, found or ([work] if is_begun else []), name, was_called, error)
        raise
    return transfer


@untraced
def fill_batch(
    event: ReportingEvent, batch: MemoryBatch, name: str, keep: Sequence[object] = ()
) -> Transfer:
    """:func:`foreign_transfer` of work that has begun, reports for itself, and fills a whole batch.

    Apart, and in few steps, since a read of a block takes little longer than to say that it is
    protected.

    Args:
        event: the end of the work.
        batch: what it fills; its heap is open.
        name: who does it.
        keep: what is kept alive until the end: the heap's buffers, unless the work keeps them.

    Raises:
        As ``foreign_transfer``.
    """
    counts, blocks = batch.counts, batch.runs
    counts.require_live(None, batch)
    batch.require_writable()
    completion = Completion(keep)
    completion.filled = ((id(counts), None),)  # first: it is found as soon as it is recorded
    transfer = Transfer(
        completion,
        path=name,
        direction="foreign",
        num_bytes=blocks.num_blocks * batch.layout.size_bytes,
        num_runs=blocks.num_runs,
        device=None,
    )
    before = batch.transfer
    try:
        batch.allocator.lifetime.record_stream(batch, completion)
        recorded = counts.streams
        if recorded is not None:
            recorded.has_fillers = True
        is_idle = before is None or before.has_succeeded
        if not is_idle or (recorded is not None and recorded.has_others(completion)):
            _require_idle((), (Rows(batch, None),))
        batch.forget_tokens()
        in_flight.add(completion)
        transfer.begun((event,))
        completion.queued(event)
        batch.transfer = transfer
    except BaseException as error:
        _give_up(completion, [event], name, False, error)
        raise
    return transfer


def _give_up(
    completion: Completion, begun: list[Any], name: str, was_called: bool, error: BaseException
) -> None:
    """Protect the blocks for as long as the work may use them, or not at all if none has begun."""
    if begun and is_event(begun[0]):
        in_flight.add(completion)
        completion.queued(_event_of(begun[0], name))
    elif was_called and (begun or is_interrupt(error)):
        completion.lose(RuntimeError(f"it was interrupted, or unclear, how it began: {error!r}"))
    else:
        completion.nothing_queued()


def _event_of(work: Any, name: str) -> ReportingEvent:
    """The end of the work; an event that reports failures is it."""
    return work if isinstance(work, ReportingEvent) else ForeignEvent(work, name)


def _require_idle(read: Sequence[Rows], written: Sequence[Rows]) -> None:
    """Raise if a transfer fills one of these blocks, has failed to, or reads one to be written.

    Raises:
        TransferError, RuntimeError: as :func:`foreign_transfer`.
    """
    for rows in (*read, *written):
        before = rows.batch.transfer
        if before is None:
            continue
        is_done = before.done()
        before.require_success()
        if not is_done:
            raise RuntimeError(
                f"{rows.batch!r} is still being filled by {before!r}: wait for it first"
            )
    for parts, is_written in ((read, False), (written, True)):
        for rows in parts:
            for user in rows.users():
                does_fill = rows.are_filled_by(user)
                if does_fill:
                    user.require_success()
                if does_fill or (is_written and not user.is_quarantined):
                    does = "filled" if does_fill else "read"
                    raise RuntimeError(
                        f"{rows.batch!r} is still being {does} by a transfer in flight: wait for "
                        f"it first"
                    )


def _size_of(blocks: BlockObjects | Rows) -> tuple[int, int]:
    """Bytes and runs of blocks, which must be live."""
    if isinstance(blocks, MemoryBatch):
        blocks.counts.require_live(None, blocks)
        return len(blocks) * blocks.size_bytes, blocks.num_runs
    runs = block_runs(blocks)
    return len(runs) * runs.size_bytes, runs.num_runs


def _rows_of(blocks: BlockObjects | Rows) -> list[Rows]:
    if isinstance(blocks, MemoryBatch):
        return [Rows(blocks, None)]
    parts = [blocks] if isinstance(blocks, Rows) else heap_of(blocks).rows_by_batch(blocks)
    return [Rows(each.batch, None) if _has_all(each) else each for each in parts]


def _has_all(part: Rows) -> bool:
    return part.rows is None or len(np.unique(part.rows)) == len(part.batch)


def _memory_of(blocks: BlockObjects | Rows) -> list[torch.Tensor]:
    """The buffers that blocks are in."""
    heap = heap_of(blocks.batch if isinstance(blocks, Rows) else blocks)
    return [buffer for _, buffer in heap.segments]
