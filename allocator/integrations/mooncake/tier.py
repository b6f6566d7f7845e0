"""``MooncakeTier``: chunks of a host heap in Mooncake Store, by their keys."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from itertools import starmap
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.arguments import require_flags
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.heap import BlockObjects, Heap, await_filling, heap_of, layout_and_addresses
from kvheap.closing import Closer
from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import TransferError
from kvheap.forks import starts_over_after_fork
from kvheap.integrations.mooncake.codes import Code, MooncakeError, have_settled, meaning
from kvheap.prefix.keys import as_bytes_keys, require_distinct
from kvheap.transfer.foreign import foreign_transfer

__all__ = ["MAX_KEYS_PER_CALL", "MooncakeTier"]

LOGGER = logging.getLogger("kvheap")

MAX_KEYS_PER_CALL = 1024
"""Keys in one call of the client. Over TCP, 2,048 still work; of 4,096, half failed, and then all
keys of every later call."""

MAX_KEY_BYTES = 511

NEEDED = (
    "register_buffer",
    "unregister_buffer",
    "batch_put_from",
    "batch_get_into",
    "batch_is_exist",
    "batch_remove",
)

EXIT_S = 10.0
"""Seconds that the end of a program waits for the calls of a tier that was not closed."""


class MooncakeTier:
    """Chunks of one layout in Mooncake Store, by their keys.

    The heap's buffers are registered with the client, so values move between its blocks and the
    store's memory without another copy. Calls return when the bytes have been moved, and may be
    made by several threads at once. While one runs, its blocks may be freed and their heap closed:
    the bytes are not used again before it has ended.

    A master or machine that was killed ends a call with an error within seconds; one that does not
    answer, within 30 s (master) or 60 s. If the client then gives up transfers without stopping
    them, the blocks of that call stay allocated for good, since they may still be written.

    Mooncake Store keeps no checksums: kvheap checks the size of a value. Chunks of another
    namespace or layout have other names in the store, and are not found.

    Args:
        client: a ``MooncakeDistributedStore`` that is set up, as by ``connect``. Close it after the
            tier.
        heap: a heap in host memory; only its blocks are moved. Its memory stays until the tier is
            closed.
        layout: what a chunk holds.
        namespace: whose KV it is: name the model, its weights, and the rank in a group of workers.
        config: how chunks are stored: a ``mooncake.store.ReplicateConfig``, with the number of
            replicas; None: one.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        ClosedError: the heap is closed.
        RuntimeError: the client refuses the heap's memory, as it does if it is registered already.
    """

    def __init__(
        self,
        client: Any,
        heap: Heap,
        layout: BlockLayout,
        *,
        namespace: str,
        config: Any = None,
    ) -> None:
        if isinstance(client, type) or not all(callable(getattr(client, n, None)) for n in NEEDED):
            raise TypeError(f"client must be a MooncakeDistributedStore, got {client!r}")
        if not isinstance(heap, Heap):
            raise TypeError(f"heap must be a heap in host memory, got {heap!r}")
        if heap.device.type != "cpu":
            raise ValueError(
                f"heap must be in host memory, got one on {heap.device}: move its blocks by "
                f"kvheap.offload to a pinned host heap, and back by kvheap.restore"
            )
        if not isinstance(layout, BlockLayout):
            raise TypeError(
                f"layout must be a BlockLayout, got {layout!r}: make one with "
                f"BlockLayout.of(shapes, dtypes, fmt)"
            )
        if not isinstance(namespace, str):
            raise TypeError(f"namespace must be a text, got {namespace!r}")
        if not namespace:
            raise ValueError("namespace must name the model, its weights and the rank, got ''")
        heap.require_open()
        self.heap = heap
        self.layout = layout
        self._client = client
        self._config = () if config is None else (config,)
        identity = json.dumps(["kvheap 1", namespace, str(layout), layout.size_bytes])
        self._prefix = f"kvheap-{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}-"
        self._running: dict[Future[None], int] = {}  # and the thread of each call
        self._registered: dict[int, torch.Tensor] = {}
        self._registering = RLock()
        # Also what keeps the memory of a tier that is dropped without being closed.
        abandon = weakref.finalize(self, _abandon, client, self._registered, os.getpid())
        abandon.atexit = False  # the closer waits for calls first
        self._register()
        self._closer = Closer(
            self,
            exit_s=EXIT_S,
            in_child="a forked child cannot use its client",
            is_kept=False,
            give_up=partial(_keep, self._registered),
        )
        starts_over_after_fork(self)

    def start_over_after_fork(self) -> None:
        """A forked child cannot use the client; a lock that another thread held is made anew."""
        self._registering = RLock()

    # -- move ----------------------------------------------------------------------------------

    def put(self, keys: Sequence[bytes], batch: BlockObjects) -> npt.NDArray[np.bool_]:
        """Store blocks under keys.

        Args:
            keys: bytes, 1 to 511 each, no two equal.
            batch: a batch, or objects of one, of the tier's heap and layout; as many as there are
                keys. Blocks that a transfer still fills are stored once it has ended.

        Returns:
            bool ``[N]``: whether the chunk is in the store. A chunk that was there before is not
            written again. False: the store has no space for it.

        Raises:
            TypeError, ValueError: a key is wrong or named twice, or the blocks have another heap,
                layout or number; nothing is stored.
            LifetimeError: a block is freed; nothing is stored.
            TransferError: the transfer that was to fill a block has failed; nothing is stored.
            ClosedError: the tier or the heap is closed, or the tier is another process's.
            MooncakeError: some chunks could not be stored for another reason. A ``TransferError``.
        """
        names, addresses = self._checked(keys, batch)
        full: set[int] = {Code.NO_SPACE, Code.QUOTA_EXCEEDED}
        call = self._client.batch_put_from
        return self._move("store", call, names, addresses, batch, full, self._config)

    def get(self, keys: Sequence[bytes], batch: BlockObjects) -> npt.NDArray[np.bool_]:
        """Fill blocks with the chunks of keys.

        Args:
            keys: as for :meth:`put`.
            batch: as for :meth:`put`; no block twice.

        Returns:
            bool ``[N]``: whether the chunk is in its block. False: it is not in the store, and the
            block is unchanged.

        Raises:
            TypeError, ValueError, LifetimeError, TransferError, ClosedError: as :meth:`put`;
                nothing is changed.
            ForeignObjectError: the blocks are another process's, and a view for reading here.
            MooncakeError: some chunks could not be loaded for another reason, such as a value of
                another size. A ``TransferError``; the bytes of the blocks are undefined, and a
                batch cannot be read any more.
        """
        names, addresses = self._checked(keys, batch)
        if len(set(addresses)) < len(addresses):
            raise ValueError("batch must not name a block twice")
        call = self._client.batch_get_into
        return self._move("load", call, names, addresses, batch, {Code.NOT_FOUND}, ())

    # -- look and drop -------------------------------------------------------------------------

    def lookup(self, keys: Iterable[bytes]) -> npt.NDArray[np.bool_]:
        """Which chunks are in the store. They are leased: for some seconds none is evicted.

        Returns:
            bool ``[N]``.

        Raises:
            TypeError, ValueError: a key is wrong.
            ClosedError: the tier is closed, or another process's.
            MooncakeError: the master cannot be asked.
        """
        found = self._ask("look up", self._client.batch_is_exist, _as_keys(keys), {0, 1})
        return np.equal(found, 1)

    def remove(self, keys: Iterable[bytes], *, force: bool = False) -> list[bytes]:
        """Remove chunks.

        Args:
            keys: those that are not there are skipped, and so are leased ones: those that anybody
                loaded or looked up in the last seconds.
            force: remove leased chunks too.

        Returns:
            The keys of the chunks that were removed.

        Raises:
            TypeError, ValueError, ClosedError, MooncakeError: as :meth:`lookup`.
        """
        require_flags(force=force)
        names = _as_keys(keys)
        right: set[int] = {Code.OK, Code.NOT_FOUND, Code.LEASED}
        codes = self._ask("remove", self._client.batch_remove, names, right, force)
        return [names[row] for row in np.flatnonzero(codes == Code.OK)]

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new calls, wait for those that run, and unregister the heap's memory.

        Chunks stay in the store, and the client stays open. May be repeated. In a forked child
        nothing happens.

        Args:
            timeout_s: the most seconds to wait; None: no limit.

        Raises:
            TimeoutError: a call still runs; the memory stays registered. Close it again later.
            NestedWaitError: in a finalizer or signal handler inside a call, which would wait for
                itself. A ``RuntimeError``.
            RuntimeError: the client does not let go of the memory, which stays.
        """
        self._closer.close(timeout_s, wait=self._wait_for_calls, release=self._release)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closer.is_closing

    def _wait_for_calls(self, timeout_s: float | None) -> None:
        running = self._running.copy()
        if threading.get_ident() in running.values():
            raise NestedWaitError(
                "a finalizer or signal handler inside a call of a MooncakeTier cannot wait for "
                "that call: close the tier again later"
            )
        late = wait(running, timeout_s).not_done
        if late:
            raise TimeoutError(
                f"{len(late)} calls of {self!r} have not ended in {timeout_s:g} s: close it again "
                f"later"
            )

    def _release(self) -> None:
        with self._registering:
            _unregister(self._client, self._registered)

    # -- the rest ------------------------------------------------------------------------------

    def _checked(
        self, keys: Sequence[bytes], blocks: BlockObjects
    ) -> tuple[list[bytes], list[int]]:
        """The keys and the absolute address of each block; raises if they do not fit the tier."""
        names = _as_keys(keys, is_list=True)
        require_distinct(names)  # of two, the client would fill one, and answer that it filled both
        self._require_open()
        heap = heap_of(blocks)
        if len(blocks) != len(names):
            raise ValueError(f"{len(names)} keys need as many blocks, got {len(blocks)} in batch")
        if heap is not self.heap:
            raise ValueError(
                f"the blocks of batch must be of the tier's heap, {self.heap!r}, got those of "
                f"{heap!r}"
            )
        layout, local = layout_and_addresses(blocks)
        if layout != self.layout:
            raise ValueError(f"the blocks of batch must be {self.layout}, got {layout}")
        return names, heap.absolute(local)[0].tolist()

    def _move(
        self,
        action: str,
        call: Callable[..., list[int]],
        names: list[bytes],
        addresses: list[int],
        blocks: BlockObjects,
        missing: set[int],
        more: tuple[Any, ...],
    ) -> npt.NDArray[np.bool_]:
        """Move chunks, and protect their blocks until the client has let go of them."""
        if not names:
            return np.zeros(0, np.bool_)
        size, is_get = self.layout.size_bytes, action == "load"
        moved = size if is_get else Code.OK
        answers: list[list[int]] = []
        took_s: list[float] = []  # of an answer that lacks it, an exception struck: it may be long
        num_begun = 0
        with self._counted() as ended:
            self._register()
            await_filling(blocks, self.heap.device)
            try:
                foreign_transfer(
                    lambda: ended,
                    source=None if is_get else blocks,
                    target=blocks if is_get else None,
                    name="Mooncake Store",
                )
                for part in _parts(len(names)):
                    values = [self._prefix + name.hex() for name in names[part]]
                    arguments = values, addresses[part], [size] * len(values), *more
                    begun_at = time.monotonic()
                    num_begun += 1
                    # In C: the answer is in the list before a signal handler can raise.
                    answers.extend(starmap(call, [arguments]))
                    took_s.append(time.monotonic() - begun_at)
                    _require_length(answers[-1], len(values))
                    if {*answers[-1]} - missing - {moved}:
                        break
                codes = [code for answer in answers for code in answer]
                found = _outcome(action, names, codes, {moved}, missing)
                return np.equal(found, moved)
            except BaseException as error:
                times = [*took_s, math.inf][: len(answers)]
                have_ended = num_begun == len(answers) and all(
                    have_settled(answer, is_get=is_get, took_s=seconds)
                    for answer, seconds in zip(answers, times, strict=True)
                )
                # Only a TransferError says that the blocks are not used any more.
                kind = TransferError if have_ended else RuntimeError
                ended.set_exception(kind(f"{type(error).__name__}: {error}"))
                raise

    def _ask(
        self,
        action: str,
        call: Callable[..., list[int]],
        names: list[bytes],
        right: set[int],
        *more: Any,
    ) -> Int64Array:
        """What the master answers about each key, int64 ``[N]``."""
        codes: list[int] = []
        with self._counted():
            for part in _parts(len(names)):
                values = [self._prefix + name.hex() for name in names[part]]
                codes += _require_length(call(values, *more), len(values))
                if {*codes} - right:
                    break
        return _outcome(action, names, codes, right, set())

    @contextmanager
    def _counted(self) -> Iterator[Future[None]]:
        """A call that ``close`` waits for; yields what tells that it has ended."""
        ended: Future[None] = Future()
        self._running[ended] = threading.get_ident()
        try:
            self._require_open()  # a close that came before does not wait for this call
            yield ended
        finally:
            if not ended.done():
                ended.set_result(None)
            self._running.pop(ended, None)

    def _register(self) -> None:
        """Register the heap's buffers that the client does not know yet; a heap may get more."""
        for _, buffer in self.heap.segments:
            pointer = buffer.data_ptr()
            if pointer in self._registered:
                continue
            with self._registering:
                if pointer in self._registered:
                    continue
                code = self._client.register_buffer(pointer, len(buffer))
                if code:
                    raise RuntimeError(
                        f"Mooncake Store refuses {len(buffer)} bytes at {pointer:#x} (error "
                        f"{code}): a client takes memory once; use one tier for each heap, and "
                        f"close it before the next"
                    )
                self._registered[pointer] = buffer

    def _require_open(self) -> None:
        self._closer.require_open()
        self.heap.require_open()

    def __enter__(self) -> MooncakeTier:
        self._closer.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """What a chunk holds."""
        return f"MooncakeTier({self.layout})"


