"""Sizes in bytes, as people read them."""

from __future__ import annotations

__all__ = ["size_text"]

UNITS = ("B", "KiB", "MiB", "GiB")


def size_text(num_bytes: float) -> str:
    """A number of bytes in the largest binary unit that fits, with up to four digits.

    >>> size_text(512), size_text(1536), size_text(64 << 20), size_text(2 << 50)
    ('512 B', '1.5 KiB', '64 MiB', '2,048 TiB')
    """
    for unit in UNITS:
        if num_bytes < 1024:
            return f"{num_bytes:,.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.4g} TiB"
