"""How much memory there is: of the machine, and of control groups of both versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_code import interrupts
from host_memory_probes import PAGE, FakeRegistrar, resident_pages

from kvheap.memory import host_memory
from kvheap.memory.available import available_bytes
from kvheap.memory.boots import boot_id
from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.sharing import is_shared


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4000 << 10),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, 4000 << 10),
        ({"sys/fs/cgroup/memory.max": "9000\n", "sys/fs/cgroup/memory.current": "8000\n"}, 1000),
        ({"sys/fs/cgroup/memory.max": "9000\n", "sys/fs/cgroup/memory.current": "9500\n"}, 0),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "7000\n",
                "sys/fs/cgroup/a/b/memory.current": "1\n",
            },
            6999,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/c\n0::/\n",
                "sys/fs/cgroup/memory/c/memory.limit_in_bytes": "300\n",
                "sys/fs/cgroup/memory/c/memory.usage_in_bytes": "100\n",
            },
            200,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
            },
            4000 << 10,
        ),
    ],
    ids=["none", "no limit", "limit", "over", "in a group", "version 1", "version 1, no limit"],
)
def test_the_least_of_all_limits(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_bytes(write(tmp_path, MACHINE | files)) == expected


def test_of_this_machine(tmp_path: Path) -> None:
    assert available_bytes() > 1 << 20
    assert available_bytes(tmp_path) == 0


def test_more_than_there_is_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 7 * PAGE)
    buffer = HostBuffer(16 * PAGE)
    buffer.pin(0, 8 * PAGE, registrar=FakeRegistrar())
    assert resident_pages(buffer)[:8] == [False] * 8
    buffer.pin(8 * PAGE, 15 * PAGE, registrar=FakeRegistrar())
    assert resident_pages(buffer)[8:15] == [True] * 7


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("name", ["available", "sharing", "boots"])
def test_who_asks_gets_a_handlers_exception(name: str) -> None:
    """A time-out is an ``OSError``, as a file that is not there."""
    buffer = torch.zeros(8)
    ask: dict[str, Callable[[], object]] = {
        "available": available_bytes,
        "sharing": lambda: is_shared(buffer),
        "boots": boot_id,
    }
    number = 0
    told: list[object] = []
    while interrupts(
        number,
        lambda: told.append(ask[name]()),
        TimeoutError,
        modules=(f"kvheap.memory.{name}",),
    ):
        assert not told, f"nobody was told at place {number}"
        number += 1
    assert number > 1
