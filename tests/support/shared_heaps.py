"""Shared heaps for tests: chunks whose bytes follow from their keys; processes that are killed."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kvheap import BlockLayout, HostMemoryAllocator, MemoryBatch, MemoryFormat, SharedHeap
from kvheap.shared import LeaseLostError, NoOwnerError, SegmentInUseError
from kvheap.shared.stats import KeeperStats

__all__ = ["LAYOUT", "PLACE", "attach", "expected", "keeper_of", "key_of", "own", "wrong_rows"]

LAYOUT = BlockLayout.of([2048], torch.int64, MemoryFormat.UNDEFINED)
PLACE = LAYOUT.size_bytes
"""16 KiB, a multiple of 4096."""

NAMESPACE = "a model"

NUM_CHUNKS, NUM_KEYS, BATCH = 24, 60, 4

LEASE_S = 0.25


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "big")


def expected(key: bytes) -> torch.Tensor:
    """The chunk of a key."""
    return torch.arange(2048) * 7919 + int.from_bytes(key[-5:], "big") * 1_000_003


def contents(keys: Sequence[bytes]) -> torch.Tensor:
    return torch.stack([expected(key) for key in keys])


def own(path: Any, num_chunks: int = NUM_CHUNKS, **options: Any) -> SharedHeap:
    options = {"namespace": NAMESPACE, **options}
    return SharedHeap(path, num_chunks * PLACE, LAYOUT, **options)


def attach(path: Any, **options: Any) -> SharedHeap:
    options = {"namespace": NAMESPACE, **options}
    return SharedHeap.attach(path, LAYOUT, **options)


def filled(heap: HostMemoryAllocator, keys: Sequence[bytes]) -> MemoryBatch:
    """A batch of another heap with the chunks of keys."""
    batch = heap.batched_allocate([2048], torch.int64, len(keys), LAYOUT.fmt, source=contents(keys))
    assert batch is not None
    return batch


def wrong_rows(keys: Sequence[bytes], blocks: Any) -> list[int]:
    """The rows of blocks that do not have the bytes of their keys."""
    return [
        row for row, key in enumerate(keys) if not torch.equal(blocks[row].tensor, expected(key))
    ]


def keeper_of(heap: SharedHeap) -> KeeperStats:
    """What the owner's keeper says; the heap must be the owner's."""
    found = heap.stats().keeper
    assert found is not None
    return found


# -- processes that are killed -----------------------------------------------------------------

RECORD = 9
"""Bytes of a record: what happened, and a key or a number."""


class Reporter:
    """Tells the test what has happened, record by record."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def say(self, kind: str, keys: Sequence[bytes]) -> None:
        os.write(self._fd, b"".join(kind.encode() + key for key in keys))


