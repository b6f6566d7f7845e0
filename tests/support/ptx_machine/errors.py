"""What the machine raises."""

from __future__ import annotations

__all__ = ["KernelError", "UnknownInstructionError"]


class KernelError(RuntimeError):
    """The kernel does something that is wrong on a GPU."""


class UnknownInstructionError(NotImplementedError):
    """The kernel uses something that the machine does not know."""
