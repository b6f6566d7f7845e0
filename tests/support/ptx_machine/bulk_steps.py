"""What threads do when they execute an instruction of bulk copies or mbarriers, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ptx_machine.bulk import BulkCopies
from ptx_machine.program import Address, Immediate, Instruction, Register
from ptx_machine.threads import Lanes, Threads

__all__ = ["bulk_step_of"]

Call: TypeAlias = Callable[..., Any]
"""What one thread does: of bulk copies, its block, its number, its operands, and the text."""


def bulk_step_of(instruction: Instruction) -> Callable[[Threads, Lanes], None]:
    """How threads execute an instruction of ``mbarrier``, ``cp`` or ``fence``.

    Raises:
        UnknownInstructionError: the machine does not know it, or one of its modifiers.
    """
    name = ".".join((instruction.opcode, *instruction.modifiers))
    if name not in BULK_STEPS:
        raise instruction.unknown()
    kinds, call = BULK_STEPS[name]
    operands = instruction.operands
    fits = len(kinds) == len(operands)
    if not fits or not all(map(isinstance, operands, (KINDS[kind] for kind in kinds))):
        raise instruction.unknown()
    if kinds[:1] == "_" and operands[0] != Register("_", 64):
        raise instruction.unknown()
    target = operands[0] if kinds[:1] == "p" else None
    sources = operands[kinds[:1] in ("p", "_") :]

    def step(threads: Threads, lanes: Lanes) -> None:
        values = [
            threads.addresses(each, lanes)
            if isinstance(each, Address)
            else threads.fetch(each, 32, lanes)
            for each in sources
        ]
        columns = (threads.block[lanes], threads.thread[lanes], *values)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        found = [call(threads.bulk, *row, instruction) for row in rows]
        if isinstance(target, Register):
            threads.put(target, np.array(found, np.bool_), lanes)

    return step


KINDS: dict[str, Any] = {
    "a": Address,
    "n": (Register, Immediate),
    "p": Register,
    "_": Register,
}
"""Operands: an address, a number, the predicate or the nothing that is written."""


def _inbound(bulk: BulkCopies, block: int, thread: int, *values: Any) -> None:
    target, source, size, barrier, what = values
    bulk.start_inbound(block, thread, (target, source), size, barrier, what)


def _outbound(bulk: BulkCopies, block: int, thread: int, *values: Any) -> None:
    target, source, size, what = values
    bulk.start_outbound(block, thread, (target, source), size, what)


def _fence(bulk: BulkCopies, block: int, thread: int, _: object) -> None:
    bulk.shared.fence(block, thread)


BULK_STEPS: dict[str, tuple[str, Call]] = {
    "mbarrier.init.shared::cta.b64": ("an", BulkCopies.init),
    "mbarrier.arrive.expect_tx.shared::cta.b64": ("_an", BulkCopies.arrive),
    "mbarrier.try_wait.parity.shared::cta.b64": ("pan", BulkCopies.has_ended),
    "fence.proxy.async.shared::cta": ("", _fence),
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": ("aana", _inbound),
    "cp.async.bulk.global.shared::cta.bulk_group": ("aan", _outbound),
    "cp.async.bulk.commit_group": ("", lambda bulk, block, thread, _: bulk.commit(block, thread)),
    "cp.async.bulk.wait_group": (
        "n",
        lambda bulk, block, thread, kept, _: bulk.wait(block, thread, kept, only_read=False),
    ),
    "cp.async.bulk.wait_group.read": (
        "n",
        lambda bulk, block, thread, kept, _: bulk.wait(block, thread, kept, only_read=True),
    ),
}
"""By name: the kinds of its operands, and what a thread does."""
