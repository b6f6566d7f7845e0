"""``lmdb`` and ``xxhash``, which only this package needs: imported at the first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["need_lmdb", "need_xxhash"]


def need_lmdb() -> Any:
    """The package ``lmdb``.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    return _need("lmdb", "a FileTier")


def need_xxhash(who: str = "a FileTier") -> Any:
    """The package ``xxhash``, for ``who``.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    return _need("xxhash", who)


def _need(name: str, who: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{who} needs the package {name} ({error}): pip install lmdb xxhash",
            name=name,
        ) from error
