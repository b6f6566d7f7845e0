"""Openings that a signal handler's exception ends, at any place: nothing stays open.

The next one, in the same process, finds the file or folder free, and no descriptor or thread is
left. Only where the constructor has returned, there is something to be closed.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import file_tiers
import pytest
import shared_heaps
from foreign_code import Interrupted, interrupts, no_deadlock

from kvheap.files import FileTier

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

Opening = Callable[[], Any]

STEP = 7
"""Every seventh place."""


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path(f"/dev/shm/kvheap-test-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(params=["tier", "owner", "attached"])
def opening(request: Any, path: Path, tmp_path: Path) -> Iterator[Opening]:
    if request.param == "tier":
        yield lambda: opened_tier(tmp_path / "tier")
    elif request.param == "owner":
        yield lambda: shared_heaps.own(path, 4)
    else:
        with shared_heaps.own(path, 4):
            yield lambda: shared_heaps.attach(path)


def opened_tier(folder: Path) -> FileTier:
    """Without what renames arguments around the constructor: it is over there."""
    tier = FileTier.__new__(FileTier)
    inner = inspect.unwrap(FileTier.__init__)
    inner(tier, folder, 4 * file_tiers.PLACE, file_tiers.LAYOUT, namespace="a model", threads=2)
    return tier


def in_use() -> set[str]:
    """The descriptors of this process with their files, and its threads."""
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            descriptors.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return descriptors | set(os.listdir("/proc/self/task"))


def left_open(before: set[str]) -> set[str]:
    """What was not there before, at the latest after some seconds."""
    end_s = time.monotonic() + 10
    while (more := in_use() - before) and time.monotonic() < end_s:
        time.sleep(0.001)
    return more


def test_nothing_stays_open(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest keeps what strikes in a finalizer, and with it the frames and all that they hold.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    opening().close()
    gc.collect()
    time.sleep(0.2)  # the last thread of a tier ends just after its close
    before = in_use()
    made: list[Any] = []
    number = 0
    while True:
        with no_deadlock():
            was_struck = interrupts(
                number,
                lambda: made.extend(map(lambda _: opening(), [0])),  # noqa: C417
                Interrupted,
                modules=("kvheap.",),
                but_not_inside=("kvheap.addresses", "kvheap.planning", "threading", "selectors"),
            )
        while made:
            made.pop().close()
        if not was_struck:
            break
        number += STEP
        opening().close()
        if number % 3 == 0:
            gc.collect()  # a heap that is closed is a part of cycles
            assert not left_open(before), number
    assert number > 100
