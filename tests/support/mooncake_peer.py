"""Mooncake's real master, and a second process with a client and a heap of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat
from kvheap.integrations.mooncake import MooncakeTier, connect

__all__ = ["LAYOUT", "Master", "Peer", "blank", "filled", "keys_of", "wrong_rows"]

LAYOUT = BlockLayout.of([500], torch.int64, MemoryFormat.UNDEFINED)
"""4,000 bytes, in blocks of 4,096."""

START_S = 60.0


def chunk(number: int) -> torch.Tensor:
    return torch.arange(500) * 7919 + number * 1_000_003


def keys_of(numbers: Any) -> list[bytes]:
    return [int(number).to_bytes(8, "big") for number in numbers]


def filled(heap: Any, numbers: Any) -> Any:
    source = torch.stack([chunk(number) for number in numbers])
    return heap.batched_allocate([500], torch.int64, len(source), LAYOUT.fmt, source=source)


def blank(heap: Any, count: int) -> Any:
    source = torch.full((count, 500), -1)
    return heap.batched_allocate([500], torch.int64, count, LAYOUT.fmt, source=source)


def wrong_rows(numbers: Any, batch: Any) -> list[int]:
    return [
        row
        for row, number in enumerate(numbers)
        if not torch.equal(batch[row].tensor, chunk(number))
    ]


class Master:
    """A ``mooncake_master`` on loopback."""

    def __init__(self, log: Path) -> None:
        import mooncake

        program = Path(str(mooncake.__file__)).parent / "mooncake_master"
        port, metrics_port = _free_port(), _free_port()
        self.address = f"127.0.0.1:{port}"
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [
                program,
                f"--rpc_port={port}",
                "--rpc_address=127.0.0.1",
                f"--metrics_port={metrics_port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START_S
        while not _answers(port):
            assert self.process.poll() is None, f"the master has died; see {log}"
            assert time.monotonic() < deadline, f"the master does not answer; see {log}"
            time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


class Peer:
    """Another process with a client: ``ask("put", 0, 10)`` makes it put the chunks 0 to 9."""

    def __init__(self, master: Master, log: Path, pool_bytes: int) -> None:
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, master.address, str(pool_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.answer() == "ready"

    def ask(self, action: str, first: int, end: int) -> Any:
        assert self.process.stdin is not None
        print(json.dumps([action, first, end]), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("answer "):
            assert line, "the peer has died; see its log"
        return json.loads(line.removeprefix("answer "))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(master: str, pool_bytes: int) -> None:
    heap = HostMemoryAllocator(4096 * 4096)
    tier = MooncakeTier(connect(master, pool_bytes=pool_bytes), heap, LAYOUT, namespace="a model")
    print('answer "ready"', flush=True)
    for line in sys.stdin:
        action, first, end = json.loads(line)
        numbers, answer = range(first, end), None
        if action == "put":
            batch = filled(heap, numbers)
            answer = int(tier.put(keys_of(numbers), batch).sum())
        else:
            batch = blank(heap, len(numbers))
            found = int(tier.get(keys_of(numbers), batch).sum())
            answer = [found, len(wrong_rows(numbers, batch))]
        heap.batched_free(batch)
        print("answer", json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
