"""``AdaptiveOrder``: evict what is worth least, by the reuse times that were seen."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Generic, TypeVar

from kvheap.prefix.orders.base import require_heap_bytes, require_new, require_num_bytes
from kvheap.prefix.orders.classes import ChunkClasses, ClassedChunk
from kvheap.prefix.orders.contest import HASH_SHIFT, MIXER, Contest
from kvheap.prefix.orders.reuse import (
    FIRST_USES,
    NUM_CLASSES,
    ReuseTimes,
    age_of,
)
from kvheap.prefix.orders.rules import FREQUENCY, LEARNED, RULES, Rule, TableRule

__all__ = ["AdaptiveOrder"]

K = TypeVar("K", bound=Hashable)

REMEMBERED_SHARE = 4
"""Evicted bytes whose uses are remembered, as a multiple of the stored bytes. This and the next are
in benchmarks/NOTES.md."""

UPDATES_PER_TURN = 8
"""How often the worths are computed anew while as many chunks are used as are stored."""

MIN_UPDATE_REFERENCES = 1000
"""But no more often than this."""

WINDOW_TURNS = 20
"""After how many times as many uses as there are chunks a counted reuse weighs 1/e."""

COMPARED_TURNS = 2
"""The same for how often each group was stored and read."""

UNEVEN_SHARE = 0.5
"""Groups are uneven if one is read less than this as often as another for each chunk stored."""

NEW_CLASS = frozenset(FIRST_USES[1:])
"""A use that makes so many puts a chunk into the next class."""


class AdaptiveOrder(Generic[K]):
    """Evicts the chunk that is worth least per byte and time, as far as the past tells.

    Chunks are classed by their number of uses, and :class:`ReuseTimes` counts for each class how
    long after a use the next one comes, also of chunks that were evicted and are remembered. The
    worth of a chunk follows from its class and its age. So what is used once leaves early if such
    chunks rarely return, and stays if they do; and of a loop that does not fit, a part stays.

    What was learnt may be late or wrong. Three other rules are at hand: least recently used, least
    often used, and used once first. A :class:`Contest` follows what each would find of a sample of
    the keys, and the rule that is ahead decides. As all rules are only ways to read the same lists,
    a change of rule takes no time to have an effect.

    Every byte is worth the same: what it costs to compute a chunk again is taken to be in
    proportion to its size, so that the groups of one token range stay or leave together. Where
    some groups are read less often than others for each chunk stored, as sliding windows and
    states are, of which a prefix needs the last only, chunks are worth something together, which
    the counts of single ones do not tell, and what is stored anew was not always missed. Then the
    least often read leave first, and what was evicted is not remembered.

    O(1) for each chunk, amortized; an eviction compares the ends of the 7 lists of classes, and
    steps over pinned chunks. The first eviction
    sorts all chunks once. A remembered chunk takes about 300 bytes of host
    memory, and :data:`REMEMBERED_SHARE` are remembered for each that is stored.

    Args:
        heap_bytes: what the heap holds.

    Raises:
        ValueError: ``heap_bytes`` is not positive.
        TypeError: ``heap_bytes`` is not an integer.

    >>> order = AdaptiveOrder[str](heap_bytes=100)
    >>> for key in "cba":  # one request, its tail first
    ...     order.insert(key, 10, group=0)
    >>> order.touch(["a", "b"])
    >>> order.evict_until(15, lambda key: False)
    ['c', 'b']
    """

    def __init__(self, heap_bytes: int) -> None:
        self._heap_bytes = require_heap_bytes(heap_bytes)
        self.reset()

    def reset(self) -> None:
        """Forget all chunks, what was learnt and what is remembered."""
        self._chunks: dict[K, ClassedChunk[K]] = {}
        self._classes: ChunkClasses[K] = ChunkClasses(NUM_CLASSES)
        self._ghosts: OrderedDict[K, ClassedChunk[K]] = OrderedDict()
        self._bytes = self._ghost_bytes = 0
        self._first_bytes = 0  # of chunks used once
        self._times = ReuseTimes()
        self._begun = [0.0] * NUM_CLASSES  # since the last update
        self._learned = TableRule(LEARNED, ReuseTimes.first_worths(), newest_too=True)
        self._rules: tuple[Rule, ...] = (self._learned, *RULES)
        self._contest: Contest[K] | None = None  # from the first eviction on
        self._stored: dict[int, float] = {}  # chunks by group, decayed
        self._read: dict[int, float] = {}
        self._is_uneven = False  # whether some groups are read less often for each chunk stored
        self._now = self._updated_at = 0
        self._next_update = MIN_UPDATE_REFERENCES

    @property
    def rule(self) -> str:
        """What decides now: ``learned``, ``recency``, ``frequency`` or ``probation``."""
        return self._present_rule().name

    def _present_rule(self) -> Rule:
        if self._is_uneven:
            return FREQUENCY
        return self._learned if self._contest is None else self._rules[self._contest.rule]

    def insert(self, key: K, size_bytes: int, group: int) -> None:
        """Enter a chunk; one that is remembered has its uses of before, and one more."""
        require_new(key, size_bytes, key in self._chunks)
        self._stored[group] = self._stored.get(group, 0.0) + 1
        chunk = self._ghosts.pop(key, None)
        if chunk is not None:
            self._ghost_bytes -= chunk.size_bytes
        if chunk is None or self._is_uneven:
            chunk = ClassedChunk(key, size_bytes, group)
        else:
            chunk.size_bytes = size_bytes
            chunk.group = group
            self._times.reused[chunk.number][age_of(self._now + 1 - chunk.used_at)] += 1
            chunk.uses += 1
            if chunk.uses in NEW_CLASS:
                chunk.number += 1
        self._chunks[key] = chunk
        self._bytes += size_bytes
        self._enter(chunk)

    def touch(self, keys: Sequence[K]) -> None:
        """Count a use of each chunk; the head is the last to leave of those alike."""
        find, lists, reused = self._chunks.get, self._classes.lists, self._times.reused
        read = self._read
        for key in reversed(keys):
            chunk = find(key)
            if chunk is not None:
                number = chunk.number
                read[chunk.group] = read.get(chunk.group, 0.0) + 1
                del lists[number][key]
                if not number:
                    self._first_bytes -= chunk.size_bytes
                now = self._now + 1
                reused[number][age_of(now - chunk.used_at)] += 1
                chunk.uses += 1
                if chunk.uses in NEW_CLASS:
                    chunk.number = number + 1
                self._enter(chunk)

    def _enter(self, chunk: ClassedChunk[K]) -> None:
        """Append a chunk to the list of its class, with a use that has just been counted."""
        now = self._now = self._now + 1
        number, key = chunk.number, chunk.key
        if not number:
            self._first_bytes += chunk.size_bytes
        self._begun[number] += 1
        chunk.used_at = now
        self._classes.lists[number][key] = chunk
        contest = self._contest
        if contest is not None and not hash(key) * MIXER >> HASH_SHIFT & contest.mask:
            contest.use(chunk)
        if now >= self._next_update:
            self._update()

    def _update(self) -> None:
        """Compute the worths anew, and let the contest decide on the rule."""
        now, num_chunks = self._now, max(len(self._chunks), MIN_UPDATE_REFERENCES)
        self._learned.table = self._times.update(now, self._begun, WINDOW_TURNS * num_chunks)
        self._begun = [0.0] * NUM_CLASSES
        self._compare_groups(math.exp((self._updated_at - now) / (COMPARED_TURNS * num_chunks)))
        if self._contest is not None:
            self._contest.decide()
        self._updated_at = now
        self._next_update = now + max(MIN_UPDATE_REFERENCES, num_chunks // UPDATES_PER_TURN)

    def _compare_groups(self, decay: float) -> None:
        """Look whether some groups are read less often than others, and forget the past a bit."""
        shares = [self._read.get(group, 0.0) / stored for group, stored in self._stored.items()]
        self._is_uneven = min(shares) < UNEVEN_SHARE * max(shares)
        for counts in (self._stored, self._read):
            for group in counts:
                counts[group] *= decay

    def settle(self, keys: Sequence[K]) -> None:
        """Make chunks the last used of their classes, the head last."""
        find, now, lists = self._chunks.get, self._now, self._classes.lists
        for key in reversed(keys):
            chunk = find(key)
            if chunk is not None:
                chunk.used_at = now
                lists[chunk.number].move_to_end(key)

    def remove(self, key: K) -> None:
        """Forget a chunk; it is not remembered."""
        chunk = self._chunks.pop(key)
        del self._classes.lists[chunk.number][key]
        self._bytes -= chunk.size_bytes
        if not chunk.number:
            self._first_bytes -= chunk.size_bytes
        self._begun[chunk.number] -= 1  # nothing is learnt from it

    def evict_until(self, num_bytes: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Remove the chunks that are worth least under the present rule, and remember them."""
        require_num_bytes(num_bytes)
        if self._contest is None and self._chunks:
            in_order = sorted(self._chunks.values(), key=attrgetter("used_at"))
            self._contest = Contest(self._rules, self._heap_bytes, in_order)
        victims = []
        rule = self._present_rule()
        worths = rule.worths(self._first_bytes, self._bytes)
        for chunk in self._classes.cheapest(worths, self._now + 1, rule.newest_too, is_pinned):
            victims.append(chunk)
            num_bytes -= chunk.size_bytes
            if num_bytes <= 0:
                break
        else:
            return []
        keys = [chunk.key for chunk in victims]
        self.evict(keys)
        return keys

    def evict(self, keys: Iterable[K]) -> None:
        """Remove chunks, and remember them."""
        chunks, lists, ghosts = self._chunks, self._classes.lists, self._ghosts
        evicted_bytes = 0
        for key in keys:
            chunk = chunks.pop(key)
            del lists[chunk.number][key]
            if not chunk.number:
                self._first_bytes -= chunk.size_bytes
            ghosts[key] = chunk
            evicted_bytes += chunk.size_bytes
        self._bytes -= evicted_bytes
        self._ghost_bytes += evicted_bytes
        max_ghost_bytes = REMEMBERED_SHARE * self._bytes
        while self._ghost_bytes > max_ghost_bytes and ghosts:
            _, ghost = ghosts.popitem(last=False)
            self._ghost_bytes -= ghost.size_bytes

    def __repr__(self) -> str:
        """How many chunks are in the order."""
        return f"{type(self).__name__}({len(self)} chunks)"

    def __len__(self) -> int:
        """How many chunks are in the order."""
        return len(self._chunks)

    def __iter__(self) -> Iterator[K]:
        """The chunks in the order of their last use, at equal ones the less used first."""
        chunks = chain.from_iterable(of_class.values() for of_class in self._classes.lists)
        return (chunk.key for chunk in sorted(chunks, key=attrgetter("used_at")))

    def __contains__(self, key: object) -> bool:
        """Whether a chunk is in the order."""
        return key in self._chunks
