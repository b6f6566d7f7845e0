"""``Transfer``: the handle on a copy in progress; ``Part``: the handle on one part of it.

Created by ``kvheap.transfer.copy``, ``offload``, ``restore`` and ``foreign_transfer``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from kvheap.device.awaiting import until
from kvheap.device.captures import DeferredEvent
from kvheap.device.completion import Answer, Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.device.directions import Direction
from kvheap.device.events import POLL_SECONDS, DeviceEvent, ReportingEvent
from kvheap.errors import TransferError
from kvheap.kernels.untraced import untraced_class

if TYPE_CHECKING:
    import torch

__all__ = ["Part", "Transfer"]


@untraced_class
class Part:
    """One part of a transfer. Parts end in order, and each reports only on itself.

    Wait for it with ``wait``, ``wait_stream`` or ``await``.
    """

    __slots__ = ("_completion", "_device", "_event", "_index")

    def __init__(
        self, index: int, event: DeviceEvent, completion: Completion, device: CopyDevice | None
    ) -> None:
        self._index = index
        self._event = event
        self._completion = completion
        self._device = device

    def done(self) -> bool:
        """Whether the part's bytes have arrived. Does not wait.

        Raises:
            TransferError: they will never arrive.
        """
        if self._completion.is_done:  # stays true, whatever happens to the device
            return True
        return self._ask(self._event.query)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait on the host until the part's bytes have arrived.

        Args:
            timeout_s: maximum seconds to wait; None: no limit.

        Returns:
            Whether they have.

        Raises:
            TransferError: they will never arrive.
            ValueError: ``timeout_s`` is not a number.
        """
        if self._completion.is_done:
            return True
        if timeout_s is None:
            self._ask(self._event.synchronize)
            return True
        if timeout_s != timeout_s:
            raise ValueError(f"timeout_s must be a number of seconds, got {timeout_s}")
        deadline = time.monotonic() + timeout_s
        while not self.done():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def wait_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Make further work on ``stream`` (None: the current one) wait for the part.

        For a copy within host memory, this waits on the host instead.

        Raises:
            TransferError: the part's bytes will never arrive.
        """
        device = self._device
        if device is None:
            self.wait()
        else:
            event = self._event
            if isinstance(event, DeferredEvent):
                event = event.recorded()
            device.wait_event(device.current_stream() if stream is None else stream, event)

    def __await__(self) -> Generator[Any, None, None]:
        """Wait until the part's bytes have arrived; other tasks run meanwhile.

        Raises:
            TransferError: they will never arrive.
        """
        return until(self.done).__await__()

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        completion = self._completion
        if completion.is_lost:  # its event may never come to pass
            completion.require_success()
        answer = completion.ask(question)
        if isinstance(self._event, ReportingEvent):
            self._event.require_success()
        return answer

    def __repr__(self) -> str:
        """The part's index."""
        return f"Part({self._index})"


