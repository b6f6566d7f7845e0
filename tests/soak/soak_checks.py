"""How the soak says that something is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SoakError(Exception):
    """Raised by whatever the soak makes fail on purpose."""


class ViolationError(AssertionError):
    """The heap did what it must never do."""


def require(condition: bool, what: object) -> None:
    """Raise a ViolationError that says ``what`` is wrong, unless ``condition`` holds."""
    if not condition:
        raise ViolationError(str(what))


@contextlib.contextmanager
def must_raise(*kinds: type[Exception]) -> Iterator[None]:
    """Require that the body raises an error of one of these kinds."""
    try:
        yield
    except kinds:
        return
    raise ViolationError(f"{' or '.join(kind.__name__ for kind in kinds)} was not raised")


def holds(block: torch.Tensor, value: int) -> bool:
    """Whether every byte of ``block`` is ``value``."""
    return bool((block == value).all())
