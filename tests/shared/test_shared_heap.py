"""What a ``SharedHeap`` does for its owner and for others, in one process."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from errno import EMFILE
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_child import in_a_child
from shared_heaps import PLACE, attach, contents, expected, filled, key_of, own, wrong_rows

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat, SharedHeap
from kvheap.errors import ClosedError, ForeignObjectError, LifetimeError
from kvheap.files import MissingChunksError
from kvheap.memory.file_locks import RangeLocks
from kvheap.shared import LeaseLostError, NoOwnerError
from kvheap.shared.chunk_table import ChunkTable
from kvheap.shared.leases import Leases
from kvheap.shared.stats import KeeperStats
from kvheap.shared.tokens import Token
from kvheap.transfer import CopyPlan, copy

NUM_CHUNKS = 8

KEYS = [key_of(number) for number in range(4)]

MANY = [key_of(number) for number in range(100, 100 + NUM_CHUNKS)]


@pytest.fixture
def heap(path: Path) -> Iterator[SharedHeap]:
    with own(path, NUM_CHUNKS) as heap:
        yield heap
        heap.check()


@pytest.fixture
def replica(heap: SharedHeap) -> Iterator[SharedHeap]:
    with attach(heap.path) as replica:
        yield replica


def put(heap: SharedHeap, keys: list[bytes]) -> list[bool]:
    found: list[bool] = heap.store(keys, contents(keys)).tolist()
    return found


def keeper_of(heap: SharedHeap) -> KeeperStats:
    keeper = heap.stats().keeper
    assert keeper is not None
    return keeper


def settled(heap: SharedHeap) -> KeeperStats:
    """What the keeper says once nothing waits any more."""
    end_s = time.monotonic() + 30
    while (keeper := keeper_of(heap)).waiting_places or keeper.pending_chunks:
        assert time.monotonic() < end_s, keeper
        time.sleep(0.005)
    return keeper


class TestStore:
    def test_everybody_finds_what_anybody_stored(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        assert put(heap, KEYS[:2]) == [True, True]
        assert put(replica, KEYS[2:]) == [True, True]
        for each in (heap, replica):
            assert each.lookup([*KEYS, b"x"]).tolist() == [True] * 4 + [False]
            assert each.prefix_length([*KEYS[:3], b"x", KEYS[3]]) == 3
            assert sorted(each.keys()) == KEYS
            with each.hold(KEYS[::-1]) as hold:
                assert hold.keys == KEYS[::-1]
                assert not wrong_rows(hold.keys, hold.batch)
        assert heap.stats().ready_chunks == replica.stats().ready_chunks == 4
        assert replica.stats().owner_pid == os.getpid()
        assert replica.stats().keeper is None
        assert keeper_of(heap).stored_chunks == 4
        assert keeper_of(heap).num_writers == 1

    def test_a_chunk_that_is_there_is_not_written_again(self, heap: SharedHeap) -> None:
        put(heap, KEYS[:2])
        assert heap.store(KEYS, torch.zeros(4, 2048, dtype=torch.int64)).all()
        with heap.hold(KEYS) as hold:
            assert not wrong_rows(KEYS[:2], hold.batch[:2])
            assert not hold.batch[2].tensor.any()

    def test_from_blocks_of_another_heap(self, heap: SharedHeap, replica: SharedHeap) -> None:
        other = HostMemoryAllocator(1 << 20)
        batch = filled(other, KEYS)
        put(heap, KEYS[1:2])
        assert replica.store(KEYS, batch).all()
        assert heap.store([b"one"], [batch[3]]).all()
        with heap.hold(KEYS) as hold:
            assert not wrong_rows(KEYS, hold.batch)
        with heap.hold([b"one"]) as hold:
            assert torch.equal(hold.batch[0].tensor, expected(KEYS[3]))
        other.batched_free(batch)
        assert other.stats().allocated_bytes == 0

    def test_from_any_strides(self, heap: SharedHeap) -> None:
        wide = torch.zeros(4, 3, 2048, dtype=torch.int64)
        wide[:, 1] = contents(KEYS)
        assert heap.store(KEYS, wide[:, 1]).all()
        with heap.hold(KEYS) as hold:
            assert not wrong_rows(KEYS, hold.batch)

    def test_so_many_that_threads_share_them(self, path: Path) -> None:
        keys = [key_of(number) for number in range(400)]
        source = contents(keys)
        with own(path, 400) as heap:
            heap.store(keys[5:200:7], source[5:200:7])
            heap.store(keys[300:], source[300:])
            heap.remove(keys[310:380:2])
            assert heap.store(keys, source).all()
            with heap.hold(keys) as hold:
                assert not wrong_rows(keys, hold.batch)
            heap.check(contents=True)

    def test_torch_does_not_copy(
        self, heap: SharedHeap, replica: SharedHeap, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On busy cores its threads wait for each other, for milliseconds."""
        source = contents(KEYS)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("torch copies"))
            assert replica.store(KEYS, source).all()
        with heap.hold(KEYS) as hold:
            assert not wrong_rows(KEYS, hold.batch)

    def test_numbers_of_tokens(self, heap: SharedHeap, replica: SharedHeap) -> None:
        heap.store(KEYS[:3], contents(KEYS[:3]), num_tokens=[16, 16, 5])
        put(heap, KEYS[3:])
        with replica.hold(KEYS) as hold:
            assert hold.num_tokens == [16, 16, 5, 0]

    def test_several_groups_and_places_with_padding(self, path: Path) -> None:
        layout = BlockLayout.of(
            [(3, 5), (7,)], [torch.float32, torch.int16], MemoryFormat.UNDEFINED
        )
        source = torch.randint(0, 255, (3, layout.size_bytes), dtype=torch.uint8)
        with SharedHeap(path, 3 * 4096, layout, namespace="x") as heap:
            assert heap.store(KEYS[:3], source).all()
            with heap.hold(KEYS[:3]) as hold:
                for row in range(3):
                    assert bytes(hold.batch[row].byte_view) == bytes(source[row].numpy())
            batch = heap.load(KEYS[:3], HostMemoryAllocator(1 << 20))
            assert batch is not None
            assert bytes(batch[2].byte_view) == bytes(source[2].numpy())

    def test_nothing(self, heap: SharedHeap, replica: SharedHeap) -> None:
        for each in (heap, replica):
            assert each.store([], torch.empty(0, 2048, dtype=torch.int64)).tolist() == []
            assert each.lookup([]).tolist() == []
            assert each.remove([]) == []
            with each.hold([]) as hold:
                assert len(hold) == 0
            batch = each.load([], HostMemoryAllocator(1 << 20))
            assert batch is not None
            assert len(batch) == 0
            with each.begin([]) as store:
                assert store.complete() == 0

    @pytest.mark.parametrize("order", ["lru", "arc", "s3fifo", "adaptive"])
    def test_a_full_heap_evicts(self, path: Path, order: str) -> None:
        with own(path, NUM_CHUNKS, policy=order) as heap:
            for number in range(0, 10 * NUM_CHUNKS, 2):
                keys = [key_of(number), key_of(number + 1)]
                assert put(heap, keys) == [True, True]
                with heap.hold(keys) as hold:
                    assert not wrong_rows(keys, hold.batch)
                heap.check()
            assert keeper_of(heap).evicted_chunks == 9 * NUM_CHUNKS
            assert len(heap.keys()) == NUM_CHUNKS

    def test_more_than_fits(self, heap: SharedHeap, replica: SharedHeap) -> None:
        keys = [key_of(number) for number in range(NUM_CHUNKS + 3)]
        assert put(replica, keys) == [True] * NUM_CHUNKS + [False] * 3
        assert keeper_of(heap).refused_chunks == 3

    def test_what_was_used_last_leaves_last(self, heap: SharedHeap, replica: SharedHeap) -> None:
        put(heap, MANY)
        replica.touch([MANY[0], b"x", MANY[1]])
        heap.touch([MANY[2]])
        into = HostMemoryAllocator(1 << 20)
        replica.load([MANY[3]], into)
        put(replica, [b"1", b"2", b"3", b"4"])
        assert heap.lookup(MANY).tolist() == [True] * 4 + [False] * 4

    def test_the_head_of_a_request_leaves_after_its_tail(self, heap: SharedHeap) -> None:
        put(heap, MANY)
        put(heap, KEYS[:2])
        assert heap.lookup(MANY).tolist() == [True] * 6 + [False] * 2

    def test_the_order_outlives_the_owner(self, path: Path) -> None:
        with own(path, NUM_CHUNKS) as heap:
            put(heap, MANY)
            heap.touch(MANY[6:])
        with own(path, NUM_CHUNKS) as heap:
            assert keeper_of(heap).restored_chunks == NUM_CHUNKS
            put(heap, [key_of(number) for number in range(6)])
            assert heap.lookup(MANY).tolist() == [False] * 6 + [True] * 2

    @pytest.mark.parametrize(
        ("keys", "source", "error", "message"),
        [
            ("ab", contents(KEYS), TypeError, r"got 'ab'"),
            (["a"], contents(KEYS[:1]), TypeError, r"must be bytes, got 'a'"),
            ([b""], contents(KEYS[:1]), ValueError, r"1 to 96 bytes, got 0"),
            ([b"x" * 97], contents(KEYS[:1]), ValueError, r"1 to 96 bytes, got 97"),
            ([b"x", b"x"], contents(KEYS[:2]), ValueError, r"b'x' twice"),
            ([b"x"], contents(KEYS[:2]), ValueError, r"must have shape \(1, 2048\)"),
            ([b"x"], contents(KEYS[:1]).float(), ValueError, r"must be torch.int64"),
            (
                [b"x"],
                torch._neg_view(contents(KEYS[:1])),
                ValueError,
                r"source is a lazy conj or neg",
            ),
            ([b"x"], 3, TypeError, r"source must be a tensor or blocks"),
            ([b"x"], [], ValueError, r"1 keys need as many blocks, got 0"),
        ],
    )
    def test_a_wrong_argument_stores_nothing(
        self,
        heap: SharedHeap,
        replica: SharedHeap,
        keys: Any,
        source: Any,
        error: Any,
        message: str,
    ) -> None:
        for each in (heap, replica):
            with pytest.raises(error, match=message):
                each.store(keys, source)
        assert not heap.keys()
        assert keeper_of(heap).free_places == NUM_CHUNKS

    @pytest.mark.parametrize("tokens", [[1], [1, -1], [1, 1 << 32], [1, 1.5]])
    def test_wrong_numbers_of_tokens(self, heap: SharedHeap, tokens: Any) -> None:
        with pytest.raises((ValueError, TypeError), match="num_tokens"):
            heap.store(KEYS[:2], contents(KEYS[:2]), tokens)
        assert keeper_of(heap).free_places == NUM_CHUNKS

    def test_keys_of_any_length_and_bytes(self, heap: SharedHeap, replica: SharedHeap) -> None:
        keys = [b"\0", b"\0\0", b"x" * 96, b"x" * 95, bytes(range(96))]
        assert put(heap, keys) == [True] * 5
        assert sorted(replica.keys()) == sorted(keys)
        assert replica.lookup([*keys, b"\0\0\0", b"x" * 94]).tolist() == [True] * 5 + [False] * 2


