"""That the machine computes what PTX defines, beside Python's integers and torch's floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptx_machine import floats
from ptx_machine.machine import Grid, execute
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import read_program
from ptx_snippets import KERNEL, run_snippet

# -- integers --------------------------------------------------------------------------------------

EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 100, 0x7FFF, 0x8000, 0x7FFFFFFF, 1 << 31, 1 << 32]
EDGES += [-1, -2, -7, -(1 << 31), (1 << 63) - 1, -(1 << 63), 0x123456789ABCDEF0, 0xDEADBEEF]


def number(value: int, bits: int, is_signed: bool) -> int:
    """The low bits of an integer as a number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if is_signed and value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a: int, b: int, selector: int) -> int:
    eight = (a | b << 32).to_bytes(8, "little")
    four = [selector >> 4 * at & 15 for at in range(4)]
    found = [eight[each & 7] for each in four]
    found = [
        (255 if byte & 128 else 0) if each & 8 else byte
        for byte, each in zip(found, four, strict=True)
    ]
    return int.from_bytes(bytes(found), "little")


INTEGERS: dict[str, tuple[int, Callable[..., int]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul.lo": (2, lambda a, b: a * b),
    "min": (2, min),
    "max": (2, max),
    "div": (2, lambda a, b: quotient(a, b or 1)),
    "rem": (2, lambda a, b: a - quotient(a, b or 1) * (b or 1)),
    "abs": (1, abs),
    "neg": (1, lambda a: -a),
    "mad.lo": (3, lambda a, b, c: a * b + c),
}
BITWISE: dict[str, tuple[int, Callable[..., int]]] = {
    "and": (2, lambda a, b: a & b),
    "or": (2, lambda a, b: a | b),
    "xor": (2, lambda a, b: a ^ b),
    "not": (1, lambda a: ~a),
    "shl": (2, lambda a, b: a << min(b & 0xFFFFFFFF, 64)),
}


def check_integers(
    name: str, widths: tuple[int, ...], out: int, expected: Callable[..., int]
) -> None:
    """Run an instruction on all combinations of edge cases, one in each thread.

    Args:
        name: of the instruction, with its type.
        widths: bits of each source.
        out: bits of the target.
        expected: the result, from the sources as integers of 64 bits.
    """
    edges = EDGES if len(widths) < 3 else EDGES[::3]
    cases = [*itertools.product(edges, repeat=len(widths))]
    cases += [cases[0]] * (-len(cases) % 32)
    table = torch.tensor([[number(v, 64, True) for v in case] for case in cases]).t().contiguous()
    if name.startswith(("div", "rem")):
        table[1][(table[1] & ((1 << widths[1]) - 1)) == 0] = 1
    loads, sources = [], []
    for at, bits in enumerate(widths):
        register = {16: "%rs", 32: "%r", 64: "%rd"}[bits] + str(10 + at)
        loads.append(f"ld.global.b{bits} {register}, [%rd4 + {8 * len(cases) * at}];")
        sources.append(register)
    target = {16: "%rs", 32: "%r", 64: "%rd"}[out] + "20"
    body = "\n".join([*loads, f"{name} {target}, {', '.join(sources)};"])
    body += f"\nst.global.b{out} [%rd5], {target};"
    program = read_program(KERNEL.format(threads=32, body=body))
    result = torch.zeros(len(cases), dtype=torch.int64)
    memory = GlobalMemory(reads=[table], writes=[result])
    arguments = [table.data_ptr(), result.data_ptr(), 7]
    execute(program, Grid(len(cases) // 32), arguments, memory)
    mask = (1 << out) - 1
    for case, found in zip(table.t().tolist(), result.tolist(), strict=True):
        assert found & mask == expected(*case) & mask, (name, case)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_arithmetic(name: str, kind: str) -> None:
    count, compute = INTEGERS[name]
    bits, is_signed = int(kind[1:]), kind[0] == "s"
    if not is_signed and name in ("abs", "neg"):
        return

    def expected(*sources: int) -> int:
        return compute(*(number(source, bits, is_signed) for source in sources))

    check_integers(f"{name}.{kind}", (bits,) * count, bits, expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", BITWISE)
def test_bits(name: str, bits: int) -> None:
    count, compute = BITWISE[name]
    widths = (bits, 32) if name == "shl" else (bits,) * count
    check_integers(f"{name}.b{bits}", widths, bits, compute)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_shifts_to_the_right(kind: str) -> None:
    bits, is_signed = int(kind[1:]), kind[0] == "s"
    check_integers(
        f"shr.{kind}",
        (bits, 32),
        bits,
        lambda a, count: number(a, bits, is_signed) >> min(count & 0xFFFFFFFF, 64),
    )


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_products_of_twice_the_width(kind: str) -> None:
    bits, is_signed = int(kind[1:]), kind[0] == "s"

    def wide(a: int, b: int, c: int = 0) -> int:
        return number(a, bits, is_signed) * number(b, bits, is_signed) + c

    check_integers(f"mul.wide.{kind}", (bits, bits), 2 * bits, wide)
    check_integers(f"mad.wide.{kind}", (bits, bits, 2 * bits), 2 * bits, wide)
    check_integers(f"mul.hi.{kind}", (bits, bits), bits, lambda a, b: wide(a, b) >> bits)


def test_bytes_are_permuted() -> None:
    check_integers(
        "prmt.b32", (32, 32, 32), 32, lambda *all_: permuted(*(each & 0xFFFFFFFF for each in all_))
    )


@pytest.mark.parametrize("kind", ["s32", "u32", "u64"])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 4), (16, 16), (20, 1), (0, 32)])
def test_bit_fields(kind: str, start: int, length: int) -> None:
    bits, is_signed = int(kind[1:]), kind[0] == "s"

    def expected(a: int) -> int:
        return number(a >> start if bits == 64 else (a & 0xFFFFFFFF) >> start, length, is_signed)

    register = "%r10" if bits == 32 else "%rd10"
    inputs = torch.tensor([number(edge, 64, True) for edge in EDGES + EDGES[:8]])
    target = register.replace("10", "20")
    body = f"ld.global.b{bits} {register}, [%rd4];"
    body += f"bfe.{kind} {target}, {register}, {start}, {length};"
    found = run_snippet(f"{body} st.global.b{bits} [%rd5], {target};", inputs)
    for value, result in zip(inputs.tolist(), found.tolist(), strict=True):
        assert result == expected(value) & ((1 << bits) - 1)


@pytest.mark.parametrize(
    "kind", ["s64.s32", "u64.u32", "u32.u64", "u16.u32", "u32.u16", "s32.s16", "s16.s32", "s32.s8"]
)
def test_integers_are_converted(kind: str) -> None:
    to, source = kind.split(".")
    bits = int(source[1:])
    check_integers(
        f"cvt.{kind}",
        (max(bits, 16),),
        int(to[1:]),
        lambda a: number(a, bits, source[0] == "s"),
    )


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_integers_are_compared(name: str, kind: str) -> None:
    bits, is_signed = int(kind[1:]), kind[0] == "s"
    compare = comparison(name)
    register = {16: "%rs", 32: "%r", 64: "%rd"}[bits]
    cases = [*itertools.product(EDGES, repeat=2)]
    cases += [cases[0]] * (-len(cases) % 32)
    table = torch.tensor([[number(v, 64, True) for v in case] for case in cases]).t().contiguous()
    result = torch.zeros(len(cases), dtype=torch.int64)
    body = f"""
        ld.global.b{bits} {register}10, [%rd4];
        ld.global.b{bits} {register}11, [%rd4 + {8 * len(cases)}];
        setp.{name}.{kind} %p1, {register}10, {register}11;
        selp.b64 %rd20, 5, 6, %p1;
        @!%p1 mov.b64 %rd20, 9;
        st.global.b64 [%rd5], %rd20;
    """
    program = read_program(KERNEL.format(threads=32, body=body))
    memory = GlobalMemory(reads=[table], writes=[result])
    execute(program, Grid(len(cases) // 32), [table.data_ptr(), result.data_ptr(), 7], memory)
    for (a, b), found in zip(table.t().tolist(), result.tolist(), strict=True):
        is_so = compare(number(a, bits, is_signed), number(b, bits, is_signed))
        assert found == (5 if is_so else 9)


def comparison(name: str) -> Callable[[Any, Any], bool]:
    return {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
    }[name]


# -- floats ----------------------------------------------------------------------------------------


def some_floats() -> torch.Tensor:
    """float32 of all sizes, with zeros, subnormal numbers, infinities and what is no number."""
    random = torch.randint(-(1 << 31), 1 << 31, (4000,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 448.0, -464.0, 1e-45, 3.4e38])
    near = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    x = torch.cat([random.to(torch.int32).view(torch.float32), edges, near, near * 2.0**-9])
    return torch.where(x.isnan(), math.nan, x)  # torch and PTX differ on signalling ones


def test_e4m3_is_that_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    found = torch.from_numpy(floats.decode_e4m3(np.arange(256, dtype=np.uint64)))
    torch.testing.assert_close(
        found, every.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(found.signbit()[:255], every[:255] >= 128)
    x = torch.cat([some_floats(), torch.arange(-32768, 32768).to(torch.int16).view(torch.half)])
    codes = torch.from_numpy(floats.encode_e4m3(x.numpy()).astype(np.uint8))
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes[~x.isnan()], wanted[~x.isnan()])
    assert (codes[x.isnan()] == 0x7F).all()


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)], ids=str
)
def test_16_bits_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    x = some_floats()
    x = x[: len(x) // 64 * 64]
    body = f"""
        ld.global.v2.b32 {{ %r10, %r11 }}, [%rd4];
        cvt.rn.{name}.f32 %r12, %r11, %r10;
        mov.b32 {{%rs1, %rs2}}, %r12;
        cvt.f32.{name[:-2]} %r13, %rs1;
        cvt.f32.{name[:-2]} %r14, %rs2;
        st.global.v2.b32 [%rd5], {{%r13, %r14}};
    """
    found = torch.from_numpy(run_snippet(body, x, num_blocks=len(x) // 64).view(np.float32))
    torch.testing.assert_close(found, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("add.f32", torch.add),
        ("sub.f32", torch.sub),
        ("mul.f32", torch.mul),
        ("div.full.f32", torch.div),
        ("max.f32", torch.fmax),
        ("min.f32", torch.fmin),
    ],
)
def test_float_arithmetic_is_that_of_torch(
    name: str, expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    a = some_floats()[: 32 * 100]
    b = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(2))]
    pairs = torch.stack([a, b], dim=1).contiguous()
    body = f"""
        ld.global.v2.b32 {{ %r10, %r11 }}, [%rd4];
        {name} %r12, %r10, %r11;
        st.global.b32 [%rd5], %r12;
    """
    found = torch.from_numpy(run_snippet(body, pairs, num_blocks=100).view(np.float32)[::2].copy())
    torch.testing.assert_close(found, expected(a, b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["abs", "neg"])
def test_only_the_sign_of_a_float_is_changed(name: str, kind: str) -> None:
    """Also that of zeros, and of what is no number."""
    bits = 32 if kind == "f32" else 16
    register = {32: "%r", 16: "%rs"}[bits]
    body = f"""
        ld.global.b{bits} {register}10, [%rd4];
        {name}.{kind} {register}11, {register}10;
        st.global.b{bits} [%rd5], {register}11;
    """
    values = [0, 1, 0x7F80, 0x7FC0, 0x3C00, 0x1234] * 6
    values = [value << (bits - 16) | sign << (bits - 1) for value in values for sign in (0, 1)]
    inputs = torch.tensor(values[:64])
    found = run_snippet(body, inputs, num_blocks=2).tolist()
    sign = 1 << (bits - 1)
    assert found == [v & ~sign if name == "abs" else v ^ sign for v in inputs.tolist()]


def test_a_product_and_a_sum_are_rounded_once() -> None:
    random = np.random.default_rng(4)
    a, b = (random.standard_normal(2000).astype(np.float32) for _ in "ab")
    # Near the product, so that most digits cancel, or far below it, where rounding decides.
    c = (-a * b * random.choice([1, 1.5, 2.0**-24, 2.0**-25], 2000)).astype(np.float32)
    sources = [x.view(np.uint32).astype(np.uint64) for x in (a, b, c)]
    found = floats.floats_of(floats._fused(*sources))
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        error = abs(Fraction(float(result)) - exact)
        for neighbour in (np.nextafter(result, np.float32(s)) for s in (-np.inf, np.inf)):
            assert error <= abs(Fraction(float(neighbour)) - exact)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_floats_are_compared(name: str, kind: str) -> None:
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    edges = torch.tensor([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan], dtype=dtype)
    pairs = torch.cartesian_prod(edges, edges)
    pairs = torch.cat([pairs, pairs[: -len(pairs) % 32]])
    inputs = torch.zeros(len(pairs), 8 // dtype.itemsize, dtype=dtype)
    inputs[:, :2] = pairs
    bits, register = 8 * dtype.itemsize, "%r" if dtype.itemsize == 4 else "%rs"
    for suffix in ("", "u"):
        body = f"""
            ld.global.v2.b{bits} {{ {register}10, {register}11 }}, [%rd4];
            setp.{name}{suffix}.{kind} %p1, {register}10, {register}11;
            @%p1 st.global.b64 [%rd5], 1;
        """
        found = run_snippet(body, inputs, num_blocks=len(pairs) // 32)
        for (a, b), result in zip(pairs.tolist(), found.tolist(), strict=True):
            is_none = math.isnan(a) or math.isnan(b)
            wanted = bool(suffix) if is_none else comparison(name)(a, b)
            assert result == wanted, (a, b)
