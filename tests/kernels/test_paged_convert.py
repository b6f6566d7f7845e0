"""Conversion to fp8 and back: its error bound, its scales, and what it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_paths import (
    ON_ALL_PATHS,
    interpreted,
    interpreted_function,
    needs_gpu,
    needs_triton,
    running,
)

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import paged_convert
from kvheap.kernels.launch import tl

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 3, 24, 16, 2, 24
CHUNK_TOKENS = 64

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def make(dtype=torch.float16, device="cpu"):
    """A cache of numbers whose size varies by layer, and a heap."""
    generator = torch.Generator().manual_seed(7)
    shape = (2, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM)
    sizes = (1e-3, 1.0, 30.0)
    tensors = [
        (torch.randn(shape, generator=generator) * size).to(dtype).to(device) for size in sizes
    ]
    heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8, device=device))
    return PagedKVCache.of("vllm-flash-nhd", tensors), tensors, heap


def rows(tensors, slots):
    """The tokens as ``[layers, 2, tokens, heads, dims]``."""
    flat = [t.reshape(2, BLOCKS * BLOCK_SIZE, HEADS, HEAD_DIM)[:, slots] for t in tensors]
    return torch.stack(flat).float().cpu()


def error_bound(original, scales, dtype):
    """How far off an element may be; ``scales`` like ``original`` or broadcast to it."""
    bound = torch.maximum(original.abs() / 16, scales / 1024) * (1 + 2**-20)
    half_step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    smallest = {torch.bfloat16: 2**-133, torch.float16: 2**-24}[dtype]
    return bound + (original.abs() + bound) * half_step + smallest


def scales_of(batch, num_tokens):
    """The scale of each element, ``[layers, 2, tokens, heads, 1]``."""
    chunks = torch.stack([obj.get_tensor(1) for obj in batch]).cpu()  # [N, 2, layers, heads]
    by_token = chunks[torch.arange(num_tokens) // CHUNK_TOKENS]
    return by_token.permute(2, 1, 0, 3)[..., None]


@DEVICES
@DTYPES
def test_elements_come_back_within_the_stated_bound(dtype, device):
    cache, tensors, heap = make(dtype, device)
    slots = torch.randperm(cache.num_slots)[:150]
    before = rows(tensors, slots)
    batch = heap.batched_store(cache, slots, CHUNK_TOKENS, convert=True)
    for tensor in tensors:
        tensor.zero_()
    heap.batched_load(batch, cache, slots, convert=True)
    after = rows(tensors, slots)
    bound = error_bound(before, scales_of(batch, 150), dtype)
    assert ((after - before).abs() <= bound).all()
    assert not torch.equal(after, before)  # fp8 cannot hold all of it
    untouched = torch.ones(cache.num_slots, dtype=torch.bool)
    untouched[slots] = False
    assert (rows(tensors, untouched.nonzero().flatten()) == 0).all()


@DEVICES
def test_the_scale_is_the_largest_magnitude_over_448(device):
    cache, tensors, heap = make(torch.float16, device)
    slots = torch.arange(40)
    batch = heap.batched_store(cache, slots, CHUNK_TOKENS, convert=True)
    found = batch[0].get_tensor(1).cpu()
    expected = rows(tensors, slots).abs().amax(dim=(2, 4)) / 448  # [layers, 2, heads]
    torch.testing.assert_close(found, expected.permute(1, 0, 2), rtol=1e-6, atol=0)


def test_numbers_of_fp8_come_back_exactly():
    cache, tensors, heap = make(torch.float16)
    codes = torch.randint(0, 127, tensors[0].shape, dtype=torch.uint8)
    for tensor in tensors:
        tensor.copy_(codes.view(torch.float8_e4m3fn).float())
        tensor[..., 0] = 448.0  # so that the scale is 1
    slots = torch.arange(100)
    before = rows(tensors, slots)
    batch = heap.batched_store(cache, slots, CHUNK_TOKENS, convert=True)
    for tensor in tensors:
        tensor.zero_()
    heap.batched_load(batch, cache, slots, convert=True)
    assert torch.equal(rows(tensors, slots), before)


@DEVICES
def test_nan_stays_nan_infinity_becomes_the_largest_and_zeros_stay_zeros(device):
    cache, tensors, heap = make(torch.float16, device)
    tensors[0].zero_()
    head = tensors[1].view(2, -1, HEADS, HEAD_DIM)[0]
    head[0, 0, 0], head[0, 0, 1], head[0, 0, 2] = float("nan"), float("inf"), -float("inf")
    slots = torch.arange(32)
    largest = head[:32, 0].isfinite() * head[:32, 0].abs().nan_to_num()
    batch = heap.batched_store(cache, slots, CHUNK_TOKENS, convert=True)
    heap.batched_load(batch, cache, slots, convert=True)
    assert (tensors[0] == 0).all()
    assert head[0, 0, 0].isnan()
    size = float(largest.nan_to_num(posinf=0).max())
    assert float(head[0, 0, 1]) == pytest.approx(size, rel=1e-3)
    assert float(head[0, 0, 2]) == pytest.approx(-size, rel=1e-3)


def test_skipped_tokens_touch_neither_bytes_nor_scale():
    cache, tensors, heap = make()
    slots = torch.arange(CHUNK_TOKENS)
    batch = heap.batched_store(cache, slots, CHUNK_TOKENS, convert=True)
    before = batch[0].raw_tensor.clone()
    kvheap.store(cache, torch.full((CHUNK_TOKENS,), -1), batch, convert=True)
    assert torch.equal(batch[0].raw_tensor, before)
    tensors[0].view(2, -1, HEADS, HEAD_DIM)[:, 0] = 1e4  # the largest by far, and skipped
    skipping = slots.clone()
    skipping[0] = -1
    kvheap.store(cache, skipping, batch, convert=True)
    expected = rows(tensors, slots[1:]).abs().amax(dim=(2, 4)) / 448
    torch.testing.assert_close(batch[0].get_tensor(1), expected.permute(1, 0, 2), rtol=1e-6, atol=0)


def test_layers_and_heads_can_be_stored_one_by_one():
    cache, _, heap = make()
    slots = torch.arange(70)
    whole = heap.batched_store(cache, slots, CHUNK_TOKENS, convert=True)
    parts = heap.batched_store(cache, slots, CHUNK_TOKENS, convert=True)
    for obj in parts:
        obj.raw_tensor.zero_()
    for layer in range(LAYERS):
        for head in range(HEADS):
            kvheap.store(
                cache,
                slots,
                parts,
                layers=range(layer, layer + 1),
                heads=slice(head, head + 1),
                convert=True,
            )
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.get_tensor(1), other.get_tensor(1))
    codes = [batch[0].get_tensor(0).view(torch.uint8) for batch in (whole, parts)]
    assert torch.equal(*codes)


def test_other_chunk_orders_give_the_same_numbers():
    cache, tensors, heap = make()
    blocks = BlockIds(torch.randperm(BLOCKS)[:9])
    slots = (blocks.ids[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    original = [tensor.clone() for tensor in tensors]
    expected = None
    for fmt in (
        MemoryFormat.KV_2LTD,
        MemoryFormat.KV_2TLD,
        MemoryFormat.KV_2TD,
        MemoryFormat.KV_T2D,
    ):
        batch = heap.batched_store(cache, blocks, CHUNK_TOKENS, fmt, convert=True)
        for tensor in tensors:
            tensor.zero_()
        heap.batched_load(batch, cache, blocks, convert=True)
        found = rows(tensors, slots)
        expected = found if expected is None else expected
        assert found.any()
        assert torch.equal(found, expected), fmt
        heap.batched_free(batch)
        for tensor, saved in zip(tensors, original, strict=True):
            tensor.copy_(saved)


def test_nothing_is_converted_unless_asked_for():
    cache, _, heap = make()
    shape = (2, LAYERS, CHUNK_TOKENS, HEADS * HEAD_DIM)
    fp8 = heap.batched_allocate(shape, torch.float8_e4m3fn, 1)
    with pytest.raises(ValueError, match="convert=True"):
        kvheap.store(cache, torch.arange(10), fp8)
    with pytest.raises(ValueError, match="two groups"):
        kvheap.store(cache, torch.arange(10), fp8, convert=True)
    exact = heap.batched_store(cache, torch.arange(10), CHUNK_TOKENS)
    with pytest.raises(ValueError, match="two groups"):
        kvheap.load(exact, cache, torch.arange(10), convert=True)
    wrong = heap.batched_allocate([shape, (2, LAYERS, 1)], [torch.float8_e4m3fn, torch.float32], 1)
    with pytest.raises(ValueError, match="scales must have shape"):
        kvheap.store(cache, torch.arange(10), wrong, convert=True)
    converted = heap.batched_store(cache, torch.arange(10), CHUNK_TOKENS, convert=True)
    with pytest.raises(ValueError, match="one group"):
        kvheap.load(converted, cache, torch.arange(10))


def test_other_dtypes_and_paged_orders_are_refused_and_nothing_stays_allocated():
    tensors = [torch.zeros(2, 4, 16, 2, 8) for _ in range(2)]
    heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
    float_cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        heap.batched_store(float_cache, torch.arange(10), CHUNK_TOKENS, convert=True)
    half_cache = PagedKVCache.of("vllm-flash-nhd", [tensor.half() for tensor in tensors])
    with pytest.raises(ValueError, match="pages"):
        heap.batched_store(half_cache, torch.arange(64), 64, MemoryFormat.KV_PL2TD, convert=True)
    assert heap.total_allocated_size == 0


@needs_triton
@DTYPES
@pytest.mark.parametrize("as_blocks", [False, True], ids=["slots", "blocks"])
def test_the_kernel_gives_the_same_bytes_as_the_cpu_path(dtype, as_blocks):
    generator = torch.Generator().manual_seed(3)
    shape = (2, 8, 4, 2, 24)
    tensors = [
        (torch.randn(shape, generator=generator) * 10.0**exponent).to(dtype) for exponent in (-2, 2)
    ]
    tensors[1][0, 0, 0, 0, 0] = float("nan")
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    original = [tensor.clone() for tensor in tensors]
    slots = torch.randperm(31, generator=generator)[:13] + 1
    slots[3], slots[4] = 0, -1
    given = BlockIds([5, 0, -1, 7], 13) if as_blocks else slots
    results = []
    for path in ("cpu", "interpreter"):
        with running(path):
            heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
            batch = heap.batched_store(cache, given, 8, convert=True)
            stored = heap.buffer.clone()
            for tensor in tensors:
                tensor.zero_()
            heap.batched_load(batch, cache, given, convert=True)
        results.append((stored, [tensor.clone() for tensor in tensors]))
        for tensor, saved in zip(tensors, original, strict=True):
            tensor.copy_(saved)
    (stored, loaded), (kernel_stored, kernel_loaded) = results
    assert stored.any()
    assert torch.equal(stored, kernel_stored)
    # The interpreter cuts bfloat16 off where hardware rounds: one step less at most.
    most = 1 if dtype == torch.bfloat16 else 0
    for one, other in zip(loaded, kernel_loaded, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        steps = one.nan_to_num().view(torch.int16) - other.nan_to_num().view(torch.int16)
        assert ((steps >= 0) & (steps <= most)).all()
    assert any(tensor.isnan().any() for tensor in loaded)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_e4m3_is_rounded_and_read_as_torch_does():
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat((x, torch.randn(65536) * 100)).clamp(-448, 448)
    codes = torch.empty(len(x), dtype=torch.uint8)
    every = torch.arange(256, dtype=torch.uint8)
    numbers = torch.empty(256)
    with interpreted():
        interpreted_function(_encode_kernel)[(1,)](x, codes, len(x))
        interpreted_function(_decode_kernel)[(1,)](every, numbers, 256)
    assert torch.equal(codes, x.to(torch.float8_e4m3fn).view(torch.uint8))
    expected = every.view(torch.float8_e4m3fn).float()
    assert ((numbers == expected) | (numbers.isnan() & expected.isnan())).all()


def _encode_kernel(x_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out_ptr + i, paged_convert._to_e4m3(tl.load(x_ptr + i)))


def _decode_kernel(x_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out_ptr + i, paged_convert._from_e4m3(tl.load(x_ptr + i)))


@ON_ALL_PATHS
@pytest.mark.parametrize("fmt", [MemoryFormat.KV_2LTD, MemoryFormat.KV_2TD], ids=lambda f: f.name)
@pytest.mark.parametrize(("heads", "dim", "tokens"), [(1, 5, 3), (3, 7, 5), (1, 1, 1), (2, 6, 3)])
def test_chunks_of_any_number_of_bytes(heads, dim, tokens, fmt, path):
    with running(path) as device:
        generator = torch.Generator().manual_seed(5)
        shape = (2, 4, 4, heads, dim)
        tensors = [torch.randn(shape, generator=generator).half().to(device) for _ in range(3)]
        cache = PagedKVCache.of("vllm-flash-nhd", tensors)
        before = [tensor.clone() for tensor in tensors]
        heap = TensorMemoryAllocator(
            torch.zeros(1 << 14, dtype=torch.uint8, device=device), align_bytes=4
        )
        slots = torch.randperm(cache.num_slots, generator=generator)[:11]
        batch = heap.batched_store(cache, slots, tokens, fmt, convert=True)
        for tensor in tensors:
            tensor.zero_()
        heap.batched_load(batch, cache, slots, convert=True)
        for tensor, saved in zip(tensors, before, strict=True):
            found, wanted = (t.view(2, -1, heads, dim)[:, slots].cpu() for t in (tensor, saved))
            # Each magnitude is far above the smallest step: a 16th of it, and fp16's own rounding.
            is_near = (found - wanted).abs() <= wanted.abs() / 15 + 0.02
            assert is_near.all()
            assert found.any()
        groups = {dtype: i for i, dtype in enumerate(batch.layout.dtypes)}
        codes_bytes = batch.layout.shapes[groups[torch.float8_e4m3fn]].numel()
        assert groups[torch.float32] == (1 if codes_bytes % 4 == 0 else 0)


def extremes(path, values, dtype):
    """What comes back of a head with these numbers, alone in its group; and its scale."""
    with running(path) as device:
        tensor = torch.zeros(2, 1, len(values), 1, 8, dtype=dtype)
        tensor[0, 0, :, 0] = torch.tensor(values, dtype=torch.float64)[:, None].to(dtype)
        tensor = tensor.to(device)
        cache = PagedKVCache.of("vllm-flash-nhd", [tensor])
        heap = TensorMemoryAllocator(torch.zeros(1 << 12, dtype=torch.uint8, device=device))
        batch = heap.batched_store(cache, range(len(values)), len(values), convert=True)
        tensor.fill_(7)
        heap.batched_load(batch, cache, range(len(values)), convert=True)
        return tensor[0, 0, :, 0, 3].cpu(), float(batch[0].get_tensor(1)[0, 0, 0])


INF = float("inf")


@ON_ALL_PATHS
@DTYPES
def test_the_sign_of_zero_is_kept(dtype, path):
    found, _ = extremes(path, [-0.0, 0.0, 3.0, -1e-30, -0.0], dtype)
    assert found.tolist() == [0, 0, 3, 0, 0]
    assert found.signbit().tolist() == [True, False, False, True, True]


@ON_ALL_PATHS
@DTYPES
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([INF, INF], [0, 0]),
        ([INF, -INF, 0.0], [0, 0, 0]),
        ([INF, -INF, 2.0], [2, -2, 2]),
        ([-INF, 3 * 2.0**-24, 0.0], [-3 * 2.0**-24, 3 * 2.0**-24, 0]),
    ],
    ids=["nothing else", "zeros", "a number", "a tiny number"],
)
def test_infinities_become_the_largest_finite_magnitude(values, expected, dtype, path):
    found, _ = extremes(path, values, dtype)
    assert found.tolist() == expected
    assert found.signbit().tolist() == [value < 0 for value in values]


@ON_ALL_PATHS
def test_infinities_beside_the_smallest_numbers(path):
    """Their scale is the smallest one, of which 448 would be more than any of them."""
    small = 2.0**-133
    found, scale = extremes(path, [INF, -INF, small, 0.0], torch.bfloat16)
    assert scale == 2.0**-126
    assert found.abs().max() <= 2 * small
    assert found[0] >= 0 >= found[1]


@ON_ALL_PATHS
def test_one_outlier_costs_its_neighbours_what_the_bound_says(path):
    values = [3e38, 1.0, -2.0, 3e38 / 458752 * 1.5, 3e38 / 20000]
    found, scale = extremes(path, values, torch.bfloat16)
    wanted = torch.tensor(values, dtype=torch.float64).bfloat16().double()
    bound = torch.maximum(wanted.abs() / 16, torch.tensor(scale, dtype=torch.float64) / 1024)
    assert ((found.double() - wanted).abs() <= bound * (1 + 2**-20) + wanted.abs() / 128).all()
    assert found[1:3].tolist() == [0, 0]
    assert found[3] != 0
    assert scale / 1024 == pytest.approx(float(wanted[0]) / 458752, rel=1e-6)


@needs_triton
def test_accesses_are_as_wide_as_what_is_before_the_elements_allows(monkeypatch):
    """Scales first, of 4 bytes: the elements of a chunk are no longer at multiples of 16."""
    seen = {}

    class Launched:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.update(constants)

    cache = PagedKVCache.of("mla", [torch.zeros(2, 8, 32).half()])
    heap = TensorMemoryAllocator(torch.zeros(1 << 12, dtype=torch.uint8), align_bytes=64)
    groups = {(1, 1, 8, 32): torch.float8_e4m3fn, (1, 1, 1): torch.float32}
    for shapes, vector in ((list(groups), 16), (list(groups)[::-1], 4)):
        dtypes = [groups[shape] for shape in shapes]
        batch = heap.batched_allocate(shapes, dtypes, 1, MemoryFormat.KV_MLA_FMT)
        with running("interpreter"), monkeypatch.context() as patch:
            patch.setattr(paged_convert, "_convert_tokens_kernel", Launched())
            kvheap.store(cache, range(8), batch, convert=True)
        assert seen["HEAP_VECTOR"] == vector


CANNOT: list[tuple[str, str | None, Any, str]] = [
    (
        "kv-tuples",
        None,
        lambda: [(torch.zeros(8, 4, 2, 8).half(), torch.zeros(8, 4, 2, 4).half())],
        r"kv-tuples has planes of \[16, 8\] bytes a head, KV_MLA_FMT has 1",
    ),
    *(
        (
            "vllm-flash-nhd",
            fmt,
            lambda: [torch.zeros(2, 8, 4, 2, 8).half()],
            rf"vllm-flash-nhd has planes of \[16, 16\] bytes a head, {fmt} has 1",
        )
        for fmt in ("KV_MLA_FMT", "KV_TLD")
    ),
    (
        "plane-tuples",
        None,
        lambda: [(torch.zeros(8, 4, 1, 8).half(), torch.zeros(8, 4, 1, 4).half())],
        r"plane-tuples has planes of \[16, 8\] bytes a head, KV_MLA_FMT has 1",
    ),
    (
        "mla",
        None,
        lambda: [torch.zeros(8, 4, 8)],
        "needs a cache of bfloat16 or float16: only these can be converted, got torch.float32",
    ),
    (
        "vllm-cpu",
        None,
        lambda: [torch.zeros(8, 2, 4, 8).half()],
        "needs rows of single tokens, and vllm-cpu holds no rows that could be converted",
    ),
]


@pytest.mark.parametrize(
    ("layout", "fmt", "make", "message"), CANNOT, ids=[f"{case[0]}-{case[1]}" for case in CANNOT]
)
def test_what_cannot_be_converted_is_said(
    layout: str, fmt: str | None, make: Any, message: str
) -> None:
    """Not by the shape of scales, which the caller never gave."""
    cache = PagedKVCache.of(layout, make())
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"convert=True .*{message}"):
        heap.batched_store(cache, BlockIds([0, 1]), 8, fmt, convert=True)
    assert heap.stats().allocated_bytes == 0
    shapes, dtypes = [[1, 1, 8, 24], [1, 1, 2]], [torch.float8_e4m3fn, torch.float32]
    batch = heap.batched_allocate(shapes, dtypes, 1, MemoryFormat.KV_MLA_FMT)
    assert batch is not None
    for copy in (
        lambda: kvheap.store(cache, BlockIds([0, 1]), batch, convert=True),
        lambda: kvheap.load(batch, cache, BlockIds([0, 1]), convert=True),
    ):
        with pytest.raises(ValueError, match="convert=True needs"):
            copy()
