"""``FileTransfer``: the handle on a store into, or a load from, a tier of files."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.claims import Claim
from kvheap.device.awaiting import until
from kvheap.device.completion import Completion
from kvheap.device.host_queue import HostEvent, NestedWaitError
from kvheap.device.transfer import Transfer
from kvheap.errors import TransferError
from kvheap.files.chunk_file import Moved
from kvheap.files.errors import MissingChunksError
from kvheap.files.io_threads import IOThreads
from kvheap.kernels.latch import Latch

__all__ = ["FileEvent", "FileJob", "FileTransfer"]


WITHDRAWN = object()


class FileEvent(HostEvent):
    """The end of a job of a tier's threads."""

    __slots__ = ("_latch", "_threads")

    def __init__(self, threads: IOThreads) -> None:
        super().__init__()
        self.is_submitted = True  # to other threads, whatever the queue of host copies waits for
        self._latch = Latch()
        self._threads = threads

    def end(self, cause: BaseException | None) -> None:
        """Note that the job has ended, and why it failed, if it did."""
        super().end(cause)
        self._latch.open()

    def synchronize(self) -> None:
        """Wait until the job has ended. The thread that copies within host memory may wait too.

        Raises:
            NestedWaitError: on a thread of the tier, in a finalizer in the middle of a job.
        """
        if not self._latch.is_open and self._threads.is_here():
            raise NestedWaitError(
                "a thread of a FileTier cannot wait for a job of that tier: a finalizer that the "
                "garbage collector runs there must not wait for transfers"
            )
        self._latch.wait()


class FileJob:
    """One store or load; it is made once, or withdrawn before it has begun.

    Args:
        before: wait for transfers that fill the blocks.
        task: moves the chunks.
        completion: protects the blocks.
        threads: makes the job.
    """

    def __init__(
        self,
        before: Sequence[Callable[[], object]],
        task: Callable[[], Moved],
        completion: Completion,
        threads: IOThreads,
    ) -> None:
        self.event = FileEvent(threads)
        self.moved: Moved | None = None
        """What became of the chunks, once the job has ended; None if it failed as a whole."""
        self._before = before
        self._task: Callable[[], Moved] | None = task
        self._completion = completion
        self._threads = threads
        self._right = Claim()  # never given up

    def run(self) -> None:
        """Make the job, on a thread of the tier; raises nothing."""
        if not self._right.take(self):
            return
        failure: TransferError | None = None
        try:
            task = self._task
            assert task is not None
            self._threads.mark_busy(False)  # what it waits for may be a job of this tier
            for wait in self._before:
                wait()
            self._threads.mark_busy(True)
            self.moved = moved = task()
            if not moved.succeeded.all():
                num_failed = int((~moved.succeeded).sum())
                failure = TransferError(
                    f"{num_failed} of {len(moved.succeeded)} chunks were not moved"
                    + ("" if moved.error is None else f": {moved.error}")
                )
                failure.__cause__ = moved.error
        except BaseException as error:
            failure = TransferError(f"a transfer of a FileTier failed: {error}")
            failure.__cause__ = error.with_traceback(None)  # its frames would keep the blocks
        self._finish(failure)

    def withdraw(self) -> bool:
        """Give the job up unless it has begun; returns whether it never runs."""
        if self._right.take(WITHDRAWN):
            self._finish(TransferError("the transfer was withdrawn before it began"))
        return self._right.holder is WITHDRAWN

    def _finish(self, failure: TransferError | None) -> None:
        self._task, self._before = None, ()
        self.event.end(failure)
        self._completion.query()  # lets the memory go


class FileTransfer:
    """A store or load in progress. Created by ``FileTier.store`` and ``FileTier.load``.

    Dropping it changes nothing: the bytes are moved, and the blocks stay protected until then.
    Await it, or use it in ``with`` or ``async with``, to wait for it and raise its error.

    Attributes:
        keys: the keys of the call.
        transfer: the same as a ``Transfer``: whether the bytes have arrived, for streams and
            copies to wait for. It has failed if any chunk was not moved.
        batch: the batch that a load fills, or a store reads; None for single objects.
    """

    __slots__ = ("_job", "batch", "keys", "transfer")

    def __init__(
        self,
        keys: Sequence[bytes],
        transfer: Transfer,
        job: FileJob,
        batch: MemoryBatch | None,
    ) -> None:
        self.keys = keys
        self.transfer = transfer
        self.batch = batch
        self._job = job

    def done(self) -> bool:
        """Whether it has ended, successfully or not. Does not wait."""
        return self.transfer.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended; returns whether it has.

        Args:
            timeout_s: the most seconds to wait; None: no limit.

        Raises:
            NestedWaitError: in a finalizer on a thread of the tier. A ``RuntimeError``.
        """
        return self.transfer.wait(timeout_s)

    def result(self, timeout_s: float | None = None) -> None:
        """Wait, and raise unless all chunks were moved.

        Raises:
            MissingChunksError: a load found some chunks missing or damaged; it names their keys,
                and ``succeeded`` tells which blocks have their bytes. A ``TransferError``.
            TransferError: chunks could not be stored, or nothing could be moved.
            TimeoutError: it has not ended in ``timeout_s`` seconds; it goes on.
        """
        self._await(timeout_s)
        moved = self._job.moved
        if moved is not None and self.transfer.direction == "f2h" and not moved.succeeded.all():
            known = {*moved.damaged, *moved.failed}
            missing = [
                key
                for key, is_there in zip(self.keys, moved.succeeded.tolist(), strict=True)
                if not is_there and key not in known
            ]
            raise MissingChunksError(missing, moved.damaged, moved.failed) from moved.error
        self.transfer.result(0.0)

    def succeeded(self, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """Wait, and tell for each key whether its chunk is in the tier, or in its block.

        The batch of a load can be read afterwards: the blocks that have their bytes, and the
        others, whose bytes are undefined.

        Returns:
            bool ``[N]``. True after a store also for chunks that another store writes.

        Raises:
            TransferError: nothing could be moved.
            TimeoutError: it has not ended in ``timeout_s`` seconds; it goes on.
        """
        self._await(timeout_s)
        moved = self._job.moved
        if moved is None:
            self.transfer.result(0.0)
            raise TransferError("a transfer of a FileTier was lost in a forked process")
        if self.batch is not None and self.batch.transfer is self.transfer:
            self.batch.transfer = None
        return moved.succeeded.copy()

    def _await(self, timeout_s: float | None) -> None:
        if not self.transfer.wait(timeout_s):
            raise TimeoutError(f"{self!r} has not ended in {timeout_s:g} s")

    def __enter__(self) -> FileTransfer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.wait()
        if kind is None:
            self.result()

    async def __aenter__(self) -> FileTransfer:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for it, also after an exception; a cancellation ends this wait only."""
        await until(self.done)
        if kind is None:
            self.result()

    def __await__(self) -> Generator[Any, None, None]:
        """As :meth:`result`, while other tasks run."""
        return self._ended().__await__()

    async def _ended(self) -> None:
        try:
            await self.transfer
        except TransferError:
            self.result()
            raise

    def __repr__(self) -> str:
        """Keys and state."""
        return f"FileTransfer({len(self.keys)} keys, {self.transfer!r})"
