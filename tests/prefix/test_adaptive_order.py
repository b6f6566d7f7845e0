"""What the adaptive order learns, by what it keeps of traffic whose answer is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import pytest

from kvheap.prefix.orders import ORDERS, AdaptiveOrder, EvictionOrder
from kvheap.prefix.orders.classes import ClassedChunk
from kvheap.prefix.orders.contest import Contest
from kvheap.prefix.orders.rules import FREQUENCY, RULES, ProbationRule
from kvheap.prefix.orders.shadows import ShadowCache

RECENCY = RULES[0]

Request = Sequence[int]


def hits(order: EvictionOrder[int], requests: Iterable[Request], capacity: int) -> int:
    """Leading chunks that were found."""
    found = 0
    for keys in requests:
        for key in keys:
            if key not in order:
                break
            found += 1
        stored = [key for key in keys if key in order]
        missing = [key for key in reversed(keys) if key not in order]
        order.touch(stored)
        excess = len(order) + len(missing) - capacity
        if excess > 0:
            assert order.evict_until(excess, set(stored).__contains__)
        for key in missing:
            order.insert(key, 1, 0)
        order.settle(keys)
    return found


def of_each(requests: Sequence[Request], capacity: int) -> dict[str, int]:
    return {name: hits(make(capacity), requests, capacity) for name, make in ORDERS.items()}


def test_a_part_of_a_loop_stays_that_does_not_fit() -> None:
    requests = [range(10 * number, 10 * number + 10) for number in range(150)] * 20
    found = of_each(requests, 1200)
    assert found["lru"] == found["arc"] == 0
    assert found["adaptive"] > 0.4 * 20 * 1200


def test_shared_heads_stay_while_requests_pass_that_never_return() -> None:
    source, new = random.Random(1), count(10**6)
    heads = [range(100 * number, 100 * number + 20) for number in range(60)]
    requests = [[*source.choice(heads), *(next(new) for _ in range(40))] for _ in range(2500)]
    found = of_each(requests, 1600)
    assert found["adaptive"] > 1.5 * found["lru"]
    assert found["adaptive"] > 0.9 * 20 * 2500


def test_conversations_that_return_stay_as_with_lru() -> None:
    source, new = random.Random(2), count(1)
    live: list[list[int]] = []
    requests = []
    for _ in range(3000):
        if len(live) < 40 or source.random() < 0.1:
            live.append([next(new) for _ in range(8)])
            live = live[-60:]
        chat = live[-1 - min(int(source.expovariate(1 / 12)), len(live) - 1)]
        chat += [next(new), next(new)]
        requests.append(list(chat))
    found = of_each(requests, 900)
    best = max(found[name] for name in ("lru", "arc", "s3fifo"))
    assert found["adaptive"] > 0.97 * best


def rules_of(order: AdaptiveOrder[int], requests: Iterable[Request], capacity: int) -> set[str]:
    rules = set()
    for keys in requests:
        hits(order, [keys], capacity)
        rules.add(order.rule)
    return rules


def test_the_shadows_choose_between_rules() -> None:
    source = random.Random(3)
    weights = [1 / (1 + rank) for rank in range(4000)]
    popular = [[key] for key in source.choices(range(4000), weights, k=20_000)]
    order = AdaptiveOrder[int](400)
    assert order.rule == "learned"
    assert "frequency" in rules_of(order, popular, 400)
    lately, recent = [], list(range(10_000, 10_600))
    for number in range(20_000):
        recent[source.randrange(600)] = 20_000 + number
        lately.append([recent[-1 - min(int(source.expovariate(1 / 150)), 599)]])
    assert rules_of(order, lately, 400) - {"frequency"}
    order.reset()
    assert order.rule == "learned"


@pytest.mark.parametrize(
    "read", [lambda keys: keys, lambda keys: keys[:-1]], ids=["even", "uneven"]
)
def test_groups_that_are_read_unevenly_are_kept_by_reads(
    read: Callable[[list[int]], list[int]],
) -> None:
    order = AdaptiveOrder[int](10**6)
    for number in range(600):
        keys = [2 * number, 2 * number + 1]
        for key in reversed(keys):
            order.insert(key, 10, group=key % 2)
        order.touch(read(keys))
    is_uneven = read([0, 1]) == [0]
    assert (order.rule == "frequency") == is_uneven
    order.touch([0])
    order.evict([0])
    order.insert(0, 10, group=0)
    victims = order.evict_until(10 * len(order), lambda key: False)
    # What comes again is new where groups are uneven, and has its uses of before where not.
    used_once = 600 if is_uneven else 0
    assert (victims.index(0) <= used_once) == is_uneven


def test_a_chunk_that_was_removed_is_not_remembered() -> None:
    def last_victim(leave: Callable[[AdaptiveOrder[int]], None]) -> int:
        order = AdaptiveOrder[int](100)
        for key in (0, 1):
            order.insert(key, 10, group=0)
        order.touch([0])
        leave(order)
        order.insert(0, 10, group=0)
        order.insert(2, 10, group=0)
        return order.evict_until(30, lambda key: False)[-1]

    assert last_victim(lambda order: order.evict([0])) == 0
    assert last_victim(lambda order: order.remove(0)) == 2


def test_a_shadow_finds_what_a_small_cache_finds() -> None:
    source = random.Random(4)
    shadow = ShadowCache[int](320, RECENCY)
    chunks = {key: ClassedChunk(key, 1 + key % 5, 0) for key in range(200)}
    plain: list[int] = []  # least recently used first
    found = 0
    for now in range(1, 5000):
        key = min(int(source.expovariate(1 / 60)), 199)
        chunks[key].used_at = now
        assert shadow.use(chunks[key]) == (key in plain)
        if key in plain:
            found += 1
            plain.remove(key)
        plain.append(key)
        # It holds 320 bytes on the average: evicts at more than 330, down to 310.
        if sum(1 + each % 5 for each in plain) > 330:
            while sum(1 + each % 5 for each in plain) > 310:
                del plain[0]
    assert 0.3 < found / 5000 < 0.95


def test_on_probation_what_was_used_once_leaves_while_it_has_more_than_its_share() -> None:
    rule = ProbationRule("probation", share=0.25)
    once, twice = 0, 1
    for first_bytes, leaves in ((26, once), (25, twice)):
        worths = rule.worths(first_bytes, 100)
        # Whatever their ages, in ages of two to an octave.
        least = [min(worths[number]) for number in (once, twice)]
        most = [max(worths[number]) for number in (once, twice)]
        assert most[leaves] < least[1 - leaves]
        assert worths[leaves] == sorted(worths[leaves], reverse=True)


def contest_of(rules: Sequence[Any], size_bytes: int) -> tuple[Contest[int], list[int]]:
    """A contest over a heap of 100 chunks that are there, and the number of references."""
    chunks = [ClassedChunk(key, size_bytes, 0) for key in range(100)]
    for now, chunk in enumerate(chunks):
        chunk.used_at = now
    return Contest(rules, 100 * size_bytes, chunks), [len(chunks)]


@pytest.mark.parametrize("size_bytes", [1, 4096])
def test_a_contest_follows_at_once_who_becomes_better(size_bytes: int) -> None:
    contest, now = contest_of([RECENCY, FREQUENCY], size_bytes)
    known: dict[int, ClassedChunk[int]] = {}

    def use(key: int) -> None:
        now[0] += 1
        chunk = known.setdefault(key, ClassedChunk(key, size_bytes, 0))
        chunk.used_at = now[0]
        assert contest.mask == 0  # so few chunks are all in the sample
        contest.use(chunk)
        chunk.uses += 1
        chunk.number = min(chunk.uses - 1, 4)
        contest.decide()

    # Popular ones among many that never return: frequency keeps them, recency does not.
    new = count(10_000)
    for _ in range(30):
        for key in [*range(1000, 1040), *(next(new) for _ in range(100))]:
            use(key)
    assert contest.rule == 1
    # A working set that moves on: those that were used often are in the way.
    uses = 0
    for start in range(2000, 2600, 30):
        for _ in range(3):
            for key in range(start, start + 60):
                use(key)
                uses += 1
        if contest.rule == 0:
            break
    assert contest.rule == 0
    # It took less than the time in which frequency had been ahead.
    assert uses < 30 * 140 / 2


def test_equal_rules_have_no_lead() -> None:
    contest, now = contest_of([RECENCY, RECENCY], 8)
    source = random.Random(6)
    for key in (min(int(source.expovariate(1 / 80)), 400) for _ in range(5000)):
        now[0] += 1
        chunk = ClassedChunk(key, 8, 0)
        chunk.used_at = now[0]
        contest.use(chunk)
        contest.decide()
        assert contest.rule == 0


def test_large_heaps_are_sampled_and_small_ones_are_not() -> None:
    for num_chunks, share in ((100, 1), (999, 1), (1000, 2), (2000, 4), (4000, 8), (10**6, 8)):
        chunk = ClassedChunk(7, 4096, 0)
        contest = Contest([RECENCY], num_chunks * 4096, [chunk])
        sampled = sum(contest.samples(key) for key in range(8000))
        assert 0.8 * 8000 < sampled * share < 1.2 * 8000
