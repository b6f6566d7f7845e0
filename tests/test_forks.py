"""A child that is forked while other threads are at work can go on with what it inherited."""

from __future__ import annotations

import inspect
import os
import pkgutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, filled, heap_on
from forked_child import in_a_child
from optional import NEED_VLLM
from transfer_fixtures import device

import kvheap
from kvheap import LazyMemoryAllocator, TensorMemoryAllocator, TransferError, offload

__all__ = ["device"]

PAGE = 4096
LOCKS = (type(threading.Lock()), type(threading.RLock()))

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def locks_of(obj: object, seen: dict[int, object], found: list[tuple[object, str]]) -> None:
    """Every lock that an object of kvheap holds, and the attribute that it is."""
    if id(obj) in seen or not type(obj).__module__.startswith("kvheap"):
        return
    seen[id(obj)] = obj
    names = set(getattr(obj, "__dict__", ()))
    for kind in type(obj).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names |= {slots} if isinstance(slots, str) else set(slots)
    for name in names:
        value = getattr(obj, name, None)
        if isinstance(value, LOCKS):
            found.append((obj, name))
        else:
            locks_of(value, seen, found)


@contextmanager
def held_by_another_thread(lock: Any) -> Iterator[None]:
    """A reentrant lock would let the thread that forks in."""
    is_held, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def heap_and_batch() -> tuple[TensorMemoryAllocator, Any]:
    buffer = torch.zeros(64 * PAGE, dtype=torch.uint8)
    heap = TensorMemoryAllocator(buffer, on_full=None, debug=True)
    batch = heap.batched_allocate([PAGE], torch.uint8, 8)
    assert batch is not None
    batch[3].pin(ttl=3600)
    return heap, batch


def use(heap: TensorMemoryAllocator, batch: Any) -> tuple[int, bool]:
    """Every kind of operation; the bytes that are left, and whether all is in order."""
    batch[0].ref_count_up()
    batch[0].ref_count_down()
    heap.free(batch[1])
    other = heap.batched_allocate([PAGE], torch.uint8, 4, source=torch.ones(4, PAGE).byte())
    assert other is not None
    heap.batched_free(other, out=torch.empty(4, PAGE, dtype=torch.uint8))
    heap.add_buffer(torch.zeros(PAGE, dtype=torch.uint8))
    heap.address_manager.check()
    return heap.stats().allocated_bytes, heap.memcheck()


def use_and_close(heap: TensorMemoryAllocator, batch: Any) -> tuple[int, bool]:
    answer = use(heap, batch)
    heap.close(timeout_s=1.0)
    return answer


def test_every_lock_starts_anew() -> None:
    """Whichever lock another thread holds at the fork."""
    heap, batch = heap_and_batch()
    found: list[tuple[object, str]] = []
    seen: dict[int, object] = {}
    for start in (heap, batch):
        locks_of(start, seen, found)
    names = {f"{type(obj).__name__}.{name}" for obj, name in found}
    assert names >= {"Guard.lock", "TensorMemoryAllocator._close_lock"}
    for obj, name in found:
        with held_by_another_thread(getattr(obj, name)):
            assert in_a_child(lambda: use_and_close(heap, batch)) == (7 * PAGE, True), name
    assert use(heap, batch) == (7 * PAGE, True)  # the parent is as it was


def test_the_lock_of_a_view_too() -> None:
    heap, batch = heap_and_batch()
    view = heap.view(batch.metadata)
    with held_by_another_thread(heap.lifetime.guard.lock):
        assert in_a_child(lambda: view[0].ref_count_up()) is None
    assert view[0].ref_count == 1


def test_every_class_with_a_lock_knows_of_forks() -> None:
    """By the source: whoever makes a lock also says what a child does with it."""
    missing = []
    for module in pkgutil.walk_packages(kvheap.__path__, "kvheap."):
        if module.name.endswith("__main__"):
            continue
        if module.name in NEED_VLLM and find_spec("vllm") is None:
            continue
        for kind in vars(import_module(module.name)).values():
            if not inspect.isclass(kind) or kind.__module__ != module.name:
                continue
            makes_lock = any(text in inspect.getsource(kind) for text in ("Lock()", "RLock()"))
            if makes_lock and not hasattr(kind, "start_over_after_fork"):
                missing.append(f"{kind.__module__}.{kind.__qualname__}")
    assert missing == []


def test_a_fork_in_the_middle_of_operations() -> None:
    """Threads allocate and free all the time: a child is forked wherever they are."""
    heap, batch = heap_and_batch()
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            other = heap.batched_allocate([PAGE], torch.uint8, 3)
            if other is not None:
                heap.batched_free(other)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            left, in_order = in_a_child(lambda: use(heap, batch))
            assert in_order
            assert left >= 7 * PAGE  # what another thread had just allocated stays allocated
            time.sleep(0.001)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert heap.stats().allocated_bytes == 8 * PAGE


@pytest.fixture
def ends(device: FakeDevice) -> tuple[TensorMemoryAllocator, TensorMemoryAllocator]:
    return heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)


def test_a_transfer_in_flight_is_lost_in_the_child(
    ends: tuple[TensorMemoryAllocator, TensorMemoryAllocator], device: FakeDevice
) -> None:
    near, far = ends
    away = offload(filled(near, 4), far, device.stream())  # type: ignore[arg-type]
    assert away is not None
    transfer = away.transfer
    assert transfer is not None

    def ask() -> tuple[bool, bool]:
        assert transfer.done()
        for question in (transfer.result, lambda: away[0].tensor):
            with pytest.raises(TransferError, match="does not continue in a forked child"):
                question()
        another = far.batched_allocate([16], torch.uint8, 1)
        assert another is not None
        return transfer.wait(1.0), another[0].tensor is not None

    assert in_a_child(ask) == (True, True)
    device.drain()
    transfer.result()


def test_growth_ends_in_the_child() -> None:
    committing = threading.Event()
    with LazyMemoryAllocator(
        1 << 20, 64 << 20, pin="no", piece_bytes=1 << 20, on_progress=lambda _: committing.wait()
    ) as heap:

        def ask() -> tuple[bool, str, int]:
            obj = heap.allocate([16], torch.uint8)
            assert obj is not None
            with pytest.raises(RuntimeError, match="does not continue in a forked child"):
                heap.wait_until_grown(5)
            done = heap.progress.done
            heap.close()
            return done, repr(heap.progress.error), heap.progress.committed_bytes

        try:
            done, error, committed = in_a_child(ask)
        finally:
            committing.set()
        assert done
        assert "forked child" in error
        assert committed <= 2 << 20
        assert heap.wait_until_grown()
