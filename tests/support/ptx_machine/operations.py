"""What an arithmetic instruction computes: a function of the bits of its sources.

:func:`operation_of` finds the function once for each instruction; the machine then calls it with
one array for each source, which holds that source's bits for every thread. Predicates are arrays of
bool. Integers are here, floats in :mod:`ptx_machine.floats`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_machine import floats
from ptx_machine.errors import KernelError
from ptx_machine.memory import Bits
from ptx_machine.program import WIDTHS, Instruction

__all__ = ["Operation", "operation_of", "signed"]

FLOAT_TYPES = {"f16", "bf16", "f32", "f64", "f32x2", "bf16x2", "f16x2", "e4m3x2"}

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Operation:
    """How an instruction gets its result.

    Attributes:
        widths: bits that it reads of each source; 1 for predicates.
        compute: the result, from the bits of each source. The target keeps its low bits.
    """

    widths: tuple[int, ...]
    compute: Callable[..., Any]


def operation_of(instruction: Instruction, division_ulps: int = 0) -> Operation:
    """The operation of an arithmetic instruction.

    Args:
        instruction: which one.
        division_ulps: how far ``div.full`` is off, in units of the last place; PTX allows 2.

    Raises:
        UnknownInstructionError: the machine does not know it, or one of its modifiers.
    """
    name = instruction.opcode
    if name == "cvt":
        return _conversion(instruction)
    if name == "selp":
        instruction.require_only()
        bits = instruction.bits
        return Operation((bits, bits, 1), lambda a, b, chosen: np.where(chosen, a, b))
    if name == "setp":
        return _comparison(instruction)
    if instruction.type == "pred":
        return _logic(instruction)
    if instruction.type in FLOAT_TYPES:
        widths, compute = floats.arithmetic(instruction, division_ulps)
        return Operation(widths, compute)
    find = INTEGERS.get(name)
    if find is None:
        raise instruction.unknown()
    return find(instruction)


def signed(value: Bits, bits: int) -> Any:
    """Two's complement numbers of so many bits, as int64."""
    if bits == 64:
        return value.view(np.int64)
    sign = np.uint64(1 << (bits - 1))
    return ((value & np.uint64((1 << bits) - 1)) ^ sign).view(np.int64) - np.int64(1 << (bits - 1))


def number(instruction: Instruction, value: Bits) -> Any:
    """A source as what its type says, int64 or uint64."""
    return signed(value, instruction.bits) if instruction.is_signed else value


def bits_of(value: Any) -> Bits:
    """Numbers as raw bits."""
    bits: Bits = value.view(np.uint64)
    return bits


def _binary(compute: Callable[[Any, Any], Any]) -> Callable[[Instruction], Operation]:
    """An operation on two numbers, whose result does not depend on what lies beyond their bits."""

    def find(instruction: Instruction) -> Operation:
        instruction.require_only()
        return Operation(
            (instruction.bits,) * 2,
            lambda a, b: bits_of(compute(number(instruction, a), number(instruction, b))),
        )

    return find


def _unary(compute: Callable[[Any], Any]) -> Callable[[Instruction], Operation]:
    def find(instruction: Instruction) -> Operation:
        instruction.require_only()
        return Operation((instruction.bits,), lambda a: bits_of(compute(number(instruction, a))))

    return find


def _quotient(a: Any, b: Any) -> Any:
    """Rounded towards zero."""
    if (b == 0).any():
        raise KernelError("an integer is divided by zero")
    with np.errstate(over="ignore"):
        below = a // b
        rest = a - below * b
        return np.where((rest != 0) & ((a < 0) != (b < 0)), below + a.dtype.type(1), below)


def _remainder(a: Any, b: Any) -> Any:
    return a - _quotient(a, b) * b


def _product(instruction: Instruction) -> Operation:
    """``mul`` and ``mad``: the low half of the product, the high half, or all of it."""
    part = instruction.modifiers[0]
    bits = instruction.bits
    if instruction.modifiers[:-1] not in (("lo",), ("hi",), ("wide",)) or (
        bits == 64 and part != "lo"
    ):
        raise instruction.unknown()

    def product(a: Bits, b: Bits) -> Bits:
        whole = number(instruction, a) * number(instruction, b)
        return bits_of(whole >> whole.dtype.type(bits) if part == "hi" else whole)

    if instruction.opcode == "mul":
        return Operation((bits, bits), product)
    summand = 2 * bits if part == "wide" else bits
    return Operation((bits, bits, summand), lambda a, b, c: product(a, b) + c)


