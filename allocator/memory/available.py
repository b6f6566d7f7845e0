"""How much memory the system, or the process's control group, can still give."""

from __future__ import annotations

from pathlib import Path

from kvheap.interrupts import suppress_own

__all__ = ["available_bytes"]

LIMITS = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Where control groups of version 2 and 1 are mounted, and their files of limit and use."""


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be committed before the kernel kills a process; 0 if that is not known.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    found = 0
    with suppress_own(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) << 10
    groups = {""}
    with suppress_own(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                # A container may see its own group, at its path on the host or as the root.
                groups.add(path.strip("/"))
    for mount, limit_file, use_file in LIMITS:
        for group in groups:
            folder = root / "sys/fs/cgroup" / mount / group
            with suppress_own(OSError, ValueError):  # no such group, or the limit is "max"
                limit = int((folder / limit_file).read_text())
                found = min(found, max(limit - int((folder / use_file).read_text()), 0))
    return found
