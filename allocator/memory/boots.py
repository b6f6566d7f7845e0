"""Which boot of the machine this is: bytes that were never flushed do not outlive it."""

from __future__ import annotations

from pathlib import Path

from kvheap.interrupts import suppress_own

__all__ = ["boot_id"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """What the kernel calls this boot of the machine; empty if it does not say."""
    with suppress_own(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return ""
