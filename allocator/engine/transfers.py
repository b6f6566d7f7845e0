"""Copies between an engine's cache and chunks as transfers: paths, streams, SM budgets.

==========================================  ========================================================
copy                                        how
==========================================  ========================================================
within host memory                          at once, on the calling thread; path ``host``
within a device, on the current stream,     one launch; like any kernel of the caller's, it is
by the kernel                               ordered by the stream alone
everything else                             as ``kvheap.transfer.copy``: the bytes of chunks are not
                                            reused before it has ended; the kernel of the paged
                                            copy, or the runs of the copy by any other path
==========================================  ========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from kvheap.blocks.heap import BlockObjects, Heap, users_of
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.device import cuda
from kvheap.device.captures import DeferredEvent
from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.device.directions import Path
from kvheap.device.events import DeviceEvent
from kvheap.device.host_queue import HostEvent
from kvheap.device.transfer import Part, Transfer
from kvheap.engine.paged_runs import count_runs, pieces_of, units_of
from kvheap.kernels.paged_copy import run_copy
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_plan import Streams
from kvheap.kernels.token_copy import TokenCopy
from kvheap.transfer.moves import begin, require_options
from kvheap.transfer.order import transfers_before
from kvheap.transfer.paths import PathChoice, default_sms
from kvheap.transfer.plan import CopyPlan
from kvheap.transfer.queueing import StreamQueue, failure_of
from kvheap.transfer.runs import DeviceRun
from kvheap.transfer.sides import Side, direction_of, protect_sides, walls_of

__all__ = ["Route", "ended_transfer"]

_ended = Completion()
_ended.ended()
_end = HostEvent()
_end.end(None)
_ended_parts = (Part(0, _end, _ended, None),)
"""Of copies that have ended before their transfer is made."""


MIN_PLANNED_BYTES = 4 << 20
"""Over the link, fewer bytes go by the kernel: to list their runs takes the host 80 us, in which a
link of 55 GB/s moves them."""


class Route:
    """Where a copy between a cache and chunks goes, and by which means. Checks them.

    Args:
        cache: the engine's cache.
        heap: the heap of the chunks.
        stream: a stream of the cache's device; None: the current one.
        path: take this path; None: the planner chooses.
        max_sms: maximum SMs for the kernel.
        is_new: whether the chunks were just allocated.

    Attributes:
        is_ordered: whether the copy orders itself behind transfers that fill the chunks.
        segments: the heap's buffers, which live as long as this object if another thread closes the
            heap.

    Raises:
        ValueError, TypeError: the stream, the path or the budget cannot be used.
        RuntimeError: a CUDA graph is being captured on the stream.
    """

    __slots__ = (
        "_cache",
        "_cache_device",
        "_heap",
        "_heap_device",
        "_is_new",
        "_max_sms",
        "_path",
        "_stream",
        "is_ordered",
        "segments",
    )

    def __init__(
        self,
        cache: PagedKVCache,
        heap: Heap,
        stream: Any = None,
        path: Path | None = None,
        max_sms: int | None = None,
        is_new: bool = False,
    ) -> None:
        if path is not None or max_sms is not None:
            require_options(path, max_sms)
        self._cache = cache
        self._heap = heap
        self._path = path
        self._max_sms = max_sms
        self._is_new = is_new
        self._stream = stream
        self._cache_device = device = cuda.device_of(cache.tensors[0])
        self.segments = heap.segments
        self._heap_device = cuda.device_of(self.segments[0][1])
        self.is_ordered = False
        if device is None:
            if stream is not None:
                raise ValueError(f"a copy within host memory runs on no stream, got {stream!r}")
            if path not in (None, "host"):
                raise ValueError(f"a copy within host memory cannot take the path {path!r}")
            return
        if path == "host":
            raise ValueError(f"path 'host' cannot be taken: the cache is on {device.name}")
        current = device.current_stream()
        self._stream = current if stream is None else device.require_stream(stream)
        is_simple = self._heap_device is device and path in (None, "kernel")
        self.is_ordered = not (is_simple and self._stream == current)

    @property
    def is_host(self) -> bool:
        """Whether the copy is within host memory, where it is made at once."""
        return self._cache_device is None

    def on_stream(self) -> AbstractContextManager[object]:
        """A context in which the copy's stream is current."""
        if self._cache_device is None or not self.is_ordered:
            return nullcontext()
        return self._cache_device.using(self._stream)

    def execute(self, copy: TokenCopy, objs: BlockObjects) -> Transfer:
        """Copy, or queue the copy.

        Args:
            copy: the checked copy.
            objs: its chunks.

        Raises:
            ValueError: the path cannot take this copy; nothing is queued.
            RuntimeError: a CUDA graph is being captured; nothing is queued.
            TransferError: the copy failed to start, or the transfer that fills the chunks to load
                has failed.
        """
        device = self._cache_device
        if device is None:
            run_copy(copy)
            num_bytes = copy.places.num_tokens * copy.pairing.token_bytes
            transfer = ended_transfer(num_bytes, count_runs(copy, copy.places))
        elif self.is_ordered:
            transfer = self._begin(copy, objs, device)
        else:
            if copy.to_heap:
                for user in users_of(objs):
                    if not user.is_on(self._stream):
                        user.wait_stream(device, self._stream)
            run_copy(copy, self._max_sms)
            event = DeferredEvent(device, self._stream)
            completion = Completion()
            completion.queued(event)
            transfer = Transfer(
                completion,
                path="kernel",
                direction="d2d",
                num_bytes=copy.places.num_tokens * copy.pairing.token_bytes,
                num_runs=count_runs(copy, copy.places),
                device=device,
            )
            transfer.begun((event,))
            self._note_stream()
        return transfer

    def _begin(self, copy: TokenCopy, objs: BlockObjects, device: CopyDevice) -> Transfer:
        """Protect the chunks, and queue the copy."""
        work = PagedWork(copy, *self._sides(objs))
        path = self._path or self._chosen(work, device)
        before = transfers_before(work)
        if path == "kernel":
            queue = StreamQueue(device, self._stream, before, (device,) if self._is_new else ())
            _require_no_capture(queue.is_captured)
            self._note_stream()
            max_sms = self._max_sms
            if max_sms is None:
                max_sms = default_sms(device, work.direction)
            transfer = begin(work, KernelRun(work, queue, max_sms))
        else:
            _require_no_capture(device.is_capturing(self._stream))
            plan = work.plan(path)
            run = DeviceRun(plan, device, self._stream, path, self._max_sms, before, self._is_new)
            transfer = begin(plan, run)
        if copy.to_heap:
            if transfer.error is not None:
                for rows in work.target.blocks:
                    rows.batch.stored_tokens.forget(rows.rows)
            elif isinstance(objs, MemoryBatch):
                objs.transfer = transfer
        transfer.require_success()
        return transfer

    def _chosen(self, work: PagedWork, device: CopyDevice) -> Path:
        """The path that the planner chooses.

        Within a device it is the kernel: the copy engines move a twentieth of what the SMs do
        (nccl #2177).
        """
        is_small = work.num_bytes < MIN_PLANNED_BYTES
        if is_small or work.direction == "d2d" or work.obstacle is not None:
            return "kernel"
        return PathChoice(work, device, self._stream, is_captured=False).chosen()

    def _sides(self, objs: BlockObjects) -> tuple[Side, Side]:
        """The cache and the chunks."""
        heap = self._heap
        memory = tuple(buffer for _, buffer in self.segments)
        rows = tuple(heap.rows_by_batch(objs))
        return (
            Side(self._cache_device, memory=self._cache.tensors),
            Side(self._heap_device, rows, memory, heap),
        )

    def _note_stream(self) -> None:
        if isinstance(self._stream, torch.cuda.Stream):
            Streams.of(self._cache).note(self._stream)


