"""Faults planted in compiled kernels: the machine, or the comparison of bytes, sees each one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch
from compiled import needs_compiler
from converted_worlds import ConvertedWorld
from paged_reference import Engine, Sizes
from paged_worlds import FLASH, World, random_slots
from ptx_machine.errors import KernelError
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory
from ptx_paged import check_compiled_copy
from sparse import sparse_memory

from kvheap import MemoryFormat
from kvheap.kernels import scatter_blocks
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy

pytestmark = needs_compiler

Rewrite: TypeAlias = Callable[[str], str]


# -- what is executed: each of these raises if its result is wrong ---------------------------------


def scatter(rewrite: Rewrite) -> None:
    """Blocks of 80 bytes, in accesses of 16."""
    addresses = np.array([5, 0, 3, 8]) * 96
    blocks = torch.randint(1, 256, (4, 80), dtype=torch.uint8)
    buffer = torch.zeros(1024, dtype=torch.uint8)
    places = [buffer[at : at + 80] for at in addresses.tolist()]
    with running_ptx(90, GlobalMemory(list(blocks), places), rewrite=rewrite):
        scatter_blocks(blocks, buffer, addresses)
    assert all(map(torch.equal, places, blocks))


def scatter_far(rewrite: Rewrite) -> None:
    """The second block is beyond 4 GiB."""
    buffer = sparse_memory(5 << 30)
    blocks = torch.randint(1, 256, (2, 64), dtype=torch.uint8)
    places = [buffer[:64], buffer[-64:]]
    with running_ptx(90, GlobalMemory([blocks], places), rewrite=rewrite):
        scatter_blocks(blocks, buffer, [0, (5 << 30) - 64])
    assert all(map(torch.equal, places, blocks))


def copy_pieces(rewrite: Rewrite) -> None:
    """Pieces of 16 to 60,000 bytes, more tiles than programs."""
    sizes = np.array([60_000, 16, 480, 4096, 32])
    offsets = np.cumsum(sizes) - sizes + 64 * np.arange(5)
    source = torch.randint(1, 256, (70_000,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    parts = [slice(at, at + size) for at, size in np.stack([offsets, sizes], axis=1).tolist()]
    memory = GlobalMemory([source[part] for part in parts], [target[part] for part in parts])
    with running_ptx(90, memory, rewrite=rewrite):
        pieces = Pieces.of(source.data_ptr() + offsets, target.data_ptr() + offsets, sizes)
        PointerCopy.prepare(pieces, torch.device("cpu")).run(2)
    assert all(torch.equal(target[part], source[part]) for part in parts)


def store_tokens(rewrite: Rewrite) -> None:
    engine = Engine(FLASH, Sizes(2, 12, 4, 2, 32))
    world = World(engine, MemoryFormat.KV_2LTD, 30, 8)
    slots = random_slots(engine, 30)
    slots[7] = -1
    check_compiled_copy(world, slots, True, 90, rewrite=rewrite)


def convert(capability: int, is_store: bool) -> Callable[[Rewrite], None]:
    def run(rewrite: Rewrite) -> None:
        world = ConvertedWorld(torch.float16, 100, 100, head_dim=128)
        if not is_store:
            world.check(world.slots(), True, capability)
        world.check(world.slots(), is_store, capability, rewrite=rewrite)

    return run


# -- what is planted -------------------------------------------------------------------------------


def replaced(pattern: str, replacement: str) -> Rewrite:
    """Change every place that fits the pattern, of which there must be one."""

    def rewrite(ptx: str) -> str:
        changed, count = re.subn(pattern, replacement, ptx)
        assert count, f"nothing fits {pattern}"
        return changed

    return rewrite


REGISTER = r"(%rd\d+)"

FAULTS: dict[str, tuple[Callable[[Rewrite], None], Rewrite, str | None]] = {
    "a mask that is off by one": (
        scatter,
        replaced(r"setp\.lt\.s32", "setp.le.s32"),
        "may not be",
    ),
    "a store without its mask": (
        scatter,
        replaced(r"@%p\d+ (st\.global)", r"\1"),
        "may not be written|different values",
    ),
    "a load without its mask": (
        copy_pieces,
        replaced(r"@%p\d+ (ld\.global)", r"\1"),
        "may not be read",
    ),
    "accesses that are wider than their alignment": (
        scatter,
        replaced(r"(v2\.b64 [^;]*\[ %rd\d+ \+) 0", r"\1 8"),
        "16 bytes at .* are misaligned",
    ),
    "half of each access": (
        copy_pieces,
        replaced(
            r"st\.global([.\w:]*)\.v2\.b64 (\S+ \S+ \S+ \S+), { (%rd\d+), %rd\d+ }",
            r"st.global\1.b64 \2, { \3 }",
        ),
        None,
    ),
    "an address that wraps at 32 bits": (
        scatter_far,
        replaced(rf"(shl\.b64 *\t*{REGISTER}, %rd\d+, 4;)", r"\1 and.b64 \2, \2, 4294967295;"),
        "may not be",
    ),
    "the stride of blocks for that of tokens": (
        store_tokens,
        replaced(rf"(add\.s64 *\t*{REGISTER}, {REGISTER}), 16;", r"\1, 24;"),
        "may not be read",
    ),
    "a skipped token that is copied": (
        store_tokens,
        replaced(r"setp\.gt\.s64(.*), -1;", r"setp.gt.s64\1, -2;"),
        "may not be",
    ),
    "tiles that are left out": (
        copy_pieces,
        replaced(
            r"mov\.u32 *\t*(%r\d+), %nctaid\.x;", r"mov.u32 \1, %nctaid.x; add.s32 \1, \1, 1;"
        ),
        None,
    ),
    "two halves of a pair of fp8 exchanged": (
        convert(90, is_store=True),
        replaced(r"(cvt\.rn\.satfinite\.e4m3x2\.f32 *\t*%rs\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
        None,
    ),
    "ties that are rounded up": (
        convert(80, is_store=True),
        replaced(r", 524287;", ", 524288;"),
        None,
    ),
}
"""Where each fault is planted, how, and what the machine says; None if only bytes are wrong."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    scene, rewrite, message = FAULTS[fault]
    scene(str)
    with pytest.raises(KernelError if message else AssertionError, match=message):
        scene(rewrite)


@pytest.mark.parametrize(
    ("scene", "needed"),
    [
        (convert(80, is_store=False), slice(None)),
        (convert(100, is_store=False), slice(None)),
        # The first one would matter if there were a third step.
        (convert(80, is_store=True), slice(1, None)),
        (convert(90, is_store=True), slice(1, None)),
    ],
    ids=["load-80", "load-100", "store-80", "store-90"],
)
def test_every_barrier_is_needed(scene: Callable[[Rewrite], None], needed: slice) -> None:
    """Without any one of them, threads race for shared memory."""
    num_barriers = 0

    def counting(ptx: str) -> str:
        nonlocal num_barriers
        num_barriers = ptx.count("bar.sync")
        return ptx

    scene(counting)
    assert num_barriers >= 2
    for number in range(num_barriers)[needed]:
        with pytest.raises(KernelError, match="without a barrier between them"):
            scene(without_barrier(number))


def without_barrier(number: int) -> Rewrite:
    def rewrite(ptx: str) -> str:
        at = [found.start() for found in re.finditer(r"bar\.sync", ptx)][number]
        return f"{ptx[:at]}//{ptx[at:]}"

    return rewrite
