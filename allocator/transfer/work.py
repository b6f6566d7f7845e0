"""``Work``: what all copies have that blocks are protected from; ``Run``: what executes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvheap.device.completion import Completion
from kvheap.device.directions import Direction, Path
from kvheap.device.events import DeviceEvent
from kvheap.transfer.sides import Side

__all__ = ["Run", "Work"]


class Work(Protocol):
    """A copy between two sides, such as a ``CopyPlan``."""

    @property
    def source(self) -> Side:
        """Where the bytes come from."""
        ...

    @property
    def target(self) -> Side:
        """Where the bytes go."""
        ...

    @property
    def direction(self) -> Direction:
        """The direction of the copy."""
        ...

    @property
    def num_runs(self) -> int:
        """Number of runs to submit, after merging neighbouring pieces."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes to copy."""
        ...

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """The buffers of both sides."""
        ...

    def protect(self, completion: Completion) -> None:
        """Protect the bytes of both sides from reuse until a copy has ended."""
        ...


class Run(Protocol):
    """What executes a copy. Made before anything is protected or queued."""

    @property
    def path(self) -> Path:
        """The path that is taken."""
        ...

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph is being captured on the stream."""
        ...

    def capture(self) -> None:
        """Queue the copy into the graph that is being captured."""
        ...

    def start(self, completion: Completion) -> Sequence[DeviceEvent]:
        """Queue the copy. A failure is stored in ``completion``, not raised.

        Returns:
            The event at the end of each part that was queued.
        """
        ...
