"""``SecondTier``: a second process that keeps what the first one's heap evicts.

After each request, the second process reads the chunks that are new; at a miss, the first one reads
them back. Both are nodes (:mod:`kvheap.remote`), and all bytes go by NIXL.

As a program this is the second process: its arguments are a geometry, the tokens of a chunk, the
bytes of the heap, and the address of the first.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvheap.errors import TransferError
from kvheap.heaps.host_allocators import HostMemoryAllocator
from kvheap.prefix.space import RequestTooLargeError
from kvheap.prefix.store import PrefixStore
from kvheap.remote import MissingKeysError, Node
from kvheap.replay.geometry import GEOMETRIES, Geometry

if TYPE_CHECKING:
    from typing import Self

    from kvheap.blocks.heap import Heap

__all__ = ["SecondTier"]

ACK_S = 60.0
"""Seconds to wait until the second process has read what is new."""

POLL_S = 100e-6


def key_of(hash_id: int) -> bytes:
    """The key of a chunk, for both processes."""
    return b"%d" % hash_id


class SecondTier:
    """Keeps chunks in another process, and brings them back.

    Args:
        heap: of the first tier, in host memory.
        geometry: of a chunk.
        size_bytes: of the second process's heap.

    Raises:
        ImportError: nixl or msgpack is not installed.
        RuntimeError: the second process does not start.
    """

    def __init__(self, heap: Heap, geometry: Geometry, size_bytes: int) -> None:
        self._node = Node("replay", heap)
        command = [
            *(sys.executable, "-m", "kvheap.replay.second_tier"),
            *(geometry.name, str(geometry.chunk_tokens), str(size_bytes), self._node.address),
        ]
        # Its input is never written to: it ends when this process does.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        address = self._process.stdout.readline().decode().strip()
        if not address:
            self.close()
            raise RuntimeError("the process of the second tier did not start")
        self._peer = self._node.connect(address)

    def keep(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> None:
        """Let the second process read chunks that are held; returns when it has.

        Raises:
            PeerGoneError: it has ended.
            TimeoutError: it has not read them.
        """
        if not hash_ids:
            return
        keys = [*map(key_of, hash_ids)]
        self._node.publish(keys, store.chunks(hash_ids))
        try:
            self._peer.offer(keys)
            if self._node.next_offer(ACK_S) is None:
                raise TimeoutError(
                    f"the second tier has not read {len(keys)} chunks in {ACK_S:g} s"
                )
        finally:
            self._node.withdraw(keys)
        while self._node.stats().leases:  # it has read them, and says so in a moment
            time.sleep(POLL_S)

    def fetch(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> list[int]:
        """Read chunks that are not stored back into the store; returns those that were there.

        Raises:
            RequestTooLargeError: they do not fit.
            TransferError: they could not be read.
        """
        if not hash_ids:
            return []
        found = self._peer.lookup([*map(key_of, hash_ids)])
        there = [hash_id for hash_id, is_there in zip(hash_ids, found, strict=True) if is_there]
        if not there:
            return []
        storing = store.begin(there)
        try:
            self._peer.read([*map(key_of, there)], into=storing.batch)
            storing.complete()
        except TransferError as error:
            storing.abort()
            if isinstance(error.__cause__, MissingKeysError):  # evicted meanwhile
                return []
            raise
        except BaseException:
            storing.abort()
            raise
        return there

    def close(self) -> None:
        """End the second process, and the node."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _serve(geometry: Geometry, size_bytes: int, first: str) -> None:
    """Keep what the first process offers."""
    heap = HostMemoryAllocator(size_bytes, on_full=None)
    store: PrefixStore[bytes] = PrefixStore(heap, geometry.layout)
    lock = threading.Lock()

    def find(keys: list[bytes]) -> list[Any]:
        with lock:
            return [store.chunks([key])[0] if key in store else None for key in keys]

    with Node("second tier", heap, find) as node:
        peer = node.connect(first)
        print(node.address, flush=True)
        while True:
            offer = node.next_offer()
            assert offer is not None
            with lock:
                store.touch(offer.keys)
                missing = store.missing(offer.keys)
                storing = None
                with suppress(RequestTooLargeError):
                    storing = store.begin(missing) if missing else None
            if storing is not None:
                peer.read(missing, into=storing.batch)
                storing.batch.transfer.result()  # type: ignore[union-attr]
                with lock:
                    storing.complete()
            peer.offer(offer.keys)


def _end_with_the_input() -> None:
    sys.stdin.read()
    signal.raise_signal(signal.SIGKILL)


def _main(name: str, chunk_tokens: str, size_bytes: str, first: str) -> None:
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    _serve(GEOMETRIES[name].with_chunks_of(int(chunk_tokens)), int(size_bytes), first)


if __name__ == "__main__":
    _main(*sys.argv[1:])
