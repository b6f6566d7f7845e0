"""``Contest``: which of several rules finds most, tried on a sample of the keys."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from kvheap.prefix.orders.classes import ClassedChunk
from kvheap.prefix.orders.rules import Rule
from kvheap.prefix.orders.shadows import ShadowCache

__all__ = ["Contest"]

K = TypeVar("K", bound=Hashable)

MIN_SAMPLE = 500
"""A shadow has at least so many chunks, if the heap has. This and the next are in
benchmarks/NOTES.md."""

MAX_SAMPLE_SHIFT = 3
"""At least one key in 2^3 is sampled."""

MIN_LEAD = 35.0
"""By how many chunks of the mean size another rule must be ahead to be taken."""

LEAD_DRIFT = 0.2
"""What a chunk found counts less than a chunk missed, so that chance alone brings no lead."""

MIXER = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: spreads the hashes of consecutive numbers."""

HASH_SHIFT = 29


class Contest(Generic[K]):
    """For each rule, a :class:`ShadowCache` that follows a sample of the keys under that rule.

    Rules are compared where they disagree: a chunk that one rule's shadow has and that of the
    present rule lacks adds its bytes to the lead of that rule, and the reverse takes them away. A
    lead never falls below zero, so that a long time in which a rule was worse does not delay it
    when it becomes better (E. S. Page's cumulative sum, 1954), and all begin anew after a change.

    Args:
        rules: at least one.
        heap_bytes: what the heap holds.
        chunks: those that it holds now, none of them evicted so far under any rule, the one used
            last at the end; at least one.

    Attributes:
        rule: the one that is ahead; the first one until another has a lead.
        mask: a key is in the sample if its mixed hash has none of these bits.
    """

    __slots__ = ("_leads", "_min_lead_bytes", "_rules", "_shadows", "mask", "rule")

    def __init__(
        self, rules: Sequence[Rule], heap_bytes: int, chunks: Iterable[ClassedChunk[K]]
    ) -> None:
        self._rules = rules
        held = list(chunks)
        mean_bytes = sum(chunk.size_bytes for chunk in held) / len(held)
        shift = MAX_SAMPLE_SHIFT
        while shift and heap_bytes / mean_bytes < MIN_SAMPLE << shift:
            shift -= 1
        self.mask = (1 << shift) - 1
        self._min_lead_bytes = MIN_LEAD * mean_bytes
        share_bytes = max(1, heap_bytes >> shift)
        self._shadows: list[ShadowCache[K]] = [ShadowCache(share_bytes, rule) for rule in rules]
        self.rule = 0
        self._leads = [0.0] * len(rules)
        for chunk in held:
            if self.samples(chunk.key):
                for shadow in self._shadows:
                    shadow.use(chunk)

    def samples(self, key: K) -> bool:
        """Whether a key is in the sample."""
        return not hash(key) * MIXER >> HASH_SHIFT & self.mask

    def use(self, chunk: ClassedChunk[K]) -> None:
        """A chunk of the sample has just been used."""
        found = [shadow.use(chunk) for shadow in self._shadows]
        found_now = found[self.rule]
        leads = self._leads
        for rule, is_found in enumerate(found):
            if is_found != found_now:
                share = 1.0 - LEAD_DRIFT if is_found else -1.0
                leads[rule] = max(0.0, leads[rule] + share * chunk.size_bytes)

    def decide(self) -> None:
        """Take the rule that leads by most, if it leads by enough."""
        best = max(range(len(self._leads)), key=self._leads.__getitem__)
        if self._leads[best] > self._min_lead_bytes:
            self.take(best)

    def take(self, rule: int) -> None:
        """Let a rule decide from now on."""
        if rule != self.rule:
            self.rule = rule
            self._leads = [0.0] * len(self._leads)