def _shift(instruction: Instruction) -> Operation:
    """Shifts by more than the width give 0 or, to the right, copies of the sign."""
    instruction.require_only()
    bits = instruction.bits

    def left(value: Bits, count: Bits) -> Bits:
        shifted = value << np.minimum(count, np.uint64(63))
        return np.where(count < bits, shifted, np.uint64(0))

    def right(value: Bits, count: Bits) -> Bits:
        if instruction.is_signed:
            return bits_of(signed(value, bits) >> np.minimum(count, np.uint64(63)).view(np.int64))
        shifted = value >> np.minimum(count, np.uint64(63))
        return np.where(count < bits, shifted, np.uint64(0))

    return Operation((bits, 32), left if instruction.opcode == "shl" else right)


def _bit_field(instruction: Instruction) -> Operation:
    """``bfe``: bits of ``a`` from ``start`` on; signed ones copy the last bit upwards."""
    instruction.require_only()
    bits = instruction.bits

    def extract(a: Bits, start: Bits, length: Bits) -> Bits:
        start, length = start & np.uint64(0xFF), length & np.uint64(0xFF)
        if (start + length > bits).any() or (length == 0).any():
            raise KernelError("a bit field leaves its number")
        mask = (np.uint64(1) << length) - np.uint64(1)
        field = (a >> start) & mask
        if instruction.is_signed:
            sign = np.uint64(1) << (length - np.uint64(1))
            field = (field ^ sign) - sign
        return field

    return Operation((bits, 32, 32), extract)


def _permutation(instruction: Instruction) -> Operation:
    """``prmt``: each byte of the result is one of the eight of a and b, or copies of its sign."""
    if instruction.modifiers != ("b32",):
        raise instruction.unknown()

    def permute(a: Bits, b: Bits, selectors: Bits) -> Bits:
        eight = a | (b << np.uint64(32))
        result = np.zeros_like(a)
        for at in range(4):
            selector = (selectors >> np.uint64(4 * at)) & np.uint64(15)
            byte = (eight >> ((selector & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
            byte = np.where(selector & np.uint64(8), sign, byte)
            result |= byte << np.uint64(8 * at)
        return result

    return Operation((32, 32, 32), permute)


INTEGERS: dict[str, Callable[[Instruction], Operation]] = {
    "add": _binary(operator.add),
    "sub": _binary(operator.sub),
    "and": _binary(operator.and_),
    "or": _binary(operator.or_),
    "xor": _binary(operator.xor),
    "min": _binary(np.minimum),
    "max": _binary(np.maximum),
    "div": _binary(_quotient),
    "rem": _binary(_remainder),
    "not": _unary(operator.invert),
    "neg": _unary(operator.neg),
    "abs": _unary(np.abs),
    "mul": _product,
    "mad": _product,
    "shl": _shift,
    "shr": _shift,
    "bfe": _bit_field,
    "prmt": _permutation,
}


def _logic(instruction: Instruction) -> Operation:
    """Of predicates."""
    instruction.require_only()
    if instruction.opcode == "not":
        return Operation((1,), operator.invert)
    compute = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
    if instruction.opcode not in compute:
        raise instruction.unknown()
    return Operation((1, 1), compute[instruction.opcode])


def _comparison(instruction: Instruction) -> Operation:
    """``setp``."""
    name = instruction.modifiers[0]
    instruction.require_only(name)
    widths = (instruction.bits,) * 2
    if instruction.type in FLOAT_TYPES:
        return Operation(widths, floats.comparison(instruction, name))
    if name not in COMPARISONS:
        raise instruction.unknown()
    compare = COMPARISONS[name]
    return Operation(widths, lambda a, b: compare(number(instruction, a), number(instruction, b)))


def _conversion(instruction: Instruction) -> Operation:
    """``cvt.to.from``: integers are cut off or extended by what the source's type says."""
    if FLOAT_TYPES & set(instruction.modifiers):
        widths, compute = floats.conversion(instruction)
        return Operation(widths, compute)
    if len(instruction.modifiers) != 2 or instruction.modifiers[0] not in WIDTHS:
        raise instruction.unknown()
    target, bits = instruction.modifiers[0], instruction.bits
    mask = np.uint64((1 << WIDTHS[target]) - 1)

    def convert(value: Bits) -> Bits:
        wide = bits_of(number(instruction, value)) & mask
        # A target that is wider than its type is filled with copies of the sign.
        return bits_of(signed(wide, WIDTHS[target])) if target.startswith("s") else wide

    return Operation((bits,), convert)