class PagedWork:
    """A copy between an engine's cache and chunks, on a device.

    Its runs are counted at once, and only made if a path needs them.

    Args:
        copy: the checked copy.
        cache: its side that is the cache.
        chunks: its side that is the chunks.
    """

    prepared: tuple[()] = ()
    """The kernel needs no preparation before it is chosen."""

    def __init__(self, copy: TokenCopy, cache: Side, chunks: Side) -> None:
        self.copy = copy
        self.source, self.target = (cache, chunks) if copy.to_heap else (chunks, cache)
        self.direction = direction_of(self.source, self.target)
        self._device = cache.device
        self._plan: CopyPlan | None = None
        # Runs of neighbouring slots are only merged for the paths that take them from the host.
        self.num_runs = count_runs(copy, copy.places)
        self.num_bytes = copy.places.num_tokens * copy.pairing.token_bytes

    @property
    def parts(self) -> Sequence[range]:
        """One part."""
        return (range(self.num_runs),)

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """The buffers of both sides."""
        return self.source.memory + self.target.memory

    @property
    def num_host_runs(self) -> int:
        """Number of runs on the host side alone."""
        return self.plan("staged").num_host_runs

    @property
    def obstacle(self) -> str | None:
        """Why only the kernel can make the copy; None if others can."""
        if self.copy.chunks.scale_offset is not None:
            return "only the kernel converts"
        if not isinstance(self.copy.places.values, np.ndarray):
            return (
                "the slots are on the device, and the host does not know the addresses: pass slots "
                "or block ids on the host"
            )
        return None

    def plan(self, path: Path) -> CopyPlan:
        """The same copy as pieces, for the paths that take addresses from the host.

        Args:
            path: the path, for the message.

        Raises:
            ValueError: only the kernel can make the copy.
        """
        if self._plan is None:
            if self.obstacle is not None:
                raise ValueError(f"path {path!r} cannot be taken: {self.obstacle}")
            pieces = pieces_of(self.copy, units_of(self.copy))
            walls = (
                walls_of(self.source, self._device, pieces.sources, pieces.sizes),
                walls_of(self.target, self._device, pieces.targets, pieces.sizes),
            )
            parts = (pieces.split(*walls),)
            self._plan = CopyPlan(self.source, self.target, parts, walls)
        return self._plan

    def protect(self, completion: Completion) -> None:
        """Protect the bytes of the chunks from reuse until a copy has ended."""
        protect_sides(self.source, self.target, completion)


