"""A soak of nodes: readers and owners in processes that are killed and frozen at random.

    python tests/soak/soak_remote.py --minutes 10

One node reads from several owners while each of them, at random moments, is frozen for up to two
seconds, killed and started again, or told to give its blocks to other chunks. Half of the reads are
by leases that were taken before; these are short or long, read several times, released and dropped
before, while and after the reads, and kept until they have expired or their owner is another
process. Every chunk that a read delivers is compared with what its key says. Blocks of failed reads
are freed at once. A wrong byte, a block or a lease that does not come back, or an error that names
no reason ends the soak with status 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from remote_nodes import LAYOUT, NodeProcess, keys_of, make_heap, until, wrong_rows

from kvheap import LifetimeError, MemoryBatch, TransferError
from kvheap.remote import (
    Node,
    PeerError,
    PeerGoneError,
    PeerLease,
    PeerTimeoutError,
    ProtocolError,
)

CHUNKS = 2048
"""Of each owner: 32 MiB."""

EXPECTED = (PeerError, PeerGoneError, PeerTimeoutError, ProtocolError, LookupError, LifetimeError)


class Owner:
    """One owner, whatever process it is now."""

    def __init__(self, number: int, tls: str) -> None:
        self.number, self.tls, self.lives = number, tls, 0
        self.first = 0
        self.process = self._start()
        self.lock = threading.Lock()

    def _start(self) -> NodeProcess:
        self.lives += 1
        self.first = self.number * 10_000_000
        numbers = range(self.first, self.first + CHUNKS)
        process = NodeProcess(f"owner {self.number}", CHUNKS, numbers, tls=self.tls)
        assert process.address
        return process

    def disturb(self, rng: random.Random) -> str:
        """Do something to it."""
        what = rng.choice(["freeze", "freeze", "kill", "replace", "replace", "replace"])
        process = self.process
        if what == "freeze":
            process.freeze()
            time.sleep(rng.choice([0.05, 0.3, 1.0, 2.0]))
            process.thaw()
        elif what == "kill":
            process.__exit__(None, None, None)
            with self.lock:
                self.process = self._start()
        else:  # its blocks become other chunks'
            process.ask("node.withdraw(keys_of(numbers))")
            process.ask("until(lambda: node.stats().leases == 0, 120)")
            process.ask("until(lambda: is_freed(heap, batch), 120)")  # one more may have begun
            first = self.first + CHUNKS
            process.ask(f"numbers = range({first}, {first} + {CHUNKS})")
            process.ask("batch = fill(heap, numbers)")
            process.ask("node.publish(keys_of(numbers), batch)")
            self.first = first
        return what


class Soak:
    """Counts what happens, and stops at the first thing that must not."""

    def __init__(self, minutes: float, seed: int) -> None:
        self.seconds = minutes * 60
        self.end = 0.0
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.heap = make_heap(4 * CHUNKS)
        self.node = Node("reader", self.heap)
        self.owners = [Owner(0, "tcp,self"), Owner(1, ""), Owner(2, "tcp,self")]

    @property
    def goes_on(self) -> bool:
        return not self.wrong and time.monotonic() < self.end

    def disturb(self, owner: Owner) -> None:
        rng = random.Random(self.seed * 100 + owner.number)
        while self.goes_on:
            time.sleep(rng.uniform(0.1, 1.5))
            try:
                self.counts[owner.disturb(rng)] += 1
            except Exception as error:
                self.wrong.append(f"owner {owner.number}: {error!r}")

    def read(self, seed: int) -> None:
        rng = random.Random(self.seed * 1000 + seed)
        while self.goes_on:
            owner = rng.choice(self.owners)
            with owner.lock:
                address, first = owner.process.address, owner.first
            start = first + rng.randrange(CHUNKS)
            numbers = range(start, min(start + rng.randrange(1, CHUNKS), first + CHUNKS))
            if rng.random() < 0.3:
                numbers = numbers[::2]
            how = rng.choice([self._read, self._read_leased])
            try:
                how(address, numbers, rng)
            except EXPECTED as error:
                self.counts[type(error).__name__] += 1
            except BaseException as error:
                self.wrong.append(f"a read failed: {error!r}")

    def _read(self, address: str, numbers: range, rng: random.Random) -> None:
        peer = self.node.connect(address, timeout_s=1.0)
        if rng.random() < 0.2:
            peer.lookup(keys_of(numbers), timeout_s=1.0)
        batch = peer.read(keys_of(numbers), into=self.heap, timeout_s=rng.choice([0.05, 0.5, 5.0]))
        self._check(batch, numbers, rng, repr(peer))

    def _read_leased(self, address: str, numbers: range, rng: random.Random) -> None:
        """Lease chunks, read them some times, and be rid of the lease in any way at any time."""
        peer = self.node.connect(address, timeout_s=1.0)
        if rng.random() < 0.5:
            numbers = numbers[: rng.randrange(1, 16)]  # small ones are posted by their caller
        ttl_s = rng.choice([0.05, 0.5, 5.0, 60.0])
        lease: PeerLease | None = peer.lease(keys_of(numbers), ttl_s, timeout_s=1.0)
        assert lease is not None
        held = [number for number, found in zip(numbers, lease.found, strict=True) if found]
        self.counts["leased"] += 1
        if not held:
            self.counts["nothing to lease"] += 1
            return
        if rng.random() < 0.1:
            time.sleep(rng.choice([0.06, 0.6]))
        kept: PeerLease | None = lease if rng.random() < 0.3 else None
        for _ in range(rng.randrange(1, 5)):
            timeout_s = rng.choice([0.05, 0.5, 5.0])
            batch = peer.read(lease, into=self.heap, timeout_s=timeout_s)
            way = rng.random()
            if way < 0.2:
                lease.release()
            elif way < 0.4 and kept is None:
                lease = None
            self._check(batch, held, rng, f"{peer!r} by a lease of {ttl_s} s")
            if way < 0.4:
                return
        lease.release()

    def _check(
        self, batch: MemoryBatch | None, numbers: Sequence[int], rng: random.Random, who: str
    ) -> None:
        """Compare what a read delivers with its keys, and free its blocks."""
        if batch is None:
            self.counts["full"] += 1
            time.sleep(0.05)
            return
        try:
            if rng.random() < 0.1:
                self.counts["freed in flight"] += 1
                return
            batch.transfer.result(30)  # type: ignore[union-attr]
            bad = wrong_rows(numbers, batch)
            self.counts["read"] += 1
            if bad:
                self.wrong.append(f"{bad} of {len(numbers)} chunks are wrong, from {who}")
        except TransferError as error:
            if not isinstance(error.__cause__, EXPECTED):
                self.wrong.append(f"no reason: {error!r} from {error.__cause__!r}")
            self.counts[type(error.__cause__).__name__] += 1
        finally:
            self.heap.batched_free(batch)

    def run(self) -> bool:
        """Whether nothing went wrong."""
        self.end = time.monotonic() + self.seconds  # the owners have started, which takes seconds
        threads = [threading.Thread(target=self.disturb, args=(owner,)) for owner in self.owners]
        threads += [threading.Thread(target=self.read, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not until(lambda: not self.node.stats().reads_in_flight, 60):
            self.wrong.append(f"reads do not end: {self.node.stats()}")
        if not until(lambda: self.heap.stats().allocated_bytes == 0, 10):
            self.wrong.append(f"blocks do not come back: {self.heap.stats()}")
        with suppress(Exception):
            self.heap.memcheck()
            self.counts["checked"] += 1
        self.node.close(10)
        for owner in self.owners:  # leases whose release was lost with a connection expire
            if not until(lambda owner=owner: not owner.process.ask("node.stats().leases"), 65):
                self.wrong.append(f"owner {owner.number} does not get its leases back")
        self.heap.close(10)
        for owner in self.owners:
            owner.process.__exit__(None, None, None)
        return not self.wrong


def soak(minutes: float, seed: int) -> tuple[bool, dict[str, Any]]:
    """Run it; returns whether nothing went wrong, and what happened."""
    run = Soak(minutes, seed)
    fine = run.run()
    return fine, {**run.counts, "wrong": run.wrong, "chunk bytes": LAYOUT.size_bytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    fine, counts = soak(arguments.minutes, arguments.seed)
    print(f"seed {arguments.seed}: {counts}")
    return 0 if fine and counts.get("checked") else 1


if __name__ == "__main__":
    sys.exit(main())