class TestBegin:
    @pytest.mark.parametrize("is_owner", [True, False])
    def test_nobody_finds_a_chunk_before_it_is_complete(
        self, heap: SharedHeap, replica: SharedHeap, is_owner: bool
    ) -> None:
        one, other = (heap, replica) if is_owner else (replica, heap)
        with one.begin(KEYS[:2]) as store:
            assert not heap.lookup(KEYS).any()
            assert put(other, KEYS[:3]) == [False, False, True]  # the first two are one's
            for row, key in enumerate(store.keys):
                store.batch[row].tensor.copy_(expected(key))
            assert store.complete([7, 8]) == 2
            assert store.complete() == 0
        with other.hold(KEYS[:3]) as hold:
            assert not wrong_rows(hold.keys, hold.batch)
            assert hold.num_tokens == [7, 8, 0]

    @pytest.mark.parametrize("is_owner", [True, False])
    def test_what_is_given_up_leaves_nothing(
        self, heap: SharedHeap, replica: SharedHeap, is_owner: bool
    ) -> None:
        one = heap if is_owner else replica
        with one.begin(KEYS[:2]):
            assert keeper_of(heap).pending_chunks == 2
        store = one.begin(KEYS[2:])
        store.abort()
        store.abort()
        with pytest.raises(LifetimeError, match="aborted"):
            store.complete()
        dropped = one.begin([b"dropped"])
        del dropped
        gc.collect()
        assert settled(heap).free_places == NUM_CHUNKS
        assert put(one, KEYS) == [True] * 4

    def test_only_what_is_missing(self, heap: SharedHeap) -> None:
        put(heap, KEYS[1:2])
        with heap.begin(KEYS[:3]) as store:
            assert store.keys == [KEYS[0], KEYS[2]]
            assert store.rows == [0, 2]
            assert store.were_ready.tolist() == [False, True, False]

    @pytest.mark.parametrize("is_owner", [True, False])
    def test_a_chunk_that_is_removed_meanwhile_is_not_found(
        self, heap: SharedHeap, replica: SharedHeap, is_owner: bool
    ) -> None:
        one, other = (heap, replica) if is_owner else (replica, heap)
        with one.begin(KEYS[:2]) as store:
            store.batch[0].tensor.zero_()
            assert other.remove([KEYS[0], b"x"]) == [KEYS[0]]
            assert put(other, KEYS[:1]) == [True]  # at another place
            store.batch[1].tensor.zero_()
            assert store.complete() == 1
        with heap.hold(KEYS[:1]) as hold:
            assert not wrong_rows(KEYS[:1], hold.batch)
        assert settled(heap).free_places == NUM_CHUNKS - 2

    @pytest.mark.parametrize(
        "options",
        [
            {"num_tokens": [1, 1 << 32]},
            {"num_tokens": [1, -1]},
            {"num_tokens": [1]},
            {"num_tokens": [1, "2"]},
            {"digests": [1, 1 << 64]},
            {"digests": [1, -1]},
            {"digests": [1]},
        ],
    )
    def test_a_wrong_number_changes_nothing(
        self, heap: SharedHeap, replica: SharedHeap, options: Any
    ) -> None:
        for each in (heap, replica):
            with each.begin(KEYS[:2]) as store:
                with pytest.raises((ValueError, TypeError), match=next(iter(options))):
                    store.complete(**options)
                heap.check()
                assert store.state == "open"
            heap.check()
            assert settled(heap).free_places == NUM_CHUNKS

    def test_what_is_given_up_beside_a_call_of_another_thread(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        store = replica.begin(KEYS)
        goes_on = threading.Event()
        heap._owner.service.tell(goes_on.wait)  # type: ignore[union-attr]
        thread = threading.Thread(target=replica.remove, args=([b"x"],))
        thread.start()
        while not replica._channel._lock.locked():  # type: ignore[attr-defined]
            time.sleep(0.001)
        store.abort()
        goes_on.set()
        thread.join()
        end_s = time.monotonic() + 60
        while keeper_of(heap).free_places < NUM_CHUNKS:
            assert time.monotonic() < end_s, keeper_of(heap)
            time.sleep(0.001)

    def test_without_an_owner(self, path: Path) -> None:
        with own(path, NUM_CHUNKS) as heap:
            put(heap, KEYS)
            replica = attach(path)
            store = replica.begin([b"x"])
        for call in (lambda: put(replica, [b"y"]), lambda: replica.remove(KEYS), store.complete):
            with pytest.raises(NoOwnerError):
                call()
        with replica.hold(KEYS) as hold:
            assert not wrong_rows(KEYS, hold.batch)
        with own(path, NUM_CHUNKS) as heap:
            assert put(replica, [b"y"]) == [True]
            assert heap.lookup([b"y"]).all()
            heap.check()
        replica.close()

    @pytest.mark.parametrize("is_owner", [True, False])
    def test_a_free_place_that_a_late_writer_has_just_locked(
        self, heap: SharedHeap, replica: SharedHeap, is_owner: bool
    ) -> None:
        """It got the place of an earlier owner, and has not yet seen that it is not its own."""
        late = attach(heap.path)
        late._leases.fill(Token(), [], lambda: True)
        locked = Token()
        assert late._leases.fill(locked, [0, 3], lambda: True)
        one = heap if is_owner else replica
        assert put(one, MANY) == [True] * (NUM_CHUNKS - 2) + [False] * 2
        with heap.hold(MANY[:-2]) as hold:
            assert not wrong_rows(hold.keys, hold.batch)
        assert keeper_of(heap).waiting_places == 2
        late._leases.end(locked)
        late.close()
        assert settled(heap).free_places == 2

    def test_places_of_an_earlier_owner_are_not_filled(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that has got places, and locks them when there is another owner."""
        with own(path, NUM_CHUNKS):
            replica = attach(path)
            channel = replica._channel
            begun = channel.begin(token := Token(), [b"x"])
        with own(path, NUM_CHUNKS) as heap:
            monkeypatch.setattr(channel, "begin", lambda token, keys: begun)
            with pytest.raises(NoOwnerError):
                replica.begin([b"x"])
            assert settled(heap).free_places == NUM_CHUNKS
        del token
        replica.close()


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


class TestClose:
    def test_it_may_be_repeated_and_ends_everything(self, path: Path) -> None:
        heap = own(path, NUM_CHUNKS)
        replica = attach(path)
        put(heap, KEYS)
        hold, store = heap.hold(KEYS), heap.begin([b"x"])
        held = replica.hold(KEYS)
        for each in (heap, replica):
            each.close()
            each.close()
        for call in (heap.keys, lambda: heap.hold(KEYS), heap.stats, lambda: heap.heap):
            with pytest.raises(ClosedError, match="is closed"):
                call()
        with pytest.raises(ClosedError), heap:
            pass
        held.release()
        hold.release()
        with suppress(ClosedError):
            store.abort()
        assert os.listdir("/proc/self/fd")
        with own(path, NUM_CHUNKS) as heap:
            assert heap.lookup(KEYS).all()
            assert keeper_of(heap).free_places == NUM_CHUNKS - 4

    def test_nothing_is_left(self, path: Path) -> None:
        def mappings() -> int:
            return Path("/proc/self/maps").read_text().count(str(path))

        own(path).close()
        gc.collect()
        files, threads, maps = os.listdir("/proc/self/fd"), {*threading.enumerate()}, mappings()
        for _ in range(5):
            with own(path) as heap, attach(path) as replica:
                put(replica, KEYS)
                put(heap, MANY)
                with heap.hold(KEYS):
                    pass
            del heap, replica
            gc.collect()
            # Others may have ended: threads that other tests have left idle.
            assert len(os.listdir("/proc/self/fd")) <= len(files)
            assert {*threading.enumerate()} <= threads
            assert mappings() == maps

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_heap_that_is_dropped(self, heap: SharedHeap) -> None:
        gc.collect()
        num_files = len(os.listdir("/proc/self/fd"))
        for number in range(4):
            dropped = attach(heap.path)
            put(dropped, KEYS[number : number + 1])
            del dropped
            gc.collect()
        end_s = time.monotonic() + 60
        while len(os.listdir("/proc/self/fd")) > num_files:
            assert time.monotonic() < end_s
            time.sleep(0.001)  # the owner notices that it has gone

    def test_a_name_that_cannot_be_removed(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError("no")

        heap = own(path, unlink=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            with pytest.raises(PermissionError):
                heap.close()
        heap.close()
        own(path).close()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("is_owner", [True, False])
    def test_in_a_finalizer_inside_another_call(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, is_owner: bool
    ) -> None:
        with own(path, NUM_CHUNKS) as heap:
            put(heap, KEYS)
        heap = own(path, NUM_CHUNKS)
        each = heap if is_owner else attach(path)
        share = RangeLocks.share

        def close_and_share(self: RangeLocks, start: int, count: int) -> bool:
            each.close()
            return share(self, start, count)

        with monkeypatch.context() as patch:
            patch.setattr(RangeLocks, "share", close_and_share)
            with suppress(ClosedError):
                each.hold(KEYS).release()
        if not is_owner:
            connect = socket.socket.connect

            def close_and_connect(self: socket.socket, name: str) -> None:
                each.close()
                connect(self, name)

            each = attach(path)
            with monkeypatch.context() as patch:
                patch.setattr(socket.socket, "connect", close_and_connect)
                assert each.remove(KEYS[:1]) == KEYS[:1]
            end_s = time.monotonic() + 60
            while keeper_of(heap).num_writers:
                assert time.monotonic() < end_s
                time.sleep(0.001)
            heap.close()
        with own(path, NUM_CHUNKS) as heap:
            heap.check(contents=True)
            assert put(heap, MANY) == [True] * NUM_CHUNKS

    def test_what_is_held_and_filled_is_not_reused(self, path: Path) -> None:
        with own(path, NUM_CHUNKS) as heap, attach(path) as replica:
            put(heap, KEYS)
            hold, store = replica.hold(KEYS), replica.begin([b"x"])
        with own(path, NUM_CHUNKS) as heap:
            assert put(heap, MANY) == [True] * 3 + [False] * 5
            assert hold.batch is not None
            assert keeper_of(heap).waiting_places
            store.abort()
            hold.release()
            end_s = time.monotonic() + 60
            while put(heap, MANY) != [True] * NUM_CHUNKS:
                assert time.monotonic() < end_s
            heap.check(contents=True)

    @pytest.mark.parametrize("is_owner", [True, False])
    def test_in_the_middle_of_a_hold_of_which_only_a_part_is_there(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, is_owner: bool
    ) -> None:
        """It locks what it has found, and then fewer places: in between, another thread closes."""
        heap = own(path, NUM_CHUNKS)
        put(heap, KEYS)
        each = heap if is_owner else attach(path)
        find, read = ChunkTable.find, Leases.read

        def find_removed(self: ChunkTable, key: bytes) -> int:
            place = find(self, key)
            if key == KEYS[1] and each.lookup(KEYS[2:]).any():
                heap.remove(KEYS[1:])  # it has found the place already
            return place

        def close_first(self: Leases, token: Token, places: list[int]) -> None:
            if len(list(places)) == 1:
                each.close()
            read(self, token, places)

        with monkeypatch.context() as patch:
            patch.setattr(ChunkTable, "find", find_removed)
            patch.setattr(Leases, "read", close_first)
            with pytest.raises(ClosedError, match="is closed"):
                each.hold(KEYS[:2], allow_partial=True)
        heap.close()
        with own(path, NUM_CHUNKS) as heap:  # while the old one has not been collected
            assert not keeper_of(heap).waiting_places
            assert not heap._owner.place_locks.are_any()
        assert each.closed

    @pytest.mark.parametrize("is_owner", [True, False])
    def test_calls_of_other_threads_end(self, path: Path, is_owner: bool) -> None:
        errors: list[BaseException] = []

        def work(each: SharedHeap, seed: int) -> None:
            rng = random.Random(seed)
            host = HostMemoryAllocator(NUM_CHUNKS * PLACE)
            while True:
                keys = [key_of(number) for number in rng.sample(range(24), 3)]
                try:
                    put(each, keys)
                    with each.hold(keys, allow_partial=True, verify=False) as hold:
                        assert not wrong_rows(hold.keys, hold.batch)
                    if (batch := each.load(hold.keys, host)) is not None:
                        host.batched_free(batch)
                    each.remove(keys[:1])
                except (MissingChunksError, LeaseLostError):
                    pass
                except (ClosedError, NoOwnerError):
                    return
                except BaseException as error:
                    errors.append(error)
                    return

        for seed in range(12):
            heap = own(path, NUM_CHUNKS)
            each = heap if is_owner else attach(path)
            threads = [threading.Thread(target=work, args=(each, 3 * seed + at)) for at in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.002 * seed)
            each.close()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
            heap.close()
            assert not errors
            with own(path, NUM_CHUNKS) as heap:
                heap.check(contents=True)
                assert not keeper_of(heap).waiting_places

    def test_a_program_that_ends_without_it(self, path: Path) -> None:
        def child() -> bool:
            heap = own(path, NUM_CHUNKS)
            return all(put(heap, KEYS[:1]))  # so few bytes that torch uses no threads

        assert in_a_child(child)
        with own(path, NUM_CHUNKS) as heap:
            assert heap.lookup(KEYS[:1]).all()


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


class TestForeignMessages:
    """Whatever else connects to the owner's socket."""

    def connected(self, heap: SharedHeap) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(20)
        peer.connect(heap._segment.state.socket_name)
        return peer

    def test_rubbish_is_refused_and_the_others_go_on(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        rng = random.Random(3)
        for length in [*range(1, 40), 5000]:
            with self.connected(heap) as peer:
                kind = bytes([rng.randrange(9)])
                body = kind + rng.randbytes(length)
                peer.sendall(struct.pack("<I", len(body)) + body)
                with suppress(ConnectionError):
                    answer = peer.recv(1 << 16)
                    assert not answer or answer[4] in (0, 1, 7)
        for head in (struct.pack("<I", 1 << 31), bytes(4)):
            with self.connected(heap) as peer:
                peer.sendall(head)
                assert peer.recv(10) == b""
        with self.connected(heap) as slow:
            slow.sendall(b"\x01")
            assert put(replica, KEYS) == [True] * 4
            assert put(heap, MANY[:4]) == [True] * 4
        heap.check(contents=True)
        assert settled(heap).free_places == 0

    def test_without_descriptors_who_is_connected_goes_on(
        self, heap: SharedHeap, replica: SharedHeap, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accept = socket.socket.accept
        fails = iter([True, True])
        num_failed: list[int] = []

        def accept_some(self: socket.socket) -> Any:
            if next(fails, False):
                num_failed.append(1)
                raise OSError(EMFILE, os.strerror(EMFILE))
            return accept(self)

        assert put(replica, KEYS[:1]) == [True]
        monkeypatch.setattr(socket.socket, "accept", accept_some)
        with attach(heap.path) as other, self.connected(heap):
            assert put(replica, KEYS[1:2]) == [True]
            assert put(other, KEYS[2:3]) == [True]
        assert len(num_failed) == 2

    def test_too_many_wait_for_an_owner_that_is_busy(self, heap: SharedHeap, path: Path) -> None:
        goes_on = threading.Event()
        heap._owner.service.tell(goes_on.wait)  # type: ignore[union-attr]
        peers = []
        with suppress(BlockingIOError):
            while True:
                peers.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                peers[-1].setblocking(False)
                peers[-1].connect(heap._segment.state.socket_name)
        with attach(path, timeout_s=0.1) as other:
            with pytest.raises(TimeoutError, match="it may be stopped, or busy"):
                put(other, KEYS)
            goes_on.set()
        with attach(path) as other:
            assert put(other, KEYS) == [True] * 4
        for peer in peers:
            peer.close()

    def test_places_of_another_are_not_published(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        with replica.begin(KEYS[:1]) as store, self.connected(heap) as peer:
            body = bytes([3]) + struct.pack("<QQQI", store._ticket.number, store.places[0], 0, 0)
            peer.sendall(struct.pack("<I", len(body)) + body)
            assert peer.recv(1000)[4] == 1
            assert not heap.lookup(KEYS[:1]).any()


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