class Ownership:
    """The lock of a file that only owners take: another witness of who owns the heap."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        end_s = time.monotonic() + 5  # the one before may have closed its files one by one
        while time.monotonic() < end_s:
            with suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.001)
        return False

    def leave(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


def waited_for(call: Any) -> SharedHeap:
    """What ``call`` opens, as soon as it can."""
    while True:
        with suppress(SegmentInUseError, FileNotFoundError):
            return call()
        time.sleep(0.002)


def be_owner(path: str, num_chunks: int, rng: random.Random, reporter: Reporter) -> None:
    """Own the heap whenever nobody else does; store, remove and close."""
    witness = Ownership(f"{path}.owner")
    while True:
        heap = waited_for(lambda: own(path, num_chunks, lease_s=LEASE_S))
        if not witness.take():
            reporter.say("2", [bytes(8)])  # there are two
        heap.check()
        for _ in range(rng.randrange(10, 400)):
            store(heap, rng, reporter)
            if rng.random() < 0.2:
                remove(heap, rng, reporter)
            if rng.random() < 0.2:
                read(heap, rng, reporter)
            if rng.random() < 0.05:
                heap.check()
        witness.leave()
        heap.close()


def be_reader(path: str, num_chunks: int, rng: random.Random, reporter: Reporter) -> None:
    """Hold and load chunks, and look at every byte."""
    heap = waited_for(lambda: attach(path))
    while True:
        read(heap, rng, reporter)


def be_writer(path: str, num_chunks: int, rng: random.Random, reporter: Reporter) -> None:
    """Store chunks through the owner, whoever that is."""
    heap = waited_for(lambda: attach(path, timeout_s=0.5))
    while True:
        with suppress(NoOwnerError, TimeoutError):
            store(heap, rng, reporter)
            if rng.random() < 0.1:
                remove(heap, rng, reporter)


def hold_and_stop(path: str, num_chunks: int, rng: random.Random, reporter: Reporter) -> None:
    """Hold all chunks, stop, and say what they are like afterwards."""
    heap = attach(path)
    keys = heap.keys()
    try:
        with heap.hold(keys) as hold:
            reporter.say("h", keys[:1])
            os.kill(os.getpid(), signal.SIGSTOP)
            wrong = wrong_rows(keys, hold.batch)
    except LeaseLostError:
        reporter.say("l", keys[:1])
    else:
        reporter.say("!" if wrong else "r", keys[:1])
    time.sleep(60)


def fill_and_stop(path: str, num_chunks: int, rng: random.Random, reporter: Reporter) -> None:
    """Fill a half of some chunks, stop, and fill the rest."""
    heap = attach(path)
    keys = [key_of(NUM_KEYS + number) for number in range(BATCH)]
    with heap.begin(keys) as begun:
        for row, key in enumerate(keys):
            begun.batch[row].tensor[:1024] = expected(key)[:1024]
        reporter.say("h", keys[:1])
        os.kill(os.getpid(), signal.SIGSTOP)
        for row, key in enumerate(keys):
            begun.batch[row].tensor[1024:] = expected(key)[1024:]
        try:
            begun.complete()
        except NoOwnerError:
            reporter.say("n", keys[:1])
        else:
            reporter.say("+", keys)
    time.sleep(60)


ROLES = {
    "owner": be_owner,
    "reader": be_reader,
    "writer": be_writer,
    "holder": hold_and_stop,
    "filler": fill_and_stop,
}


def some_keys(rng: random.Random, most: int = BATCH) -> list[bytes]:
    return [key_of(number) for number in rng.sample(range(NUM_KEYS), rng.randint(1, most))]


def store(heap: SharedHeap, rng: random.Random, reporter: Reporter) -> None:
    keys = some_keys(rng)
    if rng.random() < 0.2:  # byte by byte, and not all of them
        with heap.begin(keys) as begun:
            for row, key in enumerate(begun.keys):
                begun.batch[row].tensor.copy_(expected(key))
            if rng.random() < 0.5:
                begun.complete()
        return
    found = heap.store(keys, contents(keys)).tolist()
    reporter.say("+", [key for key, is_there in zip(keys, found, strict=True) if is_there])


def remove(heap: SharedHeap, rng: random.Random, reporter: Reporter) -> None:
    keys = [key_of(number) for number in rng.sample(range(NUM_KEYS // 2), 2)]
    heap.remove(keys)


def read(heap: SharedHeap, rng: random.Random, reporter: Reporter) -> None:
    keys = some_keys(rng)
    wrong: list[bytes] = []
    try:
        with heap.hold(keys, allow_partial=True, verify=rng.random() < 0.3) as hold:
            for _ in range(rng.choice([1, 1, 1, 4])):
                wrong = [hold.keys[row] for row in wrong_rows(hold.keys, hold.batch)]
                hold.check()
                if wrong:
                    break
                if rng.random() < 0.1:
                    time.sleep(rng.random() * 0.01)
                heap.touch(hold.keys)
            num_read = len(hold)
    except LeaseLostError:
        reporter.say("l", [bytes(8)])
        return
    if wrong:
        reporter.say("!", wrong)
    reporter.say("r", [key_of(num_read)])


class Stage:
    """A process whose forked workers are killed and stopped."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._rest = b""
        self._others: list[bytes] = []
        self.counts: dict[str, int] = {}

    def start(
        self,
        role: str,
        path: Path | str,
        seed: int = 0,
        num_chunks: int = NUM_CHUNKS,
        fault: str = "nothing",
    ) -> int:
        """A new worker; returns its process id.

        Args:
            role: one of ``ROLES``.
            path: of the heap.
            seed: of what it does.
            num_chunks: size of the heap.
            fault: what is to be spoilt, one of ``FAULTS``.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{role} {path} {seed} {num_chunks} {fault}\n".encode())
        self.process.stdin.flush()
        pids: list[int] = []
        end_s = time.monotonic() + 60
        while not pids:
            assert time.monotonic() < end_s, "the stage does not answer"
            time.sleep(0.001)
            records = self.reports()  # the worker may have said something already
            pids = [int.from_bytes(r[1:], "big") for r in records if r[:1] == b"#"]
            self._others += [record for record in records if record[:1] != b"#"]
        return pids[0]

    def reports(self) -> list[bytes]:
        """The records since the last call."""
        assert self.process.stdout is not None
        data = self._rest
        while part := self.process.stdout.read(1 << 20):
            data += part
        whole = len(data) // RECORD * RECORD
        self._rest = data[whole:]
        records = [data[at : at + RECORD] for at in range(0, whole, RECORD)]
        for record in records:
            kind = chr(record[0])
            self.counts[kind] = self.counts.get(kind, 0) + 1
        others, self._others = self._others, []
        return others + records

    def kill(self, pid: int) -> None:
        """Kill a worker, and wait until it is gone."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        end_s = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end_s, "a killed process does not end"
            self.reports()
            time.sleep(0.001)

    def wait_for(self, kind: str) -> list[bytes]:
        """The records until there is one of a kind."""
        records: list[bytes] = []
        end_s = time.monotonic() + 60
        while not any(record[:1] == kind.encode() for record in records):
            assert time.monotonic() < end_s, f"nobody says {kind}: {records}"
            time.sleep(0.001)
            records += self.reports()
        return records

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def wait_until_stopped(pid: int) -> None:
    end_s = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end_s, "the process does not stop"
        time.sleep(0.001)


