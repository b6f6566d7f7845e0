"""A folder of files for minutes: its processes are killed and stopped, and its files damaged.

    python tests/soak/soak_files.py --minutes 5

One process after another opens the folder, with threads that store, load, remove and look, and is
stopped for moments, and killed or interrupted at any time. Between two of them, somebody may flip
bits in a file, cut it off, or put an older copy of it in its place. Then all is looked at. Every
byte that is read must follow from its key, whatever was done; ``check()`` must hold; and as long as
the files were left alone, every chunk is whole, and what was removed is not found.
Prints what was done, and ends with status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from file_tiers import fill, key_of, make_heap, open_tier, wrong_rows

from kvheap.files import FileTier, MissingChunksError

NUM_PLACES = 48
NUM_KEYS = 120
"""More than there are places."""

NUM_THREADS = 3

POLICIES = ("lru", "arc", "s3fifo", "adaptive")

LIFE_S = 0.6
"""On average."""

DAMAGED = ("chunks", "index", "index")


class _Interrupt(BaseException):
    """What SIGTERM raises, wherever the process is."""


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Interrupt


class Life:
    """One process that has the folder."""

    def __init__(self, folder: Path, seed: int, report: int) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.report = report
        self.heap = make_heap(64 * NUM_THREADS)

    def live(self) -> NoReturn:
        """Until it is killed, or interrupted."""
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            tier = open_tier(self.folder, NUM_PLACES, policy=self.rng.choice(POLICIES))
            seeds = [self.rng.random() for _ in range(NUM_THREADS)]
            for seed in seeds[1:]:
                threading.Thread(target=self.work, args=(tier, seed), daemon=True).start()
            with suppress(_Interrupt):
                self.work(tier, seeds[0])
            tier.close(60)  # under the calls of the other threads
            self.heap.check()
        except _Interrupt:
            pass
        except BaseException:
            self.tell(traceback.format_exc())
        os._exit(0)

    def tell(self, what: str) -> None:
        """Something is wrong."""
        os.write(self.report, what.encode())

    def work(self, tier: FileTier, seed: float) -> None:
        """One thread."""
        rng = random.Random(seed)
        try:
            while True:
                first, count = rng.randrange(NUM_KEYS), rng.choice([1, 2, 7])
                keys = [key_of((first + row) % NUM_KEYS) for row in range(count)]
                call = rng.choice([self.store, self.store, self.load, self.load, self.rest])
                call(tier, keys)
        except Exception:
            if not tier.closed:
                self.tell(traceback.format_exc())

    def store(self, tier: FileTier, keys: list[bytes]) -> None:
        batch = fill(self.heap, keys)
        storing = tier.store(keys, batch)
        self.heap.batched_free(batch)
        storing.succeeded(60)

    def load(self, tier: FileTier, keys: list[bytes]) -> None:
        loading = tier.load(keys, self.heap)
        assert loading is not None
        is_there = loading.succeeded(60)
        if wrong_rows(keys, loading.batch, is_there.tolist()):
            self.tell("wrong bytes were loaded")

    def rest(self, tier: FileTier, keys: list[bytes]) -> None:
        tier.remove(keys[:2])
        tier.lookup(keys)
        tier.touch(keys)
        tier.check()


class Soak:
    """One soak in one folder."""

    def __init__(self, parent: Path, seed: int) -> None:
        self.folder = parent / "tier"
        self.old = parent / "old"
        self.rng = random.Random(seed)
        self.heap = make_heap(NUM_PLACES)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_damaged = False

    def run(self, seconds: float) -> None:
        """Lives until the time is over, or something is wrong."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.wrong:
            self.life()
            self.child(self.look, "looks")
            if not self.wrong and self.rng.random() < 0.3:
                self.damage()
                self.child(self.look, "looks at damage")
                self.is_damaged = False

    def life(self) -> None:
        """One process, until it is killed."""
        rng, (read, write) = self.rng, os.pipe()
        seed = rng.randrange(1 << 30)
        pid = os.fork()
        if not pid:
            os.close(read)
            Life(self.folder, seed, write).live()
        os.close(write)
        for _ in range(rng.randrange(3)):
            time.sleep(rng.expovariate(2 / LIFE_S))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGCONT)
            self.done["stops"] += 1
        time.sleep(rng.expovariate(1 / LIFE_S))
        how = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        os.kill(pid, how)
        self.done[how.name] += 1
        self.end(pid, read, how)

    def child(self, task: object, name: str) -> None:
        """Look in a process of its own, which damage may end."""
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                assert callable(task)
                task()
            except BaseException:
                os.write(write, traceback.format_exc().encode())
            os._exit(0)
        os.close(write)
        self.done[name] += 1
        self.end(pid, read, signal.SIGKILL)

    def end(self, pid: int, read: int, how: int) -> None:
        """Wait for a process, and hear what it says."""
        with os.fdopen(read, "rb") as pipe:
            if text := pipe.read().decode():
                self.wrong.append(text)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) != how:
            self.wrong.append(f"a process died of signal {os.WTERMSIG(status)}")

    def look(self) -> None:
        """Nobody has the folder: it must be whole."""
        for _ in range(2):
            with open_tier(self.folder, NUM_PLACES) as tier:
                tier.check()
                keys = tier.keys()
                loading = tier.load(keys, self.heap)
                assert loading is not None
                with suppress(MissingChunksError):
                    loading.result(60)
                is_there = loading.succeeded(60)
                assert not wrong_rows(keys, loading.batch, is_there.tolist())
                tier.check()
                stats = tier.stats()
            self.heap.batched_free(loading.batch)
            assert stats.free_bytes + stats.ready_chunks * stats.place_bytes == stats.file_bytes
            if not self.is_damaged:
                assert is_there.all(), stats
                assert not stats.dropped_chunks, stats
            self.is_damaged = False  # what was damaged is gone

    def damage(self) -> None:
        """Do something to a file."""
        rng = self.rng
        name = rng.choice(DAMAGED)
        path = self.folder / name
        how = rng.choice(["flip", "flip", "cut", "old", "keep"])
        size = path.stat().st_size
        if how == "keep" or not self.old.exists():
            if self.old.exists():
                shutil.rmtree(self.old)
            shutil.copytree(self.folder, self.old)
            return
        self.is_damaged = True
        self.done[f"{name}: {how}"] += 1
        if how == "cut":
            os.truncate(path, rng.randrange(size))
        elif how == "old":
            shutil.copy(self.old / name, path)
        else:
            raw = bytearray(path.read_bytes())
            places = [at for at, value in enumerate(raw) if value] if name == "index" else []
            for _ in range(rng.choice([1, 1, 10])):
                raw[rng.choice(places or range(size))] ^= 1 << rng.randrange(8)
            path.write_bytes(raw)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("kvheap").setLevel(logging.ERROR)  # damage is told
    folder = Path(tempfile.mkdtemp(prefix="kvheap-soak-"))
    try:
        soak = Soak(folder, arguments.seed)
        soak.run(60 * arguments.minutes)
    finally:
        shutil.rmtree(folder)
    print(", ".join(f"{count} {name}" for name, count in soak.done.items()))
    for what in soak.wrong:
        print(f"VIOLATION with seed {arguments.seed}: {what}")
    return bool(soak.wrong)


if __name__ == "__main__":
    sys.exit(main())
