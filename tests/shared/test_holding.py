"""What holds and loads of a ``SharedHeap`` find, and what they protect, in any process."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from shared_heaps import (
    PLACE,
    attach,
    filled,
    keeper_of,
    key_of,
    own,
    wrong_rows,
)
from small_shared_heaps import KEYS, MANY, NUM_CHUNKS, put, settled

from kvheap import HostMemoryAllocator, SharedHeap
from kvheap.errors import ForeignObjectError, LifetimeError
from kvheap.files import MissingChunksError
from kvheap.memory.file_locks import RangeLocks
from kvheap.shared import LeaseLostError
from kvheap.shared.tokens import Token
from kvheap.transfer import CopyPlan, copy


class TestHold:
    def test_it_protects_in_any_process(self, heap: SharedHeap, replica: SharedHeap) -> None:
        put(heap, MANY)
        with replica.hold(MANY[:3]) as one, heap.hold(MANY[2:5]) as other:
            assert put(heap, [key_of(number) for number in range(8)]) == [True] * 3 + [False] * 5
            assert heap.lookup(MANY[:5]).sum() == 0  # they leave when they can
            assert not wrong_rows(one.keys, one.batch)
            assert not wrong_rows(other.keys, other.batch)
            assert one.is_valid()
            heap.check()
            assert keeper_of(heap).waiting_places == 5
        assert settled(heap).free_places == 5
        assert put(heap, [key_of(number) for number in range(8)]) == [True] * 8

    def test_those_that_nobody_holds_leave_first(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        put(heap, MANY)
        with replica.hold(MANY[-2:]):  # used longest ago
            assert put(replica, KEYS) == [True] * 4
            assert heap.lookup(MANY[-2:]).all()

    def test_holds_nest(self, heap: SharedHeap) -> None:
        put(heap, KEYS[:2])
        one, other = heap.hold(KEYS[:2]), heap.hold(KEYS[:1])
        one.release()
        one.release()
        heap.remove(KEYS)
        assert keeper_of(heap).waiting_places == 1
        assert not wrong_rows(KEYS[:1], other.batch)
        other.release()
        assert settled(heap).free_places == NUM_CHUNKS

    def test_a_chunk_that_is_removed_stays_until_the_release(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        put(heap, KEYS)
        with replica.hold(KEYS) as hold:
            assert heap.remove([*KEYS, b"x"]) == KEYS
            assert not replica.lookup(KEYS).any()
            put(heap, MANY)
            assert not wrong_rows(KEYS, hold.batch)
            assert hold.is_valid()

    def test_one_that_is_too_long_says_so(self, path: Path) -> None:
        with own(path, NUM_CHUNKS, lease_s=0.05) as heap, attach(path) as replica:
            put(heap, MANY)
            hold = replica.hold(MANY)
            other = replica.hold(MANY[-2:])
            while put(heap, KEYS) != [True] * 4:
                time.sleep(0.01)
            time.sleep(0.05)
            with pytest.raises(LeaseLostError) as caught, other:
                pass
            assert set(caught.value.keys) <= set(MANY)
            with pytest.raises(LeaseLostError):
                hold.check()
            hold.release()
            heap.check(contents=True)

    def test_an_error_inside_is_not_hidden(self, path: Path) -> None:
        with own(path, NUM_CHUNKS, lease_s=0.01) as heap:
            put(heap, KEYS)
            hold = heap.hold(KEYS)
            heap.remove(KEYS)
            time.sleep(0.03)
            with pytest.raises(ZeroDivisionError), hold:
                raise ZeroDivisionError

    def test_a_missing_key(self, heap: SharedHeap, replica: SharedHeap) -> None:
        put(heap, KEYS[:2])
        for each in (heap, replica):
            with pytest.raises(KeyError, match="missing"):
                each.hold([*KEYS[:2], b"missing", KEYS[1]])
            with each.hold([*KEYS[:2], b"missing", KEYS[1]], allow_partial=True) as hold:
                assert hold.keys == KEYS[:2]
        heap.remove(KEYS)
        assert keeper_of(heap).waiting_places == 0

    def test_one_that_is_dropped_protects_nothing(self, heap: SharedHeap) -> None:
        put(heap, KEYS)
        hold = heap.hold(KEYS)
        del hold
        gc.collect()
        heap.remove(KEYS)
        assert keeper_of(heap).free_places == NUM_CHUNKS

    def test_its_batch_is_for_reading(self, heap: SharedHeap) -> None:
        put(heap, KEYS)
        other = HostMemoryAllocator(1 << 20)
        with heap.hold(KEYS) as hold:
            with pytest.raises(ForeignObjectError, match="view"):
                copy(CopyPlan.between(filled(other, KEYS), hold.batch)).result()
            with pytest.raises(ForeignObjectError):
                heap.heap.batched_free(hold.batch)

    def test_a_key_that_is_named_twice_is_held_once(self, heap: SharedHeap) -> None:
        put(heap, KEYS)
        with heap.hold([KEYS[0], KEYS[0]]) as hold:
            assert hold.keys == KEYS[:1]


class TestLoad:
    def test_into_a_heap_or_its_blocks(self, heap: SharedHeap, replica: SharedHeap) -> None:
        put(heap, KEYS)
        into = HostMemoryAllocator(1 << 20)
        for each in (heap, replica):
            batch = each.load(KEYS[::-1], into)
            assert batch is not None
            assert not wrong_rows(KEYS[::-1], batch)
            for block in batch:
                block.tensor.zero_()
            assert each.load(KEYS, batch) is batch
            assert not wrong_rows(KEYS, batch)
            into.batched_free(batch)
        assert into.stats().allocated_bytes == 0

    def test_into_blocks_that_a_transfer_uses(self, heap: SharedHeap) -> None:
        put(heap, KEYS)
        into = HostMemoryAllocator(1 << 20)
        batch, other = filled(into, MANY[:4]), filled(into, MANY[4:])
        batch.transfer = copy(CopyPlan.between(other, batch))
        assert heap.load(KEYS, batch) is batch
        assert not wrong_rows(KEYS, batch)

    def test_into_a_full_heap(self, heap: SharedHeap) -> None:
        put(heap, KEYS)
        assert heap.load(KEYS, HostMemoryAllocator(3 * PLACE)) is None

    def test_what_is_missing_is_named(self, heap: SharedHeap) -> None:
        put(heap, KEYS)
        into = HostMemoryAllocator(1 << 20)
        with pytest.raises(MissingChunksError) as caught:
            heap.load([KEYS[0], b"x", KEYS[1], b"y"], into)
        assert caught.value.missing == (b"x", b"y")
        assert into.stats().allocated_bytes == 0
        batch = filled(into, KEYS)
        with pytest.raises(ValueError, match="2 keys need as many blocks, got 4"):
            heap.load(KEYS[:2], batch)
        other = HostMemoryAllocator(1 << 20).batched_allocate([4096], torch.int32, 4)
        assert other is not None
        with pytest.raises(ValueError, match="the blocks of into must be"):
            heap.load(KEYS, other)
        into.batched_free(batch)
        with pytest.raises(LifetimeError, match="freed"):
            heap.load(KEYS, batch)
        with pytest.raises(TypeError, match="into must be a heap"):
            heap.load(KEYS[:2], 3)  # type: ignore[arg-type]


def test_a_place_that_this_process_fills_is_not_filled_twice(heap: SharedHeap) -> None:
    """One open file may lock a number twice, and unlocks it at once."""
    one, other = Token(), Token()
    with attach(heap.path) as replica:
        assert replica._leases.fill(one, [3], lambda: True)
        assert not replica._leases.fill(other, [2, 3], lambda: True)
        replica._leases.end(other)
        assert heap._owner.place_locks.is_filled(3)
        assert not heap._owner.place_locks.is_filled(2)
        replica._leases.end(one)
        assert not heap._owner.place_locks.is_filled(3)


def test_what_ends_beside_a_call_that_fails_is_unlocked(
    heap: SharedHeap, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(heap, KEYS)
    with attach(heap.path) as replica:
        hold = replica.hold(KEYS[:1])
        place = hold.records[0].place

        def release_and_fail(*_: object) -> bool:
            thread = threading.Thread(target=hold.release)  # which finds the leases locked
            thread.start()
            thread.join()
            raise OSError("no locks")

        with monkeypatch.context() as patch:
            patch.setattr(RangeLocks, "share", release_and_fail)
            with pytest.raises(OSError, match="no locks"):
                replica._leases.read(Token(), [place + 1])
        assert not heap._owner.place_locks.is_read(place)
