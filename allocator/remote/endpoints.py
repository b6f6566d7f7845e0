"""Where a node listens: ``host:port``, and whether others than this machine can reach it."""

from __future__ import annotations

import ipaddress
from typing import Any

__all__ = ["as_secret", "endpoint_of", "is_loopback", "require_secret"]

MAX_PORT = (1 << 16) - 1


def endpoint_of(name: str, text: Any) -> tuple[str, int]:
    """The host and the port of ``host:port``, or of ``[host]:port`` for IPv6.

    Raises:
        TypeError: it is not a text.
        ValueError: it is not of this form.

    >>> endpoint_of("bind", "127.0.0.1:0"), endpoint_of("bind", "[::1]:7000")
    (('127.0.0.1', 0), ('::1', 7000))
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a text such as '127.0.0.1:7000', got {text!r}")
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
        raise ValueError(
            f"{name} must be host:port, such as '127.0.0.1:7000' or '[::1]:7000', got {text!r}"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback; False for names other than ``localhost``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def as_secret(secret: Any) -> bytes | None:
    """A secret as bytes.

    Raises:
        TypeError: it is neither bytes, a text nor None.
        ValueError: it is empty.
    """
    if secret is None:
        return None
    if isinstance(secret, str):
        secret = secret.encode()
    if not isinstance(secret, bytes):
        raise TypeError(f"secret must be bytes, a text or None, got a {type(secret).__name__}")
    if not secret:
        raise ValueError("secret must not be empty: pass None for none, on loopback only")
    return secret


def require_secret(name: str, host: str, secret: bytes | None) -> None:
    """Raise if an address can be reached by others, and there is no secret.

    Raises:
        ValueError: it can; the message names the address.
    """
    if secret is None and not is_loopback(host):
        raise ValueError(
            f"{name} is {host!r}, which is not loopback: pass a secret, the same for all nodes"
        )
