"""The compiled kernel of bulk copies, executed: every byte against one memmove a piece."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compiled import needs_compiler
from ptx_machine import machine
from ptx_machine.errors import KernelError
from ptx_machine.jit import Gpu, running_ptx
from ptx_machine.memory import GlobalMemory
from sparse import sparse_memory

from kvheap.kernels.bulk_copy import BulkCopy
from kvheap.kernels.pieces import Pieces

pytestmark = needs_compiler

CPU = torch.device("cpu")
GIB = 1 << 30
ON_BULK_CAPABILITIES = pytest.mark.parametrize("capability", [90, 100])


class World:
    """Pieces of given sizes at random places of one tensor, and where they go in another."""

    def __init__(self, sizes: np.ndarray) -> None:
        random = np.random.default_rng(len(sizes))
        places = [spread(sizes, random) for _ in range(2)]
        self.source, self.target = (
            torch.from_numpy(random.integers(0, 256, int((o + sizes).max()) + 64, dtype=np.uint8))
            for o in places
        )
        rows = np.stack([*places, sizes], axis=1).tolist()
        self.memory = GlobalMemory(
            reads=[self.source[start : start + size] for start, _, size in rows],
            writes=[self.target[to : to + size] for _, to, size in rows],
        )
        self.pieces = Pieces.of(
            self.source.data_ptr() + places[0], self.target.data_ptr() + places[1], sizes
        )
        self.expected = self.target.clone()
        for start, to, size in rows:
            self.expected[to : to + size] = self.source[start : start + size]

    def copy(
        self, max_sms: int | None, capability: int = 90, rewrite: Callable[[str], str] = str
    ) -> Gpu:
        with running_ptx(capability, self.memory, rewrite=rewrite) as gpu:
            BulkCopy.prepare(self.pieces, CPU).run(max_sms)
        assert len(gpu.launches) == 1
        assert torch.equal(self.target, self.expected)
        return gpu


def spread(sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Offsets of disjoint pieces in random order, multiples of 16, some with gaps between."""
    order = random.permutation(len(sizes))
    steps = sizes[order] + random.integers(0, 4, len(sizes)) * 16
    offsets = np.empty(len(sizes), np.int64)
    offsets[order] = np.cumsum(steps) - steps
    return offsets


SIZES = {
    "one-of-16": np.array([16]),
    "16": np.full(900, 16),
    "80": np.full(333, 80),
    "528": np.full(100, 528),
    "2048": np.full(40, 2048),
    "2064": np.full(25, 2064),
    "16400": np.full(5, 16400),
    "160-KiB": np.full(1, 160 << 10),
    "two-sizes": np.array([16, 32]),
    "small-and-large": np.array([20_000, 16, 16, 65_536, 48, 2064]),
    "anything": np.random.default_rng(0).integers(1, 400, 60) * 16,
}


@pytest.mark.parametrize(("max_sms", "capability"), [(1, 90), (5, 100), (None, 90)])
@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_are_copied(sizes: str, max_sms: int | None, capability: int) -> None:
    World(SIZES[sizes]).copy(max_sms, capability)


@ON_BULK_CAPABILITIES
@pytest.mark.parametrize("last_size", [4096, 48])
def test_pieces_beyond_two_to_the_32_bytes(last_size: int, capability: int) -> None:
    offsets = np.array([0, 4 * GIB - 4096, 4 * GIB, 17 * GIB, 79 * GIB])
    near, far = sparse_memory(80 * GIB), sparse_memory(80 * GIB)
    sizes = np.array([4096] * 4 + [last_size])
    rows = list(zip(offsets.tolist(), offsets[::-1].tolist(), sizes.tolist(), strict=True))
    for source, target in ((near, far), (far, near)):
        for start, to, size in rows:
            source[start : start + size] = torch.randint(1, 256, (size,), dtype=torch.uint8)
            target[to : to + size] = 0
        memory = GlobalMemory(
            reads=[source[start : start + size] for start, _, size in rows],
            writes=[target[to : to + size] for _, to, size in rows],
        )
        pieces = Pieces.of(source.data_ptr() + offsets, target.data_ptr() + offsets[::-1], sizes)
        with running_ptx(capability, memory):
            BulkCopy.prepare(pieces, CPU).run(2)
        for start, to, size in rows:
            assert torch.equal(target[to : to + size], source[start : start + size])


