"""``SharedHeap.close``: in any state, beside calls of other threads, and where it was forgotten."""

from __future__ import annotations

import gc
import os
import random
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from forked_child import in_a_child
from shared_heaps import (
    PLACE,
    attach,
    keeper_of,
    key_of,
    own,
    wrong_rows,
)
from small_shared_heaps import KEYS, MANY, NUM_CHUNKS, put

from kvheap import HostMemoryAllocator, SharedHeap
from kvheap.errors import ClosedError
from kvheap.files import MissingChunksError
from kvheap.memory.file_locks import RangeLocks
from kvheap.shared import LeaseLostError, NoOwnerError
from kvheap.shared.chunk_table import ChunkTable
from kvheap.shared.leases import Leases
from kvheap.shared.tokens import Token


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
