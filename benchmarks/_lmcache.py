"""LMCache, the peer of the benchmarks on the host.

Benchmarks compare with it if it is installed::

    pip install -c constraints-lmcache.txt '.[lmcache-deps]' && pip install --no-deps lmcache==0.5.6
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Mapping
from typing import Any

import torch
from _report import Row, describe_machine, print_machine
from _timing import Samples
from rich.console import Console

PEER = "LMCache"


def lmcache_name(module: str, name: str) -> Any | None:
    """A name from a module of LMCache.

    None if LMCache, a module that its import asks for, or the name is missing.
    """
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def lmcache_address_manager() -> Any | None:
    """LMCache's ``AddressManager``; None as for :func:`lmcache_name`."""
    return lmcache_name("lmcache.v1.memory_management", "AddressManager")


def lmcache_allocator(module: str, name: str) -> Any | None:
    """A class from LMCache's ``memory_allocators``; None as for :func:`lmcache_name`."""
    return lmcache_name(f"lmcache.v1.memory_allocators.{module}", name)


def machine_with_lmcache(
    console: Console, device: torch.device, has_lmcache: bool
) -> dict[str, Any]:
    """Describe and print the machine, with LMCache's version, and silence LMCache's log."""
    logging.disable(logging.WARNING)  # LMCache logs each allocation that fails
    machine = describe_machine(device)
    version = importlib.metadata.version("lmcache") if has_lmcache else None
    machine["versions"]["lmcache"] = version
    print_machine(console, machine)
    if not has_lmcache and device.type == "cpu":
        console.print("lmcache is not installed: kvheap is measured without it")
    return machine


def compared(samples: Mapping[str, Samples]) -> Row:
    """Percentiles of each, and LMCache's time over kvheap's if both were measured."""
    row: Row = {name: timing.percentiles() for name, timing in samples.items()}
    if PEER in samples:
        row["times_as_fast"] = round(samples["kvheap"].speed_against(samples[PEER]), 2)
    return row
