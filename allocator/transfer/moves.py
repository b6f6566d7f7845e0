"""Transfers: move pieces of KV from here to there, on this stream, by the fastest path.

:func:`copy` carries out a ``CopyPlan`` within a device, between a device
and pinned host memory, between devices, or within host memory; :func:`offload` and
:func:`restore` move a batch to another heap. All return at once, with a :class:`Transfer` that
tells when the bytes are there. Neither side's bytes are handed out again before.

==============  ===========================================================  ==================
path            how                                                          directions
==============  ===========================================================  ==================
``kernel``      one SM kernel over a list of pointers, on few SMs            h2d, d2h, d2d
``copy_engine`` ``cuMemcpyBatchAsync``, or an asynchronous copy for each run  all with a device
``staged``      gathered on the device in an extent, and one large copy of   h2d, d2h; chosen for
                it; the next extent is filled meanwhile                      a host side in runs
``host``        memory copies on the host, beside the caller                 h2h
==============  ===========================================================  ==================

Without ``path`` the planner chooses, by direction, number and size of the runs that are left after
merging, from a table of this device (``planning/planner.py``, ``kvheap calibrate``).

Sources are read in stream order, in every direction. The copy engine's batch call takes no legacy
default stream: there ``path="copy_engine"`` is refused, and the planner does without it and says
so once. In a CUDA graph capture a prepared plan's kernel and single asynchronous copies work, and
all else is refused before anything is queued.

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

import asyncio
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from kvheap.blocks.heap_blocks import BlockObjects, heap_of, layout_and_addresses
from kvheap.blocks.memory_allocator import Rows
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.device.completion import (
    Answer,
    Completion,
    DeviceEvent,
    FutureEvent,
    Success,
    in_flight,
)
from kvheap.device.copy_device import Direction
from kvheap.transfer.paths import PATHS, DeviceRun, HostRun, Path
from kvheap.transfer.plan import CopyPlan

if TYPE_CHECKING:
    import torch

    from kvheap.blocks.lifetime import Lifetime, Release
    from kvheap.blocks.memory_allocator import MemoryAllocatorInterface
    from kvheap.device.copy_device import CopyDevice

__all__ = ["CopyPlan", "Part", "Transfer", "copy", "offload", "restore"]

FIRST_POLL_S, LAST_POLL_S = 50e-6, 2e-3
"""How often an awaited transfer is looked at: at first, and after many looks."""


class Part:
    """One part of a transfer; parts end in order, and each speaks for itself only."""

    __slots__ = ("_completion", "_device", "_event", "_index")

    def __init__(
        self, index: int, event: DeviceEvent, completion: Completion, device: CopyDevice | None
    ) -> None:
        self._index = index
        self._event = event
        self._completion = completion
        self._device = device

    def done(self) -> bool:
        """Whether the part's bytes are where they should be. Does not wait.

        Raises:
            TransferError: they never will be.
        """
        if self._completion.is_done:  # which stays so, whatever becomes of the device
            return True
        return self._ask(self._event.query)

    def wait(self) -> None:
        """Wait on the host until they are.

        Raises:
            TransferError: as for :meth:`done`.
        """
        if not self._completion.is_done:
            self._ask(self._event.synchronize)

    def wait_stream(self, stream: torch.cuda.Stream) -> None:
        """Let further work on ``stream`` wait for them; a copy within the host is waited for here.

        Raises:
            TransferError: as for :meth:`done`.
        """
        device = self._device
        if device is None:
            self.wait()
        else:
            device.wait_event(device.current_stream() if stream is None else stream, self._event)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        answer = self._completion.ask(question)
        if isinstance(self._event, FutureEvent):
            error = self._event.error()
            if error is not None:
                raise error
        return answer

    def __repr__(self) -> str:
        """Which part."""
        return f"Part({self._index})"


class Transfer:
    """A copy on its way. Made by :func:`copy`, :func:`offload` and :func:`restore`.

    A context manager, whose end waits for the copy and raises what went wrong with it; and
    awaitable. Dropping it changes nothing: the copy goes on, and its bytes stay protected.

    Attributes:
        path: the path that was taken: ``kernel``, ``copy_engine``, ``staged`` or ``host``.
        direction: ``h2d``, ``d2h``, ``d2d``, ``p2p`` or ``h2h``.
        num_bytes: bytes to copy.
        num_runs: how many pieces they were, after merging.
        parts: what ends one after another, each with ``done``, ``wait`` and ``wait_stream``; empty
            where the transfer failed before its first end, and in a graph capture.
    """

    __slots__ = (
        "_completion",
        "_device",
        "_is_captured",
        "_lifetime",
        "direction",
        "num_bytes",
        "num_runs",
        "parts",
        "path",
    )

    def __init__(self, plan: CopyPlan, path: Path, completion: Completion) -> None:
        self.path = path
        self.direction: Direction = plan.direction
        self.num_bytes = plan.num_bytes
        self.num_runs = plan.num_runs
        self.parts: tuple[Part, ...] = ()
        self._device = plan.device
        self._completion = completion
        self._is_captured = False
        self._lifetime: weakref.ref[Lifetime] | None = None

    def done(self) -> bool:
        """Whether the copy has ended, well or not. Does not wait.

        Raises:
            RuntimeError: it was captured in a graph, and runs with each replay.
        """
        self._require_not_captured()
        return self._completion.has_ended

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait on the host until the copy has ended, well or not.

        Args:
            timeout_s: give up after so many seconds.

        Returns:
            Whether it has ended.

        Raises:
            RuntimeError: as for :meth:`done`.
        """
        self._require_not_captured()
        return self._completion.wait(timeout_s)

    def wait_stream(self, stream: torch.cuda.Stream) -> None:
        """Let further work on ``stream`` wait for the copy; one within the host is waited for here.

        Raises:
            TransferError: the transfer has failed.
            RuntimeError: as for :meth:`done`.
        """
        self._require_not_captured()
        if self._completion.error is not None:
            raise self._completion.error
        if self.parts:
            self.parts[-1].wait_stream(stream)

    def result(self, timeout_s: float | None = None) -> None:
        """Wait for the copy; return if all bytes are where they should be.

        Raises:
            TransferError: it failed; the target's bytes are undefined. A source that was to be
                freed is live again.
            TimeoutError: it has not ended in ``timeout_s`` seconds, and goes on.
            RuntimeError: as for :meth:`done`.
        """
        ended = self.wait(timeout_s)
        error = self._completion.error
        if not ended and error is None:
            raise TimeoutError(f"{self!r} has not ended in {timeout_s:g} s")
        lifetime = None if self._lifetime is None else self._lifetime()
        if lifetime is not None:
            lifetime.settle(wait_s=1.0, limit=None)  # frees the source, or takes it back
        if error is not None:
            raise error

    def _require_not_captured(self) -> None:
        if self._is_captured:
            raise RuntimeError("this transfer was captured in a CUDA graph: it runs at each replay")

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_captured:
            return
        self.wait()
        if error is None:
            self.result()

    def __await__(self) -> Generator[Any, None, None]:
        return self._ended().__await__()

    async def _ended(self) -> None:
        pause_s = FIRST_POLL_S
        while not self.done():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_POLL_S)
        self.result()

    def __repr__(self) -> str:
        """Direction, path, bytes, runs and state."""
        if self._is_captured:
            state = "captured"
        elif self._completion.error is not None:
            state = "failed"
        else:
            state = "ended" if self._completion.has_ended else "in flight"
        return (
            f"Transfer({self.direction} by {self.path}, {self.num_bytes} bytes in {self.num_runs} "
            f"runs, {state})"
        )


