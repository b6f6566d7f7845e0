"""Floating point: arithmetic of float32, and conversions between it, 16 bits, and fp8 e4m3.

Results are those of IEEE 754 with subnormal numbers; a result that is not a number is the one that
PTX calls canonical. ``div.full``, which may be off by two units in the last place, is exact unless
the machine is told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ptx_machine.memory import Bits
from ptx_machine.program import Instruction

__all__ = ["arithmetic", "comparison", "conversion", "decode_e4m3", "encode_e4m3", "largest"]

Floats: TypeAlias = npt.NDArray[np.float32]
Compute: TypeAlias = Callable[..., Any]

CANONICAL_NAN = np.uint64(0x7FFFFFFF)
LARGEST_E4M3 = 448.0
E4M3_NAN = np.uint64(0x7F)


def floats_of(value: Bits) -> Floats:
    """The float32 numbers whose bits these are."""
    return value.astype(np.uint32).view(np.float32)


def _from_f16(value: Bits) -> Floats:
    return value.astype(np.uint16).view(np.float16).astype(np.float32)


def _from_bf16(value: Bits) -> Floats:
    return floats_of(value << np.uint64(16))


NUMBERS: dict[str, Callable[[Bits], Floats]] = {
    "f32": floats_of,
    "f16": _from_f16,
    "bf16": _from_bf16,
}
"""The numbers that bits stand for, by type."""


def bits_of(value: Floats) -> Bits:
    """The bits of float32 numbers, with one pattern for all that are not numbers."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(value), CANONICAL_NAN, bits)


# -- arithmetic ------------------------------------------------------------------------------------


def arithmetic(instruction: Instruction, division_ulps: int) -> tuple[tuple[int, ...], Compute]:
    """Widths of the sources of an instruction on floats, and what it computes of their bits."""
    name, kind = instruction.opcode, instruction.type
    if name in ("abs", "neg") and kind in SIGNS:
        return _sign_change(instruction)
    if kind == "f32x2" and name in ("add", "mul", "fma"):
        _, compute = arithmetic_of_f32(instruction, division_ulps)
        return (64,) * (3 if name == "fma" else 2), lambda *both: _by_halves(compute, *both)
    if kind != "f32":
        raise instruction.unknown()
    return arithmetic_of_f32(instruction, division_ulps)


def arithmetic_of_f32(
    instruction: Instruction, division_ulps: int
) -> tuple[tuple[int, ...], Compute]:
    name = instruction.opcode
    if name == "div":
        if instruction.modifiers[:-1] not in (("full",), ("rn",)):
            raise instruction.unknown()
        ulps = division_ulps if "full" in instruction.modifiers else 0
        return (32, 32), lambda a, b: _quotient(a, b, ulps)
    if name == "fma":
        instruction.require_only("rn")
        return (32, 32, 32), _fused
    instruction.require_only("rn")
    if name not in BINARY:
        raise instruction.unknown()
    count = len(instruction.operands) - 1
    if count == 3 and name in ("max", "min"):
        return (32, 32, 32), _on_floats(lambda a, b, c: BINARY[name](BINARY[name](a, b), c))
    return (32, 32), _on_floats(BINARY[name])


SIGNS = {
    "f32": 0x80000000,
    "f16": 0x8000,
    "bf16": 0x8000,
    "f16x2": 0x80008000,
    "bf16x2": 0x80008000,
}
"""The bits of the sign, by type."""


def _sign_change(instruction: Instruction) -> tuple[tuple[int, ...], Compute]:
    """``abs`` and ``neg``."""
    instruction.require_only()
    sign = np.uint64(SIGNS[instruction.type])
    if instruction.opcode == "abs":
        return (instruction.bits,), lambda a: a & ~sign
    return (instruction.bits,), lambda a: a ^ sign


def _on_floats(compute: Callable[..., Floats]) -> Compute:
    def of_bits(*sources: Bits) -> Bits:
        with np.errstate(all="ignore"):
            return bits_of(compute(*map(floats_of, sources)))

    return of_bits


def _larger(a: Floats, b: Floats) -> Floats:
    """The larger number; +0 is larger than -0, and a number wins over what is none."""
    a_wins = (a > b) | ((a == b) & ~np.signbit(a)) | np.isnan(b)
    return np.where(a_wins, a, b)


def _smaller(a: Floats, b: Floats) -> Floats:
    return -_larger(-a, -b)


BINARY: dict[str, Callable[[Floats, Floats], Floats]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": _larger,
    "min": _smaller,
}


def largest(values: Bits) -> Bits:
    """The largest float32 of each row."""
    found = floats_of(values[:, 0])
    for column in range(1, values.shape[1]):
        found = _larger(found, floats_of(values[:, column]))
    return bits_of(found)


def _quotient(a: Bits, b: Bits, ulps: int) -> Bits:
    with np.errstate(all="ignore"):
        quotient = floats_of(a) / floats_of(b)
    bits = bits_of(quotient)
    if ulps:
        # Away from what is neither a normal number nor finite, where an ulp is not one of the bits.
        size = np.abs(quotient)
        is_normal = (size > 2.0**-120) & (size < 2.0**120)
        bits = np.where(is_normal, bits + np.int64(ulps).view(np.uint64), bits)
    return bits


