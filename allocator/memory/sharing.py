"""Which memory of this process other processes see too: a fork does not copy it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import torch

from kvheap.interrupts import suppress_own
from kvheap.memory.host_mapping import attached_mappings

__all__ = ["is_of_another_process", "is_shared"]

TORCH_FILE = re.compile(r"/torch_(\d+)_")
"""The name of torch's shared memory; the number is the process that created it."""


def is_shared(buffer: torch.Tensor) -> bool:
    """Whether a child that is forked sees the same bytes as its parent, and not a copy of them.

    True for memory of a device, shared memory of torch and of ``multiprocessing``, and files that
    are mapped shared. Reads the process's memory map. Without one, as on systems other than Linux,
    only torch's own shared memory is known.
    """
    if not buffer.numel():
        return False
    if buffer.device.type != "cpu" or buffer.is_shared():  # type: ignore[no-untyped-call]
        return True
    return any(flags.endswith("s") for flags, _ in _mappings_of(buffer))


def is_of_another_process(buffer: torch.Tensor) -> bool:
    """Whether a buffer is known to be memory that another process created.

    That is memory of a ``HostBuffer`` that maps a file which this process did not create, and
    torch's shared memory that another process created. Other memory does not say who created it:
    False.
    """
    first = buffer.data_ptr()
    for mapping in attached_mappings():
        if mapping.data_ptr <= first < mapping.data_ptr + mapping.size_bytes:
            return True
    if buffer.device.type != "cpu" or not buffer.numel() or not buffer.is_shared():  # type: ignore[no-untyped-call]
        return False
    for _, path in _mappings_of(buffer):
        found = TORCH_FILE.search(path)
        if found is not None and int(found[1]) != os.getpid():
            return True
    return False


def _mappings_of(buffer: torch.Tensor) -> Iterator[tuple[str, str]]:
    """Flags, such as ``rw-s``, and file of each mapping that holds bytes of a CPU buffer."""
    first = buffer.data_ptr()
    end = first + buffer.numel() * buffer.itemsize
    lines: list[str] = []
    with suppress_own(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    for line in lines:
        bounds, flags, *rest = line.split(maxsplit=5)
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low < end and first < high:
            yield flags, rest[3] if len(rest) > 3 else ""