def copy(
    plan: CopyPlan | tuple[BlockObjects | torch.Tensor, BlockObjects | torch.Tensor],
    stream: torch.cuda.Stream | None = None,
    *,
    path: Path | None = None,
    max_sms: int | None = None,
) -> Transfer:
    """Carry out a plan on a stream; returns at once.

    Args:
        plan: what to copy; or a pair ``(source, target)`` of batches, objects or tensors, for
            :meth:`CopyPlan.between`.
        stream: a stream of the plan's device; None: the current one. Copies within the host have
            none: they run in the order of the calls, beside the caller.
        path: take this path; None: the planner chooses.
        max_sms: how many SMs the kernel may take; None: 8 between a device and the host, within a
            device any number.

    Returns:
        The transfer. What fails once the copy has begun is told by its ``result()``.

    Raises:
        ValueError: the path cannot be taken, the stream is of another device, or the pair does not
            make a plan; nothing is queued.
        TypeError: an argument is of another kind; nothing is queued.
        LifetimeError: a block is freed; nothing is queued.
        RuntimeError: a graph is being captured, and this cannot be; nothing is queued.
        TransferError: the source is the target of a transfer that failed; nothing is queued.
    """
    if not isinstance(plan, CopyPlan):
        if not isinstance(plan, tuple) or len(plan) != 2:
            raise TypeError(f"copy takes a CopyPlan or a pair (source, target), got {plan!r}")
        plan = CopyPlan.between(*plan)
    return _start(plan, stream, path, max_sms)


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
) -> MemoryBatch | None:
    """Allocate in another heap, typically pinned host memory, and copy blocks there.

    Args:
        batch: blocks of one heap and layout.
        into: where to.
        stream: as for :func:`copy`. Wait for it before others use the new batch.
        free: free the blocks here once they have been copied. They count as freed at once, and
            their bytes come back when the copy has ended; should it fail, they are live again.
        allow_partial: when not all fit there, move the first ones, as many as do.
        by_layer: see :meth:`CopyPlan.between`.
        path: as for :func:`copy`.
        max_sms: as for :func:`copy`.

    Returns:
        The new batch, whose ``transfer`` tells when the bytes are there; None when the blocks do
        not fit and ``allow_partial`` is false.

    Raises:
        ValueError, TypeError: as :func:`copy`; nothing is allocated or freed.
        DoubleFreeError, BlockInUseError: with ``free``, a block is named twice, or is somebody
            else's too; nothing is allocated or freed.
        LifetimeError: a block is freed; nothing is allocated.
        RuntimeError: a graph is being captured; nothing is allocated or freed.
        TransferError: the copy failed when it was begun, or one that fills the blocks has failed;
            nothing is allocated or freed.
    """
    return _move(batch, into, stream, free, allow_partial, by_layer, path, max_sms)


