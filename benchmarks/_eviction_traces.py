"""Traffic for bench_eviction: made-up requests of many kinds, each a list of chunk ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count, cycle, islice

Request = list[int]


class Ids:
    """Chunks that were not there before."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count()

    def new(self, num_chunks: int) -> Request:
        return list(islice(self._numbers, num_chunks))


def documents(source: random.Random, num_requests: int, skew: float = 0.8) -> list[Request]:
    """Questions about documents behind one prompt; document i is asked for as i**-skew."""
    ids = Ids()
    head = ids.new(4)
    texts = [head + ids.new(source.randint(5, 30)) for _ in range(5000)]
    weights = [(1 + rank) ** -skew for rank in range(len(texts))]
    asked = source.choices(texts, weights, k=num_requests)
    return [text + ids.new(source.randint(1, 3)) for text in asked]


def zipf(source: random.Random, num_requests: int) -> list[Request]:
    """Prefixes of a large collection, by Zipf's law, each with a question of its own."""
    ids = Ids()
    texts = [ids.new(source.randint(4, 24)) for _ in range(20_000)]
    weights = [(1 + rank) ** -0.9 for rank in range(len(texts))]
    return [text + ids.new(1) for text in source.choices(texts, weights, k=num_requests)]


def loop(source: random.Random, num_requests: int) -> list[Request]:
    """The same requests over and over, as of an evaluation."""
    ids = Ids()
    texts = [ids.new(source.randint(8, 24)) for _ in range(1200)]
    return list(islice(cycle(texts), num_requests))


def scans(source: random.Random, num_requests: int) -> list[Request]:
    """Shared prefixes, and from time to time a batch job of requests that never return."""
    ids = Ids()
    texts = [ids.new(16) for _ in range(300)]
    requests = []
    for number in range(num_requests):
        if number // 1500 % 2 and source.random() < 0.8:
            requests.append(ids.new(source.randint(8, 40)))
        else:
            requests.append(source.choice(texts) + ids.new(2))
    return requests


def chats(source: random.Random, num_requests: int, active: int = 800) -> list[Request]:
    """Conversations that return and grow, behind one of eight prompts."""
    ids = Ids()
    heads = [ids.new(6) for _ in range(8)]
    live: list[Request] = []
    requests = []
    for _ in range(num_requests):
        if live and source.random() < 0.75:
            chat = source.choice(live)
        else:
            chat = list(source.choice(heads))
            live.append(chat)
            if len(live) > active:
                live.pop(source.randrange(active // 2))
        chat += ids.new(source.randint(1, 6))
        requests.append(list(chat))
        if len(chat) > 150:
            live.remove(chat)
    return requests


def agents(source: random.Random, num_requests: int) -> list[Request]:
    """Agents that send a growing context many times in a row, behind prompts with their tools."""
    ids = Ids()
    heads = [ids.new(source.randint(10, 40)) for _ in range(5)]
    live: list[Request] = []
    requests = []
    for _ in range(num_requests):
        while len(live) < 150:
            live.append(source.choice(heads) + ids.new(source.randint(2, 20)))
        agent = source.choice(live)
        agent += ids.new(source.randint(1, 3))
        requests.append(list(agent))
        if source.random() < 0.06:
            live.remove(agent)
    return requests


def drift(source: random.Random, num_requests: int) -> list[Request]:
    """Shared prefixes whose popularity changes all the time."""
    ids = Ids()
    texts = [ids.new(source.randint(6, 20)) for _ in range(3000)]
    weights = [(1 + rank) ** -0.8 for rank in range(len(texts))]
    requests = []
    for number in range(num_requests):
        if number % 2 == 0:
            texts[source.randrange(len(texts))] = ids.new(source.randint(6, 20))
        requests.append(source.choices(texts, weights)[0] + ids.new(2))
    return requests


def phases(source: random.Random, num_requests: int) -> list[Request]:
    """Zipf, a loop, chats and scans, one after the other: what was learnt is wrong three times."""
    requests: list[Request] = []
    for kind in (zipf, loop, chats, scans):
        first = 1 + max((max(request) for request in requests), default=-1)
        part = kind(source, num_requests // 4)
        requests += [[first + key for key in request] for request in part]
    return requests


MADE_UP: dict[str, tuple[Callable[[random.Random, int], list[Request]], int]] = {
    "documents": (documents, 14_000),
    "zipf": (zipf, 18_000),
    "loop": (loop, 14_000),
    "scans": (scans, 12_000),
    "chats": (chats, 12_000),
    "agents": (agents, 5_000),
    "drift": (drift, 16_000),
    "phases": (phases, 16_000),
}
"""By name, what makes a trace, and how many requests it has; about 250,000 references each."""
