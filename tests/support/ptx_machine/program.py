"""PTX as a program: parameters, shared memory, instructions and their operands."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ptx_machine.errors import UnknownInstructionError

__all__ = [
    "WIDTHS",
    "Address",
    "Immediate",
    "Instruction",
    "Operand",
    "Program",
    "Register",
    "Symbol",
    "Vector",
    "read_program",
]

WIDTHS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
WIDTHS |= {"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f32x2": 64, "pred": 1}
"""Bits of each type."""


@dataclass(frozen=True, slots=True)
class Register:
    """A register of each thread; those of 1 bit are predicates."""

    name: str
    bits: int
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant: an integer, or the bits of a float."""

    value: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a label, a parameter, shared memory, or what a thread knows of its place."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """``{a, b, ...}``."""

    parts: tuple[Operand, ...]


Operand: TypeAlias = "Register | Immediate | Symbol | Address | Vector"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: what stands before the first dot.
        modifiers: what stands between the other dots.
        operands: the target first, as in the text.
        guard: the predicate of the threads that execute it; None for all.
        text: as it was read.
        place: its line in the PTX, and the line of the kernel's source.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str
    place: str

    @property
    def type(self) -> str:
        """The last modifier, which for most instructions is the type of the operands."""
        return self.modifiers[-1] if self.modifiers else ""

    @property
    def bits(self) -> int:
        """Bits of the type."""
        if self.type not in WIDTHS:
            raise self.unknown()
        return WIDTHS[self.type]

    @property
    def is_signed(self) -> bool:
        """Whether the operands are signed integers."""
        return self.type.startswith("s")

    def require_only(self, *known: str) -> None:
        """Refuse modifiers, besides the type, that are not known to change nothing."""
        if not set(self.modifiers[:-1]) <= set(known):
            raise self.unknown()

    def unknown(self) -> UnknownInstructionError:
        """The error for what the machine cannot execute."""
        return UnknownInstructionError(f"the machine does not know {self}")

    def __str__(self) -> str:
        return f"{self.text} ({self.place})"


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel.

    Attributes:
        name: of its entry.
        parameters: their names, in order.
        num_threads: threads of a block.
        instructions: all of them.
        labels: index of the instruction behind each label.
        shared: offset of each array of shared memory.
        shared_bytes: bytes of shared memory, besides what a launch adds.
    """

    name: str
    parameters: tuple[str, ...]
    num_threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]
    shared_bytes: int


@lru_cache(maxsize=256)
def read_program(ptx: str) -> Program:
    """The kernel in a module with one entry.

    Raises:
        UnknownInstructionError: the text is not of the form that Triton emits.
    """
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", ptx, re.DOTALL)
    threads = head and re.search(r"\.reqntid\s+(\d+)", head[3])
    if not head or not threads:
        raise UnknownInstructionError("the PTX has no entry with a fixed number of threads")
    parameters = re.findall(r"([\w$]+)\s*(?:,|$)", head[2].strip())
    if len(parameters) != head[2].count(".param"):
        raise UnknownInstructionError(f"the machine does not know the parameters {head[2]}")
    reader = _BodyReader(first_line=ptx.count("\n", 0, head.end()) + 1)
    reader.read(_body(ptx[head.end() :]))
    shared, shared_bytes = _shared_arrays(ptx)
    return Program(
        name=head[1],
        parameters=tuple(parameters),
        num_threads=int(threads[1]),
        instructions=tuple(reader.instructions),
        labels=reader.labels,
        shared=shared,
        shared_bytes=shared_bytes,
    )


def _shared_arrays(ptx: str) -> tuple[dict[str, int], int]:
    """Where each shared array begins, and where the last one ends."""
    offsets: dict[str, int] = {}
    end = 0
    for found in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", ptx):
        alignment = int(found[1])
        offsets[found[2]] = -(-end // alignment) * alignment
        end = offsets[found[2]] + int(found[3] or 0)
    return offsets, end


def _body(text: str) -> str:
    """What stands before the brace that closes the entry."""
    depth = 1
    for found in re.finditer(r"//[^\n]*|[{}]", text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return text[: found.start()]
    raise UnknownInstructionError("the entry has no end")


class _BodyReader:
    """Reads the body of an entry into instructions and labels."""

    def __init__(self, first_line: int) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._line = first_line
        self._source_line = ""
        self._widths: dict[str, int] = {}

    def read(self, body: str) -> None:
        statement = ""
        for line in body.split("\n"):
            code, _, comment = line.partition("//")
            if code.strip().startswith(".loc"):
                self._source_line = comment.strip()
            else:
                *whole, statement = f"{statement} {code}".split(";")
                for each in whole:
                    self._statement(each)
                statement = self._without_labels(statement)
            self._line += 1
        if statement:
            raise UnknownInstructionError(f"the PTX ends within {statement!r}")

    def _statement(self, text: str) -> None:
        text = self._without_labels(text)
        if text.startswith(".reg"):
            self._declare(text)
        elif text and not text.startswith((".pragma", ".shared")):
            self.instructions.append(self._instruction(" ".join(text.split())))

    def _without_labels(self, text: str) -> str:
        """The text without labels, which are noted, and without the braces of scopes."""
        text = text.lstrip("{} \t")
        while found := re.match(r"([\w$]+):(?!:)", text):
            self.labels[found[1]] = len(self.instructions)
            text = text[found.end() :].lstrip("{} \t")
        return text.rstrip()

    def _declare(self, text: str) -> None:
        """Note the width of registers: ``.reg .b32 %r<7>`` or ``.reg .pred p, q``."""
        _, kind, names = text.split(maxsplit=2)
        for name in names.split(","):
            self._widths[re.sub(r"<\d+>", "", name).strip()] = WIDTHS[kind[1:]]

    def _instruction(self, text: str) -> Instruction:
        found = re.fullmatch(r"(?:@(!?)([%\w$]+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if not found:
            raise UnknownInstructionError(f"the machine cannot read {text!r}")
        guard = self._operand(found[1] + found[2]) if found[2] else None
        opcode, *modifiers = found[3].split(".")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,{\[]*", found[4] or "")
        return Instruction(
            opcode,
            tuple(modifiers),
            tuple(self._operand(operand.strip()) for operand in operands),
            guard if isinstance(guard, Register) else None,
            text,
            ", ".join(filter(None, (f"line {self._line} of the PTX", self._source_line))),
        )

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part.strip()) for part in text[1:-1].split(",")))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            found = self._operand(base.strip())
            if not isinstance(found, Register | Symbol):
                raise UnknownInstructionError(f"the machine does not know the address {text}")
            return Address(found, int(offset, 0) if offset else 0)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return Immediate(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.fullmatch(r"-?\d+\.\d*", text):
            return Immediate(int.from_bytes(struct.pack("<d", float(text)), "little"))
        name = text.lstrip("!")
        bits = self._widths.get(name) or self._widths.get(name.rstrip("0123456789"))
        if name == "_":
            return Register(name, 64)
        return Symbol(name) if bits is None else Register(name, bits, name != text)
