"""Each order of eviction in the plainest way: lists that are searched from the front.

``NaiveAdaptive`` takes what chunks are worth from ``ReuseTimes``, which has a test of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kvheap.prefix.orders import adaptive, contest
from kvheap.prefix.orders.classes import NEWEST_FACTOR
from kvheap.prefix.orders.reuse import AGE_EDGES, FIRST_USES, NUM_CLASSES, ReuseTimes
from kvheap.prefix.orders.rules import PROBATION_SHARE
from kvheap.prefix.orders.s3fifo import MAX_USES, SMALL_SHARE
from kvheap.prefix.orders.shadows import SLACK_DIVISOR

Key = int
IsPinned = Callable[[Key], bool]


class NaiveLRU:
    def __init__(self, heap_bytes: int) -> None:
        self.sizes: dict[Key, int] = {}
        self.order: list[Key] = []

    def insert(self, key: Key, size: int, group: int) -> None:
        self.sizes[key] = size
        self.order.append(key)

    def touch(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            if key in self.sizes:
                self.order.remove(key)
                self.order.append(key)

    def settle(self, keys: Sequence[Key]) -> None:
        self.touch(keys)

    def remove(self, key: Key) -> None:
        self.order.remove(key)
        del self.sizes[key]

    def evict(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.remove(key)

    def evict_until(self, num_bytes: int, is_pinned: IsPinned) -> list[Key]:
        victims = []
        for key in [key for key in self.order if not is_pinned(key)]:
            if num_bytes > 0:
                victims.append(key)
                num_bytes -= self.sizes[key]
        if num_bytes > 0:
            return []
        self.evict(victims)
        return victims


class NaiveARC:
    """Two lists and their ghosts, as vLLM's class has them; with bytes instead of chunks."""

    def __init__(self, heap_bytes: int) -> None:
        self.heap_bytes = heap_bytes
        self.sizes: dict[Key, int] = {}
        self.t1: list[Key] = []
        self.t2: list[Key] = []
        self.b1: list[tuple[Key, int]] = []
        self.b2: list[tuple[Key, int]] = []
        self.target = 0.0

    def total(self, keys: list[Key]) -> int:
        return sum(self.sizes[key] for key in keys)

    def insert(self, key: Key, size: int, group: int) -> None:
        b1, b2 = (sum(size for _, size in ghosts) for ghosts in (self.b1, self.b2))
        if key in dict(self.b1):
            self.target = min(self.target + size * max(1, b2 / b1), self.heap_bytes)
        elif key in dict(self.b2):
            self.target = max(self.target - size * max(1, b1 / b2), 0)
        self.b1 = [ghost for ghost in self.b1 if ghost[0] != key]
        self.b2 = [ghost for ghost in self.b2 if ghost[0] != key]
        self.sizes[key] = size
        self.t1.append(key)

    def touch(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            if key in self.sizes:
                (self.t1 if key in self.t1 else self.t2).remove(key)
                self.t2.append(key)

    def settle(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            for own in (self.t1, self.t2):
                if key in own:
                    own.remove(key)
                    own.append(key)

    def remove(self, key: Key) -> None:
        (self.t1 if key in self.t1 else self.t2).remove(key)
        del self.sizes[key]

    def evict(self, keys: Sequence[Key]) -> None:
        for key in keys:
            (self.b1 if key in self.t1 else self.b2).append((key, self.sizes[key]))
            self.remove(key)
        for ghosts in (self.b1, self.b2):
            while sum(size for _, size in ghosts) > self.heap_bytes:
                del ghosts[0]

    def evict_until(self, num_bytes: int, is_pinned: IsPinned) -> list[Key]:
        t1 = [key for key in self.t1 if not is_pinned(key)]
        t2 = [key for key in self.t2 if not is_pinned(key)]
        t1_bytes = self.total(self.t1)
        victims: list[Key] = []
        while num_bytes > 0:
            if not t1 and not t2:
                return []
            from_t1 = t1 and (t1_bytes >= int(self.target) or not t2)
            key = t1.pop(0) if from_t1 else t2.pop(0)
            t1_bytes -= self.sizes[key] if from_t1 else 0
            num_bytes -= self.sizes[key]
            victims.append(key)
        self.evict(victims)
        return victims


class NaiveS3FIFO:
    def __init__(self, heap_bytes: int) -> None:
        self.sizes: dict[Key, int] = {}
        self.uses: dict[Key, int] = {}
        self.small: list[Key] = []
        self.main: list[Key] = []
        self.ghosts: list[tuple[Key, int]] = []

    def insert(self, key: Key, size: int, group: int) -> None:
        is_ghost = key in dict(self.ghosts)
        self.ghosts = [ghost for ghost in self.ghosts if ghost[0] != key]
        self.sizes[key], self.uses[key] = size, 0
        (self.main if is_ghost else self.small).append(key)

    def touch(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key in self.sizes:
                self.uses[key] = min(self.uses[key] + 1, MAX_USES)

    def settle(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            for queue in (self.small, self.main):
                if key in queue:
                    queue.remove(key)
                    queue.append(key)

    def remove(self, key: Key) -> None:
        (self.small if key in self.small else self.main).remove(key)
        del self.sizes[key]

    def evict(self, keys: Sequence[Key]) -> None:
        main_share = (1 - SMALL_SHARE) * sum(self.sizes.values())
        for key in keys:
            self.leave(key)
        self.trim(main_share)

    def leave(self, key: Key) -> None:
        if key in self.small:
            self.ghosts.append((key, self.sizes[key]))
        self.remove(key)

    def trim(self, main_share: float) -> None:
        while sum(size for _, size in self.ghosts) > main_share:
            del self.ghosts[0]

    def evict_until(self, num_bytes: int, is_pinned: IsPinned) -> list[Key]:
        if sum(size for key, size in self.sizes.items() if not is_pinned(key)) < num_bytes:
            return []
        stored = sum(self.sizes.values())
        small_share = SMALL_SHARE * stored
        victims = []
        while num_bytes > 0:
            small = [key for key in self.small if not is_pinned(key)]
            main = [key for key in self.main if not is_pinned(key)]
            exceeds = sum(self.sizes[key] for key in self.small) > small_share
            key = small[0] if small and (exceeds or not main) else main[0]
            if self.uses[key]:
                self.uses[key] = 0 if key in small else self.uses[key] - 1
                (self.small if key in small else self.main).remove(key)
                self.main.append(key)
            else:
                num_bytes -= self.sizes[key]
                victims.append(key)
                self.leave(key)
        self.trim(stored - small_share)
        return victims


class Known:
    """What ``NaiveAdaptive`` knows of a chunk."""

    def __init__(self, key: Key, size: int, group: int) -> None:
        self.key, self.size, self.group = key, size, group
        self.uses, self.used_at = 1, 0

    @property
    def rank(self) -> int:
        """The number of its class in its group."""
        return max(number for number, uses in enumerate(FIRST_USES) if self.uses >= uses)


def age_by_search(references: int) -> int:
    return max(age for age, edge in enumerate(AGE_EDGES) if references + 1 >= edge)


class NaiveAdaptive:
    def __init__(self, heap_bytes: int) -> None:
        self.known: dict[Key, Known] = {}
        self.order: list[Known] = []  # by the last use, over all classes
        self.ghosts: list[Known] = []
        self.times = ReuseTimes()
        self.begun = [0.0] * NUM_CLASSES
        self.learned = ReuseTimes.first_worths()
        self.stored: dict[int, float] = {}
        self.read: dict[int, float] = {}
        self.is_uneven = False
        self.contest: NaiveContest | None = None
        self.heap_bytes = heap_bytes
        self.now = self.updated_at = 0
        self.next_update = adaptive.MIN_UPDATE_REFERENCES

    @property
    def sizes(self) -> dict[Key, int]:
        return {key: chunk.size for key, chunk in self.known.items()}

    @property
    def rule(self) -> str:
        if self.is_uneven:
            return "frequency"
        return "learned" if self.contest is None else self.contest.rule

    def worth(self, rule: str, chunk: Known, now: int) -> tuple[float, ...]:
        age = age_by_search(now - chunk.used_at)
        if rule == "frequency":
            return (chunk.rank + 0.25 / AGE_EDGES[age],)
        if rule == "learned":
            return (self.learned[chunk.rank][age],)
        if rule == "once first":
            return (float(chunk.rank > 0), 1 / AGE_EDGES[age])
        if rule == "once last":
            return (float(chunk.rank == 0), 1 / AGE_EDGES[age])
        return (1 / AGE_EDGES[age],)

    def cheapest(self, rule: str, chunks: list[Known], now: int) -> Known:
        """The best of the ends of all classes; ``chunks`` are in the order of the last use."""
        classes: dict[int, list[Known]] = {}
        for chunk in chunks:
            classes.setdefault(chunk.rank, []).append(chunk)
        ends = []
        for _, members in sorted(classes.items()):
            ends.append((self.worth(rule, members[0], now), members[0].used_at, members[0]))
            if rule == "learned" and len(members) > 1:
                (worth,) = self.worth(rule, members[-1], now)
                ends.append(((NEWEST_FACTOR * worth,), members[-1].used_at, members[-1]))
        return min(ends, key=lambda end: end[:2])[2]

    def insert(self, key: Key, size: int, group: int) -> None:
        self.stored[group] = self.stored.get(group, 0) + 1
        ghost = next((ghost for ghost in self.ghosts if ghost.key == key), None)
        if ghost is not None:
            self.ghosts.remove(ghost)
        if ghost is not None and not self.is_uneven:
            chunk = ghost
            chunk.size, chunk.group = size, group
            self.count(chunk)
        else:
            chunk = Known(key, size, group)
        self.known[key] = chunk
        self.enter(chunk)

    def count(self, chunk: Known) -> None:
        age = age_by_search(self.now + 1 - chunk.used_at)
        self.times.reused[chunk.rank][age] += 1
        chunk.uses += 1

    def enter(self, chunk: Known) -> None:
        self.now += 1
        chunk.used_at = self.now
        self.begun[chunk.rank] += 1
        self.order.append(chunk)
        if self.contest is not None:
            self.contest.use(chunk)
        if self.now >= self.next_update:
            self.update()

    def update(self) -> None:
        num_chunks = max(len(self.known), adaptive.MIN_UPDATE_REFERENCES)
        window = adaptive.WINDOW_TURNS * num_chunks
        self.learned = self.times.update(self.now, self.begun, window)
        self.begun = [0.0] * NUM_CLASSES
        shares = [self.read.get(group, 0) / stored for group, stored in self.stored.items()]
        self.is_uneven = min(shares) < adaptive.UNEVEN_SHARE * max(shares)
        passed = self.now - self.updated_at
        for counts in (self.stored, self.read):
            for name in counts:
                counts[name] *= math.exp(-passed / (adaptive.COMPARED_TURNS * num_chunks))
        if self.contest is not None:
            self.contest.decide()
        self.updated_at = self.now
        period = max(adaptive.MIN_UPDATE_REFERENCES, num_chunks // adaptive.UPDATES_PER_TURN)
        self.next_update = self.now + period

    def touch(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            if key in self.known:
                chunk = self.known[key]
                self.read[chunk.group] = self.read.get(chunk.group, 0) + 1
                self.order.remove(chunk)
                self.count(chunk)
                self.enter(chunk)

    def settle(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            if key in self.known:
                chunk = self.known[key]
                chunk.used_at = self.now
                self.order.remove(chunk)
                self.order.append(chunk)

    def remove(self, key: Key) -> None:
        chunk = self.known.pop(key)
        self.order.remove(chunk)
        self.begun[chunk.rank] -= 1

    def evict(self, keys: Sequence[Key]) -> None:
        for key in keys:
            chunk = self.known.pop(key)
            self.order.remove(chunk)
            self.ghosts.append(chunk)
        stored = sum(chunk.size for chunk in self.known.values())
        while sum(ghost.size for ghost in self.ghosts) > adaptive.REMEMBERED_SHARE * stored:
            del self.ghosts[0]

    def evict_until(self, num_bytes: int, is_pinned: IsPinned) -> list[Key]:
        if self.contest is None and self.order:
            self.contest = NaiveContest(self)
        left = [chunk for chunk in self.order if not is_pinned(chunk.key)]
        if sum(chunk.size for chunk in left) < num_bytes:
            return []
        victims = []
        rule = now_read(self.rule, self.order)
        while num_bytes > 0:
            victim = self.cheapest(rule, left, self.now + 1)
            left.remove(victim)
            num_bytes -= victim.size
            victims.append(victim.key)
        self.evict(victims)
        return victims


def now_read(rule: str, chunks: Sequence[Known]) -> str:
    """How a rule reads these chunks."""
    if rule != "probation":
        return rule
    once = sum(chunk.size for chunk in chunks if chunk.rank == 0)
    is_much = once > PROBATION_SHARE * sum(chunk.size for chunk in chunks)
    return "once first" if is_much else "once last"


class NaiveContest:
    def __init__(self, order: NaiveAdaptive) -> None:
        self.order = order
        self.rule = "learned"
        self.shadows: dict[str, list[tuple[Known, int]]] = {
            rule: [] for rule in ("learned", "recency", "frequency", "probation")
        }
        self.leads = dict.fromkeys(self.shadows, 0.0)
        self.mean = sum(chunk.size for chunk in order.order) / len(order.order)
        self.one_in = 8
        while self.one_in > 1 and order.heap_bytes / self.mean < contest.MIN_SAMPLE * self.one_in:
            self.one_in //= 2
        for chunk in list(order.order):
            self.use(chunk)
        self.leads = dict.fromkeys(self.shadows, 0.0)

    def use(self, chunk: Known) -> None:
        if (hash(chunk.key) * contest.MIXER >> contest.HASH_SHIFT) % self.one_in:
            return
        found = {rule: self.shadow(rule, chunk) for rule in self.shadows}
        for rule in self.shadows:
            step = found[rule] - found[self.rule]
            if step > 0:
                step *= 1 - contest.LEAD_DRIFT
            self.leads[rule] = max(0, self.leads[rule] + step * chunk.size)

    def decide(self) -> None:
        best = max(self.leads, key=self.leads.__getitem__)
        if self.leads[best] > contest.MIN_LEAD * self.mean and best != self.rule:
            self.rule = best
            self.leads = dict.fromkeys(self.shadows, 0.0)

    def shadow(self, rule: str, chunk: Known) -> bool:
        """Whether it was there; chunks have the classes that they had when they were used."""
        chunks = self.shadows[rule]
        there = [place for place in chunks if place[0].key == chunk.key]
        if there:
            chunks.remove(there[0])
        chunks.append((chunk, chunk.rank))
        share = max(1, self.order.heap_bytes // self.one_in)
        slack = share // SLACK_DIVISOR
        low = share - slack // 2
        if sum(known.size for known, _ in chunks) > low + slack:
            now_rule = now_read(rule, [known for known, _ in chunks])
            while sum(known.size for known, _ in chunks) > low:
                others = [known for known, _ in chunks if known.key != chunk.key]
                if not others:
                    break
                victim = self.order.cheapest(now_rule, others, self.order.now + 1)
                chunks[:] = [place for place in chunks if place[0] is not victim]
        return bool(there)


NAIVE = {"lru": NaiveLRU, "arc": NaiveARC, "s3fifo": NaiveS3FIFO, "adaptive": NaiveAdaptive}
