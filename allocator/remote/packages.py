"""``nixl`` and ``msgpack``, which only this package needs: imported at the first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["INSTALL", "need_msgpack", "need_nixl"]

INSTALL = "pip install msgpack && pip install --no-deps nixl-cu13==1.5.1 nixl==1.5.1"
"""How to install both. With its dependencies, ``nixl`` brings CUDA builds of torch."""


def need_nixl() -> Any:
    """NIXL's bindings.

    Its Python class ``nixl_agent`` fixes the pause of the progress thread at 0, which takes most of
    a core for as long as the agent lives; the bindings let it be chosen.

    Raises:
        ImportError: NIXL is not installed; the message says how to install it.
    """
    _need("nixl")
    return _need("nixl._bindings")


def need_msgpack() -> Any:
    """The package ``msgpack``.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    return _need("msgpack")


def _need(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"a Node needs the package {package} ({error}): {INSTALL}", name=package
        ) from error
