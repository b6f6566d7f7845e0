"""Each eviction policy in the plainest way: lists that are searched from the front.

A model knows keys and sizes only. What it may evict is what it has and is not in ``used``.
"""

from __future__ import annotations

from kvheap.prefix.policies.gdsf import REMEMBERED_SHARE
from kvheap.prefix.policies.s3fifo import MAX_USES, SMALL_SHARE

Key = int


class Naive:
    """What all models share: sizes, and the keys in use."""

    def __init__(self) -> None:
        self.sizes: dict[Key, int] = {}
        self.used: set[Key] = set()

    def insert(self, keys: list[Key], sizes: dict[Key, int]) -> None:
        self.sizes |= {key: sizes[key] for key in keys}
        for key in reversed(keys):
            self.enter(key)

    def touch(self, keys: list[Key]) -> None:
        for key in reversed(keys):
            self.use(key)

    def hold(self, keys: list[Key]) -> None:
        self.used |= set(keys)

    def release(self, keys: list[Key]) -> None:
        self.used -= set(keys)
        for key in reversed(keys):
            self.come_back(key)

    def remove(self, keys: list[Key]) -> None:
        for key in keys:
            self.forget(key)
            self.used.discard(key)
            del self.sizes[key]

    def evict(self, num_bytes: int) -> list[Key]:
        self.begin_eviction()
        victims = []
        while num_bytes > 0:
            victim = self.choose()
            self.forget(victim)
            victims.append(victim)
            num_bytes -= self.sizes.pop(victim)
        self.end_eviction(victims)
        return victims

    def begin_eviction(self) -> None: ...
    def end_eviction(self, victims: list[Key]) -> None: ...
    def total(self, keys: list[Key]) -> int:
        return sum(self.sizes[key] for key in keys)


class NaiveLRU(Naive):
    def __init__(self) -> None:
        super().__init__()
        self.order: list[Key] = []

    def enter(self, key: Key) -> None:
        self.order.append(key)

    def use(self, key: Key) -> None:
        self.order.remove(key)
        self.order.append(key)

    come_back = use

    def forget(self, key: Key) -> None:
        self.order.remove(key)

    def choose(self) -> Key:
        return next(key for key in self.order if key not in self.used)


class NaiveGhosts:
    """Keys with the bytes that they had and a note, the oldest first."""

    def __init__(self) -> None:
        self.entries: list[tuple[Key, int, int]] = []

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size, _ in self.entries)

    def remember(self, key: Key, size: int, note: int = 0) -> None:
        self.recall(key)
        self.entries.append((key, size, note))

    def recall(self, key: Key) -> int | None:
        found = [entry for entry in self.entries if entry[0] == key]
        self.entries = [entry for entry in self.entries if entry[0] != key]
        return found[0][2] if found else None

    def trim(self, limit: float) -> None:
        while self.num_bytes > limit:
            del self.entries[0]


class NaiveGDSF(Naive):
    """Priorities are compared for every eviction; equal ones by when they were computed."""

    def __init__(self, cost=lambda size: size) -> None:
        super().__init__()
        self.cost = cost
        self.clock = 0.0
        self.time = 0
        self.uses: dict[Key, int] = {}
        self.priority: dict[Key, tuple[float, int]] = {}
        self.ghosts = NaiveGhosts()

    def rank(self, key: Key) -> None:
        self.time += 1
        size = self.sizes[key]
        self.priority[key] = (self.clock + self.uses[key] * (self.cost(size) / size), self.time)

    def enter(self, key: Key) -> None:
        self.uses[key] = (self.ghosts.recall(key) or 0) + 1
        self.rank(key)

    def use(self, key: Key) -> None:
        self.uses[key] += 1
        self.rank(key)

    def come_back(self, key: Key) -> None:
        self.rank(key)

    def forget(self, key: Key) -> None:
        self.last = self.uses.pop(key), self.priority.pop(key)

    def choose(self) -> Key:
        candidates = self.priority.keys() - self.used
        victim = min(candidates, key=lambda key: self.priority[key])
        self.clock = max(self.clock, self.priority[victim][0])
        self.ghosts.remember(victim, self.sizes[victim], self.uses[victim])
        return victim

    def end_eviction(self, victims: list[Key]) -> None:
        self.ghosts.trim(REMEMBERED_SHARE * self.total(list(self.sizes)))


