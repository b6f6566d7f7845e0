"""Streams of rows, against a naive list of records; and what a look-up costs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kvheap import TensorMemoryAllocator
from kvheap.blocks.recorded_streams import RecordedStreams


class Stream:
    """A stream that ends when a test says so, and counts how often it is asked."""

    def __init__(self) -> None:
        self.ended = False
        self.asked = 0

    @property
    def has_let_go(self) -> bool:
        self.asked += 1
        return self.ended

    def record_event(self) -> object:
        raise AssertionError


@pytest.mark.parametrize("seed", range(5))
def test_it_answers_as_a_naive_list_does(seed: int) -> None:
    source = random.Random(seed)
    recorded, naive = RecordedStreams(), []
    streams = [Stream() for _ in range(12)]
    for _ in range(400):
        rows = source.choice([None, [source.randrange(20)], source.sample(range(20), 3)])
        stream = source.choice(streams)
        recorded.add(stream, None if rows is None else np.array(rows))
        naive.append((None if rows is None else set(rows), stream))
        if source.random() < 0.02:
            source.choice(streams).ended = True
        wanted = source.choice([None, source.sample(range(20), source.randint(1, 4))])
        found = recorded.of(None if wanted is None else np.array(wanted)).values()
        expected = {
            id(each) for used, each in naive if used is None or wanted is None or used & set(wanted)
        }
        assert len({id(each) for each in found}) == len(found)
        assert {id(each) for each in found} <= expected
        missing = expected - {id(each) for each in found}
        assert all(each.ended for each in streams if id(each) in missing)


def test_equal_records_are_one() -> None:
    recorded, stream = RecordedStreams(), Stream()
    for _ in range(1000):
        for rows in (None, np.array([3]), np.array([3, 4])):
            recorded.add(stream, rows)
    assert stream.asked == 0  # nothing grew, so nothing was looked for
    assert list(recorded.of(np.array([5])).values()) == [stream]


def test_many_records_are_looked_at_a_few_times_each() -> None:
    heap = TensorMemoryAllocator(torch.zeros(4096 << 4, dtype=torch.uint8), 16, on_full=None)
    batch = heap.batched_allocate([16], torch.uint8, 4096)
    assert batch is not None
    streams = [Stream() for _ in range(4096)]
    for row, stream in enumerate(streams):
        batch[row].record_stream(stream)
    assert sum(stream.asked for stream in streams) <= 2 * len(streams)
    assert list(batch.counts.streams_of(np.array([17])).values()) == [streams[17]]


def test_streams_that_have_ended_are_dropped() -> None:
    heap = TensorMemoryAllocator(torch.zeros(4096, dtype=torch.uint8), on_full=None)
    batch = heap.batched_allocate([16], torch.uint8, 1)
    assert batch is not None
    for _ in range(10_000):
        stream = Stream()
        stream.ended = True
        batch.record_stream(stream)
    assert len(batch.counts.streams_of(None)) <= 16


class EqualStream(Stream):
    """As torch's: each call of ``current_stream`` makes an object that equals the others."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualStream)

    def __hash__(self) -> int:
        return 1


class UnhashableStream(Stream):
    __hash__ = None  # type: ignore[assignment]


def test_equal_streams_are_one() -> None:
    recorded = RecordedStreams()
    for _ in range(1000):
        recorded.add(EqualStream(), None)
        recorded.add(EqualStream(), np.array([3]))
    assert len(recorded.of(None)) == 1


def test_streams_without_a_hash_are_told_apart() -> None:
    recorded, streams = RecordedStreams(), [UnhashableStream() for _ in range(3)]
    for stream in streams * 2:
        recorded.add(stream, None)
    assert list(recorded.of(None).values()) == streams
