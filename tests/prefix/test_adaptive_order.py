"""What the adaptive order learns, by what it keeps of traffic whose answer is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import pytest

from kvheap.prefix.orders import ORDERS, AdaptiveOrder, EvictionOrder
from kvheap.prefix.orders.adaptive import BY_RECENCY
from kvheap.prefix.orders.classes import ClassedChunk
from kvheap.prefix.orders.reuse import NUM_CLASSES
from kvheap.prefix.orders.shadows import ShadowCache

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


def test_a_shadow_counts_the_bytes_that_a_small_cache_finds() -> None:
    source = random.Random(4)
    shadow = ShadowCache[int](320, newest_too=False)
    shadow.extend(NUM_CLASSES)
    chunks = {key: ClassedChunk(key, 1 + key % 5, 0) for key in range(200)}
    plain: list[int] = []  # least recently used first
    found = 0
    for now in range(1, 5000):
        key = min(int(source.expovariate(1 / 60)), 199)
        chunks[key].used_at = now
        shadow.use(chunks[key], BY_RECENCY)
        if key in plain:
            found += 1 + key % 5
            plain.remove(key)
        plain.append(key)
        # It holds 320 bytes on the average: evicts at more than 330, down to 310.
        if sum(1 + each % 5 for each in plain) > 330:
            while sum(1 + each % 5 for each in plain) > 310:
                del plain[0]
        assert shadow.found_bytes == found
    assert 0.3 < found / (3 * 5000) < 0.95
