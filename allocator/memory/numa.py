"""NUMA nodes: finding the one nearest to a GPU or to a thread, and binding memory to one."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["MAX_NUMA_NODES", "bind_to_node", "cpus_nearby", "numa_node_of_gpu"]

MAX_NUMA_NODES = 1024

MPOL_BIND = 2
"""From <linux/mempolicy.h>: use the memory of these nodes and no other."""

MBIND_SYSCALLS = {"x86_64": 237, "aarch64": 235}
"""Number of the system call ``mbind`` on each machine; glibc has no function for it."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def bind_to_node(pointer: int, num_bytes: int, numa_node: int) -> None:
    """Take the pages of a mapping from one node only. They must not be committed yet.

    Args:
        pointer: where the mapping begins.
        num_bytes: its size.
        numa_node: 0 to ``MAX_NUMA_NODES - 1``.

    Raises:
        OSError: the kernel refused, or kvheap does not know this machine's system call.
    """
    machine = platform.machine()
    if machine not in MBIND_SYSCALLS:
        raise OSError(errno.ENOSYS, f"numa_node is not supported on {machine}")
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = (ctypes.c_ulong * (MAX_NUMA_NODES // word_bits))()
    words[numa_node // word_bits] = 1 << numa_node % word_bits
    failed = _libc.syscall(
        ctypes.c_long(MBIND_SYSCALLS[machine]),
        ctypes.c_void_p(pointer),
        ctypes.c_ulong(num_bytes),
        ctypes.c_ulong(MPOL_BIND),
        words,
        ctypes.c_ulong(MAX_NUMA_NODES + 1),  # the kernel expects the number of bits plus one
        ctypes.c_ulong(0),
    )
    if failed:
        code = ctypes.get_errno()
        raise OSError(
            code, f"cannot bind {num_bytes} bytes to NUMA node {numa_node}: {os.strerror(code)}"
        )


def cpus_nearby(cpus: set[int], cpu: int | None = None, *, sysfs: Path = Path("/sys")) -> set[int]:
    """Those of some CPUs that are on the node of one CPU.

    Args:
        cpus: numbers of CPUs.
        cpu: the CPU; None: the one on which this thread runs.
        sysfs: where sysfs is mounted.

    Returns:
        All of them if none is there, or if that is not known, as on systems without nodes.
    """
    if cpu is None:
        get_cpu = getattr(_libc, "sched_getcpu", None)
        cpu = -1 if get_cpu is None else get_cpu()
    for file in sorted((sysfs / f"devices/system/cpu/cpu{cpu}").glob("node*/cpulist")):
        near: set[int] = set()
        for part in file.read_text().strip().split(","):
            first, _, last = part.partition("-")
            near.update(range(int(first), int(last or first) + 1))
        return near & cpus or cpus
    return cpus


def numa_node_of_gpu(
    device: torch.device | int | str | None = None, *, sysfs: Path = Path("/sys")
) -> int | None:
    """The NUMA node that a GPU is attached to; copies to and from that node's memory are fastest.

    Args:
        device: the GPU; None: the current one.
        sysfs: where sysfs is mounted.

    Returns:
        The node; None if the system does not report it, as on machines with one node.

    Raises:
        RuntimeError: this torch does not report the PCI address, or there is no CUDA.
    """
    try:
        properties: Any = torch.cuda.get_device_properties(device)
    except AssertionError as error:  # a torch without CUDA
        raise RuntimeError(f"torch has no CUDA, so it knows no GPU: {error}") from error
    try:
        address = (
            f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:"
            f"{properties.pci_device_id:02x}.0"
        )
    except AttributeError as error:
        raise RuntimeError(
            f"torch {torch.__version__} does not report a GPU's PCI address"
        ) from error
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
    except FileNotFoundError:
        return None
    return node if node >= 0 else None
