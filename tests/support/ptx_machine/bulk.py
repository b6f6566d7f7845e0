"""Bulk copies between global and shared memory, and the mbarriers that they arrive at.

A bulk copy happens as late as the program allows: bytes arrive in shared memory when a thread waits
for them, and leave it when a thread waits until they have been read or written. What uses them
earlier, or leaves no thread to wait, is refused:

* shared bytes of a copy that is in flight, which may be neither read nor written until it has
  arrived, nor written until it has been read;
* bytes that have arrived, read by a thread that has not waited for them, and has not met one that
  has;
* a phase of an mbarrier that ends although copies that it counts are in flight, or that cannot end
  because they bring more bytes than were announced;
* ordinary stores that no fence orders before a bulk copy which reads the bytes, or before the first
  one that arrives at an mbarrier;
* a thread that returns before its copies have arrived, or been written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ptx_machine.errors import KernelError
from ptx_machine.memory import WARP, GlobalMemory
from ptx_machine.shared_memory import Numbers, SharedMemory

__all__ = ["BulkCopies"]

GRANULE = 16
"""What divides all addresses and sizes of bulk copies."""

MAX_COUNT = (1 << 20) - 1
"""The most arrivals, and the most bytes, that an mbarrier counts."""

Place: TypeAlias = "tuple[int, int]"
"""A block's position in the batch, and a thread of it or an address of its shared memory."""


@dataclass(slots=True)
class Inbound:
    """A copy to shared memory that is in flight."""

    thread: int
    source: int
    cells: Numbers


@dataclass(slots=True)
class Outbound:
    """A copy to global memory; its bytes are known once they have been read."""

    target: int
    cells: Numbers
    data: npt.NDArray[np.uint8] | None = None


@dataclass(slots=True)
class Barrier:
    """An mbarrier: what its phase still waits for, and what each thread knows of it.

    Attributes:
        count: arrivals of a phase.
        missing: arrivals that this phase still needs.
        tx: bytes that were announced and have not arrived.
        phase: how many phases have ended.
        was_tried: whether a thread has already waited for this phase in vain.
        inbound: copies in flight that this phase counts.
        seen: how many phases each thread knows to have ended.
    """

    count: int
    missing: int
    seen: npt.NDArray[np.int64]
    was_tried: bool = False
    tx: int = 0
    phase: int = 0
    inbound: list[Inbound] = field(default_factory=list)


