"""Nodes for tests: chunks whose bytes follow from their keys, and nodes in processes of their own.

As a program it forks such processes. Each runs the lines that it gets: a statement, or an
expression whose value it sends back.
"""

from __future__ import annotations

import ast
import atexit
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import kvheap
from kvheap import BlockInUseError, BlockLayout, HostMemoryAllocator, MemoryBatch, MemoryFormat

__all__ = [
    "LAYOUT",
    "MANY",
    "NUMBERS",
    "TCP",
    "NodeProcess",
    "fill",
    "is_freed",
    "key_of",
    "keys_of",
    "make_heap",
    "need_nixl",
    "until",
    "wrong_rows",
]

LAYOUT = BlockLayout.of([2048], torch.int64, MemoryFormat.UNDEFINED)
"""16 KiB."""

MANY = 8192
"""Chunks that take long enough over TCP to be stopped in between: 128 MiB."""

NUMBERS = range(MANY)

TCP = "tcp,self"
"""What UCX may use, for reads that take long."""


def need_nixl() -> str | None:
    """Why these tests cannot run here; None if they can. Raises where they must."""
    try:
        import msgpack  # noqa: F401
        import nixl  # noqa: F401
    except ImportError as error:
        if os.environ.get("KVHEAP_REQUIRE_NIXL"):
            raise
        return f"needs NIXL: see constraints-nixl.txt ({error})"
    return None


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "big")


def keys_of(numbers: Sequence[int]) -> list[bytes]:
    return [key_of(number) for number in numbers]


def make_heap(num_chunks: int = 64, **options: Any) -> HostMemoryAllocator:
    return HostMemoryAllocator(num_chunks * LAYOUT.size_bytes, stream_wait_s=0.0, **options)


@lru_cache(maxsize=4)
def contents(numbers: Sequence[int]) -> torch.Tensor:
    """The chunks of keys, int64 ``[N, 2048]``; not to be changed."""
    return torch.tensor([*numbers])[:, None] * 1_000_003 + torch.arange(2048) * 7919


def fill(heap: Any, numbers: Sequence[int]) -> MemoryBatch:
    """A batch with the chunks of keys."""
    batch = heap.batched_allocate(
        list(LAYOUT.shapes[0]),
        torch.int64,
        len(numbers),
        LAYOUT.fmt,
        source=contents(_hashable(numbers)),
    )
    assert batch is not None
    return batch


def lone(heap: Any, numbers: Sequence[int]) -> tuple[MemoryBatch, list[Any]]:
    """Blocks with the chunks of keys, of which no two are neighbours; and what lies between."""
    batch = fill(heap, [number for number in numbers for _ in range(2)])
    return batch, [batch[row] for row in range(0, 2 * len(numbers), 2)]


def wrong_rows(numbers: Sequence[int], blocks: Any) -> int:
    """How many blocks do not have the bytes of their keys."""
    expected = contents(_hashable(numbers))
    return sum(
        not torch.equal(block.tensor, chunk) for block, chunk in zip(blocks, expected, strict=True)
    )


def _hashable(numbers: Sequence[int]) -> Sequence[int]:
    return numbers if isinstance(numbers, range) else tuple(numbers)


def is_freed(heap: Any, batch: MemoryBatch) -> bool:
    """Free blocks, unless a reader has them."""
    try:
        heap.batched_free(batch)
    except BlockInUseError:
        return False
    return True


def until(question: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What a question says once that is true."""
    end = time.monotonic() + seconds
    while True:
        answer = question()
        if answer or time.monotonic() > end:
            return answer
        time.sleep(0.002)


class Nursery:
    """A process that has imported everything, and forks a node for each that is asked for."""

    def __init__(self) -> None:
        # Its input is never written to: it ends when this process does.
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = "127.0.0.1", int(self._process.stdout.readline())
        atexit.register(self.close)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@lru_cache(maxsize=1)
def nursery() -> Nursery:
    return Nursery()


class NodeProcess:
    """A node in a process of its own.

    Args:
        name: of the node.
        num_chunks: of its heap.
        published: the chunks that it has, a range.
        tls: the transports of UCX; empty: its choice.
        bind: where to listen.
        secret: of the node.
    """

    def __init__(
        self,
        name: str,
        num_chunks: int,
        published: range = range(0),
        *,
        tls: str = "",
        bind: str = "127.0.0.1:0",
        secret: str = "",
    ) -> None:
        self._socket = socket.create_connection(nursery().address)
        self._lines = self._socket.makefile("r")
        start = [name, num_chunks, published.start, published.stop, tls, bind, secret]
        self._socket.sendall(f"{start!r}\n".encode())
        self.pid = int(self._line())
        self._address = ""

    @property
    def address(self) -> str:
        """Where it listens; waits for it to start."""
        if not self._address:
            self._address = self._line()
        return self._address

    def _line(self) -> str:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the process has ended")
        return line.strip()

    def tell(self, line: str) -> None:
        """Let it run a statement, without waiting for that."""
        assert self.address
        self._socket.sendall(f"{line}\n".encode())

    def ask(self, line: str) -> Any:
        """The value of an expression there; of a statement None."""
        self.tell(line)
        return self.answer()

    def answer(self) -> Any:
        """The value of the expression that was told first and not answered."""
        kind, _, text = self._line().partition(" ")
        if kind == "error":
            raise RuntimeError(text)
        return ast.literal_eval(text)

    @property
    def state(self) -> str:
        """The kernel's letter for its state; empty if it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][:1]
        except OSError:
            return ""

    def freeze(self) -> None:
        """Stop it; returns once it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        assert until(lambda: self.state == "T")

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        if self.state not in ("", "Z"):
            os.kill(self.pid, signal.SIGKILL)
            assert until(lambda: self.state in ("", "Z"))

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._lines.close()
        self._socket.close()


def live(connection: socket.socket) -> None:
    """Make a node, and run what comes in."""
    lines, report = connection.makefile("r"), connection.makefile("w")
    print(os.getpid(), file=report, flush=True)
    name, num_chunks, first, end, tls, bind, secret = ast.literal_eval(lines.readline())
    if tls:
        os.environ["UCX_TLS"] = tls
    heap = make_heap(num_chunks)
    node = kvheap.remote.Node(name, heap, bind=bind, secret=secret or None)
    numbers = range(first, end)
    batch = fill(heap, numbers) if len(numbers) else None
    if batch is not None:
        node.publish(keys_of(numbers), batch)
    names: dict[str, Any] = dict(
        globals(), remote=kvheap.remote, heap=heap, node=node, batch=batch, numbers=numbers
    )
    print(node.address, file=report, flush=True)
    for line in lines:
        print(outcome(line, names), file=report, flush=True)


def outcome(line: str, names: dict[str, Any]) -> str:
    try:
        code = compile(line, "<input>", "eval")
    except SyntaxError:
        code = compile(line, "<input>", "exec")
    try:
        return f"value {eval(code, names)!r}"
    except BaseException as error:
        return " ".join(f"error {error!r}".split())


def main() -> None:
    """Fork a node for each connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets those that end
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
        connection, _ = server.accept()
        if not os.fork():
            server.close()
            try:
                live(connection)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    import kvheap.remote
    import kvheap.remote.service

    main()
