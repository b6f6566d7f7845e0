"""``copy``, ``offload`` and ``restore``: execute a plan; move blocks to another heap.

All return at once. Their ``Transfer`` tells when the bytes have arrived; until then, the bytes of
both sides are not reused. ``paths.py`` lists the paths that a copy can take.

Sources are read in stream order, in every direction. The copy engine's batch call does not accept
the legacy default stream: ``path="copy_engine"`` is refused there, and the planner avoids the batch
call and warns once. A CUDA graph capture accepts the kernel with a prepared plan, and single
asynchronous copies; everything else is refused before anything is queued.

>>> import torch
>>> from kvheap import TensorMemoryAllocator, offload, restore
>>> near = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
>>> far = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
>>> batch = near.batched_allocate([8], torch.float32, 4, source=torch.arange(32.0).reshape(4, 8))
>>> away = offload(batch, into=far, free=True)
>>> away.transfer.result()
>>> back = restore(away, into=near)
>>> back.transfer.result(), back[3].tensor[:2]
(None, tensor([24., 25.]))
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvheap.addresses.arguments import require_count, require_flags
from kvheap.blocks.carried_tokens import carry_tokens
from kvheap.blocks.heap import BlockObjects, Heap, heap_of, layout_and_addresses
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.memory_allocator import MemoryAllocatorInterface
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.rows import Rows
from kvheap.device.completion import Completion, Success, in_flight
from kvheap.device.directions import PATHS, Path
from kvheap.device.transfer import Transfer
from kvheap.errors import BlockInUseError, DoubleFreeError
from kvheap.kernels.untraced import untraced
from kvheap.transfer.order import Earlier, transfers_before
from kvheap.transfer.plan import CopyPlan
from kvheap.transfer.runs import DeviceRun, HostRun
from kvheap.transfer.work import Run, Work

if TYPE_CHECKING:
    import torch

__all__ = ["begin", "copy", "offload", "require_options", "restore"]


@untraced
def copy(
    plan: CopyPlan | tuple[BlockObjects | torch.Tensor, BlockObjects | torch.Tensor],
    stream: torch.cuda.Stream | None = None,
    *,
    path: Path | None = None,
    max_sms: int | None = None,
) -> Transfer:
    """Execute a plan on a stream; returns at once.

    It comes behind the transfers that fill either side, and behind those that still read the
    target's blocks, whoever makes them: on another stream, the stream waits; within host memory,
    the queue's thread. Only a foreign transfer is waited for here, on the caller's thread, until
    it has ended or failed. What kvheap does not know to use the blocks is the caller's to wait for:
    kernels and tensors of yours, readers elsewhere that hold a lease, copies of other views of the
    same bytes and of :meth:`CopyPlan.of_addresses` and ``of_pointers``, calls of other threads at
    the same time, and replays of a graph. Whoever reads the target by other means than a copy waits
    for the result of this call: unlike ``offload``, it does not become ``target.transfer``.

    Args:
        plan: what to copy; or a pair ``(source, target)`` of batches, objects or tensors, which is
            passed to :meth:`CopyPlan.between`.
        stream: a stream of the plan's device; None: the current one. Copies within host memory
            take no stream: they run in call order, in the background.
        path: take this path; None: the planner chooses.
        max_sms: maximum number of SMs for the kernel; None: no limit within a device, and over the
            link as many as ``kvheap calibrate`` found to saturate it, or without it 2 to the host
            and 3 to a device.

    Returns:
        The transfer. Errors that occur once the copy has begun are raised by its ``result()``.

    Raises:
        ValueError: the path cannot be taken, the stream belongs to another device, or the pair
            does not make a plan; nothing is queued.
        TypeError: an argument has a wrong type; nothing is queued.
        LifetimeError: a block is freed; nothing is queued.
        ForeignObjectError: the target's blocks are another process's, and a view for reading here;
            nothing is queued.
        RuntimeError: a graph is being captured, and it cannot include this copy, or what it would
            have to wait for; or a future of the event loop that runs this code would have to end
            first. Nothing is queued.
        TransferError: the source is the target of a transfer that failed, or a foreign transfer
            that failed may still write to the target; nothing is queued.
    """
    if not isinstance(plan, CopyPlan):
        if not isinstance(plan, tuple) or len(plan) != 2:
            raise TypeError(f"copy takes a CopyPlan or a pair (source, target), got {plan!r}")
        plan = CopyPlan.between(*plan)
    return _start(plan, stream, path, max_sms)


@untraced
def offload(
    batch: BlockObjects,
    into: MemoryAllocatorInterface,
    stream: torch.cuda.Stream | None = None,
    *,
    free: bool = False,
    allow_partial: bool = False,
    by_layer: bool = False,
    path: Path | None = None,
    max_sms: int | None = None,
    moved: list[MemoryBatch] | None = None,
) -> MemoryBatch | None:
    """Allocate in another heap and copy blocks there.

    ``offload`` and ``restore`` are one function with two names: ``offload`` for moves away from a
    device, typically to pinned host memory, ``restore`` for moves back.

    Args:
        batch: blocks of one heap and block layout.
        into: the allocator to move to.
        stream: as for :func:`copy`. Wait for it before other streams use the new batch.
        free: free the source's blocks once they have been copied. They count as freed at once;
            their bytes become free when the copy succeeds. If it fails, the blocks are live again.
        allow_partial: if not all blocks fit, move only the first ones, as many as fit.
        by_layer: see :meth:`CopyPlan.between`.
        path: as for :func:`copy`.
        max_sms: as for :func:`copy`.
        moved: the new batch is appended to this list before the copy begins, for a caller that must
            not lose it to an exception of a signal handler. If its ``transfer`` is set, the move
            has begun.

    Returns:
        The new batch, whose ``transfer`` tells when the bytes have arrived; None if the blocks do
        not fit and ``allow_partial`` is false.

    Raises:
        ValueError, TypeError: as for :func:`copy`; nothing is allocated or freed.
        DoubleFreeError, BlockInUseError: with ``free``, a block is named twice, pinned, or has more
            than one reference; nothing is allocated or freed.
        LifetimeError: a block is freed; nothing is allocated.
        RuntimeError: a graph is being captured; nothing is allocated or freed.
        TransferError: the copy failed to start, or the transfer that fills the source's blocks has
            failed; nothing is allocated or freed.
    """
    require_flags(free=free, allow_partial=allow_partial, by_layer=by_layer)
    if not callable(getattr(into, "batched_allocate", None)):
        raise TypeError(f"into must be an allocator, got {into!r}")
    heap = heap_of(batch)
    layout, _ = layout_and_addresses(batch)
    shapes, dtypes = list(layout.shapes), list(layout.dtypes)
    target = into.batched_allocate(
        shapes, dtypes, len(batch), layout.fmt, allow_partial=allow_partial
    )
    if target is None:
        return None
    move: _Move | None = None
    try:
        source: BlockObjects | Rows | None = batch
        if isinstance(batch, MemoryBatch):
            if len(target) < len(batch):
                source = Rows(batch, np.arange(len(target)))
        elif not len(target):  # an empty list has no heap and no layout
            source = heap.batched_allocate(shapes, dtypes, 0, layout.fmt)
        else:
            source = batch[: len(target)]
        assert source is not None
        given_up: Sequence[Rows] = ()
        if free:
            given_up = [source] if isinstance(source, Rows) else heap.rows_by_batch(source)
        plan = CopyPlan.between(source, target, by_layer=by_layer)
        move = _Move(given_up)
        if moved is not None:
            moved.append(target)
        target.transfer = _start(plan, stream, path, max_sms, move)
    except BaseException:
        if move is not None:
            move.take_back()
        into.batched_free(target)
        raise
    carry_tokens(source, target)
    return target


restore = offload


def require_movable(
    batch: BlockObjects,
    into: Heap,
    stream: torch.cuda.Stream | None = None,
    *,
    free: bool = False,
    path: Path | None = None,
    max_sms: int | None = None,
) -> None:
    """Raise what :func:`offload` would raise, as far as it is known before blocks are allocated.

    Raises:
        ValueError, TypeError, DoubleFreeError, BlockInUseError, LifetimeError, RuntimeError,
            TransferError: as :func:`offload`.
    """
    require_options(path, max_sms)
    into.require_owner("allocate blocks")
    layout_and_addresses(batch)
    if free:
        for part in heap_of(batch).rows_by_batch(batch):
            _require_freeable(part)
    plan = CopyPlan.to_new_blocks(batch, into)
    _run_of(plan, stream, path, max_sms, transfers_before(plan), is_new=True)


def _require_freeable(blocks: Rows) -> None:
    """Raise what claiming blocks would raise, without claiming them."""
    batch = blocks.batch
    batch.require_owner()
    rows = np.arange(len(batch)) if blocks.rows is None else blocks.rows
    live, references, pins = batch.live[rows], batch.ref_counts[rows], batch.pin_counts[rows]
    distinct, counts = np.unique(rows, return_counts=True)
    if len(distinct) < len(rows):
        name = batch.describe(int(distinct[counts.argmax()]))
        raise DoubleFreeError(f"{name} is named twice in one call")
    wrong = ~live | (references != 1) | (pins != 0)
    if wrong.any():
        at = int(wrong.argmax())
        name = batch.describe(int(rows[at]))
        if not live[at]:
            raise DoubleFreeError(f"{name} is already freed")
        raise BlockInUseError(
            f"{name} is in use: reference count {references[at]}, pin count {pins[at]}"
        )


def require_options(path: Path | None, max_sms: int | None) -> None:
    """Raise unless these can be the options of a copy.

    Raises:
        ValueError, TypeError: names the value.
    """
    if path is not None and (not isinstance(path, str) or path not in PATHS):
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if max_sms is not None:
        require_count("max_sms", max_sms, at_least=1)


def _run_of(
    plan: CopyPlan,
    stream: Any,
    path: Path | None,
    max_sms: int | None,
    before: list[Earlier],
    is_new: bool,
) -> HostRun | DeviceRun:
    """What executes a plan; its constructor raises if the copy cannot be done."""
    device = plan.device
    run: HostRun | DeviceRun
    if device is None:
        run = HostRun(plan, stream, path, before)
    else:
        run = DeviceRun(plan, device, stream, path, max_sms, before, is_new_target=is_new)
    if run.is_captured and is_new:
        raise RuntimeError(
            "blocks cannot be moved in a graph capture: allocate before it, and capture a copy"
        )
    return run


def _start(
    plan: CopyPlan,
    stream: Any,
    path: Path | None,
    max_sms: int | None,
    move: _Move | None = None,
) -> Transfer:
    """Protect both sides, claim the blocks that a move frees, and queue the copy."""
    if path is not None or max_sms is not None:
        require_options(path, max_sms)
    for rows in plan.target.blocks:
        rows.batch.require_writable()
    before = transfers_before(plan)
    run = _run_of(plan, stream, path, max_sms, before, is_new=move is not None)
    for rows in plan.target.blocks:
        rows.batch.stored_tokens.forget(rows.rows)
    return begin(plan, run, move)


def begin(work: Work, run: Run, move: _Move | None = None) -> Transfer:
    """Protect both sides, claim the blocks that a move frees, and queue the copy.

    Args:
        work: the copy, checked.
        run: what executes it.
        move: the source blocks to be freed.

    Returns:
        The transfer, which may have failed already.

    Raises:
        LifetimeError, BlockInUseError: as for :func:`copy` and :func:`offload`.
    """
    completion = Completion(work.memory)
    transfer = Transfer(
        completion,
        path=run.path,
        direction=work.direction,
        num_bytes=work.num_bytes,
        num_runs=work.num_runs,
        device=work.source.device or work.target.device,
        is_captured=run.is_captured,
        settle=None if move is None else move.settle,
    )
    try:
        work.protect(completion)
        if run.is_captured:
            run.capture()
            completion.nothing_queued()
            return transfer
        if move is not None:
            move.claim(completion)
        in_flight.add(completion)
        events = run.start(completion)
        if move is not None:
            completion.require_success()
    except BaseException:
        if move is not None:
            move.void()  # before the copy counts as ended
        completion.nothing_queued()
        if move is not None:
            move.take_back()
        raise
    transfer.begun(tuple(events))
    return transfer


class _Move:
    """The source blocks that a move frees once they have been copied."""

    def __init__(self, given_up: Sequence[Rows]) -> None:
        self._blocks = given_up
        self._lifetime = given_up[-1].batch.allocator.lifetime if given_up else None
        self._success: Success | None = None
        self.settle: Callable[[bool], None] | None = None
        """Called after the copy has ended, with whether it failed."""
        if self._lifetime is not None:
            self.settle = partial(_settle, weakref.ref(self._lifetime))

    def claim(self, completion: Completion) -> None:
        """Free the blocks, all or none, on condition that the copy succeeds.

        Raises:
            DoubleFreeError: a block is already freed.
            BlockInUseError: a block is pinned or has more than one reference.
        """
        if self._lifetime is not None:
            self._success = Success(completion)
            self._lifetime.free_on(self._blocks, self._success)

    def void(self) -> bool:
        """Make the condition fail; False if it was met already, or nothing was claimed."""
        return self._success is not None and self._success.void()

    def take_back(self) -> None:
        """Make the blocks live again, however far an exception let the move come."""
        if self.void() and self._lifetime is not None and self._success is not None:
            self._lifetime.take_back(self._success)


def _settle(reference: weakref.ref[Lifetime], has_failed: bool) -> None:
    """Make blocks live again whose copy has failed, or free some of those that were copied.

    Only the former must be done at once, and needs a look at all pending releases: with thousands
    of transfers in flight, each of them would look at all others.
    """
    lifetime = reference()
    if lifetime is None:
        return
    if has_failed:
        lifetime.reclaimer.settle(limit=None)
    else:
        lifetime.reclaimer.settle()
