"""Executes a program: all threads of many blocks at once, one instruction after the other.

Threads that are at the same instruction execute it together. A branch that only some of them take
divides them. Those furthest behind go on first, so that threads meet again behind the branch.
Blocks run in batches; within a batch they keep step, and batches run one after the other. Any order
is right for kernels whose blocks do not communicate, and atomics come from one thread at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx_machine.errors import KernelError
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Instruction, Program, Symbol
from ptx_machine.steps import step_of
from ptx_machine.threads import Lanes, Threads

__all__ = ["Grid", "execute"]

MAX_STEPS = 1_000_000
"""Steps of one batch of blocks after which a kernel counts as one that does not end."""

THREADS_AT_ONCE = 1 << 13
"""Threads of a batch: enough that most of the time is NumPy's, not Python's."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What a launch says beside the arguments.

    Attributes:
        num_blocks: blocks of the grid.
        shared_bytes: bytes of shared memory that the launch adds.
        blocks: the blocks to execute; None for all.
        division_ulps: see :func:`~ptx_machine.operations.operation_of`.
    """

    num_blocks: int
    shared_bytes: int = 0
    blocks: Sequence[int] | None = None
    division_ulps: int = 0


def execute(
    program: Program, grid: Grid, arguments: Sequence[int], memory: GlobalMemory
) -> Counter[str]:
    """Run a kernel.

    Args:
        program: the kernel.
        grid: the blocks to run.
        arguments: a number for each parameter, an address or an integer.
        memory: what it may read and write.

    Returns:
        How often each instruction, by its name with all modifiers, was executed by a group of
        threads.

    Raises:
        KernelError: the kernel does something wrong. What it had written until then stays.
        UnknownInstructionError: the kernel uses something that the machine does not know.
    """
    if len(arguments) != len(program.parameters):
        raise ValueError(
            f"{program.name} has {len(program.parameters)} parameters, got {len(arguments)}"
        )
    values = dict(zip(program.parameters, arguments, strict=True))
    blocks = range(grid.num_blocks) if grid.blocks is None else grid.blocks
    at_once = max(1, THREADS_AT_ONCE // program.num_threads)
    shared_bytes = program.shared_bytes + grid.shared_bytes
    run = _Run(program, grid.division_ulps)
    for first in range(0, len(blocks), at_once):
        batch = blocks[first : first + at_once]
        run.batch(Threads(program, batch, grid.num_blocks, values, memory, shared_bytes))
    return run.executed


class _Run:
    """A program that is being executed."""

    def __init__(self, program: Program, division_ulps: int) -> None:
        self.executed: Counter[str] = Counter()
        self._program = program
        self._steps = [
            None if each.opcode in ("bra", "ret") else step_of(each, division_ulps)
            for each in program.instructions
        ]

    def batch(self, threads: Threads) -> None:
        """Run the threads of some blocks to their end."""
        groups: dict[int, Lanes] = {0: threads.everyone}
        for _ in range(MAX_STEPS):
            if not groups:
                return
            at = min(groups)
            lanes = groups.pop(at)
            if at == len(self._steps):
                raise KernelError(f"{self._program.name} runs past its end")
            for behind, moved in self._step(threads, at, lanes):
                if len(moved):
                    others = groups.get(behind)
                    groups[behind] = moved if others is None else np.union1d(others, moved)
        raise KernelError(f"{self._program.name} does not end")

    def _step(self, threads: Threads, at: int, lanes: Lanes) -> list[tuple[int, Lanes]]:
        """Execute one instruction; where the threads are then."""
        instruction, step = self._program.instructions[at], self._steps[at]
        self.executed[".".join((instruction.opcode, *instruction.modifiers))] += 1
        chosen = lanes
        if instruction.guard is not None:
            is_chosen = threads.fetch(instruction.guard, 1, lanes)
            chosen = lanes if is_chosen.all() else lanes[is_chosen]
        if step is not None:
            if len(chosen):
                step(threads, chosen)
            return [(at + 1, lanes)]
        others = lanes[:0] if chosen is lanes else lanes[~is_chosen]
        if instruction.opcode == "bra":
            return [(self._target(instruction), chosen), (at + 1, others)]
        threads.bulk.require_ended(threads.block[chosen], threads.thread[chosen], instruction)
        threads.is_running[chosen] = False
        return [(at + 1, others)]

    def _target(self, instruction: Instruction) -> int:
        """Where a branch leads."""
        match instruction.operands:
            case [Symbol(name)] if name in self._program.labels:
                return self._program.labels[name]
        raise instruction.unknown()
