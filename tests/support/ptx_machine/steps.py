"""What the threads of a group do when they execute an instruction, branches aside."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ptx_machine import floats
from ptx_machine.bulk_steps import bulk_step_of
from ptx_machine.errors import KernelError
from ptx_machine.memory import WARP, Bits
from ptx_machine.operations import operation_of, signed
from ptx_machine.program import Address, Instruction, Register, Vector
from ptx_machine.threads import Lanes, Threads

__all__ = ["Step", "step_of"]

Step: TypeAlias = Callable[[Threads, Lanes], None]

CACHE_HINTS = ("L1::evict_first", "L2::cache_hint")
ORDERS = ("gpu", "acq_rel")
ALL_LANES = 0xFFFFFFFF


def step_of(instruction: Instruction, division_ulps: int) -> Step:
    """How threads execute an instruction that is no branch.

    Args:
        instruction: which one.
        division_ulps: as for :func:`~ptx_machine.operations.operation_of`.

    Raises:
        UnknownInstructionError: the machine does not know it.
    """
    find = STEPS.get(instruction.opcode)
    if find is not None:
        return find(instruction)
    operation = operation_of(instruction, division_ulps)
    target, *sources = instruction.operands
    if not isinstance(target, Register) or len(sources) != len(operation.widths):
        raise instruction.unknown()
    pairs = tuple(zip(sources, operation.widths, strict=True))
    compute = operation.compute

    def step(threads: Threads, lanes: Lanes) -> None:
        values = [threads.fetch(source, bits, lanes) for source, bits in pairs]
        threads.put(target, compute(*values), lanes)

    return step


# -- registers -------------------------------------------------------------------------------------


def _move(instruction: Instruction) -> Step:
    """``mov``: between registers, or between one register and the parts of which it consists."""
    instruction.require_only()
    target, source = instruction.operands
    bits = instruction.bits
    if isinstance(target, Vector):
        parts = _registers(instruction, target)
        width = bits // len(parts)

        def unpack(threads: Threads, lanes: Lanes) -> None:
            whole = threads.fetch(source, bits, lanes)
            for at, part in enumerate(parts):
                piece = (whole >> np.uint64(at * width)) & np.uint64((1 << width) - 1)
                threads.put(part, piece, lanes)

        return unpack
    if not isinstance(target, Register):
        raise instruction.unknown()
    if isinstance(source, Vector):
        pieces = source.parts
        width = bits // len(pieces)

        def pack(threads: Threads, lanes: Lanes) -> None:
            whole = np.zeros(len(lanes), np.uint64)
            for at, piece in enumerate(pieces):
                whole |= threads.fetch(piece, width, lanes) << np.uint64(at * width)
            threads.put(target, whole, lanes)

        return pack
    return lambda threads, lanes: threads.put(target, threads.fetch(source, bits, lanes), lanes)


def _registers(instruction: Instruction, vector: Vector) -> tuple[Register, ...]:
    parts = tuple(part for part in vector.parts if isinstance(part, Register))
    if len(parts) != len(vector.parts):
        raise instruction.unknown()
    return parts


def _policy(instruction: Instruction) -> Step:
    """``createpolicy``: how caches are used does not matter here."""
    target = instruction.operands[0]
    if not isinstance(target, Register):
        raise instruction.unknown()
    return lambda threads, lanes: threads.put(target, np.zeros(len(lanes), np.uint64), lanes)


# -- memory ----------------------------------------------------------------------------------------


def _load(instruction: Instruction) -> Step:
    space, count = _access(instruction)
    target, address = instruction.operands[:2]
    targets: tuple[Register, ...] = (target,) if isinstance(target, Register) else ()
    if isinstance(target, Vector):
        targets = _registers(instruction, target)
    if len(targets) != count or not isinstance(address, Address):
        raise instruction.unknown()
    bits, is_signed = instruction.bits, instruction.is_signed

    def step(threads: Threads, lanes: Lanes) -> None:
        if space == "param":
            elements = [threads.argument(address, bits, lanes)]
        else:
            addresses = threads.addresses(address, lanes)
            if space == "global":
                elements = threads.memory.load(addresses, bits // 8, count, instruction)
            else:
                block, thread = threads.block[lanes], threads.thread[lanes]
                elements = threads.shared.load(
                    block, thread, addresses, bits // 8, count, instruction
                )
        for register, element in zip(targets, elements, strict=True):
            value = signed(element, bits).view(np.uint64) if is_signed else element
            threads.put(register, value, lanes)

    return step


def _matrix_load(instruction: Instruction) -> Step:
    """``ldmatrix``: matrices of 8 rows of 16 bytes, whose addresses 8 threads of a warp hold each.

    Thread ``4 * i + j`` gets the ``j``-th 4 bytes of row ``i`` of every matrix.
    """
    target, address = instruction.operands
    *kind, number, space, element = instruction.modifiers
    counts = {"x1": 1, "x2": 2, "x4": 4}
    known = (kind, space, element) == (["sync", "aligned", "m8n8"], "shared", "b16")
    if not known or number not in counts or not isinstance(target, Vector):
        raise instruction.unknown()
    targets, count = _registers(instruction, target), counts[number]
    if len(targets) != count or not isinstance(address, Address):
        raise instruction.unknown()

    def step(threads: Threads, lanes: Lanes) -> None:
        _require_warps(threads, lanes, instruction)
        has_row = lanes % WARP < 8 * count
        holders = lanes[has_row]
        addresses = threads.addresses(address, lanes)[has_row]
        block, thread = threads.block[holders], threads.thread[holders]
        rows = threads.shared.load(block, thread, addresses, 4, 4, instruction)
        # [warps, matrices, rows, columns] to a value of each thread for each matrix.
        values = np.stack(rows, axis=1).reshape(-1, count, WARP)
        for at, register in enumerate(targets):
            threads.put(register, values[:, at].reshape(-1), lanes)

    return step


def _store(instruction: Instruction) -> Step:
    space, count = _access(instruction)
    address, source = instruction.operands[:2]
    sources = source.parts if isinstance(source, Vector) else (source,)
    if len(sources) != count or not isinstance(address, Address) or space == "param":
        raise instruction.unknown()
    bits = instruction.bits

    def step(threads: Threads, lanes: Lanes) -> None:
        addresses = threads.addresses(address, lanes)
        values = [threads.fetch(each, bits, lanes) for each in sources]
        if space == "global":
            threads.memory.store(addresses, bits // 8, values, instruction)
        else:
            block, thread = threads.block[lanes], threads.thread[lanes]
            threads.shared.store(block, thread, addresses, bits // 8, values, instruction)

    return step


def _access(instruction: Instruction) -> tuple[str, int]:
    """The space and the number of elements of a load or store."""
    space, *others = instruction.modifiers[:-1] or ("",)
    space = space.removesuffix("::cta")
    counts = {"v2": 2, "v4": 4}
    vector = [counts.get(part, 0) for part in others if part not in CACHE_HINTS]
    if space not in ("global", "shared", "param") or len(vector) > 1 or 0 in vector:
        raise instruction.unknown()
    return space, vector[0] if vector else 1


def _atomic(instruction: Instruction) -> Step:
    """``atom.global``: one thread after the other."""
    names = [part for part in instruction.modifiers[:-1] if part not in (*ORDERS, "global")]
    target, address, source = instruction.operands
    known = len(names) == 1 and names[0] in ATOMICS and "global" in instruction.modifiers
    if not known or not isinstance(target, Register) or not isinstance(address, Address):
        raise instruction.unknown()
    compute = ATOMICS[names[0]]
    bits, is_signed = instruction.bits, instruction.is_signed

    def number(value: Bits) -> int:
        return int(signed(value, bits)[0] if is_signed else value[0])

    def step(threads: Threads, lanes: Lanes) -> None:
        addresses = threads.addresses(address, lanes)
        values = threads.fetch(source, bits, lanes)
        found = np.zeros(len(lanes), np.uint64)
        for at in range(len(lanes)):
            one = slice(at, at + 1)
            (old,) = threads.memory.load(addresses[one], bits // 8, 1, instruction)
            new = compute(number(old), number(values[one])) & ((1 << bits) - 1)
            word = np.array([new], np.uint64)
            threads.memory.store(addresses[one], bits // 8, [word], instruction)
            found[at] = old[0]
        threads.put(target, found, lanes)

    return step


ATOMICS: dict[str, Callable[[int, int], int]] = {"min": min, "max": max, "add": operator.add}


# -- threads that meet -----------------------------------------------------------------------------


def _barrier(instruction: Instruction) -> Step:
    """``bar.sync 0`` of a block, or ``bar.warp.sync`` of a warp."""
    if instruction.modifiers == ("warp", "sync"):

        def warps_meet(threads: Threads, lanes: Lanes) -> None:
            _require_warps(threads, lanes, instruction)
            first = lanes[::WARP]
            block, thread = threads.block[first], threads.thread[first]
            threads.shared.warp_barrier(block, thread // WARP)
            threads.bulk.warps_meet(block, thread)

        return warps_meet
    if instruction.modifiers != ("sync",) or len(instruction.operands) != 1:
        raise instruction.unknown()

    def blocks_meet(threads: Threads, lanes: Lanes) -> None:
        here = np.bincount(threads.block[lanes])
        running = np.bincount(threads.block[threads.is_running], minlength=len(here))[: len(here)]
        missing = (here > 0) & (here != running)
        if missing.any():
            at = int(np.argmax(missing))
            raise KernelError(
                f"only {here[at]} of {running[at]} threads reach a barrier: {instruction}"
            )
        blocks = np.flatnonzero(here)
        threads.shared.block_barrier(blocks)
        threads.bulk.blocks_meet(blocks)

    return blocks_meet


def _require_warps(threads: Threads, lanes: Lanes, instruction: Instruction) -> None:
    """Refuse an instruction of whole warps if some threads of a warp are elsewhere."""
    per_warp = np.bincount(lanes // WARP)
    if not np.isin(per_warp, (0, WARP)).all():
        raise KernelError(f"only some threads of a warp reach what all must: {instruction}")


def _require_all_lanes(
    threads: Threads, lanes: Lanes, mask: npt.NDArray[Any], instruction: Instruction
) -> None:
    if (mask != ALL_LANES).any():
        raise instruction.unknown()
    _require_warps(threads, lanes, instruction)


def _shuffle(instruction: Instruction) -> Step:
    """``shfl.sync.bfly`` and ``.idx``: the value of another thread of the warp."""
    target, source, other, clamp, mask = instruction.operands
    mode = instruction.modifiers[1] if len(instruction.modifiers) == 3 else ""
    if mode not in ("bfly", "idx") or not isinstance(target, Register):
        raise instruction.unknown()

    def step(threads: Threads, lanes: Lanes) -> None:
        _require_all_lanes(threads, lanes, threads.fetch(mask, 32, lanes), instruction)
        if (threads.fetch(clamp, 32, lanes) != WARP - 1).any():
            raise instruction.unknown()
        lane = np.arange(len(lanes)) % WARP
        there = threads.fetch(other, 32, lanes).view(np.int64) % WARP
        there = lane ^ there if mode == "bfly" else there
        values = threads.fetch(source, 32, lanes)
        threads.put(target, values[np.arange(len(lanes)) - lane + there], lanes)

    return step


def _reduction(instruction: Instruction) -> Step:
    """``redux.sync``: one value from those of all threads of a warp."""
    target, source, mask = instruction.operands
    kind = ".".join(instruction.modifiers)
    if kind not in REDUCTIONS or not isinstance(target, Register):
        raise instruction.unknown()
    reduce = REDUCTIONS[kind]

    def step(threads: Threads, lanes: Lanes) -> None:
        _require_all_lanes(threads, lanes, threads.fetch(mask, 32, lanes), instruction)
        values = threads.fetch(source, 32, lanes).reshape(-1, WARP)
        threads.put(target, np.repeat(reduce(values), WARP), lanes)

    return step


REDUCTIONS: dict[str, Callable[[Bits], Bits]] = {
    "sync.max.s32": lambda values: signed(values, 32).max(axis=1).view(np.uint64),
    "sync.max.f32": lambda values: floats.largest(values),
}
"""By modifiers: the result for each warp, from ``[warps, 32]``."""


STEPS: dict[str, Callable[[Instruction], Step]] = {
    "mov": _move,
    "createpolicy": _policy,
    "ld": _load,
    "ldmatrix": _matrix_load,
    "st": _store,
    "atom": _atomic,
    "bar": _barrier,
    "shfl": _shuffle,
    "redux": _reduction,
    **dict.fromkeys(("mbarrier", "cp", "fence"), bulk_step_of),
}
"""How to execute instructions that do more than compute a register from others."""
