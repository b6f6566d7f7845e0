"""Objects of LMCache that nobody frees: finalizers, cycles, locks and threads."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from typing import Any

import pytest
import torch
from lmcache_scenes import SHAPE, allocated, locks_of, part_of_lmcache


def drop_inside(lock: Any, objs: list[Any]) -> None:
    with lock:
        objs.pop()


class TestDropped:
    def test_each_object_comes_back_at_its_own_end(self, make: Any) -> None:
        allocator = make()
        objs = allocator.batched_allocate(SHAPE, torch.half, 8)
        for left in range(7, -1, -1):
            objs.pop(random.randrange(len(objs)))
            assert allocated(allocator) == left
        assert (allocator.dropped_objects, allocator.num_active_allocations) == (8, 0)
        assert allocator.heap.stats().dropped_blocks == 0

    def test_an_allocation_takes_what_was_dropped(self, make: Any) -> None:
        allocator = make(1)
        for _ in range(3):
            assert allocator.allocate(SHAPE, torch.half) is not None

    def test_the_garbage_collector_ends_objects_in_any_order(self, make: Any) -> None:
        """In a cycle an object and its batch are finalized together, the batch first."""
        allocator = make()
        gc.collect()
        gc.freeze()  # so that collecting looks at little but the cycles made here
        gc.disable()
        try:
            for index in range(100):
                cycle: list[Any] = [allocator.batched_allocate(SHAPE, torch.half, 2)]
                cycle.append(cycle)
                if index % 3 == 0:
                    allocator.free(cycle[0][0])
                del cycle
                gc.collect()
                objs = [allocator.allocate(SHAPE, torch.half) for _ in range(3)]
                assert len({obj.meta.address for obj in objs}) == 3
                assert allocated(allocator) == 3
                allocator.batched_free(objs)
                assert allocated(allocator) == 0
        finally:
            gc.enable()
            gc.unfreeze()
        assert allocator.memcheck()

    def test_an_allocator_that_ends_with_its_objects(self, make: Any) -> None:
        allocator = make()
        heap, cycle = allocator.heap, [allocator, allocator.batched_allocate(SHAPE, torch.half, 4)]
        cycle.append(cycle)
        del allocator, cycle
        gc.collect()
        assert heap.stats().allocated_bytes == 0
        assert heap.memcheck()

    def test_dropping_waits_for_no_lock(self, lm: Any, make: Any) -> None:
        """Whichever lock this thread holds, a finalizer that runs then takes no lock."""
        utils = part_of_lmcache("lmcache.utils")
        allocator = make()
        objs = allocator.batched_allocate(SHAPE, torch.half, 40)
        locks = locks_of("obj", objs[-1]) | locks_of("allocator", allocator)
        locks["lmcache.utils"] = utils._shared_observability_lock
        assert len(locks) >= 5, f"there must be more locks than {list(locks)}"
        assert len(locks) <= len(objs)
        for path, lock in locks.items():
            with_lock = threading.Thread(target=drop_inside, args=(lock, objs), daemon=True)
            with_lock.start()
            with_lock.join(60)
            assert not with_lock.is_alive(), f"a finalizer waits for {path}"
        objs.clear()
        assert allocated(allocator) == 0

    def test_a_finalizer_waits_for_no_lock(
        self, lm: Any, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Dropped, and even freed by a finalizer of somebody else's, in the middle of a call."""
        allocator = make()
        locks = locks_of("manager", allocator.heap.address_manager)  # not reentrant
        assert locks
        dropped = allocator.batched_allocate(SHAPE, torch.half, 20)
        freed = allocator.batched_allocate(SHAPE, torch.half, 20)

        def inside(*_: object) -> None:
            with contextlib.ExitStack() as stack:
                for lock in locks.values():
                    stack.enter_context(lock)
                dropped.pop()
                freed.pop().ref_count_down()

        class HookedHeap:
            """Runs the finalizers at every use of the heap."""

            def __getattr__(self, name: str) -> Any:
                inside()
                return getattr(heap, name)

        def call_and_count(method: Any, *arguments: Any) -> int:
            """How often the finalizers ran inside the call."""
            before = len(freed)
            worker = threading.Thread(target=method, args=arguments, daemon=True)
            worker.start()
            worker.join(60)
            assert not worker.is_alive()
            assert len(dropped) == len(freed)
            return before - len(freed)

        heap = allocator.heap
        monkeypatch.setattr(allocator, "heap", HookedHeap())
        assert call_and_count(allocator.allocate, SHAPE, torch.half) >= 1
        assert call_and_count(allocator.batched_free, []) >= 2  # what the first call left too
        monkeypatch.undo()
        monitor = lm.TensorMemoryObj.monitor
        monkeypatch.setattr(monitor, "update_local_cache_usage", inside)
        monkeypatch.setattr(monitor, "update_active_memory_objs_count", inside)
        assert call_and_count(allocator.batched_free, []) == 2
        monkeypatch.undo()
        assert allocated(allocator) == len(dropped) + len(freed)
        dropped.clear()
        allocator.batched_free(freed)
        assert allocated(allocator) == 0


class TestThreads:
    def test_threads(self, make: Any) -> None:
        """Every way to end, by several threads at once: nothing is lost, nothing freed twice."""
        allocator = make(48)
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            dice = random.Random(seed)
            held: list[Any] = []
            try:
                for _ in range(400):
                    objs = allocator.batched_allocate(SHAPE, torch.half, dice.randrange(1, 6))
                    for obj in objs or []:
                        obj.raw_data.fill_(seed)
                    held += objs or []
                    dice.shuffle(held)
                    assert all(obj.raw_data.eq(seed).all() for obj in held)
                    while len(held) > 8:
                        end = dice.randrange(3)
                        if end == 0:
                            held.pop().ref_count_down()
                        elif end == 1:
                            held.pop()
                        else:
                            allocator.batched_free([held.pop(), held.pop()])
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures
        gc.collect()
        assert allocated(allocator) == allocator.num_active_allocations == 0
        assert allocator.memcheck()

    def test_two_threads_end_one_object(self, make: Any) -> None:
        allocator = make(2)
        for _ in range(300):
            obj = allocator.allocate(SHAPE, torch.half)
            start = threading.Barrier(2)

            def end(obj: Any = obj, start: threading.Barrier = start) -> None:
                start.wait()
                allocator.free(obj)

            workers = [threading.Thread(target=end) for _ in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert allocated(allocator) == 0
