"""Rules of eviction: ways to read the same lists of chunks."""

from __future__ import annotations

from typing import Protocol

from kvheap.prefix.orders.reuse import AGE_EDGES, NUM_AGES, NUM_CLASSES, Table

__all__ = ["FREQUENCY", "LEARNED", "RULES", "ProbationRule", "Rule", "TableRule"]

PROBATION_SHARE = 0.1
"""Bytes of chunks that were used once, as a share of all; S3-FIFO's (Yang et al., SOSP 2023)."""

FIRST_OUT, LAST_OUT = 1e-20, 1e20
"""Factors by which the worths of a class are below, or above, those of all others."""

_EDGES: list[float] = AGE_EDGES.tolist()[:NUM_AGES]


class Rule(Protocol):
    """What a chunk is worth; the one that is worth least is evicted.

    Attributes:
        name: of the rule.
        newest_too: whether a chunk used lately may be worth less than older ones of its class.
    """

    name: str
    newest_too: bool

    def worths(self, first_bytes: int, num_bytes: int) -> Table:
        """By class and age, what a chunk is worth now.

        Args:
            first_bytes: of the chunks that were used once.
            num_bytes: of all chunks.
        """


class TableRule:
    """A rule that asks for class and age alone.

    Attributes:
        table: by class and age, what a chunk is worth; it may be replaced.
    """

    def __init__(self, name: str, table: Table, newest_too: bool = False) -> None:
        self.name = name
        self.table = table
        self.newest_too = newest_too

    def worths(self, first_bytes: int, num_bytes: int) -> Table:
        """See :meth:`Rule.worths`."""
        return self.table


class ProbationRule:
    """Chunks that were used once leave first while they have more than a share of the bytes."""

    newest_too = False

    def __init__(self, name: str, share: float = PROBATION_SHARE) -> None:
        self.name = name
        self._share = share
        first, *others = BY_RECENCY
        self._others_stay: Table = [[FIRST_OUT * worth for worth in first], *others]
        self._first_stay: Table = [[LAST_OUT * worth for worth in first], *others]

    def worths(self, first_bytes: int, num_bytes: int) -> Table:
        """See :meth:`Rule.worths`."""
        return self._others_stay if first_bytes > self._share * num_bytes else self._first_stay


BY_RECENCY: Table = [[1.0 / edge for edge in _EDGES]] * NUM_CLASSES
"""The longer ago, the less."""

BY_FREQUENCY: Table = [[number + 0.25 / edge for edge in _EDGES] for number in range(NUM_CLASSES)]
"""The fewer uses, the less; among a class, the longer ago."""

_RECENCY = TableRule("recency", BY_RECENCY)
FREQUENCY = TableRule("frequency", BY_FREQUENCY)
_PROBATION = ProbationRule("probation")

LEARNED = "learned"
"""The name of the rule whose table is computed from reuse times."""

RULES: tuple[Rule, ...] = (_RECENCY, FREQUENCY, _PROBATION)
"""The rules that are always the same."""
