"""``Leases``: places that this process reads or fills, as locks that the kernel keeps.

A reader locks a place together with other readers, and then reads its record again: if that is
still the chunk's, its bytes stay until the lock is gone. The owner first makes the record odd, and
then asks the kernel whether somebody has the place. Both go through the kernel, so either the
reader sees the odd number, or the owner sees the lock. A process that dies loses its locks.

That holds in the order of the kernel's lock around its list of locks, which asking does not always
take. So the owner first sets a lock of its own once more: see ``fence``.

A process that fills a place locks it alone, and then reads who owns the segment: if that is still
the owner that gave it the place, no owner hands the place out until the lock is gone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EAGAIN

from kvheap.device.host_queue import NestedWaitError
from kvheap.memory.file_locks import RangeLocks

__all__ = ["Leases", "PlaceLocks"]

FIRST = 1 << 40
"""The first number; beyond any file, as the numbers need not be offsets of bytes."""


class PlaceLocks:
    """What the owner asks the kernel.

    Args:
        locks: on an open file that no lease is on.
        num_places: how many places there are.
    """

    def __init__(self, locks: RangeLocks, num_places: int) -> None:
        self._locks = locks
        self._num_places = num_places

    def fence(self) -> None:
        """Order what was written before this call before what is asked after it.

        To be called once after records were made odd, and before :meth:`are_any` and the others.
        """
        self._locks.share(FIRST + 2 * self._num_places, 1)

    def are_any(self) -> bool:
        """Whether any place is read or filled by anybody."""
        return self._locks.has_others(FIRST, 2 * self._num_places)

    def is_read(self, place: int) -> bool:
        """Whether somebody reads a place."""
        return self._locks.has_others(FIRST + place, 1)

    def is_filled(self, place: int) -> bool:
        """Whether somebody fills a place."""
        return self._locks.has_others(FIRST + self._num_places + place, 1)

    def close(self) -> None:
        """Let go of the file."""
        self._locks.close()


class Leases:
    """The places that this process reads and fills; for all threads.

    Args:
        locks: on an open file of their own.
        num_places: how many places there are.
    """

    def __init__(self, locks: RangeLocks, num_places: int) -> None:
        self._locks = locks
        self._num_places = num_places
        self._counts: dict[int, int] = {}  # of the holds that read a place
        self._released: deque[Sequence[int]] = deque()
        self._being_copied: deque[tuple[Sequence[int], Callable[[], bool]]] = deque()
        self._lock = threading.Lock()
        self._holder = 0

    def read(self, places: Iterable[int]) -> None:
        """Lock places for reading; each as often as it is named by calls.

        Raises:
            NestedWaitError: in a finalizer that happens to run inside another call.
        """
        if self._holder == threading.get_ident():
            raise NestedWaitError(
                "a finalizer inside a call of a SharedHeap cannot hold its chunks"
            )
        wanted = sorted(set(places))
        with self._lock:
            self._holder = threading.get_ident()
            counts = self._counts
            before = {place: counts.get(place, 0) for place in wanted}
            try:
                for start, count in _runs([place for place in wanted if not before[place]]):
                    if not self._locks.share(FIRST + start, count):
                        raise BlockingIOError(
                            EAGAIN, "another program has locked a part of the segment's file"
                        )
                counts.update({place: count + 1 for place, count in before.items()})
            except BaseException:
                counts.update(before)
                for place in wanted:
                    if not before[place]:
                        self._locks.drop(FIRST + place, 1)
                raise
            finally:
                self._holder = 0
        self._drop_released()

    def release(self, places: Sequence[int]) -> None:
        """Unlock places that are read, each once. Never waits: also for finalizers."""
        self._released.append(list(dict.fromkeys(places)))
        self._drop_released()

    def _drop_released(self) -> None:
        while self._released and self._lock.acquire(blocking=False):
            try:
                self._holder = threading.get_ident()
                while self._released:
                    self._drop(self._released.popleft())
            finally:
                self._holder = 0
                self._lock.release()

    def _drop(self, places: Sequence[int]) -> None:
        counts = self._counts
        free = []
        for place in places:
            left = counts.get(place, 0) - 1
            if left > 0:
                counts[place] = left
            else:
                counts.pop(place, None)
                free.append(place)
        for start, count in _runs(sorted(free)):
            self._locks.drop(FIRST + start, count)

    def fill(self, places: Iterable[int]) -> bool:
        """Lock places for filling; False: somebody still fills one, and none is locked."""
        self._end_filled()
        base = FIRST + self._num_places
        done: list[tuple[int, int]] = []
        for run in _runs(sorted(places)):
            if not self._locks.take(base + run[0], run[1]):
                for start, count in done:
                    self._locks.drop(base + start, count)
                return False
            done.append(run)
        return True

    def end_filling(self, places: Iterable[int]) -> None:
        """Unlock places that are filled."""
        for start, count in _runs(sorted(places)):
            self._locks.drop(FIRST + self._num_places + start, count)

    def end_filling_after(self, places: Sequence[int], has_ended: Callable[[], bool]) -> None:
        """Unlock places that are filled once a copy into them has ended, with a later call."""
        self._being_copied.append((places, has_ended))
        self._end_filled()

    def _end_filled(self) -> None:
        for _ in range(len(self._being_copied)):
            try:
                places, has_ended = self._being_copied.popleft()
            except IndexError:  # another thread looks too
                return
            if has_ended():
                self.end_filling(places)
            else:
                self._being_copied.append((places, has_ended))

    def close(self) -> None:
        """Unlock everything."""
        self._locks.close()


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of consecutive numbers."""
    at = 0
    while at < len(places):
        end = at + 1
        while end < len(places) and places[end] == places[end - 1] + 1:
            end += 1
        yield places[at], end - at
        at = end
