"""The threads of some blocks: their registers, and what they know of their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ptx_machine.bulk import BulkCopies
from ptx_machine.errors import KernelError
from ptx_machine.memory import Bits, GlobalMemory
from ptx_machine.program import Address, Immediate, Operand, Program, Register, Symbol
from ptx_machine.shared_memory import SharedMemory

__all__ = ["Lanes", "Threads"]

Lanes: TypeAlias = "npt.NDArray[np.int64]"
"""Numbers of threads in a batch of blocks, ascending."""


class Threads:
    """All threads of a batch of blocks.

    Attributes:
        size: how many there are.
        block, thread: of each thread, its block's position in the batch, and its number there.
        memory, shared: what they access.
        bulk: their bulk copies between the two.
        is_running: which of them have not returned.
    """

    def __init__(
        self,
        program: Program,
        blocks: Sequence[int],
        num_blocks: int,
        arguments: Mapping[str, int],
        memory: GlobalMemory,
        shared_bytes: int,
    ) -> None:
        num_threads = program.num_threads
        self.size = len(blocks) * num_threads
        self.block = np.repeat(np.arange(len(blocks)), num_threads)
        self.thread = np.tile(np.arange(num_threads), len(blocks))
        self.memory = memory
        self.shared = SharedMemory(len(blocks), shared_bytes, num_threads)
        self.bulk = BulkCopies(self.shared, memory, num_threads)
        self.is_running = np.ones(self.size, np.bool_)
        self._arguments = arguments
        self._shared_offsets = program.shared
        self._registers: dict[str, npt.NDArray[Any]] = {}
        self._constants: dict[int, Bits] = {}
        self._garbage = np.random.default_rng(0)
        self._places = {
            "%tid.x": self.thread.astype(np.uint64),
            "%ctaid.x": np.repeat(np.array(blocks, np.uint64), num_threads),
            "%nctaid.x": np.full(self.size, num_blocks, np.uint64),
            "%ntid.x": np.full(self.size, num_threads, np.uint64),
        }

    @property
    def everyone(self) -> Lanes:
        """All threads."""
        return np.arange(self.size)

    def fetch(self, operand: Operand, bits: int, lanes: Lanes) -> npt.NDArray[Any]:
        """The low bits of an operand in each thread; bools for 1 bit. Not to be changed."""
        if isinstance(operand, Register):
            values = self._register(operand)
            found = values if len(lanes) == self.size else values[lanes]
            if operand.is_negated:
                return ~found
            return found if bits >= operand.bits else found & np.uint64((1 << bits) - 1)
        if isinstance(operand, Immediate):
            if bits == 1:
                return np.full(len(lanes), operand.value != 0)
            return self._constant(operand.value & ((1 << bits) - 1))[: len(lanes)]
        if isinstance(operand, Symbol):
            return self._symbol(operand.name, lanes)
        raise TypeError(f"{operand} has no value")

    def put(self, register: Register, values: npt.NDArray[Any], lanes: Lanes) -> None:
        """Write a register of some threads; it keeps the low bits."""
        if register.name == "_":
            return
        if 1 < register.bits < 64:
            values = values & np.uint64((1 << register.bits) - 1)
        if len(lanes) == self.size:
            self._registers[register.name] = np.array(values)
        else:
            self._register(register)[lanes] = values

    def addresses(self, address: Address, lanes: Lanes) -> Bits:
        """Where an access goes in each thread."""
        offset = np.uint64(address.offset & ((1 << 64) - 1))
        return self.fetch(address.base, 64, lanes) + offset

    def argument(self, address: Address, bits: int, lanes: Lanes) -> Bits:
        """An argument of the launch."""
        assert isinstance(address.base, Symbol)
        if address.offset:
            raise KernelError(f"parameters have no parts, such as that at {address}")
        return self._constant(self._arguments[address.base.name] & ((1 << bits) - 1))[: len(lanes)]

    def _register(self, register: Register) -> npt.NDArray[Any]:
        """All values of a register; garbage at first, on which no result may depend.

        Compilers do read such registers, where nothing comes of it.
        """
        found = self._registers.get(register.name)
        if found is None:
            found = self._garbage.integers(0, 1 << register.bits, self.size, np.uint64)
            found = found.astype(np.bool_) if register.bits == 1 else found
            self._registers[register.name] = found
        return found

    def _constant(self, value: int) -> Bits:
        found = self._constants.get(value)
        if found is None:
            found = self._constants[value] = np.full(self.size, value, np.uint64)
            found.setflags(write=False)
        return found

    def _symbol(self, name: str, lanes: Lanes) -> Bits:
        if name in self._places:
            return self._places[name][lanes]
        if name in self._shared_offsets:
            return self._constant(self._shared_offsets[name])[: len(lanes)]
        raise KernelError(f"{name} has no value")
