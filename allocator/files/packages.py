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
    return _need("lmdb")


def need_xxhash() -> Any:
    """The package ``xxhash``.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    return _need("xxhash")


def _need(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"a FileTier needs the package {name} ({error}): pip install lmdb xxhash",
            name=name,
        ) from error
