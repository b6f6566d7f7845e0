"""Compiled conversions to fp8 e4m3 and back, executed, beside plain loops over torch's numbers.

From sm_89 on there is an instruction for e4m3; sm_80 rounds in integer arithmetic.
"""

from __future__ import annotations

import pytest
import torch
from compiled import ON_ALL_CAPABILITIES, needs_compiler
from converted_worlds import ConvertedWorld, codes_and_scales
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory
from sparse import sparse_memory

import kvheap
from kvheap import BlockIds, PagedKVCache, TensorMemoryAllocator

pytestmark = needs_compiler

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize(
    ("dtype", "head_dim", "num_tokens", "chunk_tokens"),
    [
        (torch.bfloat16, 24, 70, 32),
        (torch.bfloat16, 128, 40, 40),
        (torch.float16, 128, 110, 100),
        (torch.float16, 33, 20, 8),
        (torch.bfloat16, 64, 5, 1),
    ],
    ids=str,
)
def test_numbers_are_converted_and_come_back(
    dtype: torch.dtype, head_dim: int, num_tokens: int, chunk_tokens: int, capability: int
) -> None:
    """Chunks of one step and of several, rows of all alignments, a chunk that is partly filled."""
    world = ConvertedWorld(dtype, num_tokens, chunk_tokens, head_dim=head_dim)
    for is_store in (True, False):
        gpu = world.check(world.slots(), is_store, capability)
        assert any("e4m3x2" in name for name in gpu.executed) == (capability >= 89)


@ON_ALL_CAPABILITIES
def test_skipped_tokens_and_blocks(capability: int) -> None:
    world = ConvertedWorld(torch.float16, 46, 16)
    slots = [slot if at % 5 and not 16 <= at < 32 else -1 for at, slot in enumerate(world.slots())]
    ids = [7, -1, 0, 3, 2, 1, 8, -1, 4, 6, -1, 5]
    of_blocks = [-1 if ids[at // 4] < 0 else ids[at // 4] * 4 + at % 4 for at in range(46)]
    for is_store in (True, False):
        for expected, given in ((slots, None), (of_blocks, BlockIds(ids, 46))):
            world.batch.set_num_tokens(None)  # filled by hand: a store may have skipped the rest
            world.check(expected, is_store, capability, given=given)


@ON_ALL_CAPABILITIES
def test_every_number_of_fp16_is_rounded_as_torch_does(capability: int) -> None:
    """In K with a scale of 1, which gives all ties; in V with infinities and what is no number."""
    world = ConvertedWorld(torch.float16, 512, 512, num_heads=1, head_dim=128, num_layers=1)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    slots = world.slots()
    for plane in (0, 1):
        values = torch.where(every.abs() <= 448, every, 448.0) if plane == 0 else every
        for slot, row in zip(slots, values.view(512, 128), strict=True):
            world.token(0, plane, slot, 0).copy_(row)
    world.check(slots, True, capability)
    _, scales = codes_and_scales(world.batch[0])
    assert float(scales[0, 0, 0]) == 1.0


@ON_ALL_CAPABILITIES
@DTYPES
def test_every_code_comes_back_with_its_sign(dtype: torch.dtype, capability: int) -> None:
    """Also -0.0."""
    world = ConvertedWorld(dtype, 8, 8, num_heads=1, head_dim=32, num_layers=1)
    codes, scales = codes_and_scales(world.batch[0])
    codes.copy_(torch.arange(256, dtype=torch.uint8).view(1, 8, 32).expand(2, 1, 8, 32))
    scales.copy_(torch.tensor([1.0, 0.37]).view(2, 1, 1))
    world.check(world.slots(), False, capability)
    zero = world.token(0, 0, world.slots()[4], 0)[0]
    assert zero == 0
    assert zero.signbit()


def bound(original: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """How far off an element may be when it comes back; see kernels/paged_convert.py."""
    error = torch.maximum(original.abs() / 16, torch.tensor(scale / 1024)) * (1 + 2**-20)
    half_step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    smallest = {torch.bfloat16: 2**-133, torch.float16: 2**-24}[dtype]
    return error + (original.abs() + error) * half_step + smallest


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize(("ulps", "dtype"), [(-2, torch.bfloat16), (2, torch.float16)], ids=str)
def test_the_bound_holds_where_division_is_inexact(
    ulps: int, dtype: torch.dtype, capability: int
) -> None:
    """PTX's ``div.full`` may be off by two units in the last place."""
    world = ConvertedWorld(dtype, 70, 64, head_dim=64)
    slots = world.slots()
    before = [[row.float() for row in rows] for rows, _, _ in world.groups(slots)]
    for is_store in (True, False):
        memory = world.memory(slots, is_store)
        with running_ptx(capability, memory, division_ulps=ulps) as gpu:
            if is_store:
                kvheap.store(world.cache, slots, world.batch, convert=True)
            else:
                kvheap.load(world.batch, world.cache, slots, convert=True)
        assert gpu.executed["div.full.f32"] > 0 or not is_store
    for originals, (rows, _, scale) in zip(before, world.groups(slots), strict=True):
        for original, row in zip(originals, rows, strict=True):
            assert ((row.float() - original).abs() <= bound(original, float(scale), dtype)).all()


@ON_ALL_CAPABILITIES
def test_offsets_beyond_two_to_the_32(capability: int) -> None:
    """Blocks 3 GiB apart, K and V 40 GiB, chunks at up to 39 GiB."""
    shape, strides = (2, 10, 4, 1, 32), (20 << 30, 3 << 29, 32, 32, 1)
    tensor = sparse_memory(80 << 30).view(torch.float16).as_strided(shape, strides)
    cache = PagedKVCache.of("vllm-flash-nhd", [tensor])
    heap = TensorMemoryAllocator(sparse_memory(40 << 30))
    shapes, dtypes = [(2, 1, 4, 32), (2, 1, 1)], [torch.float8_e4m3fn, torch.float32]
    batch = heap.view([(4 << 30) - 4096, (39 << 30) + 4096], shapes, dtypes)
    slots = [39, 0, 17, 34, 5, 22]
    tokens = [tensor[:, slot // 4, slot % 4, 0] for slot in slots]
    for token in tokens:
        token.copy_(torch.randn(2, 32))
    rows = [row for token in tokens for row in token]
    codes, scales = zip(*map(codes_and_scales, batch), strict=True)
    places = [
        place for chunk, count in zip(codes, (4, 2), strict=True) for place in chunk[:, 0, :count]
    ]
    saved = torch.stack(tokens)
    with running_ptx(capability, GlobalMemory(rows, [*places, *scales])):
        kvheap.store(cache, slots, batch, convert=True)
    for token in tokens:
        token.zero_()
    with running_ptx(capability, GlobalMemory([*places, *scales], rows)):
        kvheap.load(batch, cache, slots, convert=True)
    largest = float(torch.stack(scales).max())
    found = torch.stack(tokens)
    assert ((found - saved).abs() <= bound(saved.float(), largest, torch.float16)).all()
