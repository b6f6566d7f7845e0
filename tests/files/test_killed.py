"""A process that is killed at any moment: nothing torn is served, no ended store is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

import file_tiers
from file_tiers import BATCH, NUM_CHUNKS, make_heap, open_tier, wrong_rows

KILLS = 24

RECORD = 9
"""Bytes of a record: what happened, and a key or a number."""


class Victim:
    """A process whose forked workers are killed."""

    def __init__(self, folder: Path, kind: str) -> None:
        command = [sys.executable, file_tiers.__file__, str(folder), kind]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def killed_after(self, seed: int, seconds: float) -> dict[str, list[bytes]]:
        """Kill a new worker; returns the keys of what it has reported.

        ``+``: the store had ended; ``?``: it was about to be removed; ``-``: it was removed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"%d\n" % seed)
        self.process.stdin.flush()
        records = [self.process.stdout.read(RECORD)]
        while not any(record[:1] == b"#" for record in records):
            records.append(self.process.stdout.read(RECORD))
        pid = next(int.from_bytes(r[1:], "big") for r in records if r[:1] == b"#")
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        while records[-1][:1] != b".":
            records.append(self.process.stdout.read(RECORD))
        return {
            kind: [record[1:] for record in records if record[:1] == kind.encode()]
            for kind in "+?-"
        }

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(4)


@pytest.fixture
def victim(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Victim]:
    victim = Victim(tmp_path / "tier", request.param)
    yield victim
    victim.close()


@pytest.mark.parametrize("victim", ["as it is"], indirect=True)
def test_nothing_torn_is_found_and_nothing_that_ended_is_lost(
    tmp_path: Path, victim: Victim, rng: random.Random
) -> None:
    heap = make_heap(NUM_CHUNKS)
    num_stored = num_found = 0
    for seed in range(1, KILLS + 1):
        reports = victim.killed_after(seed, rng.uniform(0.02, 0.3))
        with open_tier(tmp_path / "tier", NUM_CHUNKS) as tier:
            tier.check()
            keys = tier.keys()
            loading = tier.load(keys, heap)
            assert loading is not None
            loading.result(60)  # raises if one is damaged
            assert not wrong_rows(keys, loading.batch)
            heap.batched_free(loading.batch)
            # A full tier evicts the oldest, and what was under way is one batch.
            latest = [key for key in reports["+"][-2 * BATCH :] if key not in reports["?"]]
            assert tier.lookup(latest).all()
            assert not tier.lookup(reports["-"]).any()
            assert tier.stats().dropped_chunks == 0
        num_stored += len(reports["+"])
        num_found += len(keys)
    assert num_stored > KILLS * BATCH  # it did work
    assert num_found > KILLS * BATCH
    assert heap.stats().allocated_bytes == 0


@pytest.mark.parametrize("victim", ["index-first"], indirect=True)
def test_an_index_that_is_written_first_is_torn_which_checksums_show(
    tmp_path: Path, victim: Victim, rng: random.Random
) -> None:
    """So the test above can fail; and what is torn is never served."""
    heap = make_heap(NUM_CHUNKS)
    num_damaged = 0
    for seed in range(1, 10 * KILLS):
        victim.killed_after(seed, rng.uniform(0.02, 0.2))
        with open_tier(tmp_path / "tier", NUM_CHUNKS) as tier:
            keys = tier.keys()
            loading = tier.load(keys, heap)
            assert loading is not None
            is_right = loading.succeeded(60)
            assert not wrong_rows(keys, loading.batch, is_right.tolist())
            heap.batched_free(loading.batch)
            tier.check()
            assert tier.stats().damaged_chunks == (~is_right).sum()
            num_damaged += int((~is_right).sum())
        if num_damaged >= 3:
            break
    assert num_damaged >= 3