class NaiveS3FIFO(Naive):
    def __init__(self, min_uses: int = 1) -> None:
        super().__init__()
        self.min_uses = min_uses
        self.small: list[Key] = []
        self.main: list[Key] = []
        self.uses: dict[Key, int] = {}
        self.ghosts = NaiveGhosts()

    def queue_of(self, key: Key) -> list[Key]:
        return self.small if key in self.small else self.main

    def enter(self, key: Key) -> None:
        self.uses[key] = 0
        (self.small if self.ghosts.recall(key) is None else self.main).append(key)

    def use(self, key: Key) -> None:
        self.uses[key] = min(self.uses[key] + 1, MAX_USES)

    def come_back(self, key: Key) -> None:
        queue = self.queue_of(key)
        queue.remove(key)
        queue.append(key)

    def forget(self, key: Key) -> None:
        self.queue_of(key).remove(key)

    def begin_eviction(self) -> None:
        self.stored_bytes = self.total(self.small + self.main)

    def choose(self) -> Key:
        while True:
            idle_small = [key for key in self.small if key not in self.used]
            idle_main = [key for key in self.main if key not in self.used]
            exceeds = self.total(self.small) > SMALL_SHARE * self.stored_bytes
            from_small = bool(idle_small) and (exceeds or not idle_main)
            key = idle_small[0] if from_small else idle_main[0]
            if self.uses[key] < (self.min_uses if from_small else 1):
                if from_small:
                    self.ghosts.remember(key, self.sizes[key])
                return key
            self.queue_of(key).remove(key)
            self.main.append(key)
            self.uses[key] = 0 if from_small else self.uses[key] - 1

    def end_eviction(self, victims: list[Key]) -> None:
        self.ghosts.trim(self.stored_bytes - SMALL_SHARE * self.stored_bytes)


class NaiveARC(Naive):
    def __init__(self) -> None:
        super().__init__()
        self.once: list[Key] = []
        self.again: list[Key] = []
        self.once_ghosts = NaiveGhosts()
        self.again_ghosts = NaiveGhosts()
        self.target = 0.0

    def enter(self, key: Key) -> None:
        once, again = self.once_ghosts.num_bytes, self.again_ghosts.num_bytes
        size, stored = self.sizes[key], self.total(self.once + self.again)
        if self.once_ghosts.recall(key) is not None:
            self.target = min(self.target + size * max(1.0, again / once), stored)
            self.again.append(key)
        elif self.again_ghosts.recall(key) is not None:
            self.target = max(self.target - size * max(1.0, once / again), 0.0)
            self.again.append(key)
        else:
            self.once.append(key)

    def use(self, key: Key) -> None:
        self.forget(key)
        self.again.append(key)

    def come_back(self, key: Key) -> None:
        queue = self.once if key in self.once else self.again
        queue.remove(key)
        queue.append(key)

    def forget(self, key: Key) -> None:
        (self.once if key in self.once else self.again).remove(key)

    def begin_eviction(self) -> None:
        self.stored_bytes = self.total(self.once + self.again)

    def choose(self) -> Key:
        idle_once = [key for key in self.once if key not in self.used]
        idle_again = [key for key in self.again if key not in self.used]
        exceeds = self.total(self.once) > self.target
        from_once = bool(idle_once) and (exceeds or not idle_again)
        key = idle_once[0] if from_once else idle_again[0]
        ghosts = self.once_ghosts if from_once else self.again_ghosts
        ghosts.remember(key, self.sizes[key])
        return key

    def end_eviction(self, victims: list[Key]) -> None:
        self.once_ghosts.trim(self.stored_bytes - self.total(self.once))
        self.again_ghosts.trim(self.stored_bytes - self.once_ghosts.num_bytes)


NAIVE = {"lru": NaiveLRU, "gdsf": NaiveGDSF, "s3fifo": NaiveS3FIFO, "arc": NaiveARC}