@untraced_class
class Transfer:
    """A copy in progress. Created by ``copy``, ``offload``, ``restore`` and ``foreign_transfer``.

    Use it in ``with`` or ``async with``, or await it: all wait for the copy and raise its error.
    Dropping it changes nothing, and neither does cancelling a task that awaits it: the copy
    continues, its bytes stay protected, and it can be awaited again.

    Attributes:
        path: the path that was taken: ``kernel``, ``copy_engine``, ``staged`` or ``host``; of a
            foreign transfer, its name.
        direction: ``h2d``, ``d2h``, ``d2d``, ``p2p`` or ``h2h``; or ``foreign``.
        num_bytes: bytes to copy.
        num_runs: number of runs to copy, after merging neighbouring pieces.
        parts: the parts, which end in order, each with ``done``, ``wait``, ``wait_stream`` and
            ``await``; empty if the transfer failed before its first part, and in a graph capture.
        is_captured: whether the copy was captured in a CUDA graph.
    """

    __slots__ = (
        "_completion",
        "_device",
        "_settle",
        "direction",
        "is_captured",
        "num_bytes",
        "num_runs",
        "parts",
        "path",
    )

    def __init__(
        self,
        completion: Completion,
        path: str,
        direction: Direction | Literal["foreign"],
        num_bytes: int,
        num_runs: int,
        device: CopyDevice | None,
        is_captured: bool = False,
        settle: Callable[[bool], None] | None = None,
        parts: tuple[Part, ...] = (),
    ) -> None:
        self.path = path
        self.direction = direction
        self.num_bytes = num_bytes
        self.num_runs = num_runs
        self.parts: tuple[Part, ...] = parts
        self.is_captured = is_captured
        self._completion = completion
        self._device = device
        self._settle = settle  # frees the source's blocks, or makes them live again

    def begun(self, events: tuple[DeviceEvent, ...]) -> None:
        """Set the event at the end of each part; called by the code that queues the copy."""
        completion, device = self._completion, self._device
        if len(events) == 1:  # most: the generator costs as much as the part
            self.parts = (Part(0, events[0], completion, device),)
            return
        self.parts = tuple(
            Part(index, event, completion, device) for index, event in enumerate(events)
        )

    @property
    def error(self) -> TransferError | None:
        """Why the transfer failed, as far as is known; None if it has not failed."""
        return self._completion.error

    @property
    def has_succeeded(self) -> bool:
        """Whether all bytes are known to have arrived. Asks nobody."""
        return self._completion.is_done

    def is_of(self, completion: Completion) -> bool:
        """Whether this is the state of the transfer."""
        return self._completion is completion

    def require_success(self) -> None:
        """Raise if the transfer is known to have failed. Does not wait.

        Raises:
            TransferError: it has.
        """
        self._completion.require_success()

    @property
    def is_quarantined(self) -> bool:
        """Whether the transfer has failed without being known to have ended.

        Something may still read and write its blocks: freed ones stay allocated, as pending bytes,
        until a foreign transfer is known to have ended after all, and for ever if a device is gone.
        """
        return self._completion.is_lost or self._completion.is_stuck

    def done(self) -> bool:
        """Whether the copy has ended, successfully or not, or is quarantined. Does not wait.

        Raises:
            RuntimeError: the copy was captured in a CUDA graph, and runs at each replay.
        """
        self._require_not_captured()
        return self._completion.has_ended

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait on the host until :meth:`done`.

        Args:
            timeout_s: maximum seconds to wait; None: no limit.

        Returns:
            Whether it is.

        Raises:
            ValueError: ``timeout_s`` is not a number.
            NestedWaitError: without ``timeout_s``, in a finalizer on the thread that makes the
                copy. A ``RuntimeError``.
            RuntimeError: as for :meth:`done`.
        """
        self._require_not_captured()
        if timeout_s is not None and timeout_s != timeout_s:
            raise ValueError(f"timeout_s must be a number of seconds, got {timeout_s}")
        return self._completion.wait(timeout_s)

    def wait_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Make further work on ``stream`` (None: the current one) wait for the copy.

        For a copy within host memory, this waits on the host instead.

        Raises:
            TransferError: the transfer has failed.
            RuntimeError: as for :meth:`done`.
        """
        self._require_not_captured()
        self._completion.require_success()
        if self.parts:
            self.parts[-1].wait_stream(stream)

    def result(self, timeout_s: float | None = None) -> None:
        """Wait for the copy, and raise unless all bytes have arrived.

        Raises:
            TransferError: the copy failed; the target's bytes are undefined. Source blocks that it
                was to free are live again.
            TimeoutError: the copy has not ended in ``timeout_s`` seconds; it continues.
            RuntimeError: as for :meth:`done`.
        """
        ended = self.wait(timeout_s)
        if self._settle is None and self._completion.is_done:
            return
        has_failed = self._completion.error is not None
        if not ended and not has_failed:
            raise TimeoutError(f"{self!r} has not ended in {timeout_s:g} s")
        if self._settle is not None:
            self._settle(has_failed)
        self._completion.require_success()

    def _require_not_captured(self) -> None:
        if self.is_captured:
            raise RuntimeError("this transfer was captured in a CUDA graph: it runs at each replay")

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_captured:
            return
        self.wait()
        if error is None:
            self.result()

    def __await__(self) -> Generator[Any, None, None]:
        """As :meth:`result`, while other tasks run."""
        return self._ended().__await__()

    async def _ended(self) -> None:
        await until(self.done)
        self.result()

    async def __aenter__(self) -> Transfer:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the copy, also after an exception, and raise its error if there was none.

        A cancellation ends this wait, but not the copy.
        """
        if self.is_captured:
            return
        await until(self.done)
        if error is None:
            self.result()

    def __repr__(self) -> str:
        """Direction, path, bytes, runs and state."""
        if self.is_captured:
            state = "captured"
        elif self._completion.error is not None:
            state = "failed"
        else:
            state = "ended" if self._completion.has_ended else "in flight"
        return (
            f"Transfer({self.direction} by {self.path}, {self.num_bytes} bytes in {self.num_runs} "
            f"runs, {state})"
        )
