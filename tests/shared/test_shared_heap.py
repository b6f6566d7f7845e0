"""A ``SharedHeap`` under threads, exceptions and random calls, against a model of its chunks."""

from __future__ import annotations

import gc
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_heaps import (
    attach,
    contents,
    keeper_of,
    key_of,
    own,
    wrong_rows,
)
from small_shared_heaps import MANY, NUM_CHUNKS, put, settled

from kvheap import SharedHeap


class TestManyThreads:
    def test_all_at_once(self, path: Path) -> None:
        num_wrong = []
        with own(path, NUM_CHUNKS) as heap, attach(path) as replica:

            def work(each: SharedHeap, seed: int) -> None:
                rng = random.Random(seed)
                for _ in range(60):
                    keys = [key_of(number) for number in rng.sample(range(24), 3)]
                    put(each, keys)
                    with each.hold(keys, allow_partial=True, verify=False) as hold:
                        num_wrong.extend(wrong_rows(hold.keys, hold.batch))
                    if rng.random() < 0.2:
                        each.remove(keys[:1])

            threads = [
                threading.Thread(target=work, args=(each, seed))
                for seed, each in enumerate([heap, heap, heap, replica, replica, replica])
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not num_wrong
            keeper = settled(heap)
            heap.check(contents=True)
            assert keeper.free_places == NUM_CHUNKS - len(heap.keys())


class StruckError(Exception):
    """From a signal handler."""


class TestInterrupted:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("is_owner", [True, False])
    def test_an_exception_anywhere_loses_nothing(
        self, heap: SharedHeap, replica: SharedHeap, is_owner: bool
    ) -> None:
        each = heap if is_owner else replica
        rng = random.Random(9)

        def strike(*_: object) -> None:
            raise StruckError

        before = signal.signal(signal.SIGALRM, strike)
        num_struck = 0
        try:
            for _ in range(150):
                keys = [key_of(number) for number in rng.sample(range(24), 3)]
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
                        put(each, keys)
                        with each.hold(keys, allow_partial=True) as hold:
                            hold.is_valid()
                        each.remove(keys[:1])
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except StruckError:
                    num_struck += 1
        finally:
            signal.signal(signal.SIGALRM, before)
        gc.collect()
        assert num_struck > 20
        each.keys()  # any call gives back what was dropped without a word
        keeper = settled(heap)
        heap.check(contents=True)
        assert keeper.free_places == NUM_CHUNKS - len(heap.keys())
        assert put(each, MANY) == [True] * NUM_CHUNKS


def test_a_naive_model_agrees(path: Path) -> None:
    """Random calls of an owner, its heirs and others, against a dict of what each key has."""
    rng = random.Random(1)
    heap = own(path, NUM_CHUNKS)
    others = [attach(path), attach(path)]
    held: list[Any] = []
    ready: set[bytes] = set()  # at most: the heap evicts
    for step in range(400):
        each = rng.choice([heap, *others])
        keys = [key_of(number) for number in rng.sample(range(16), rng.randint(1, 4))]
        action = rng.random()
        if action < 0.4:
            found = each.store(keys, contents(keys))
            ready |= {key for key, is_there in zip(keys, found, strict=True) if is_there}
        elif action < 0.5:
            assert set(each.remove(keys)) <= ready & set(keys)
            ready -= set(keys)
        elif action < 0.7:
            held.append(each.hold(keys, allow_partial=True, verify=False))
        elif action < 0.9 and held:
            held.pop(rng.randrange(len(held))).release()
        elif action < 0.93:
            for hold in held:
                hold.release()
            held.clear()
            heap.close()
            heap = own(path, NUM_CHUNKS)
            assert keeper_of(heap).dropped_chunks == 0
        for hold in held:
            assert not wrong_rows(hold.keys, hold.batch), step
        heap.check()
        found_keys = set(heap.keys())
        assert found_keys <= ready
        ready &= found_keys  # evicted ones do not come back
        assert np.array_equal(heap.lookup(sorted(ready)), others[0].lookup(sorted(ready)))
    heap.check(contents=True)
    for each in (*held,):
        each.release()
    for each in (*others, heap):
        each.close()
