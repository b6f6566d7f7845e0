"""What is stored in a ``SharedHeap``, at once or begun and completed, and what is evicted."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_heaps import (
    attach,
    contents,
    expected,
    filled,
    keeper_of,
    key_of,
    own,
    wrong_rows,
)
from small_shared_heaps import KEYS, MANY, NUM_CHUNKS, put, settled

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat, SharedHeap
from kvheap.errors import LifetimeError
from kvheap.shared import NoOwnerError
from kvheap.shared.tokens import Token


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
