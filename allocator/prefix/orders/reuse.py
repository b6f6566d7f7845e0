"""``ReuseTimes``: how soon chunks are used again, and what one is worth until then."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["AGE_EDGES", "FIRST_USES", "NUM_AGES", "NUM_CLASSES", "ReuseTimes", "Table", "age_of"]

Table = list[list[float]]
"""By class and age, what a chunk is worth."""

_Floats = npt.NDArray[np.float64]

NUM_AGES = 96
"""Ages are told apart up to 2^48 references, more than there will be."""

AGE_EDGES: _Floats = np.array(
    [2.0 ** (age >> 1) * (1.5 if age & 1 else 1.0) for age in range(2, NUM_AGES + 3)]
)
"""References at which each age begins, two to an octave; the last is the end of the last age."""

FIRST_USES = (1, 2, 3, 4, 5, 8, 16)
"""The least uses of each class."""

NUM_CLASSES = len(FIRST_USES)

FIRST_HAZARD = 0.04
"""Share of the chunks of one age that are used again in it, before anything is known."""

HAZARD_GROWTH = 1.5
"""The same for a class whose chunks had more uses, as a multiple of the class below it."""

MAX_FIRST_HAZARD = 0.5

PRIOR_CHUNKS = 20.0
"""How many chunks the assumptions count for; benchmarks/NOTES.md has these and their like."""

MIN_SURVIVORS = 1e-4
"""So much of a class is taken to be never used again, at least."""

LOW_SURVIVORS = 1e-3
"""If fewer of a class reach an age, they tell nothing about the class above it."""

MAX_SNAPSHOTS = 512
"""Of what had begun; beyond them, every second one of the older half is forgotten."""


def age_of(references: int) -> int:
    """The age of a chunk whose last use was so many references ago.

    >>> [age_of(references) for references in (1, 2, 3, 4, 1000, 1 << 20)]
    [0, 1, 2, 2, 17, 38]
    """
    references += 1
    length = references.bit_length()
    return 2 * length - 4 + (references >> (length - 2) & 1)


class ReuseTimes:
    """Counts, for each class of chunks, at which ages they are used again.

    Chunks belong to a class by the number of their uses. A chunk's age is the number of references
    since its last use. From the counts follow the hazards: which share of the chunks that reach an
    age is used again before the next. From these follows what keeping a chunk is worth, its Gittins
    index: the largest ratio, over all times to come, of the uses expected by then to the space-time
    spent for them. To evict the chunk of the lowest index is optimal if classes and ages are all
    that is known (J. C. Gittins, 1979; hit density: Beckmann, Chen and Cidon, NSDI 2018).

    Old counts decay. A class of which little is known is taken to be like the class below it.
    """

    __slots__ = ("_begun", "_decayed_at", "_snapshots", "_times", "reused")

    def __init__(self) -> None:
        self.reused: Table = [[0.0] * NUM_AGES for _ in range(NUM_CLASSES)]
        """By class and age, how often a chunk was used again; its user adds to it."""
        self._begun: _Floats = np.zeros(NUM_CLASSES)
        self._decayed_at = 0
        # What had begun at some times, decayed: reuse at an age is a share of what began then.
        self._times: list[int] = []
        self._snapshots: list[_Floats] = []

    def update(self, now: int, begun: Sequence[float], window: float) -> Table:
        """Take in what has begun, let counts decay, and return what a chunk is worth.

        Args:
            now: the number of references so far.
            begun: by class, how many chunks were used since the last update.
            window: the number of references over which a count decays to 1/e.
        """
        decay = math.exp((self._decayed_at - now) / window)
        self._decayed_at = now
        num_ages = age_of(now + 1) + 1  # none is older
        for counts in self.reused:
            counts[:num_ages] = [count * decay for count in counts[:num_ages]]
        self._begun = (self._begun + begun) * decay
        self._times.append(now)
        self._snapshots.append(self._begun)
        self._thin_snapshots()
        return self._worths(now, num_ages)

    @staticmethod
    def first_worths() -> Table:
        """What a chunk is worth before anything is known."""
        no_counts = np.zeros((NUM_CLASSES, NUM_AGES)).tolist()
        return _indices(_reuse_shares(no_counts, no_counts), AGE_EDGES)

    def _worths(self, now: int, num_ages: int) -> Table:
        at_risk = self._at_risk(now, num_ages)
        shares = _reuse_shares([counts[:num_ages] for counts in self.reused], at_risk.tolist())
        worths = _indices(shares, AGE_EDGES[: num_ages + 1])
        return [row + row[-1:] * (NUM_AGES - num_ages) for row in worths]

    def _thin_snapshots(self) -> None:
        """Keep fewer snapshots, the further back they are."""
        if len(self._times) > MAX_SNAPSHOTS:
            half = MAX_SNAPSHOTS // 2
            self._times = self._times[:half:2] + self._times[half:]
            self._snapshots = self._snapshots[:half:2] + self._snapshots[half:]

    def _at_risk(self, now: int, num_ages: int) -> _Floats:
        """By class and age, how many chunks could have been used again at that age."""
        times, snapshots = self._times, self._snapshots
        rows = []
        nothing = np.zeros(NUM_CLASSES)
        for edge in AGE_EDGES[: num_ages + 1]:
            then = now - edge
            after = bisect_right(times, then)
            if then <= 0:
                rows.append(nothing)
            elif after == 0:
                rows.append(snapshots[0] * (then / times[0]))
            else:
                share = (then - times[after - 1]) / (times[after] - times[after - 1])
                rows.append(snapshots[after - 1] * (1 - share) + snapshots[after] * share)
        at_edges = np.array(rows).T
        return 0.5 * (at_edges[:, :-1] + at_edges[:, 1:])


def _reuse_shares(reused: Table, at_risk: Table) -> _Floats:
    """By class and age, the share of all chunks that is used again at that age."""
    shares: Table = []
    hazards = [FIRST_HAZARD] * len(reused[0])
    for counts, chunks in zip(reused, at_risk, strict=True):
        survivors = 1.0
        of_class = []
        for age, hazard in enumerate(hazards):
            count = counts[age] + PRIOR_CHUNKS * hazard * survivors
            share = min(count / (chunks[age] + PRIOR_CHUNKS), survivors)
            of_class.append(share)
            if survivors > LOW_SURVIVORS:
                hazard = share / survivors
            hazards[age] = min(hazard * HAZARD_GROWTH, MAX_FIRST_HAZARD)
            survivors = max(survivors - share, MIN_SURVIVORS)
        shares.append(of_class)
    return np.array(shares)


def _indices(shares: _Floats, edges: _Floats) -> Table:
    """By class and age, the Gittins index; a chunk of more uses has no lower one."""
    ends = 1.0 - np.cumsum(shares, axis=1)
    survivors = np.maximum(np.concatenate([np.ones((len(shares), 1)), ends], axis=1), MIN_SURVIVORS)
    space = 0.5 * (survivors[:, :-1] + survivors[:, 1:]) * np.diff(edges)
    zeros = np.zeros((len(shares), 1))
    uses = np.concatenate([zeros, np.cumsum(shares, axis=1)], axis=1)
    spent = np.concatenate([zeros, np.cumsum(space, axis=1)], axis=1)
    gained = uses[:, None, 1:] - uses[:, :-1, None]  # class, from, to
    cost = spent[:, None, 1:] - spent[:, :-1, None]
    later = np.tri(len(edges) - 1, dtype=bool).T
    ratios = np.where(later, gained / np.where(later, cost, 1.0), 0.0)
    worths: Table = np.maximum.accumulate(ratios.max(axis=2), axis=0).tolist()
    return worths
