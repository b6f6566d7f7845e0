"""Blocks and chunks while bytes move: frees, evictions, exceptions, closes, threads, forks."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

from file_tiers import PLACE, expected, fill, key_of, make_heap, open_tier, stored, wrong_rows
from forked_child import in_a_child

from kvheap import ClosedError, HostMemoryAllocator, TransferError, offload
from kvheap.device.host_queue import NestedWaitError, host_queue
from kvheap.files import FileTier, TierInUseError
from kvheap.files.chunk_index import ChunkIndex
from kvheap.transfer import copy

NAMES = [key_of(number) for number in range(40)]

needs_fork = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Gate:
    """Holds reads or writes of files back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.opened.set()
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, self.held(getattr(os, name)))

    def held(self, call: Any) -> Callable[..., int]:
        def wait_and_call(*arguments: Any) -> int:
            self.reached.set()
            assert self.opened.wait(60)
            return call(*arguments)

        return wait_and_call

    def close(self) -> None:
        self.reached.clear()
        self.opened.clear()

    def open(self) -> None:
        self.opened.set()

    def wait_until_reached(self) -> None:
        assert self.reached.wait(60)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def heap() -> HostMemoryAllocator:
    return make_heap()


@pytest.fixture
def tier(tmp_path: Path, gate: Gate) -> Iterator[FileTier]:
    tier = open_tier(tmp_path / "tier")
    yield tier
    gate.open()
    tier.check()
    tier.close()


def begun(tier: FileTier, heap: Any, gate: Gate, kind: str) -> tuple[Any, Any]:
    """A store or load whose calls are held back, and its batch."""
    keys = stored(tier, heap, range(4)) if kind == "load" else NAMES[:4]
    batch = fill(heap, NAMES[20:24] if kind == "load" else keys)
    gate.close()
    transfer = tier.load(keys, batch) if kind == "load" else tier.store(keys, batch)
    gate.wait_until_reached()
    return transfer, batch


