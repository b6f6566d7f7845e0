"""``prometheus_client``, which only this package needs: imported at the first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["need_prometheus"]


def need_prometheus(module: str = "") -> Any:
    """The package ``prometheus_client``, or a module of it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(f"prometheus_client{'.' * bool(module)}{module}")
    except ImportError as error:
        raise ImportError(
            f"metrics need the package prometheus_client ({error}): pip install prometheus_client",
            name="prometheus_client",
        ) from error
