"""Words that the host writes for one launch, and that a device reads in it.

A copy of a few blocks takes the host less time than pinned memory from torch's allocator and a
tensor of the device (17 us on an H200). So each stream of a device keeps some pinned memory and a
tensor, a :class:`WordRing`, and its copies use them again and again. Their uploads and kernels
follow each other on the stream, so each upload may overwrite the tensor. Pinned memory is written
again once an event says that it has been read; nothing waits for one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.copy_engine import driver
from kvheap.kernels.direct_launch import current_stream
from kvheap.kernels.launch import is_cuda, require_no_capture, send, staging

__all__ = ["WordRing", "Words"]

SEGMENT_WORDS = 8192
"""64 KiB. Larger uploads take memory of their own, in which their cost is small."""

NUM_SEGMENTS = 4

MAX_RINGS = 64
"""Launches beyond these take memory of their own: 20 MiB in all."""


class Event(Protocol):
    """What a stream has reached."""

    def query(self) -> bool:
        """Whether it has."""


class WordRing:
    """Pinned memory of one stream, written segment by segment, round and round.

    Args:
        pinned: int64 ``[segments * segment_words]`` on the host.
        target: int64 ``[segment_words]`` on the device.
        copy: enqueues a copy to the target: address of the source, address of the target, bytes.
        record: an event of what is enqueued by now.
    """

    def __init__(
        self,
        pinned: torch.Tensor,
        target: torch.Tensor,
        copy: Callable[[int, int, int], None],
        record: Callable[[], Event],
    ) -> None:
        self.target = target
        self._pinned = pinned
        self._host: Int64Array = pinned.numpy()
        self._address, self._target_address = pinned.data_ptr(), target.data_ptr()
        self._copy, self._record = copy, record
        self._segment_words = len(target)
        self._reads: list[Event | None] = [None] * (len(pinned) // len(target))
        self._segment = self._at = 0

    def take(self, num_words: int) -> int | None:
        """Where the host may write so many words now; None if the device has yet to read there."""
        if num_words > self._segment_words:
            return None
        if self._at + num_words > self._segment_words:
            following = (self._segment + 1) % len(self._reads)
            read = self._reads[following]
            if read is not None and not _has_read(read):
                return None
            self._reads[self._segment] = self._record()
            self._segment, self._at = following, 0
        start = self._segment * self._segment_words + self._at
        self._at += num_words
        return start

    def words(self, start: int, num_words: int) -> Int64Array:
        """The words that were taken."""
        return self._host[start : start + num_words]

    def send(self, start: int, num_words: int) -> None:
        """Copy them to the beginning of the target, in stream order."""
        self._copy(self._address + 8 * start, self._target_address, 8 * num_words)


_FREE: dict[tuple[int, int], list[WordRing]] = {}
"""By device and stream, those that no launch is using: usually one, which a launch takes by a
single operation. A finalizer that copies during the launch, or another thread, takes another."""

_ALL: list[WordRing] = []
"""All of them: a device may still read the memory of one that an exception has lost."""


class Words:
    """Words for one launch: a context in which they are written, sent and read by the launch.

    Within it, the device must be the current one.

    Args:
        num_words: how many; with none, nothing is sent, and a launch can be captured.
        device: which device reads them.

    Attributes:
        host: the words, to be written; int64 ``[num_words]``.

    Raises:
        RuntimeError: the current stream is being captured; see ``launch.staging``.

    >>> with Words(3, torch.device("cpu")) as words:
    ...     words.host[:] = [5, 6, 7]
    ...     words.send().tolist()
    [5, 6, 7]
    """

    __slots__ = ("_device", "_free", "_num_words", "_ring", "_staged", "_start", "host")

    def __init__(self, num_words: int, device: torch.device) -> None:
        self._num_words, self._device = num_words, device
        self._ring: WordRing | None = None

    def __enter__(self) -> Words:
        if not self._num_words:
            self.host = np.empty(0, np.int64)
            return self
        if is_cuda(self._device) and self._num_words <= SEGMENT_WORDS:
            require_no_capture()
            self._free = _FREE.setdefault(current_stream(), [])
            try:
                ring: WordRing | None = self._free.pop()
            except IndexError:
                ring = _new_ring()
            if ring is not None:
                start = ring.take(self._num_words)
                if start is not None:
                    self._ring, self._start = ring, start
                    self.host = ring.words(start, self._num_words)
                    return self
                self._free.append(ring)
        self._staged = staging(self._num_words, self._device)
        self.host = self._staged.numpy()
        return self

    def send(self) -> torch.Tensor:
        """The words on the device, at a multiple of 16 bytes, until the context ends."""
        if self._ring is None:
            return send(self._staged, self._device)
        self._ring.send(self._start, self._num_words)
        return self._ring.target

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ring is not None:
            self._free.append(self._ring)
            self._ring = None


def _has_read(event: Event) -> bool:
    with Relaxed():
        return event.query()


def _new_ring() -> WordRing | None:
    """A ring for the current stream; None if there are many."""
    if len(_ALL) >= MAX_RINGS:
        return None
    stream = torch.cuda.current_stream()
    with Relaxed():
        pinned = staging(NUM_SEGMENTS * SEGMENT_WORDS, stream.device)
        target = torch.empty(SEGMENT_WORDS, dtype=torch.int64, device=stream.device)
    handle, copy_one = stream.cuda_stream, driver().copy_one

    def copy(source: int, target: int, num_bytes: int) -> None:
        copy_one(source, target, num_bytes, handle)

    ring = WordRing(pinned, target, copy, stream.record_event)
    _ALL.append(ring)
    return ring