def _parts(num_keys: int) -> Iterator[slice]:
    for first in range(0, num_keys, MAX_KEYS_PER_CALL):
        yield slice(first, first + MAX_KEYS_PER_CALL)


def _require_length(codes: list[int], num_keys: int) -> list[int]:
    if len(codes) != num_keys:
        raise TransferError(
            f"Mooncake Store answered {len(codes)} results for {num_keys} keys: {codes[:3]!r}"
        )
    return codes


def _outcome(
    action: str, names: list[bytes], codes: list[int], right: set[int], missing: set[int]
) -> Int64Array:
    """The codes, int64 ``[N]``.

    Raises:
        MooncakeError: one is neither right nor stands for what is missing.
    """
    found = np.array(codes, np.int64)
    failed = {
        name: code
        for name, code in zip(names, codes, strict=False)
        if code not in right and code not in missing
    }
    if failed:
        succeeded = np.zeros(len(names), np.bool_)
        succeeded[: len(codes)] = np.isin(found, list(right))
        raise MooncakeError(action, failed, names[len(codes) :], succeeded)
    return found


def _unregister(client: Any, registered: dict[int, torch.Tensor]) -> None:
    for pointer, buffer in list(registered.items()):
        code = client.unregister_buffer(pointer)
        if code:
            raise RuntimeError(
                f"Mooncake Store does not let go of {len(buffer)} bytes at {pointer:#x}: "
                f"{meaning(code)}"
            )
        registered.pop(pointer, None)


def _abandon(client: Any, registered: dict[int, torch.Tensor], pid: int) -> None:
    """Unregister the memory of a tier that was not closed; what stays registered, stays."""
    if os.getpid() != pid:
        return
    try:
        _unregister(client, registered)
    except Exception as error:
        _keep(registered)
        LOGGER.warning("a MooncakeTier was dropped without being closed: %s", str(error))


def _keep(registered: dict[int, torch.Tensor]) -> None:
    """Never unmap memory that a client did not let go of."""
    # A reference that nobody gives back: the interpreter's end clears lists as well.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(list(registered.values())))


def _as_keys(keys: Any, *, is_list: bool = False) -> list[bytes]:
    return as_bytes_keys(keys, MAX_KEY_BYTES, "MooncakeTier", is_list=is_list)
