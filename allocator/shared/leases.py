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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EAGAIN
from typing import NamedTuple

from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import ClosedError
from kvheap.memory.file_locks import RangeLocks
from kvheap.shared.tokens import Dropped, Token

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


class _Lease(NamedTuple):
    """Places that are locked.

    Attributes:
        numbers: of their locks, sorted.
        has_ended: whether no copy into them is under way.
    """

    numbers: list[int]
    has_ended: Callable[[], bool]


class Leases:
    """The places that this process reads and fills; for all threads.

    An exception of a signal handler may strike anywhere. Then the next call counts anew, and
    unlocks what no token stands for.

    Args:
        locks: on an open file of their own.
        num_places: how many places there are.
    """

    def __init__(self, locks: RangeLocks, num_places: int) -> None:
        self._locks = locks
        self._num_places = num_places
        self._counts: dict[int, int] = {}  # by lock: of the tokens that stand for it
        self._dropped: Dropped[_Lease] = Dropped()
        self._copied: list[_Lease] = []  # dropped, but a copy fills them still
        self._lock = threading.Lock()
        self._holder = 0
        self._is_unfinished = False
        self._is_closed = False

    def read(self, token: Token, places: Iterable[int]) -> None:
        """Lock places for reading, until the token is ended or gone.

        Raises:
            NestedWaitError: in a finalizer that happens to run inside another call.
            ClosedError: after :meth:`close`.
        """
        self._require_outside()
        wanted = sorted(set(places))
        try:
            with self._lock:
                try:
                    self._require_open()
                    self._begin()
                    if not self._lock_all(wanted, self._locks.share):
                        raise BlockingIOError(
                            EAGAIN, "another program has locked a part of the segment's file"
                        )
                    self._dropped.track(token, _Lease(wanted, _yes))
                    self._is_unfinished = False
                finally:
                    self._holder = 0
        finally:  # what others have ended meanwhile, whatever became of this
            self.give_back()

    def fill(self, token: Token, places: Iterable[int], has_ended: Callable[[], bool]) -> bool:
        """Lock places for filling, until the token is ended or gone, and ``has_ended()``.

        Returns:
            Whether they are locked: False, and none is, if somebody still fills one.

        Raises:
            NestedWaitError: in a finalizer that happens to run inside another call.
            ClosedError: after :meth:`close`.
        """
        self._require_outside()
        wanted = sorted(self._num_places + place for place in places)
        try:
            with self._lock:
                try:
                    self._require_open()
                    self._begin()
                    # Not what this process still fills: its open file may lock a number twice.
                    are_locked = self._counts.keys().isdisjoint(wanted)
                    if are_locked:
                        self._dropped.track(token, _Lease(wanted, has_ended))
                        are_locked = self._lock_all(wanted, self._locks.take)
                    if not are_locked:
                        self._dropped.forget(token)
                        self._count_anew()
                    self._is_unfinished = False
                finally:
                    self._holder = 0
        finally:
            self.give_back()
        return are_locked

    def end(self, token: Token) -> None:
        """Unlock what a token stands for. Never waits: also for finalizers."""
        self._dropped.end(token)
        self.give_back()

    def give_back(self) -> None:
        """Unlock what was ended, or whose token is gone, or what an interrupted call has locked."""
        # Whoever has the lock looks again afterwards, or the next call does.
        while self._is_anything_left and not self._lock.locked():
            with self._lock:
                try:
                    self._begin()
                    self._drop_all()
                    self._close_unused()
                    self._is_unfinished = False
                finally:
                    self._holder = 0
            if not self._dropped.has_any:
                break

    @property
    def _is_anything_left(self) -> bool:
        return self._is_unfinished or self._dropped.has_any or bool(self._copied)

    def _begin(self) -> None:
        self._holder = threading.get_ident()
        if self._is_unfinished:
            self._count_anew()
        self._is_unfinished = True

    def _drop_all(self) -> None:
        dropped = self._dropped
        while (lease := dropped.first()) is not None:
            if lease.has_ended():
                self._drop(lease)
            else:
                self._copied.append(lease)
            dropped.remove_first()
        for lease in [lease for lease in self._copied if lease.has_ended()]:
            self._drop(lease)
            self._copied.remove(lease)

    def _lock_all(self, numbers: Sequence[int], lock: Callable[[int, int], bool]) -> bool:
        """Lock what is not locked here yet, and count; False if somebody else has one."""
        counts = self._counts
        for start, count in _runs([number for number in numbers if number not in counts]):
            if not lock(FIRST + start, count):
                return False
        for number in numbers:
            counts[number] = counts.get(number, 0) + 1
        return True

    def _drop(self, lease: _Lease) -> None:
        for start, count in _runs([each for each in lease.numbers if self._count_down(each)]):
            self._locks.drop(FIRST + start, count)

    def _count_down(self, number: int) -> bool:
        """Whether nobody here needs a lock any more."""
        left = self._counts.get(number, 0) - 1
        if left > 0:
            self._counts[number] = left
        else:
            self._counts.pop(number, None)
        return left <= 0

    def _count_anew(self) -> None:
        """Count what tokens stand for, and unlock everything else. O(leases)."""
        leases = [*self._dropped.live(), *self._copied]
        counts = Counter(number for lease in leases for number in lease.numbers)
        at = 0
        for start, count in [*_runs(sorted(counts)), (2 * self._num_places, 0)]:
            if start > at:
                self._locks.drop(FIRST + at, start - at)
            at = start + count
        self._counts = dict(counts)

    @property
    def _is_here(self) -> bool:
        """Whether a call was interrupted on this thread, and must go on first."""
        # What an exception of a signal handler has left there, without the lock, is nobody.
        return self._holder == threading.get_ident() and self._lock.locked()

    def _require_outside(self) -> None:
        if self._is_here:
            raise NestedWaitError(
                "a finalizer inside a call of a SharedHeap cannot hold its chunks, or store"
            )

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this SharedHeap is closed")

    def close(self) -> None:
        """Lock nothing more, and let go of the file once nothing is locked; may be repeated."""
        self._is_closed = True
        if self._is_here:
            return  # in a finalizer inside another call: the file is closed when this is dropped
        with self._lock:
            self._close_unused()
        self.give_back()

    def _close_unused(self) -> None:
        if self._is_closed and not self._dropped.live() and not self._copied:
            self._locks.close()

    def start_over_after_fork(self) -> None:
        """Leave the locks to the parent, in a forked child."""
        self._lock = threading.Lock()
        self._locks.close()


def _yes() -> bool:
    return True


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of consecutive numbers."""
    at = 0
    while at < len(numbers):
        end = at + 1
        while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
            end += 1
        yield numbers[at], end - at
        at = end