class TestBlocks:
    @pytest.mark.parametrize("kind", ["store", "load"])
    @pytest.mark.parametrize("how", ["free", "drop", "free one by one", "free some"])
    def test_bytes_come_back_when_the_transfer_has_ended(
        self, tier: FileTier, heap: HostMemoryAllocator, gate: Gate, kind: str, how: str
    ) -> None:
        transfer, batch = begun(tier, heap, gate, kind)
        addresses = set(batch.addresses.tolist())
        if how == "free":
            heap.batched_free(batch)
        elif how == "free some":
            heap.batched_free(batch[1:3])
        elif how == "free one by one":
            for obj in batch:
                obj.ref_count_down()
        else:
            del batch
            transfer.batch = None
            gc.collect()
        others = []
        while (other := heap.batched_allocate([2048], torch.int64, 1)) is not None:
            other[0].tensor.fill_(-1)
            others.append(other)
        assert not addresses & {int(other.addresses[0]) for other in others}
        assert not transfer.done()
        gate.open()
        assert transfer.wait(60)
        transfer.result()
        assert all((other[0].tensor == -1).all() for other in others)
        for other in others:
            heap.batched_free(other)
        if kind == "store":
            loading = tier.load(NAMES[:4], heap)
            assert loading is not None
            loading.result(60)
            assert not wrong_rows(NAMES[:4], loading.batch)

    def test_one_that_is_moved_can_be_read_once_it_is_there(
        self, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        loading, batch = begun(tier, heap, gate, "load")
        assert batch.transfer is loading.transfer
        threading.Timer(0.05, gate.open).start()
        assert not wrong_rows(NAMES[:4], batch)  # waits

    def test_a_copy_of_what_is_loaded_waits_for_it(
        self, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        _, batch = begun(tier, heap, gate, "load")
        far = make_heap()
        copied = offload(batch, into=far)
        target = fill(far, NAMES[30:34])
        copying = copy((batch, target))
        assert copied is not None
        assert not copying.wait(0.05)
        gate.open()
        copying.result(60)
        assert not wrong_rows(NAMES[:4], copied)
        assert not wrong_rows(NAMES[:4], target)

    def test_a_store_of_what_is_loaded_waits_for_it(
        self, tmp_path: Path, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        with open_tier(tmp_path / "other") as other:
            _, batch = begun(tier, heap, gate, "load")
            storing = other.store(NAMES[:4], batch)
            again = tier.store(NAMES[10:14], batch)
            assert not storing.wait(0.05)
            gate.open()
            storing.result(60)
            again.result(60)
            loading = other.load(NAMES[:4], heap)
            assert loading is not None
            loading.result(60)
            assert not wrong_rows(NAMES[:4], loading.batch)

    def test_a_load_into_what_is_copied_to_waits_for_it(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        stored(tier, heap, range(4))
        ended = threading.Event()
        host_queue.run([lambda: ended.wait(60) and None], is_small=False)
        far = offload(fill(make_heap(), NAMES[30:34]), into=heap)  # behind it
        assert far is not None
        loading = tier.load(NAMES[:4], far)
        assert loading is not None
        assert not loading.wait(0.05)
        ended.set()
        loading.result(60)
        assert not wrong_rows(NAMES[:4], far)

    def test_a_load_into_what_is_being_stored_waits_for_it(
        self, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        stored(tier, heap, range(10, 14))
        storing, batch = begun(tier, heap, gate, "store")
        loading = tier.load(NAMES[10:14], batch)
        assert loading is not None
        assert not loading.wait(0.05)
        gate.open()
        storing.result(60)
        loading.result(60)
        assert not wrong_rows(NAMES[10:14], batch)
        again = tier.load(NAMES[:4], heap)
        assert again is not None
        again.result(60)  # what was stored are the bytes of before
        assert not wrong_rows(NAMES[:4], again.batch)

    def test_single_objects_that_are_loaded_are_stored_and_loaded_anew_afterwards(
        self, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        stored(tier, heap, range(4))
        stored(tier, heap, range(4, 8))
        batch = fill(heap, NAMES[20:24])
        blocks = [batch[0], batch[2]]
        gate.close()
        loading = tier.load(NAMES[1:3], blocks)
        gate.wait_until_reached()
        storing = tier.store(NAMES[30:32], blocks)
        anew = tier.load(NAMES[4:6], blocks)
        other = tier.store(NAMES[32:33], [batch[1]])  # a block that nobody fills
        gate.open()
        for each in (loading, storing, anew, other):
            assert each is not None
            each.result(60)
        assert not wrong_rows(NAMES[4:6], blocks)
        assert not wrong_rows([NAMES[21]], [batch[1]])
        back = tier.load(NAMES[30:32], heap)
        assert back is not None
        back.result(60)
        assert not wrong_rows(NAMES[1:3], back.batch)

    def test_what_could_not_be_filled_is_not_stored(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        loading = tier.load(NAMES[:2], heap)  # missing
        assert loading is not None
        loading.wait(60)
        with pytest.raises(TransferError):
            tier.store(NAMES[:2], loading.batch)  # type: ignore[arg-type]
        assert tier.keys() == []

    def test_what_turns_out_not_to_be_filled_is_not_stored(
        self, tmp_path: Path, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        keys = stored(tier, heap, range(4))
        with open(tmp_path / "tier" / "chunks", "r+b") as file:
            file.write(b"damage")
        gate.close()
        loading = tier.load(keys, heap)
        assert loading is not None
        gate.wait_until_reached()
        storing = tier.store(NAMES[10:14], loading.batch)  # type: ignore[arg-type]
        gate.open()
        with pytest.raises(TransferError, match="1 of 4 chunks were not moved"):
            storing.result(60)
        with pytest.raises(TransferError):
            storing.succeeded()
        assert not tier.lookup(NAMES[10:14]).any()

    def test_a_heap_that_is_closed_meanwhile(self, tier: FileTier, gate: Gate) -> None:
        heap = make_heap()
        loading, batch = begun(tier, heap, gate, "load")
        heap.batched_free(batch)
        with pytest.raises(TimeoutError):
            heap.close(timeout_s=0.05)
        gate.open()
        loading.result(60)
        heap.close()

    def test_memory_is_let_go_at_the_end(self, tier: FileTier, heap: HostMemoryAllocator) -> None:
        batch = fill(heap, NAMES[:4])
        storing = tier.store(NAMES[:4], batch)
        storing.result(60)
        reference = weakref.ref(batch)
        heap.batched_free(batch)
        storing.batch = None
        del batch
        gc.collect()
        assert reference() is None
        assert heap.stats().pending_bytes == 0

    def test_thousands_of_transfers_leave_no_records(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        batch = fill(heap, NAMES[:1])
        for _ in range(500):
            tier.store(NAMES[:1], batch).result(60)
        assert len(batch.counts.streams_now(None)) < 50


class TestChunks:
    def test_a_chunk_that_is_read_is_not_evicted(
        self, tmp_path: Path, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        with open_tier(tmp_path / "tier", 4, threads=2) as tier:
            loading, batch = begun(tier, heap, gate, "load")
            storing = tier.store(NAMES[5:8], fill(heap, NAMES[5:8]))
            assert not storing.succeeded(60).any()  # all others are being read
            assert tier.stats().refused_chunks == 3
            gate.open()
            loading.result(60)
            assert not wrong_rows(NAMES[:4], batch)
            tier.store(NAMES[5:8], fill(heap, NAMES[5:8])).result(60)
            tier.check()

    def test_another_one_is_evicted(
        self, tmp_path: Path, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        with open_tier(tmp_path / "tier", 4) as tier:
            keys = stored(tier, heap, [1, 2, 3, 4])
            tier.touch(keys[:2])
            gate.close()
            loading = tier.load(keys[2:], heap)  # the ones that would leave first
            assert loading is not None
            gate.wait_until_reached()
            tier.check()
            storing = tier.store(NAMES[5:7], fill(heap, NAMES[5:7]))
            gate.open()
            storing.result(60)
            loading.result(60)
            assert not wrong_rows(keys[2:], loading.batch)
            assert sorted(tier.keys()) == [NAMES[3], NAMES[4], NAMES[5], NAMES[6]]

    def test_a_chunk_that_is_being_stored_is_neither_found_nor_stored_twice(
        self, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        storing, batch = begun(tier, heap, gate, "store")
        assert not tier.lookup(NAMES[:4]).any()
        assert tier.keys() == []
        loading = tier.load(NAMES[:4], heap)
        assert loading is not None
        assert not loading.succeeded(60).any()
        again = tier.store(NAMES[:4], batch)
        assert not again.wait(0.1)  # its end would mean that they can be loaded
        assert tier.stats().pending_chunks == 4
        other = tier.store(NAMES[6:8], fill(heap, NAMES[6:8]))
        gate.open()
        storing.result(60)
        assert again.succeeded(60).all()
        assert other.succeeded(60).all()
        assert tier.stats().stored_chunks == 6

    def test_a_chunk_whose_other_store_fails_is_stored(
        self,
        tier: FileTier,
        heap: HostMemoryAllocator,
        gate: Gate,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        fails, held = iter([True]), os.pwritev

        def pwritev(*arguments: Any) -> int:
            written = held(*arguments)
            if next(fails, False):
                raise OSError(EIO, "no such luck")
            return written

        monkeypatch.setattr(os, "pwritev", pwritev)
        storing, _ = begun(tier, heap, gate, "store")
        again = tier.store(NAMES[2:6], fill(heap, NAMES[2:6]))
        gate.open()
        assert not storing.succeeded(60).all()
        assert again.succeeded(60).all()
        loading = tier.load(NAMES[2:6], heap)
        assert loading is not None
        loading.result(60)
        assert not wrong_rows(NAMES[2:6], loading.batch)
        tier.check()

    def test_one_that_fails_late_leaves_the_chunk_that_was_stored_anew(
        self, tmp_path: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was removed while it was written, and stored again, before its write failed."""
        reached, goes_on = threading.Event(), threading.Event()
        pwritev = os.pwritev

        def fail_first(*arguments: Any) -> int:
            if not reached.is_set():
                reached.set()
                assert goes_on.wait(60)
                raise OSError(ENOSPC, "no such luck")
            return pwritev(*arguments)

        with open_tier(tmp_path / "tier", threads=2) as tier:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwritev", fail_first)
                late = tier.store(NAMES[:1], fill(heap, NAMES[:1]))
                assert reached.wait(60)
                assert tier.remove(NAMES[:1]) == NAMES[:1]
                assert tier.store(NAMES[:1], fill(heap, NAMES[:1])).succeeded(60).all()
                goes_on.set()
                assert late.succeeded(60).all()  # the chunk is there
            stored(tier, heap, [30])
            tier.check()
        with open_tier(tmp_path / "tier") as tier:
            assert tier.lookup(NAMES[:1]).all()

    @pytest.mark.parametrize("kind", ["store", "load"])
    def test_a_chunk_that_is_removed_while_it_moves(
        self, tmp_path: Path, heap: HostMemoryAllocator, gate: Gate, kind: str
    ) -> None:
        with open_tier(tmp_path / "tier", 5) as tier:
            transfer, batch = begun(tier, heap, gate, kind)
            assert tier.remove(NAMES[:2]) == NAMES[:2]
            tier.check()
            assert tier.stats().free_bytes == PLACE  # their places are not free yet
            if kind == "load":
                gate.open()
                transfer.result(60)
                assert not wrong_rows(NAMES[:4], batch)
            else:
                gate.open()
                assert transfer.succeeded(60).tolist() == [False, False, True, True]
            assert sorted(tier.keys()) == NAMES[2:4]
            tier.check()
            assert tier.stats().free_bytes == 3 * PLACE
        with open_tier(tmp_path / "tier", 5) as tier:
            assert sorted(tier.keys()) == NAMES[2:4]

    def test_a_load_does_not_wait_behind_stores(
        self, tier: FileTier, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = stored(tier, heap, range(3))
        opened, real = threading.Event(), os.pwritev

        def held(*arguments: Any) -> int:
            assert opened.wait(60)
            return real(*arguments)

        monkeypatch.setattr(os, "pwritev", held)
        storing = [
            tier.store(NAMES[at : at + 2], fill(heap, NAMES[at : at + 2]))
            for at in range(10, 18, 2)
        ]
        tier.load(keys, heap).result(60)  # type: ignore[union-attr]
        assert tier.remove(keys[:1]) == keys[:1]
        assert not any(each.done() for each in storing)
        opened.set()
        for each in storing:
            each.result(60)


def error_of(call: Callable[[], Any], kind: type[Exception]) -> Exception | None:
    """The error of that kind that a call raises."""
    try:
        call()
    except kind as error:
        return error
    return None


class StruckError(Exception):
    """What the handler of a signal raises."""


class TestExceptions:
    def test_a_signal_handler_that_raises_anywhere(
        self, tmp_path: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After each, the call was made or not; nothing leaks, and the tier goes on."""
        # pytest keeps what strikes in a finalizer, and with it the frames and all that they hold.
        monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)

        def strike(number: int, frame: Any) -> None:
            raise StruckError

        rng = random.Random(1)
        tier = open_tier(tmp_path / "tier", 12)
        known = stored(tier, heap, range(8))
        batch = fill(heap, NAMES[20:24])
        calls: list[Callable[[], Any]] = [
            lambda: tier.store(NAMES[20:24], batch).wait(60),
            lambda: tier.load(known, heap).wait(60),  # type: ignore[union-attr]
            lambda: tier.remove(NAMES[20:22]),
            lambda: tier.lookup(NAMES),
            lambda: tier.touch(known),
            tier.check,
        ]
        before = signal.signal(signal.SIGALRM, strike)
        num_struck = 0
        try:
            for round_number in range(240):
                call = calls[round_number % len(calls)]
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 1.5e-3))
                    call()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except StruckError:
                    num_struck += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert num_struck > 20
        tier.check()
        tier.store(NAMES[20:24], batch).result(60)
        loading = tier.load(NAMES[20:24], heap)
        assert loading is not None
        loading.result(60)
        assert not wrong_rows(NAMES[20:24], loading.batch)
        heap.batched_free(batch)
        heap.batched_free(loading.batch)
        gc.collect()
        tier.close()
        heap.stats()
        assert heap.batched_allocate([2048], torch.int64, 64) is not None  # nothing leaks

    @pytest.mark.parametrize("where", ["submit", "queued", "record_stream"])
    def test_an_exception_in_the_middle_of_a_call(
        self,
        tier: FileTier,
        heap: HostMemoryAllocator,
        where: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from kvheap import MemoryBatch
        from kvheap.device.completion import Completion
        from kvheap.files.io_threads import IOThreads

        keys = stored(tier, heap, range(2))
        owner: Any = {"submit": IOThreads, "queued": Completion, "record_stream": MemoryBatch}[
            where
        ]

        def fail(*_: Any) -> None:
            raise StruckError

        batch = fill(heap, NAMES[10:12])
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, fail)
            with pytest.raises(StruckError):
                tier.store(NAMES[10:12], batch)
            with pytest.raises(StruckError):
                tier.load(keys, heap)
            with pytest.raises(StruckError):
                tier.load(keys, batch)
        assert batch.transfer is None
        assert not wrong_rows(NAMES[10:12], batch)
        assert heap.stats().allocated_bytes == 2 * PLACE
        heap.batched_free(batch)
        assert heap.stats().allocated_bytes == 0
        assert not tier.lookup(NAMES[10:12]).any()

    def test_an_exception_after_the_call_has_begun(
        self, tier: FileTier, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kvheap.files.io_threads import IOThreads

        batch, submit = fill(heap, NAMES[:2]), IOThreads.submit

        def submit_and_fail(*arguments: Any) -> None:
            submit(*arguments)
            time.sleep(0.1)
            raise StruckError

        with monkeypatch.context() as patch:
            patch.setattr(IOThreads, "submit", submit_and_fail)
            with pytest.raises(StruckError):
                tier.store(NAMES[:2], batch)
        assert tier.lookup(NAMES[:2]).all()
        heap.batched_free(batch)
        assert heap.stats().allocated_bytes == 0

    def test_an_error_in_a_call_that_nobody_waits_for(
        self,
        tier: FileTier,
        heap: HostMemoryAllocator,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        from kvheap.files.books import Books

        with monkeypatch.context() as patch:
            patch.setattr(Books, "touch", lambda *_: 1 / 0)
            tier.touch(NAMES)
            tier.check()  # behind it, on the same thread
        assert "a job of a FileTier has failed" in caplog.text

    def test_an_error_of_our_own_in_a_job_ends_it(
        self, tier: FileTier, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = fill(heap, NAMES[:2])
        with monkeypatch.context() as patch:
            patch.setattr("kvheap.files.chunk_file.cut_into_pieces", lambda *_: 1 / 0)
            with pytest.raises(TransferError, match="division by zero"):
                tier.store(NAMES[:2], batch).result(60)
        tier.check()
        tier.store(NAMES[:2], batch).result(60)


class TestFinalizers:
    def test_they_may_call_the_tier_in_the_middle_of_its_jobs(
        self, tier: FileTier, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Most run on threads of the tier, where waiting for it raises."""
        batch, real = fill(heap, NAMES[:4]), ChunkIndex.write
        raised: list[BaseException | None] = []
        seen: list[Any] = []

        def call_back(self: ChunkIndex, *arguments: Any) -> None:
            seen.extend((tier.stats(), tier.keys(), tier.lookup(NAMES)))
            tier.touch(NAMES)
            again.append(tier.store(NAMES[8:9], other))
            waits = (again[0].wait, lambda: tier.remove(NAMES), tier.check, storing_waits)
            raised.extend(error_of(wait, NestedWaitError) for wait in waits)
            monkeypatch.setattr(ChunkIndex, "write", real)
            real(self, *arguments)

        def storing_waits() -> None:
            storing[0].result()

        again: list[Any] = []
        other = fill(heap, NAMES[8:9])
        monkeypatch.setattr(ChunkIndex, "write", call_back)
        gate = threading.Event()
        host_queue.run([lambda: gate.wait(60) and None], is_small=False)
        filled = offload(batch, into=make_heap())  # so that the store begins late enough
        assert filled is not None
        storing = [tier.store(NAMES[:4], filled)]
        gate.set()
        storing[0].result(60)
        again[0].result(60)
        assert len(raised) == 4
        assert all(raised)
        assert len(seen) == 3


class TestClose:
    def test_it_waits_and_can_be_repeated(
        self, tmp_path: Path, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        tier = open_tier(tmp_path / "tier")
        storing, batch = begun(tier, heap, gate, "store")
        later = tier.store(NAMES[4:6], fill(heap, NAMES[4:6]))
        for _ in range(2):
            with pytest.raises(TimeoutError, match="6 chunks are being stored"):
                tier.close(0.02)
        with pytest.raises(ClosedError):
            tier.store(NAMES[8:9], batch)
        with pytest.raises(TierInUseError):
            open_tier(tmp_path / "tier")
        gate.open()
        tier.close(60)
        storing.result()
        later.result()
        with open_tier(tmp_path / "tier") as tier:
            assert tier.lookup(NAMES[:6]).all()

    def test_files_that_cannot_be_closed(
        self, tmp_path: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The folder is free all the same, and what was stored is there."""
        tier = open_tier(tmp_path / "tier")
        stored(tier, heap, [1])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", lambda fd: 1 / 0)
            patch.setattr(ChunkIndex, "close", lambda self: 1 / 0)
            tier.close(60)
        tier._file._index._env.close()
        with open_tier(tmp_path / "tier") as tier:
            assert tier.keys() == [NAMES[1]]

    def test_several_threads_close_and_move(
        self, tmp_path: Path, heap: HostMemoryAllocator
    ) -> None:
        """Each call is refused, or its bytes are moved; none hangs."""
        for round_number in range(12):
            tier = open_tier(tmp_path / "tier")
            begin = threading.Barrier(4)
            ended: list[bytes] = []
            errors: list[BaseException] = []

            def move(
                at: int, tier: FileTier = tier, begin: Any = begin, ended: Any = ended
            ) -> None:
                batch = fill(heap, NAMES[at : at + 1])
                begin.wait()
                try:
                    for _ in range(20):
                        tier.store(NAMES[at : at + 1], batch).result(60)
                        ended.append(NAMES[at])
                        tier.remove([])
                except ClosedError:
                    pass
                finally:
                    heap.batched_free(batch)

            def close(
                _: int, tier: FileTier = tier, begin: Any = begin, n: int = round_number
            ) -> None:
                begin.wait()
                time.sleep(0.0005 * (n % 4))
                tier.close(60)

            def guarded(call: Any, at: int, errors: Any = errors) -> None:
                try:
                    call(at)
                except BaseException as error:
                    errors.append(error)

            threads = [
                threading.Thread(target=guarded, args=(call, at))
                for at, call in enumerate((move, move, close, close))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
            assert not errors
            with open_tier(tmp_path / "tier") as again:
                assert again.lookup(ended).all()
                again.remove(NAMES)
        assert heap.stats().allocated_bytes == 0

    def test_threads_that_cannot_be_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, started = threading.Thread.start, []

        def start(self: threading.Thread) -> None:
            if len(started) == 3:
                raise RuntimeError("can't start new thread")
            started.append(self)
            real(self)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start"):
                open_tier(tmp_path / "tier")
        for thread in started:
            thread.join(60)
            assert not thread.is_alive()
        open_tier(tmp_path / "tier").close()


def test_threads_store_load_and_remove(tmp_path: Path, heap: HostMemoryAllocator) -> None:
    """On a tier that is too small, so that chunks are evicted while others are read."""
    errors: list[BaseException] = []
    loaded = [0]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                keys = rng.sample(NAMES, rng.randint(1, 6))
                kind = rng.random()
                if kind < 0.5:
                    batch = fill(heap, keys)
                    storing = tier.store(keys, batch)
                    heap.batched_free(batch)
                    if rng.random() < 0.5:
                        storing.wait(60)
                elif kind < 0.9:
                    loading = tier.load(keys, heap)
                    assert loading is not None
                    rows = loading.succeeded(60).tolist()
                    assert not wrong_rows(keys, loading.batch, rows)
                    loaded[0] += sum(rows)
                    heap.batched_free(loading.batch)
                else:
                    tier.remove(keys[:2])
        except BaseException as error:
            errors.append(error)

    heap = make_heap(256)
    with open_tier(tmp_path / "tier", 16, policy="arc") as tier:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        if errors:
            raise errors[0]
        tier.check()
        stats = tier.stats()
        assert stats.damaged_chunks == stats.failed_chunks == 0
        assert stats.evicted_chunks > 20
        assert loaded[0] > 20
    with open_tier(tmp_path / "tier", 16) as tier:
        keys = tier.keys()
        loading = tier.load(keys, heap)
        assert loading is not None
        loading.result(60)
        assert not wrong_rows(keys, loading.batch)
        heap.batched_free(loading.batch)
    assert heap.stats().allocated_bytes == 0


class TestFork:
    pytestmark = needs_fork

    def test_a_child_cannot_use_the_tier_and_does_not_disturb_it(
        self, tier: FileTier, heap: HostMemoryAllocator, gate: Gate
    ) -> None:
        storing, batch = begun(tier, heap, gate, "store")

        def use_it() -> list[str]:
            calls: list[Callable[[], Any]] = [
                lambda: tier.lookup(NAMES),
                lambda: tier.store(NAMES[8:9], batch[:1]),
                lambda: tier.load(NAMES[8:9], heap),
                lambda: tier.remove(NAMES),
                tier.check,
            ]
            found = [error_of(call, ClosedError) for call in calls]
            found.append(error_of(lambda: storing.result(10), TransferError))
            tier.close()
            return [str(error) for error in found]

        found = in_a_child(use_it)
        assert len(found) == 6
        assert all(f"belongs to process {os.getpid()}" in text for text in found[:5])
        assert "forked child" in found[5]
        gate.open()
        storing.result(60)
        assert tier.lookup(NAMES[:4]).all()

    def test_a_child_that_lives_on_does_not_keep_the_folder(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "tier")
        end, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(write)
            os.read(end, 1)
            os._exit(0)
        os.close(end)
        tier.close()
        open_tier(tmp_path / "tier").close()
        os.close(write)
        os.waitpid(child, 0)

    def test_a_child_may_open_another_folder(self, tmp_path: Path, tier: FileTier) -> None:
        def work() -> bool:
            heap = make_heap()
            with open_tier(tmp_path / "other") as other:
                keys = stored(other, heap, range(3))
                loading = other.load(keys, heap)
                assert loading is not None
                loading.result(20)
                return torch.equal(loading.batch[2].tensor, expected(keys[2]))  # type: ignore[index]

        assert in_a_child(work)
