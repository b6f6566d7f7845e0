"""Heaps of a few pages, streams whose work ends when a test says so, and calls in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from kvheap import (
    MemoryBatch,
    TensorMemoryAllocator,
)

PAGE = 4096


def heap_of(pages: int, **options: object) -> TensorMemoryAllocator:
    buffer = torch.zeros(pages * PAGE, dtype=torch.uint8)
    return TensorMemoryAllocator(buffer, **options)  # type: ignore[arg-type]


def take(heap: TensorMemoryAllocator, count: int) -> MemoryBatch:
    batch = heap.batched_allocate([PAGE], torch.uint8, count)
    assert batch is not None
    return batch


def allocated_pages(heap: TensorMemoryAllocator) -> int:
    return heap.stats().allocated_bytes // PAGE


def in_threads(calls: list[Callable[[], object]]) -> list[BaseException | None]:
    """What each call raised, run all at once."""
    raised: list[BaseException | None] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            calls[index]()
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.position = stream.submitted

    def query(self) -> bool:
        return self.stream.done >= self.position


class FakeStream:
    """A stream whose work ends when a test says so."""

    def __init__(self) -> None:
        self.submitted = 0
        self.done = 0

    def submit(self) -> None:
        self.submitted += 1

    def finish(self) -> None:
        self.done = self.submitted

    def record_event(self) -> FakeEvent:
        return FakeEvent(self)


class BrokenStream(FakeStream):
    def record_event(self) -> FakeEvent:
        raise RuntimeError("the stream is gone")


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heaps are in debug mode only if the test says so."""
    monkeypatch.delenv("KVHEAP_DEBUG", raising=False)