def restore(
    batch: BlockObjects,
    into: MemoryAllocatorInterface,
    stream: torch.cuda.Stream | None = None,
    *,
    free: bool = False,
    allow_partial: bool = False,
    by_layer: bool = False,
    path: Path | None = None,
    max_sms: int | None = None,
) -> MemoryBatch | None:
    """Allocate in a device's heap, and copy blocks back there: :func:`offload`, which see."""
    return _move(batch, into, stream, free, allow_partial, by_layer, path, max_sms)


def _move(
    objs: BlockObjects,
    into: MemoryAllocatorInterface,
    stream: torch.cuda.Stream | None,
    free: bool,
    allow_partial: bool,
    by_layer: bool,
    path: Path | None,
    max_sms: int | None,
) -> MemoryBatch | None:
    heap = heap_of(objs)
    layout, _ = layout_and_addresses(objs)
    target = into.batched_allocate(
        list(layout.shapes), list(layout.dtypes), len(objs), layout.fmt, allow_partial=allow_partial
    )
    if target is None:
        return None
    try:
        moved: BlockObjects | Rows | None = objs
        if isinstance(objs, MemoryBatch):
            if len(target) < len(objs):
                moved = Rows(objs, np.arange(len(target)))
        elif not len(target):  # an empty list does not say what it is of
            moved = heap.batched_allocate(list(layout.shapes), list(layout.dtypes), 0, layout.fmt)
        else:
            moved = objs[: len(target)]
        assert moved is not None
        given_up: Sequence[Rows] = ()
        if free:
            given_up = [moved] if isinstance(moved, Rows) else heap._rows_by_batch(moved)
        plan = CopyPlan.between(moved, target, by_layer=by_layer)
        target.transfer = _start(plan, stream, path, max_sms, _Move(given_up))
    except BaseException:
        into.batched_free(target)
        raise
    return target