def _fused(a: Bits, b: Bits, c: Bits) -> Bits:
    """``a * b + c``, rounded once.

    The product is exact in float64. Its sum with ``c`` is rounded to odd there, so that rounding it
    to float32 gives what one rounding would have.
    """
    with np.errstate(all="ignore"):
        product = floats_of(a).astype(np.float64) * floats_of(b).astype(np.float64)
        summand = floats_of(c).astype(np.float64)
        total = product + summand
        there = total - product
        error = (product - (total - there)) + (summand - there)
        odd = total.view(np.int64)
        is_inexact = np.isfinite(total) & (error != 0) & (odd & 1 == 0)
        towards = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(is_inexact, odd + towards, odd).view(np.float64)
        return bits_of(total.astype(np.float32))


def _by_halves(compute: Compute, *sources: Bits) -> Bits:
    """Two float32 at once, in 64 bits."""
    low: Bits = compute(*(source & np.uint64(0xFFFFFFFF) for source in sources))
    high: Bits = compute(*(source >> np.uint64(32) for source in sources))
    return low | (high << np.uint64(32))


def comparison(
    instruction: Instruction, name: str
) -> Callable[[Bits, Bits], npt.NDArray[np.bool_]]:
    """``setp``; a comparison with what is not a number is false, or true if its name ends in u."""
    base = name.removesuffix("u")
    if instruction.type not in NUMBERS or base not in COMPARISONS:
        raise instruction.unknown()
    numbers = NUMBERS[instruction.type]

    def compare(a: Bits, b: Bits) -> npt.NDArray[np.bool_]:
        x, y = numbers(a), numbers(b)
        is_none = np.isnan(x) | np.isnan(y)
        return (is_none & (base != name)) | (COMPARISONS[base](x, y) & ~is_none)

    return compare


COMPARISONS: dict[str, Callable[[Floats, Floats], npt.NDArray[np.bool_]]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


# -- conversions -----------------------------------------------------------------------------------


def conversion(instruction: Instruction) -> tuple[tuple[int, ...], Compute]:
    """Widths of the sources of a ``cvt`` from or to floats, and what it computes of their bits."""
    found = CONVERSIONS.get(".".join(instruction.modifiers))
    if found is None:
        raise instruction.unknown()
    return found


def _to_f16(value: Floats) -> Bits:
    with np.errstate(all="ignore"):
        bits = value.astype(np.float16).view(np.uint16).astype(np.uint64)
    return np.where(np.isnan(value), np.uint64(0x7FFF), bits)


def _to_bf16(value: Floats) -> Bits:
    """The upper 16 bits, rounded to nearest even."""
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), np.uint64(0x7FFF), rounded)


def decode_e4m3(codes: Bits) -> Floats:
    """The numbers of e4m3 codes: sign, 4 bits of exponent with bias 7, 3 bits of fraction."""
    exponent, fraction = (codes >> np.uint64(3)) & np.uint64(15), codes & np.uint64(7)
    normal = (fraction.astype(np.float32) + 8) * np.exp2(exponent.astype(np.float32) - 10)
    subnormal = fraction.astype(np.float32) * np.float32(2.0**-9)
    size = np.where(exponent == 0, subnormal, normal).astype(np.float32)
    size = np.where(codes & np.uint64(0x7F) == E4M3_NAN, np.float32(np.nan), size)
    return np.where(codes & np.uint64(0x80), -size, size)


E4M3_NUMBERS = decode_e4m3(np.arange(127, dtype=np.uint64)).astype(np.float64)
"""All numbers of e4m3 that are not negative, ascending: code ``i`` is the ``i``-th."""


def encode_e4m3(value: Floats) -> Bits:
    """The e4m3 codes of the nearest numbers, of the even one of two; 448 if none is as large."""
    size = np.where(np.isnan(value), 0, np.abs(value)).astype(np.float64)
    size = np.minimum(size, LARGEST_E4M3)
    above = np.searchsorted(E4M3_NUMBERS, size).clip(1, 126)
    to_above, to_below = E4M3_NUMBERS[above] - size, size - E4M3_NUMBERS[above - 1]
    is_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    codes = np.where(is_above, above, above - 1).astype(np.uint64)
    codes |= np.signbit(value).astype(np.uint64) << np.uint64(7)
    return np.where(np.isnan(value), E4M3_NAN, codes)


def _pair(encode: Callable[[Floats], Bits], bits: int) -> Compute:
    """Two numbers in one register: the first source goes to the upper half."""

    def compute(upper: Bits, lower: Bits) -> Bits:
        return encode(floats_of(lower)) | (encode(floats_of(upper)) << np.uint64(bits))

    return compute


def _unpacked_e4m3(value: Bits) -> Bits:
    low = _to_f16(decode_e4m3(value & np.uint64(0xFF)))
    return low | (_to_f16(decode_e4m3(value >> np.uint64(8))) << np.uint64(16))


def _of_float(encode: Callable[[Floats], Bits]) -> Compute:
    return lambda value: encode(floats_of(value))


CONVERSIONS: dict[str, tuple[tuple[int, ...], Compute]] = {
    "f32.f16": ((16,), lambda value: bits_of(_from_f16(value))),
    "f32.bf16": ((16,), lambda value: bits_of(_from_bf16(value))),
    "rn.f16.f32": ((32,), _of_float(_to_f16)),
    "rn.bf16.f32": ((32,), _of_float(_to_bf16)),
    "rn.f16x2.f32": ((32, 32), _pair(_to_f16, 16)),
    "rn.bf16x2.f32": ((32, 32), _pair(_to_bf16, 16)),
    "rn.satfinite.e4m3x2.f32": ((32, 32), _pair(encode_e4m3, 8)),
    "rn.f16x2.e4m3x2": ((16,), _unpacked_e4m3),
    "rn.f32.u16": ((16,), lambda value: bits_of(value.astype(np.float32))),
}
"""By modifiers; widths of the sources, and the result from their bits."""