class KernelRun:
    """A copy between an engine's cache and chunks by its own kernel, in one launch.

    Args:
        work: the copy.
        queue: its stream.
        max_sms: maximum SMs; None: no limit.
    """

    path: Path = "kernel"
    is_captured = False

    def __init__(self, work: PagedWork, queue: StreamQueue, max_sms: int | None) -> None:
        self._work = work
        self._queue = queue
        self._max_sms = max_sms

    def capture(self) -> None:
        """Raise: the addresses of chunks are on the host."""
        raise RuntimeError("addresses on the host cannot be captured in a CUDA graph")

    def start(self, completion: Completion) -> Sequence[DeviceEvent]:
        """Queue the launch; see ``Run.start``."""
        work = self._work
        completion.keep(work.copy)  # slots on a device, which the kernel reads
        launch = partial(run_copy, work.copy, self._max_sms)
        return self._queue.start((launch,), completion, partial(failure_of, work, self.path))


def ended_transfer(num_bytes: int, num_runs: int) -> Transfer:
    """The transfer of a copy within host memory that was made at once."""
    # By position: names of arguments take 0.2 us.
    return Transfer(_ended, "host", "h2h", num_bytes, num_runs, None, False, None, _ended_parts)


def _require_no_capture(is_captured: bool) -> None:
    if is_captured:
        raise RuntimeError(
            "addresses on the host cannot be captured in a CUDA graph: a replay would read them "
            "again; copy before or after the capture"
        )
