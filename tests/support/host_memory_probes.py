"""What tests of host memory look at: mappings, resident pages, and a registrar without CUDA."""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path

from kvheap.memory.host_memory import HostBuffer

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
libc = ctypes.CDLL(None, use_errno=True)


def is_mapped(pointer: int) -> bool:
    return mapping_line(pointer) is not None


def mapping_line(pointer: int, file: str = "maps") -> str | None:
    """The line of this address in /proc/self/maps or smaps."""
    for line in Path("/proc/self", file).read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2 and int(bounds[0], 16) <= pointer < int(bounds[1], 16):
            return line
    return None


def vm_flags(pointer: int) -> list[str]:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    start = mapping_line(pointer)
    for line in lines:
        if line == start:
            break
    return next(line for line in lines if line.startswith("VmFlags:")).split()[1:]


def resident_pages(buffer: HostBuffer) -> list[bool]:
    count = -(-buffer.size_bytes // PAGE)
    pages = (ctypes.c_ubyte * count)()
    size = ctypes.c_size_t(count * PAGE)
    assert libc.mincore(ctypes.c_void_p(buffer.data_ptr), size, pages) == 0
    return [bool(page & 1) for page in pages]


def anonymous_bytes() -> int:
    """Private memory of this process that is its own: pages that were only read are not."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise AssertionError("smaps_rollup says nothing of anonymous memory")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class FakeRegistrar:
    """Keeps what is registered, and refuses what CUDA would: overlaps, and unmapped memory."""

    def __init__(self, fail_register: int | None = None, fail_unregister: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[int, int]] = []
        self.threads: set[threading.Thread] = set()
        self.fail_register = fail_register
        self.fail_unregister = fail_unregister
        self.unregistered_unmapped = 0

    def register(self, pointer: int, num_bytes: int) -> None:
        self.threads.add(threading.current_thread())
        self.calls.append((pointer, num_bytes))
        if len(self.calls) - 1 == self.fail_register:
            raise RuntimeError("cudaErrorFake (77): no pages left")
        if pointer % PAGE or num_bytes % PAGE or not is_mapped(pointer + num_bytes - 1):
            raise AssertionError(f"not whole mapped pages: {pointer:#x}, {num_bytes}")
        for other, other_bytes in self.registered.items():
            if pointer < other + other_bytes and other < pointer + num_bytes:
                raise AssertionError(f"{pointer:#x} overlaps {other:#x}")
        self.registered[pointer] = num_bytes

    def unregister(self, pointer: int) -> None:
        if not is_mapped(pointer):
            self.unregistered_unmapped += 1
        if self.fail_unregister:
            self.fail_unregister -= 1
            raise RuntimeError(f"cudaErrorFake (78): {pointer:#x} stays")
        del self.registered[pointer]