class BulkCopies:
    """All bulk copies and mbarriers of many blocks.

    Attributes:
        shared: the memory that they arrive in and leave from.
    """

    def __init__(self, shared: SharedMemory, memory: GlobalMemory, num_threads: int) -> None:
        self.shared = shared
        self._memory = memory
        self._num_threads = num_threads
        self._barriers: dict[Place, Barrier] = {}
        self._groups: dict[Place, list[list[Outbound]]] = {}

    # -- mbarriers -------------------------------------------------------------------------------

    def init(self, block: int, thread: int, address: int, count: int, what: object) -> None:
        """``mbarrier.init``: the first phase waits for ``count`` arrivals."""
        if not 0 < count <= MAX_COUNT:
            raise KernelError(f"an mbarrier cannot count {count} arrivals: {what}")
        self.shared.place_barrier(block, thread, address, what)
        seen = np.zeros(self._num_threads, np.int64)
        self._barriers[block, address] = Barrier(count, count, seen)

    def arrive(self, block: int, thread: int, address: int, tx: int, what: object) -> None:
        """``mbarrier.arrive.expect_tx``: announce bytes, then arrive."""
        barrier = self._barrier(block, thread, address, what)
        barrier.tx += tx
        barrier.missing -= 1
        if barrier.missing < 0 or not -MAX_COUNT <= barrier.tx <= MAX_COUNT:
            raise KernelError(
                f"a phase of {barrier.count} arrivals gets another, or {barrier.tx} bytes: {what}"
            )
        self._end_phase(block, barrier, what)

    def has_ended(self, block: int, thread: int, address: int, parity: int, what: object) -> bool:
        """``mbarrier.try_wait.parity``: whether the phase of this parity has ended."""
        barrier = self._barrier(block, thread, address, what)
        if barrier.phase % 2 == parity:
            if not barrier.was_tried:
                barrier.was_tried = True  # waiting may end too early, so kernels must ask again
            elif not barrier.missing:
                self._deliver(block, address, barrier, what)
            if barrier.phase % 2 == parity:
                return False
        barrier.seen[thread] = barrier.phase
        return True

    def _deliver(self, block: int, address: int, barrier: Barrier, what: object) -> None:
        """All copies that the phase counts arrive."""
        inbound, barrier.inbound = barrier.inbound, []
        for each in inbound:
            data = self._memory.read_bytes(each.source, len(each.cells))
            self.shared.land(each.cells, data, (address, barrier.phase))
            barrier.tx -= len(data)
        if barrier.tx < 0:
            raise KernelError(f"{-barrier.tx} bytes arrive that were not announced: {what}")
        self._end_phase(block, barrier, what)

    def _end_phase(self, block: int, barrier: Barrier, what: object) -> None:
        if barrier.missing or barrier.tx:
            return
        if barrier.inbound:
            raise KernelError(
                f"a phase ends while bulk copies are in flight that it did not announce: {what}"
            )
        barrier.phase += 1
        barrier.was_tried = False
        barrier.missing = barrier.count

    def _barrier(self, block: int, thread: int, address: int, what: object) -> Barrier:
        found = self._barriers.get((block, address))
        if found is None:
            raise KernelError(f"there is no mbarrier at {address:#x}: {what}")
        self.shared.require_barrier_known(block, thread, address, what)
        return found

    def warps_meet(self, blocks: Numbers, first_threads: Numbers) -> None:
        """Each thread of these warps knows what any of them has waited for."""
        for block, first in zip(blocks.tolist(), first_threads.tolist(), strict=True):
            self._meet(block, slice(first, first + WARP))

    def blocks_meet(self, blocks: Numbers) -> None:
        """Each thread of these blocks knows what any of them has waited for."""
        for block in blocks.tolist():
            self._meet(block, slice(None))

    def _meet(self, block: int, threads: slice) -> None:
        for (where, _), barrier in self._barriers.items():
            if where == block:
                barrier.seen[threads] = barrier.seen[threads].max()

    # -- copies ----------------------------------------------------------------------------------

    def start_inbound(
        self, block: int, thread: int, where: tuple[int, int], size: int, address: int, what: object
    ) -> None:
        """``cp.async.bulk.shared::cluster.global``, counted by the mbarrier at ``address``.

        ``where`` is the address of shared memory, and that of global memory.
        """
        target, source = where
        self._require_granules((target, source, size), what)
        barrier = self._barrier(block, thread, address, what)
        self.shared.require_fenced_barrier(block, address, what)
        self._memory.require_readable(source, size, what)
        cells = self.shared.start_landing(block, thread, target, size, what)
        barrier.inbound.append(Inbound(thread, source, cells))

    def start_outbound(
        self, block: int, thread: int, where: tuple[int, int], size: int, what: object
    ) -> None:
        """``cp.async.bulk.global.shared::cta``, to be part of the thread's next group.

        ``where`` is the address of global memory, and that of shared memory.
        """
        target, source = where
        self._require_granules((target, source, size), what)
        self._memory.require_writable(target, size, what)
        cells, origins = self.shared.start_reading(block, thread, source, size, what)
        for address, phase in origins:
            if self._barriers[block, address].seen[thread] <= phase:
                raise KernelError(
                    f"thread {thread} reads what a bulk copy brought without having waited for "
                    f"it: {what}"
                )
        self._groups_of(block, thread)[-1].append(Outbound(target, cells))

    def commit(self, block: int, thread: int) -> None:
        """``cp.async.bulk.commit_group``."""
        self._groups_of(block, thread).append([])

    def wait(self, block: int, thread: int, num_pending: int, only_read: bool) -> None:
        """``cp.async.bulk.wait_group``: all groups but the last ones have been read or written."""
        groups = self._groups_of(block, thread)
        for group in groups[: max(len(groups) - 1 - num_pending, 0)]:
            for each in group:
                if each.data is None:
                    each.data = self.shared.end_reading(block, thread, each.cells)
                if not only_read:
                    self._memory.write_bytes(each.target, each.data)
            if not only_read:
                group.clear()
        if not only_read:
            groups[:] = groups[max(len(groups) - 1 - num_pending, 0) :]

    def require_ended(self, blocks: Numbers, threads: Numbers, what: object) -> None:
        """Refuse that threads return before their copies have ended."""
        if not self._barriers and not self._groups:
            return
        returning = set(zip(blocks.tolist(), threads.tolist(), strict=True))
        late = {place for place, groups in self._groups.items() if any(groups)}
        late |= {
            (block, each.thread)
            for (block, _), barrier in self._barriers.items()
            for each in barrier.inbound
        }
        if late & returning:
            _, thread = min(late & returning)
            raise KernelError(f"thread {thread} returns before its bulk copies have ended: {what}")

    def _groups_of(self, block: int, thread: int) -> list[list[Outbound]]:
        """The groups of a thread that have not been written; the last is not yet committed."""
        return self._groups.setdefault((block, thread), [[]])

    @staticmethod
    def _require_granules(values: tuple[int, ...], what: object) -> None:
        if any(value % GRANULE for value in values) or not values[-1]:
            raise KernelError(
                f"bulk copies need positive multiples of 16, got addresses {values[0]:#x} and "
                f"{values[1]:#x}, {values[2]} bytes: {what}"
            )
