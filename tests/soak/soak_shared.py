"""Processes that share a heap, killed and stopped at random for minutes.

    python tests/soak/soak_shared.py --minutes 5

Several processes want to own the heap, and some read and store. Every few milliseconds one is
killed and another one started, or one is stopped, and goes on later. Readers look at every byte of
what they hold. Every few seconds all are killed, and the heap must be whole: no torn chunk, no
place lost, nothing in the folder but the heap. An owner takes a second lock, which nobody else may
have.
Prints what was done, and ends with status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from shared_heaps import LEASE_S, NUM_CHUNKS, Stage, own, wrong_rows

CAST = ["owner", "owner", "reader", "reader", "reader", "writer", "writer"]

ROUND_S = (0.5, 6.0)

PAUSES_S = (0.001, 0.1)

STOPPED_S = (0.01, 3 * LEASE_S)

VIOLATIONS = {"!": "wrong bytes were read", "2": "there were two owners", "x": "a process failed"}


class Soak:
    """One soak in one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / "heap"
        self.folder = folder
        self.rng = random.Random(seed)
        self.stage = Stage()
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._seed = seed * 1_000_000

    def run(self, seconds: float) -> None:
        """Rounds until the time is over, or something is wrong."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.wrong:
            self.round(min(end_s, time.monotonic() + self.rng.uniform(*ROUND_S)))
        self.stage.close()

    def start(self, role: str) -> int:
        self._seed += 1
        return self.stage.start(role, self.path, self._seed)

    def round(self, end_s: float) -> None:
        """Trouble, then a look."""
        rng = self.rng
        roles = {self.start(role): role for role in CAST}
        stopped: dict[int, float] = {}
        while time.monotonic() < end_s:
            time.sleep(rng.uniform(*PAUSES_S))
            now = time.monotonic()
            for pid in [pid for pid, until in stopped.items() if until < now]:
                del stopped[pid]
                self.send(pid, signal.SIGCONT)
            pid = rng.choice(list(roles))
            if rng.random() < 0.4:
                self.stage.kill(pid)
                stopped.pop(pid, None)
                self.done["kills"] += 1
                role = roles.pop(pid)
                roles[self.start(role)] = role
            elif pid not in stopped:
                self.send(pid, signal.SIGSTOP)
                self.done["stops"] += 1
                stopped[pid] = now + rng.uniform(*STOPPED_S)
            self.stage.reports()
        pids = list(roles)
        rng.shuffle(pids)
        for pid in pids:
            self.stage.kill(pid)
            self.done["kills"] += 1
        self.stage.reports()
        self.look()

    def send(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def look(self) -> None:
        """Nobody is there any more: the heap must be whole."""
        self.done["looks"] += 1
        self.wrong += [what for kind, what in VIOLATIONS.items() if self.stage.counts.get(kind)]
        try:
            with own(self.path, lease_s=LEASE_S) as heap:
                heap.check()
                keys = heap.keys()
                self.done["chunks found"] += len(keys)
                with heap.hold(keys, verify=False) as hold:
                    if wrong_rows(hold.keys, hold.batch):
                        self.wrong.append("a torn chunk was found")
                heap.check(contents=True)
                keeper = heap.stats().keeper
                assert keeper is not None
                if keeper.free_places + len(keys) != NUM_CHUNKS or keeper.waiting_places:
                    self.wrong.append(f"places are lost: {keeper}")
                if keeper.dropped_chunks:
                    self.wrong.append(f"records are damaged: {keeper}")
        except Exception as error:
            self.wrong.append(repr(error))
        left = {file.name for file in self.folder.iterdir()} - {"heap", "heap.owner"}
        if left:
            self.wrong.append(f"files are left: {left}")
        if self.rng.random() < 0.1:
            self.path.unlink()


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvheap-soak-", dir="/dev/shm"))
    try:
        soak = Soak(folder, arguments.seed)
        soak.run(60 * arguments.minutes)
    finally:
        shutil.rmtree(folder)
    names = {"+": "stored", "r": "holds", "l": "lost leases"}
    counts = {name: soak.stage.counts.get(kind, 0) for kind, name in names.items()}
    print(", ".join(f"{count} {name}" for name, count in {**soak.done, **counts}.items()))
    for what in soak.wrong:
        print(f"VIOLATION with seed {arguments.seed}: {what}")
    return bool(soak.wrong)


if __name__ == "__main__":
    sys.exit(main())
