"""Paged copies by compiled kernels, which may touch nothing but the rows that are copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paged_reference import pairs
from paged_worlds import World, check_copy
from ptx_machine.jit import Gpu, running_ptx
from ptx_machine.memory import GlobalMemory


def check_compiled_copy(
    world: World,
    slots: Sequence[int],
    is_store: bool,
    capability: int,
    given_as: Any = None,
    rewrite: Callable[[str], str] = str,
    **kept: Any,
) -> Gpu:
    """Copy the tokens at ``slots``, and compare every byte of the world with the reference."""
    rows = list(pairs(world.engine, world.batch, slots, **kept))
    ours, theirs = [heap_row for _, heap_row in rows], [engine_row for engine_row, _ in rows]
    memory = GlobalMemory(theirs, ours) if is_store else GlobalMemory(ours, theirs)
    with running_ptx(capability, memory, rewrite=rewrite) as gpu:
        check_copy(world, slots, is_store, given_as, **kept)
    return gpu
