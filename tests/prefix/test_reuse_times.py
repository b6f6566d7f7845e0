"""Reuse times and what chunks are worth, against plain loops over the definitions."""

from __future__ import annotations

import math
import random

import pytest

from kvheap.prefix.orders import reuse
from kvheap.prefix.orders.reuse import AGE_EDGES, NUM_AGES, NUM_CLASSES, ReuseTimes, age_of


def test_ages_begin_at_their_edges() -> None:
    for age in range(40):
        first = math.ceil(AGE_EDGES[age])
        assert age_of(first - 1) == age
        assert age_of(math.ceil(AGE_EDGES[age + 1]) - 2) == age
    assert age_of((1 << 48) - 1) < NUM_AGES


class Plain:
    """The same counts, kept as the events themselves."""

    def __init__(self) -> None:
        self.began: list[tuple[int, int, int]] = []  # time, time of the update after it, class
        self.ended: list[tuple[int, int, int]] = []  # time, class, age
        self.updates: list[int] = []

    def begun_by(self, number: int, then: float, window: float) -> float:
        """What had begun by a time, decayed until then; linear between updates."""

        def at(update: int) -> float:
            counts = [t for t, after, c in self.began if c == number and after <= update]
            return sum(math.exp((t - update) / window) for t in counts)

        if then <= 0:
            return 0.0
        before = max((t for t in self.updates if t <= then), default=None)
        after = min((t for t in self.updates if t > then), default=None)
        if before is None:
            assert after is not None
            return at(after) * then / after
        if after is None:
            return at(before)
        share = (then - before) / (after - before)
        return at(before) * (1 - share) + at(after) * share

    def shares(self, now: int, window: float) -> list[list[float]]:
        rows = []
        hazards = [reuse.FIRST_HAZARD] * NUM_AGES
        for number in range(NUM_CLASSES):
            survivors, row = 1.0, []
            for age in range(age_of(now + 1) + 1):
                uses = [t for t, c, a in self.ended if (c, a) == (number, age)]
                count = sum(math.exp((t - now) / window) for t in uses)
                edges = (AGE_EDGES[age], AGE_EDGES[age + 1])
                at_risk = sum(self.begun_by(number, now - edge, window) for edge in edges) / 2
                prior = reuse.PRIOR_CHUNKS
                share = (count + prior * hazards[age] * survivors) / (at_risk + prior)
                share = min(share, survivors)
                if survivors > reuse.LOW_SURVIVORS:
                    hazards[age] = share / survivors
                survivors = max(survivors - share, reuse.MIN_SURVIVORS)
                row.append(share)
            hazards = [min(h * reuse.HAZARD_GROWTH, reuse.MAX_FIRST_HAZARD) for h in hazards]
            rows.append(row)
        return rows

    def worths(self, now: int, window: float) -> list[list[float]]:
        rows: list[list[float]] = []
        for shares in self.shares(now, window):
            survivors = [1.0]
            ends = range(1, len(shares) + 1)
            survivors += [max(1.0 - sum(shares[:end]), reuse.MIN_SURVIVORS) for end in ends]
            row = []
            for first in range(len(shares)):
                best = uses = space = 0.0
                for age in range(first, len(shares)):
                    uses += shares[age]
                    width = AGE_EDGES[age + 1] - AGE_EDGES[age]
                    space += 0.5 * (survivors[age] + survivors[age + 1]) * width
                    best = max(best, uses / space)
                row.append(max(best, rows[-1][first]) if rows else best)
            rows.append(row)
        return rows


@pytest.mark.parametrize("seed", range(3))
def test_worths_are_those_of_the_definitions(seed: int) -> None:
    source = random.Random(seed)
    times, plain, now = ReuseTimes(), Plain(), 0
    for _ in range(12):
        before = now  # all that happens between two updates counts as of the first
        now += source.randint(50, 200)
        begun = [0.0] * NUM_CLASSES
        for _ in range(60):
            number = min(int(source.expovariate(1)), NUM_CLASSES - 1)
            begun[number] += 1
            plain.began.append((before, now, number))
            if source.random() < 0.5:
                age = age_of(source.randint(1, now))
                times.reused[number][age] += 1
                plain.ended.append((before, number, age))
        plain.updates.append(now)
        worths = times.update(now, begun, window=700.0)
    expected = plain.worths(now, 700.0)
    for row, plain_row in zip(worths, expected, strict=True):
        assert row[: len(plain_row)] == pytest.approx(plain_row, rel=1e-6)
        assert row[len(plain_row) :] == [row[len(plain_row) - 1]] * (NUM_AGES - len(plain_row))


def test_snapshots_are_thinned_and_still_tell_what_had_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def worths_after(most: int) -> list[list[float]]:
        monkeypatch.setattr(reuse, "MAX_SNAPSHOTS", most)
        times = ReuseTimes()
        worths: list[list[float]] = []
        for step in range(1, 200):
            times.reused[0][age_of(300)] += 3
            worths = times.update(100 * step, [10.0] + [0.0] * (NUM_CLASSES - 1), 5000.0)
        return worths

    whole, thinned = worths_after(1000), worths_after(16)
    assert whole[0] == pytest.approx(thinned[0], rel=0.05, abs=2e-6)
    assert whole != thinned


def test_what_returns_after_a_fixed_time_is_worth_more_the_nearer_it_is() -> None:
    times = ReuseTimes()
    worths: list[list[float]] = []
    for step in range(1, 100):
        times.reused[0][age_of(900)] += 50
        worths = times.update(100 * step, [50.0] + [0.0] * (NUM_CLASSES - 1), 10_000.0)
    ages = [age_of(references) for references in (10, 100, 400, 800)]
    ordered = [worths[0][age] for age in ages]
    assert ordered == sorted(ordered)
    assert ordered[-1] > 2 * ordered[0]


def test_what_is_used_soon_or_never_is_worth_less_the_older_it_is() -> None:
    times = ReuseTimes()
    worths: list[list[float]] = []
    for step in range(1, 100):
        times.reused[0][age_of(20)] += 10
        worths = times.update(100 * step, [50.0] + [0.0] * (NUM_CLASSES - 1), 10_000.0)
    assert worths[0][age_of(10)] > 10 * worths[0][age_of(100)]
