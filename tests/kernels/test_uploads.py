"""Words of launches: pinned memory is not written again before the device has read it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvheap.kernels import uploads
from kvheap.kernels.uploads import WordRing, Words

SEGMENT, SEGMENTS = 16, 4
CUDA = torch.device("cuda", 0)


@dataclass
class Stream:
    """A stream whose device reads late: copies are done when ``run`` says so."""

    targets: list[torch.Tensor] = field(default_factory=list)
    queue: list[tuple[int, int, int]] = field(default_factory=list)
    done: int = 0
    received: list[list[int]] = field(default_factory=list)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        self.queue.append((source, target, num_bytes))

    def record_event(self) -> Any:
        at = len(self.queue)
        return SimpleNamespace(query=lambda: self.done >= at)

    def run(self, count: int) -> None:
        """Do the next copies, and keep what arrived."""
        for source, target, num_bytes in self.queue[self.done : self.done + count]:
            ctypes.memmove(target, source, num_bytes)
            self.received.append(list((ctypes.c_int64 * (num_bytes // 8)).from_address(target)))
            self.done += 1


def ring_of(stream: Stream) -> WordRing:
    pinned = torch.full((SEGMENT * SEGMENTS,), -1, dtype=torch.int64)
    stream.targets.append(torch.zeros(SEGMENT, dtype=torch.int64))
    return WordRing(pinned, stream.targets[-1], stream.copy, stream.record_event)


@pytest.mark.parametrize("seed", range(30))
def test_the_device_receives_what_was_written_however_late_it_reads(seed: int) -> None:
    random, stream = np.random.default_rng(seed), Stream()
    ring, sent, refused = ring_of(stream), [], 0
    for number in range(300):
        count = int(random.integers(1, SEGMENT + 1))
        start = ring.take(count)
        if start is None:
            refused += 1
        else:
            words = [1000 * number + at for at in range(count)]
            ring.words(start, count)[:] = words
            ring.send(start, count)
            sent.append(words)
        stream.run(int(random.integers(0, 3)))
    stream.run(len(sent))
    assert stream.received == sent
    assert len(sent) > 50
    assert refused or seed  # a device that reads late is met


def test_more_words_than_a_segment_are_refused() -> None:
    ring = ring_of(Stream())
    assert ring.take(SEGMENT + 1) is None
    assert ring.take(SEGMENT) == 0


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current stream of a device that is not there."""
    found = Stream()
    monkeypatch.setattr(uploads, "_FREE", {})
    monkeypatch.setattr(uploads, "_new_ring", lambda: ring_of(found))
    monkeypatch.setattr(uploads, "current_stream", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def staged(num_words: int, device: torch.device) -> Any:
        words = torch.zeros(num_words, dtype=torch.int64)
        return SimpleNamespace(numpy=words.numpy, to=lambda *_, **__: words)

    monkeypatch.setattr(uploads, "staging", staged)
    return found


def test_words_of_a_stream_go_through_its_ring(stream: Stream) -> None:
    for number in range(100):
        with Words(5, CUDA) as words:
            words.host[:] = number
            assert words.send() is stream.targets[0]
        stream.run(1)
    assert stream.received == [[number] * 5 for number in range(100)]


def test_words_within_words_take_memory_of_their_own(stream: Stream) -> None:
    """As in a finalizer that copies while a copy is being launched, or on another thread."""
    with Words(5, CUDA) as words:
        words.host[:] = 1
        sent = words.send()
        with Words(5, CUDA) as inner:
            inner.host[:] = 2
            assert inner.send() is not sent
    stream.run(9)
    assert stream.received == [[1] * 5, [2] * 5]
    for _ in range(9):
        with Words(5, CUDA) as words, Words(5, CUDA):
            words.send()
    assert len(stream.targets) == 2


def test_words_that_find_no_room_take_memory_of_their_own(stream: Stream) -> None:
    """The device reads nothing, and nobody waits for it."""
    own = []
    for number in range(20):
        with Words(10, CUDA) as words:
            words.host[:] = number
            sent = words.send()
            if sent is not stream.targets[0]:
                own.append(sent.tolist())
    assert own == [[number] * 10 for number in range(SEGMENTS, 20)]
    stream.run(20)
    assert stream.received == [[number] * 10 for number in range(SEGMENTS)]
    with Words(10, CUDA) as words:
        assert words.send() is stream.targets[0]


def test_a_ring_is_used_again_after_a_launch_that_failed(stream: Stream) -> None:
    with pytest.raises(ZeroDivisionError), Words(5, CUDA):
        raise ZeroDivisionError
    with Words(5, CUDA) as words:
        assert words.send() is stream.targets[0]


def test_a_capture_refuses_words_but_not_launches_without(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"), Words(5, CUDA):
        pass
    with Words(0, CUDA) as words:
        assert len(words.host) == 0