def _start(
    plan: CopyPlan,
    stream: Any,
    path: Path | None,
    max_sms: int | None,
    move: _Move | None = None,
) -> Transfer:
    """Protect both sides, claim what a move gives up, and queue the copy."""
    if path is not None and path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if max_sms is not None and max_sms < 1:
        raise ValueError(f"max_sms must be positive, got {max_sms}")
    before = _filling(plan)
    device = plan.device
    run: HostRun | DeviceRun
    if device is None:
        run = HostRun(plan, stream, path, before)
    else:
        is_new = move is not None
        run = DeviceRun(plan, device, stream, path, max_sms, before, is_new_target=is_new)
    is_captured = isinstance(run, DeviceRun) and run.is_captured
    if is_captured and move is not None:
        raise RuntimeError(
            "blocks are not moved in a graph capture: allocate before it, and capture a copy"
        )
    completion = Completion(plan.memory)
    transfer = Transfer(plan, run.path, completion)
    try:
        plan.protect(completion)
        if isinstance(run, DeviceRun) and is_captured:
            transfer._is_captured = True
            run.capture()
            completion.nothing_queued()
            return transfer
        if move is not None:
            move.claim()
        in_flight.add(completion)
        events = run.start(completion)
        error = completion.error
        if error is not None and move is not None:
            raise error
    except BaseException:
        completion.nothing_queued()
        if move is not None:
            move.take_back()
        raise
    transfer.parts = tuple(Part(i, event, completion, device) for i, event in enumerate(events))
    if move is not None:
        transfer._lifetime = move.release(completion)
    return transfer


class _Move:
    """A copy to new blocks, and the old ones, which are given up once it has been done."""

    def __init__(self, given_up: Sequence[Rows]) -> None:
        self._given_up = given_up
        self._taken: list[tuple[Rows, Release]] = []

    def claim(self) -> None:
        """Make them freed for everybody else; all or none.

        Raises:
            DoubleFreeError, BlockInUseError: one is freed already, or somebody else's too.
        """
        for part in self._given_up:
            rows = Rows(part.batch, part.batch._claim(part.rows))
            try:
                release = part.batch._release_of(rows.rows)
            except BaseException:  # a stream that is gone cannot say when its work has ended
                part.batch._unclaim(rows.rows)
                raise
            self._taken.append((rows, release))

    def take_back(self) -> None:
        """Make them live again."""
        for rows, _ in self._taken:
            rows.batch._unclaim(rows.rows)
        self._taken = []

    def release(self, completion: Completion) -> weakref.ref[Lifetime] | None:
        """Free their bytes when the copy has been done; should it fail, they live again."""
        lifetime: Lifetime | None = None
        for rows, release in self._taken:
            lifetime = rows.batch.allocator.lifetime
            lifetime.release(
                replace(
                    release,
                    events=(Success(completion), *release.events),
                    take_back=partial(rows.batch._unclaim, rows.rows),
                )
            )
        return None if lifetime is None else weakref.ref(lifetime)


def _filling(plan: CopyPlan) -> list[Transfer]:
    """Transfers on their way that write what this one reads or writes.

    Raises:
        TransferError: one that was to fill a source has failed.
    """
    found = []
    for side in (plan.source, plan.target):
        for rows in side.blocks:
            transfer = rows.batch.transfer
            if transfer is None:
                continue
            ended = transfer.done()
            error = transfer._completion.error
            if error is not None and side is plan.source:
                raise error
            if not ended and transfer not in found:
                found.append(transfer)
    return found
