"""Processes that are killed or stopped at any moment: nothing torn is found, nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from shared_heaps import (
    BATCH,
    LEASE_S,
    NUM_CHUNKS,
    NUM_KEYS,
    Stage,
    attach,
    contents,
    keeper_of,
    key_of,
    own,
    wait_until_stopped,
    wrong_rows,
)

from kvheap.shared import SegmentInUseError, SharedHeap

ROUNDS = 12

ROLES = ["owner", "reader", "writer"]

MANY_CHUNKS = NUM_KEYS + 2 * BATCH
"""So many that nothing is evicted."""

OFTEN_REMOVED = NUM_KEYS // 2
"""The numbers of keys that workers remove are below."""


def look(path: Path, num_chunks: int) -> tuple[list[bytes], list[int]]:
    """Own the heap, and look at all of it; returns the keys, and the rows that are torn."""
    with own(path, num_chunks, lease_s=LEASE_S) as heap:
        heap.check()
        keys = heap.keys()
        with heap.hold(keys, verify=False) as hold:
            torn = wrong_rows(hold.keys, hold.batch)
        if not torn:
            heap.check(contents=True)
            assert keeper_of(heap).dropped_chunks == 0
        keeper = keeper_of(heap)
        assert keeper.free_places + keeper.waiting_places + len(keys) == num_chunks
    return keys, torn


@pytest.mark.parametrize("num_chunks", [NUM_CHUNKS, MANY_CHUNKS])
def test_whoever_is_killed_nothing_torn_is_found_and_nothing_is_lost(
    path: Path, stage: Stage, num_chunks: int
) -> None:
    """36 kills each."""
    rng = random.Random(num_chunks)
    num_found = 0
    stored: set[bytes] = set()
    for seed in range(ROUNDS):
        pids = [stage.start(role, path, 9 * seed + at, num_chunks) for at, role in enumerate(ROLES)]
        time.sleep(rng.uniform(0.0, 0.1))
        rng.shuffle(pids)
        for pid in pids:
            time.sleep(rng.uniform(0.0, 0.01))
            stage.kill(pid)
        stored |= {record[1:] for record in stage.reports() if record[:1] == b"+"}
        found, torn = look(path, num_chunks)
        assert not torn
        if num_chunks == MANY_CHUNKS:
            lasting = {key for key in stored if int.from_bytes(key, "big") >= OFTEN_REMOVED}
            assert lasting <= set(found)
        num_found += len(found)
    assert not stage.counts.keys() & {"!", "2", "x"}, stage.counts
    assert num_found > ROUNDS * 5
    assert stage.counts["+"] > ROUNDS
    assert stage.counts["r"] > ROUNDS


@pytest.mark.parametrize("fault", ["publish-first", "keep-forgotten", "ignore-locks"])
def test_an_order_that_is_spoilt_is_seen(path: Path, stage: Stage, fault: str) -> None:
    """So the test above can fail."""
    for seed in range(100):
        pids = [
            stage.start(role, path, 9 * seed + at, NUM_CHUNKS, fault)
            for at, role in enumerate(ROLES)
        ]
        time.sleep(0.1)
        for pid in pids:
            stage.kill(pid)
        stage.reports()
        if stage.counts.keys() & {"!", "x", "l"} or look(path, NUM_CHUNKS)[1]:
            return
        path.unlink()
    pytest.fail("nothing was seen")


def fill(heap: SharedHeap, start: int, count: int = NUM_CHUNKS) -> int:
    """Store chunks; returns how many are there."""
    keys = [key_of(number) for number in range(start, start + count)]
    return int(heap.store(keys, contents(keys)).sum())


class TestStoppedReader:
    def test_it_keeps_its_chunks_for_a_while_and_learns_that_it_has_lost_them(
        self, path: Path, stage: Stage
    ) -> None:
        with own(path, lease_s=0.6) as heap:
            fill(heap, 0)
            pid = stage.start("holder", path)
            stage.wait_for("h")
            wait_until_stopped(pid)
            begun_s = time.monotonic()
            num_stored = fill(heap, 1000)
            if time.monotonic() < begun_s + 0.6:
                assert num_stored == 0
            while fill(heap, 1000) < NUM_CHUNKS:
                time.sleep(0.02)
            assert keeper_of(heap).broken_leases >= NUM_CHUNKS
            heap.check(contents=True)
            os.kill(pid, signal.SIGCONT)
            records = stage.wait_for("l")
            assert not [record for record in records if record[:1] in b"!r"]
            stage.kill(pid)

    def test_one_that_goes_on_in_time_has_lost_nothing(self, path: Path, stage: Stage) -> None:
        with own(path, lease_s=600.0) as heap:
            fill(heap, 0)
            pid = stage.start("holder", path)
            stage.wait_for("h")
            wait_until_stopped(pid)
            assert fill(heap, 1000) == 0
            assert keeper_of(heap).waiting_places == NUM_CHUNKS
            os.kill(pid, signal.SIGCONT)
            assert stage.wait_for("r")
            stage.kill(pid)
            while keeper_of(heap).waiting_places:
                time.sleep(0.01)
            assert fill(heap, 1000) == NUM_CHUNKS

    def test_one_that_is_killed_pins_nothing(self, path: Path, stage: Stage) -> None:
        with own(path, lease_s=600.0) as heap:
            fill(heap, 0)
            pid = stage.start("holder", path)
            stage.wait_for("h")
            stage.kill(pid)
            assert fill(heap, 1000) == NUM_CHUNKS


class TestStoppedWriter:
    def test_nobody_uses_what_it_may_still_write(self, path: Path, stage: Stage) -> None:
        with own(path, lease_s=0.01) as heap:
            pid = stage.start("filler", path)
            stage.wait_for("h")
            wait_until_stopped(pid)
            fill(heap, 0)
            time.sleep(0.05)
            assert fill(heap, 1000) == NUM_CHUNKS - BATCH
            assert keeper_of(heap).pending_chunks == BATCH
            assert len(heap.keys()) == NUM_CHUNKS - BATCH
            os.kill(pid, signal.SIGCONT)
            keys = [record[1:] for record in stage.wait_for("+") if record[:1] == b"+"]
            with heap.hold(keys) as hold:
                assert not wrong_rows(keys, hold.batch)
            heap.check(contents=True)
            stage.kill(pid)

    def test_one_that_is_killed_leaves_nothing_behind(self, path: Path, stage: Stage) -> None:
        with own(path) as heap:
            pid = stage.start("filler", path)
            stage.wait_for("h")
            assert keeper_of(heap).pending_chunks == BATCH
            stage.kill(pid)
            while keeper_of(heap).pending_chunks or keeper_of(heap).waiting_places:
                time.sleep(0.005)
            assert keeper_of(heap).free_places == NUM_CHUNKS
            assert keeper_of(heap).aborted_chunks == BATCH
            assert not heap.keys()
            heap.check()

    def test_the_next_owner_does_not_use_what_it_may_still_write(
        self, path: Path, stage: Stage
    ) -> None:
        with own(path, lease_s=0.01):
            pid = stage.start("filler", path)
            stage.wait_for("h")
            wait_until_stopped(pid)
        with own(path, lease_s=0.01) as heap:
            assert keeper_of(heap).waiting_places == BATCH
            time.sleep(0.05)
            assert fill(heap, 0) == NUM_CHUNKS - BATCH
            assert len(heap.keys()) == NUM_CHUNKS - BATCH
            os.kill(pid, signal.SIGCONT)
            stage.wait_for("n")
            while keeper_of(heap).waiting_places:
                time.sleep(0.005)
            heap.check(contents=True)
            assert max(heap.keys()) < key_of(NUM_KEYS)
            stage.kill(pid)


class TestStoppedOwner:
    def test_others_read_on_and_nobody_else_owns_the_heap(self, path: Path, stage: Stage) -> None:
        pid = stage.start("owner", path, 1)
        while stage.counts.get("+", 0) < 3 * NUM_CHUNKS:
            stage.reports()
        os.kill(pid, signal.SIGSTOP)
        wait_until_stopped(pid)
        with attach(path, timeout_s=0.1) as heap:
            keys = heap.keys()
            assert keys
            with heap.hold(keys) as hold:
                assert not wrong_rows(keys, hold.batch)
            assert heap.stats().owner_pid == pid
            with pytest.raises(TimeoutError, match=f"process {pid}, which owns"):
                heap.store([b"new"], contents([bytes(8)]))
            with pytest.raises(SegmentInUseError, match=f"is owned by process {pid}"):
                own(path, lease_s=LEASE_S)
            stage.kill(pid)
            with own(path, lease_s=LEASE_S) as next_owner:
                assert set(keys) == set(next_owner.keys())
                assert heap.store([b"new"], contents([bytes(8)])).all()
                assert next_owner.lookup([b"new"]).all()
                next_owner.check(contents=True)
        stage.reports()
        assert not stage.counts.keys() & {"!", "2", "x"}