def publish_first() -> None:
    """Spoil the order of a store: others find the chunk before its bytes are there."""
    from kvheap.shared.storing import Storing

    fill = Storing._fill

    def fill_late(self: Any, store: Any, source: Any) -> None:
        digests = [
            self._table.digest_of(key, memoryview(source[row].numpy()).cast("B"))
            for key, row in zip(store.keys, store.rows, strict=True)
        ]
        store.complete(digests=digests)
        fill(self, store, source)

    Storing._fill = fill_late  # type: ignore[method-assign]


def ignore_locks() -> None:
    """Spoil the leases: the owner does not ask who reads."""
    from kvheap.shared.leases import PlaceLocks

    PlaceLocks.are_any = lambda self: False  # type: ignore[method-assign]


def keep_forgotten() -> None:
    """Spoil the order of an eviction: others find the chunk until its place is used again."""
    from kvheap.shared.chunk_table import ChunkTable

    ChunkTable.forget = lambda self, place, key: None  # type: ignore[method-assign]


FAULTS = {
    "nothing": lambda: None,
    "publish-first": publish_first,
    "ignore-locks": ignore_locks,
    "keep-forgotten": keep_forgotten,
}


def work(line: str, report: int) -> None:
    role, path, seed, num_chunks, fault = line.split()
    FAULTS[fault]()
    try:
        ROLES[role](path, int(num_chunks), random.Random(int(seed)), Reporter(report))
    except BaseException:
        traceback.print_exc()
        os.write(report, b"x" + bytes(8))


def main() -> None:
    """Fork a worker for each line of the input, and print its process id."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    children = []
    report = os.dup(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                work(line, report)
            finally:
                os._exit(1)
        children.append(child)
        os.write(report, b"#" + child.to_bytes(8, "big"))
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