def test_the_end_of_a_piece_of_more_than_4_gib() -> None:
    """Only the last item of a piece, which the last block of the grid copies."""
    size = 5 * GIB
    source, target = sparse_memory(size), sparse_memory(size)
    source[-2048:] = torch.randint(1, 256, (2048,), dtype=torch.uint8)
    memory = GlobalMemory([source], [target])
    pieces = Pieces.of([source.data_ptr()], [target.data_ptr()], size)
    with running_ptx(90, memory, blocks=lambda count: [count - 1]) as gpu:
        BulkCopy.prepare(pieces, CPU).run(size // 2048 // 32)
    assert gpu.launches[0].num_blocks == size // 2048 // 32
    assert torch.equal(target[-2048:], source[-2048:])


def test_all_copies_share_one_compiled_kernel() -> None:
    with running_ptx(90, memory=None, is_new=True) as gpu:
        for sizes in SIZES.values():
            ready = BulkCopy.prepare(World(sizes).pieces, CPU)
            ready.warm_up()
            ready.run(3)
            ready.run()
    assert gpu.num_compiled()["_copy_bulk_kernel"] == 1


# -- faults planted in the kernel --------------------------------------------------------------


def replaced(pattern: str, replacement: str, count: int = 0) -> Callable[[str], str]:
    """Change every place that fits the pattern, of which there must be one, or the first ones."""

    def rewrite(ptx: str) -> str:
        changed, found = re.subn(pattern, replacement, ptx, count=count)
        assert found, f"nothing fits {pattern}"
        return changed

    return rewrite


FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "waiting once, whether or not it was in vain": (
        replaced(r"@!done bra\s+bulk_wait;", ""),
        "without having waited for it",
    ),
    "waiting for the phase before": (
        replaced(r"mov\.u32\s+parity, 0;", "mov.u32 parity, 1;"),
        "used while a bulk copy to them is in flight",
    ),
    "waiting for the first phase for ever": (
        replaced(r"@wraps xor\.b32\s+parity, parity, 1;", ""),
        "used while a bulk copy to them is in flight",
    ),
    "a stage that is filled again before it was read": (
        replaced(r"wait_group\.read 2;", "wait_group.read 3;"),
        "overwritten while a bulk copy reads them",
    ),
    "no waiting for a stage to be read": (
        replaced(r"cp\.async\.bulk\.wait_group\.read 2;", ""),
        "overwritten while a bulk copy reads them",
    ),
    "groups that are never committed": (
        replaced(r"cp\.async\.bulk\.commit_group;", ""),
        "overwritten while a bulk copy reads them",
    ),
    "an end at which bytes have been read and not written": (
        replaced(r"wait_group 0;", "wait_group.read 0;"),
        "returns before its bulk copies have ended",
    ),
    "an end that waits for nothing": (
        replaced(r"cp\.async\.bulk\.wait_group 0;", ""),
        "returns before its bulk copies have ended",
    ),
    "mbarriers that bulk copies may not see yet": (
        replaced(r"fence\.proxy[^;]*;", ""),
        "no fence orders an ordinary store",
    ),
    "mbarriers that other lanes may not see yet": (
        replaced(r"bar\.warp\.sync[^;]*;", "", count=1),
        "without a barrier between them",
    ),
    "lanes that do not meet before they fill a stage": (
        replaced(r"(wait_group\.read 2;\s*)bar\.warp\.sync[^;]*;", r"\1"),
        "without a barrier between them",
    ),
    "fewer bytes announced than arrive": (
        replaced(r"_, \[fill_bar\], size;", "_, [fill_bar], 16;"),
        "bytes arrive that were not announced",
    ),
    "no bytes announced": (
        replaced(r"_, \[fill_bar\], size;", "_, [fill_bar], 0;"),
        "in flight",
    ),
    "an mbarrier for fewer lanes than arrive": (
        replaced(r"(mbarrier\.init[^;]*), %r\d+;", r"\1, 1;"),
        "a phase of 1 arrivals gets another",
    ),
    "an address in shared memory that is no multiple of 16": (
        replaced(r"(mad\.lo\.u32\s+slot, [^;]*;)", r"\1 add.u32 slot, slot, 8;"),
        "need positive multiples of 16, got addresses 0x.*8 and",
    ),
    "a size that is no multiple of 16": (
        replaced(r"\[place\], \[slot\], size;", "[place], [slot], 8;"),
        "need positive multiples of 16, got .* 8 bytes",
    ),
    "one stage more than shared memory has": (
        replaced(r"shl\.b32\s+end_bar, (%r\d+), 3;", r"shl.b32 end_bar, \1, 4;"),
        "there is no mbarrier|leaves the 24576 bytes of shared memory",
    ),
    "slots that overlap": (
        replaced(r"mul\.lo\.u32\s+stage_bytes,[^;]*;", "mov.u32 stage_bytes, 16;"),
        "used while a bulk copy to them is in flight",
    ),
    "targets that the next stage overwrites": (
        replaced(r"mul\.lo\.u32\s+stage_heads,[^;]*;", "mov.u32 stage_heads, 0;"),
        "without a barrier between them",
    ),
    "an item too many": (
        replaced(r"setp\.lt\.u32(\s+has_item), item,", r"setp.le.u32\1, item,"),
        "may not be read",
    ),
}
"""How each fault is planted, and what the machine says."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of 528 bytes share stages in threes, and a lane's slot is another lane's next time."""
    rewrite, message = FAULTS[fault]
    monkeypatch.setattr(machine, "MAX_STEPS", 6000)
    sizes = np.full(200, 528)
    with pytest.raises(KernelError, match=message):
        World(sizes).copy(2, rewrite=rewrite)


def test_each_way_of_waiting_and_of_copying_is_executed() -> None:
    executed = World(np.full(200, 528)).copy(2).executed
    for name in (
        "mbarrier.init.shared::cta.b64",
        "mbarrier.arrive.expect_tx.shared::cta.b64",
        "mbarrier.try_wait.parity.shared::cta.b64",
        "fence.proxy.async.shared::cta",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "cp.async.bulk.global.shared::cta.bulk_group",
        "cp.async.bulk.commit_group",
        "cp.async.bulk.wait_group.read",
        "cp.async.bulk.wait_group",
    ):
        assert executed[name], name
