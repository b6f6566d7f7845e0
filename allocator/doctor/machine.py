"""What the operating system provides: a compiler, memory and its limits, huge pages, NUMA nodes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from kvheap.doctor.finding import Finding
from kvheap.sizes import size_text

__all__ = ["machine_findings"]

COMPILERS = ("cc", "gcc", "clang")
"""Triton builds a launcher with one of these, or with ``$CC``, when it first runs a kernel."""

CGROUP_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_findings(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Look at the operating system.

    Args:
        root: where ``proc``, ``sys`` and ``dev`` are.
        environment: the variables of the environment.
    """
    return [
        _compiler(environment),
        _memory(root),
        _shared_memory(root),
        *_transparent_huge_pages(root),
        _explicit_huge_pages(root),
        _numa(root),
    ]


def _compiler(environment: Mapping[str, str]) -> Finding:
    asked = environment.get("CC")
    names = (asked.split()[0],) if asked and asked.split() else COMPILERS
    for name in names:
        found = shutil.which(name, path=environment.get("PATH"))
        if found is not None:
            return Finding("machine", "C compiler", "ok", found)
    remedy = "install gcc or clang: Triton compiles its launchers with it"
    if asked:
        return Finding("machine", "C compiler", "wrong", f"$CC is {asked!r}, not found", remedy)
    return Finding("machine", "C compiler", "absent", "needed for kernels on a GPU", remedy)


def _memory(root: Path) -> Finding:
    sizes = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.split():
            sizes[name] = int(value.split()[0]) << 10
    if "MemTotal" not in sizes:
        return Finding("machine", "memory", "absent", "the system does not report it")
    words = [f"{size_text(sizes['MemTotal'])}"]
    if "MemAvailable" in sizes:
        words.append(f"{size_text(sizes['MemAvailable'])} available")
    for limit in CGROUP_LIMITS:
        text = _read(root / limit).strip()
        if text.isdigit() and int(text) < sizes["MemTotal"]:
            words.append(f"limited to {size_text(int(text))} by its control group")
            break
    return Finding("machine", "memory", "ok", ", ".join(words))


def _shared_memory(root: Path) -> Finding:
    try:
        usage = shutil.disk_usage(root / "dev/shm")
    except OSError:
        return Finding(
            "machine", "/dev/shm", "absent", "heaps that processes share by path need a tmpfs"
        )
    words = f"{size_text(usage.free)} free of {size_text(usage.total)}"
    return Finding("machine", "/dev/shm", "ok", words)


def _transparent_huge_pages(root: Path) -> list[Finding]:
    found = []
    folder = root / "sys/kernel/mm/transparent_hugepage"
    for name, setting in (("private", "enabled"), ("shared", "shmem_enabled")):
        choices = _read(folder / setting).strip()
        label = f"transparent huge pages, {name} memory"
        chosen = choices.partition("[")[2].partition("]")[0]
        if chosen in ("", "never", "deny"):
            words = chosen or "the kernel has none"
            remedy = f"echo madvise > /{(folder / setting).relative_to(root)}" if chosen else ""
            if name == "shared" and chosen:
                remedy = remedy.replace("madvise", "advise")
            found.append(Finding("machine", label, "absent", words, remedy))
        else:
            found.append(Finding("machine", label, "ok", chosen))
    return found


def _explicit_huge_pages(root: Path) -> Finding:
    counts = {}
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith(("HugePages_Total:", "HugePages_Free:", "Hugepagesize:")):
            name, value = line.split()[:2]
            counts[name.rstrip(":")] = int(value)
    size = counts.get("Hugepagesize", 0) << 10
    if not counts.get("HugePages_Total") or not size:
        return Finding(
            "machine",
            "explicit huge pages",
            "absent",
            "none reserved",
            "sysctl vm.nr_hugepages=N, for huge_pages='explicit'" if size else "",
        )
    words = (
        f"{counts.get('HugePages_Free', 0)} free of {counts['HugePages_Total']}, "
        f"{size_text(size)} each"
    )
    return Finding("machine", "explicit huge pages", "ok", words)


def _numa(root: Path) -> Finding:
    nodes = sorted(
        int(node.name.removeprefix("node"))
        for node in (root / "sys/devices/system/node").glob("node[0-9]*")
    )
    if not nodes:
        return Finding("machine", "NUMA nodes", "absent", "the system reports none")
    return Finding("machine", "NUMA nodes", "ok", ", ".join(map(str, nodes)))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
