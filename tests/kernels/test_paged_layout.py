"""PagedKVCache: addresses against those of indexed tensors, detection, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_reference import DENSE_BLOCKS, ONE_PLANE, SPECS, Engine, Sizes, Strides

from kvheap.kernels.paged_layout import LAYOUTS, LayoutError, PagedKVCache

FUSED = [name for name, spec in SPECS.items() if spec.physical]
GUESSED = [
    name
    for name in SPECS
    if name not in ("opaque", "values-scales", "vllm-packed", "vllm-nvfp4-linear", "plane-tuples")
]
"""The others need hints: test_layout_choice.py."""
TIGHT, PADDED = Strides(), Strides(padding=8, guard=24)


def cache_of(engine: Engine) -> PagedKVCache:
    return PagedKVCache.of(
        engine.layout, engine.tensors, block_size=engine.block_size, **engine.facts
    )


def address(cache: PagedKVCache, layer: int, plane: int, slot: int, head: int) -> int:
    """Where the cache says that a row begins."""
    block, at = divmod(slot, cache.block_size)
    strides = cache.planes[plane]
    offset = block * strides.block_stride + at * strides.slot_stride + head * strides.head_stride
    return int(cache.base_addresses[layer, plane]) + offset


def rows(engine: Engine) -> itertools.product[tuple[int, ...]]:
    """All (layer, plane, slot, head)."""
    sizes = engine.sizes
    counts = (sizes.num_layers, engine.num_planes, engine.num_slots, sizes.num_heads)
    return itertools.product(*map(range, counts))


def check_addresses(engine: Engine, cache: PagedKVCache) -> None:
    assert tuple(plane.row_bytes for plane in cache.planes) == engine.row_bytes
    for row in rows(engine):
        assert address(cache, *row) == engine.row(*row).data_ptr(), row


def test_the_reference_knows_every_layout() -> None:
    whole_blocks = {name for name, layout in LAYOUTS.items() if layout.whole_blocks}
    assert set(SPECS) | whole_blocks == set(LAYOUTS)  # those: test_paged_whole_blocks.py
    assert not set(SPECS) & whole_blocks


@pytest.mark.parametrize("strides", [TIGHT, PADDED])
@pytest.mark.parametrize("layout", SPECS)
def test_rows_are_where_the_tensors_are(layout: str, strides: Strides) -> None:
    engine = Engine(layout, strides=strides)
    check_addresses(engine, cache_of(engine))


@pytest.mark.parametrize("layout", FUSED)
def test_layers_of_one_tensor_may_come_as_a_list(layout: str) -> None:
    engine = Engine(layout, strides=PADDED, is_list=True)
    check_addresses(engine, cache_of(engine))
    layers = {f"layers.{layer}": tensor for layer, tensor in enumerate(engine.tensors)}
    assert PagedKVCache.of(layout, layers).addresses_like(cache_of(engine))


@pytest.mark.parametrize("layout", SPECS)
def test_sizes_are_those_of_the_engine(layout: str) -> None:
    engine = Engine(layout)
    cache, sizes = cache_of(engine), engine.sizes
    rows_bytes = sum(engine.row_bytes)
    assert cache.num_layers == sizes.num_layers
    assert cache.num_planes == engine.num_planes
    assert cache.layout.num_planes == (0 if layout == "plane-tuples" else engine.num_planes)
    assert (cache.num_blocks, cache.block_size) == (sizes.num_blocks, engine.block_size)
    assert (cache.num_heads, cache.num_slots) == (sizes.num_heads, engine.num_slots)
    assert cache.token_bytes == sizes.num_layers * sizes.num_heads * rows_bytes
    assert (cache.dtype, cache.device) == (sizes.dtype, torch.device("cpu"))
    expected_dim = engine.row_bytes[0] // sizes.dtype.itemsize
    if layout in ("indexer", "values-scales", "plane-tuples"):
        expected_dim = rows_bytes // sizes.dtype.itemsize
    elif layout == "vllm-nvfp4-linear":
        expected_dim = rows_bytes // 2
    assert cache.head_dim == expected_dim
    assert cache.plane_strides.tolist() == [
        [
            engine.row(layer, plane, 0, 0).data_ptr() - engine.row(layer, 0, 0, 0).data_ptr()
            for plane in range(1, engine.num_planes)
        ]
        for layer in range(sizes.num_layers)
    ]


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    layout = draw(st.sampled_from(list(SPECS)))
    spec = SPECS[layout]
    order = ""
    if not spec.physical and layout not in DENSE_BLOCKS:
        order = "".join(draw(st.permutations(spec.dims[:-1]))) + spec.dims[-1]
    sizes = Sizes(
        num_layers=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(1, 3)),
        block_size=draw(st.integers(1, 3)),
        num_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 5, 8])),
        dtype=draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32])),
    )
    strides = Strides(
        draw(st.integers(0, 5)), draw(st.integers(0, 17)), draw(st.integers(0, 3)), order
    )
    return Engine(layout, sizes, strides)


@settings(max_examples=150, deadline=None)
@given(engine=engines())
def test_any_order_and_any_padding(engine: Engine) -> None:
    check_addresses(engine, cache_of(engine))


@settings(max_examples=150, deadline=None)
@given(engine=engines())
def test_alignment_is_what_all_rows_have(engine: Engine) -> None:
    bits = 16
    for row in rows(engine):
        found = engine.row(*row)
        bits |= found.data_ptr() | found.numel()
    assert cache_of(engine).alignment == bits & -bits


def detect(engine: Engine, **changes: Any) -> PagedKVCache:
    sizes = engine.sizes
    known = {
        "num_kv_heads": sizes.num_heads,
        "head_dim": sizes.head_dim,
        "block_size": engine.block_size,
    }
    return PagedKVCache.detect(engine.tensors, **{**known, **changes})


class TestDetect:
    @pytest.mark.parametrize("strides", [TIGHT, PADDED])
    @pytest.mark.parametrize("layout", GUESSED)
    def test_every_layout_is_found(self, layout: str, strides: Strides) -> None:
        sizes = Sizes(head_dim=128) if layout == "indexer" else Sizes()
        engine = Engine(layout, sizes, strides)
        # On a CPU, the tensors of vllm-lbhnc may be those of vllm-cpu.
        known = {"backend": "FLASH_ATTN"} if layout == "vllm-lbhnc" else {}
        found = detect(engine, **known)
        assert found.layout.name == layout
        check_addresses(engine, found)

    @pytest.mark.parametrize("layout", [name for name in FUSED if name in GUESSED])
    def test_a_list_of_layers_is_found(self, layout: str) -> None:
        engine = Engine(layout, strides=PADDED, is_list=True)
        check_addresses(engine, detect(engine))

    @pytest.mark.parametrize(
        ("layout", "sizes", "others"),
        [
            ("vllm-flash-nhd", Sizes(block_size=5), "vllm-flash-nhd, vllm-flash-hnd"),
            ("vllm-flash-hnd", Sizes(block_size=5), "vllm-flash-nhd, vllm-flash-hnd"),
            ("vllm-flash-nhd", Sizes(num_blocks=2), "vllm-flash-nhd, vllm-flashinfer-nhd"),
            ("vllm-flashinfer-hnd", Sizes(num_blocks=2), "vllm-flash-hnd, vllm-flashinfer-hnd"),
            ("trtllm", Sizes(block_size=5), "vllm-cross-layer, trtllm"),
            ("kv-tuples", Sizes(block_size=5), "kv-tuples, kv-tuples-hnd"),
        ],
    )
    def test_two_meanings_are_not_guessed(self, layout: str, sizes: Sizes, others: str) -> None:
        message = f"several engine layouts fit, choose one by name: {others}"
        with pytest.raises(LayoutError, match=message):
            detect(Engine(layout, sizes))

    @pytest.mark.parametrize(
        ("layout", "sizes"),
        [
            ("vllm-flash-hnd", Sizes(block_size=1, num_heads=1)),
            ("kv-tuples-hnd", Sizes(block_size=1, num_heads=1)),
            ("trtllm", Sizes(block_size=1, num_heads=1)),
            ("vllm-blhnc", Sizes(block_size=5)),
            ("vllm-lbnhc", Sizes(block_size=5)),
            ("sglang-mla", Sizes(block_size=1)),
        ],
    )
    def test_two_names_of_the_same_addresses_are_one(self, layout: str, sizes: Sizes) -> None:
        engine = Engine(layout, sizes)
        check_addresses(engine, detect(engine))

    @pytest.mark.parametrize("changes", [{"num_kv_heads": 6}, {"head_dim": 16}, {"block_size": 3}])
    @pytest.mark.parametrize("layout", ["vllm-flash-nhd", "mla", "trtllm", "sglang-mha"])
    def test_sizes_that_fit_nothing_are_refused(self, layout: str, changes: Any) -> None:
        message = f"(?s)no engine layout fits.*[;=] .*{layout}: "
        with pytest.raises(LayoutError, match=message) as caught:
            detect(Engine(layout, Sizes(num_blocks=50)), **changes)
        assert len(str(caught.value)) < 1000  # no tensor is printed
        assert len(str(caught.value).splitlines()) == 3

    @pytest.mark.parametrize("size_bytes", [0, 64])
    def test_a_layer_without_memory_is_refused(self, size_bytes: int) -> None:
        layers = [torch.zeros(4, 3, 7) for _ in range(2)]
        layers[1].untyped_storage().resize_(size_bytes)
        with pytest.raises(ValueError, match=r"layer 1 of mla ends at byte 336 of its storage"):
            PagedKVCache.of("mla", layers)

    def test_opaque_is_never_guessed(self) -> None:
        with pytest.raises(LayoutError, match="no engine layout fits"):
            PagedKVCache.detect([torch.zeros(4, 3, 7)], num_kv_heads=1, head_dim=21, block_size=1)


def test_other_addresses_are_not_alike() -> None:
    engine = Engine("vllm-flash-nhd")
    cache = cache_of(engine)
    assert cache.addresses_like(cache_of(engine))
    assert not cache.addresses_like(cache_of(Engine("vllm-flash-nhd")))
    assert not cache.addresses_like(replace(cache, num_heads=4))
    assert not cache.addresses_like(replace(cache, dtype=torch.float16))
    assert not cache.addresses_like(PagedKVCache.of("vllm-flash-nhd", engine.tensors[:2]))


def test_tensors_are_kept_alive() -> None:
    cache = PagedKVCache.of("mla", [torch.zeros(4, 2, 8) for _ in range(2)])
    starts = [tensor.data_ptr() for tensor in cache.tensors]
    np.testing.assert_array_equal(cache.base_addresses[:, 0], starts)


@pytest.mark.parametrize("block_size", [None, 1, 7, 28])
def test_slots_make_blocks_of_any_size(block_size: int | None) -> None:
    tensors = [torch.zeros(28, 1, 8) for _ in range(2)]
    cache = PagedKVCache.of("sglang-mla", tensors, block_size=block_size)
    size = block_size or 1
    assert (cache.num_blocks, cache.block_size) == (28 // size, size)
    assert [address(cache, 1, 0, slot, 0) for slot in range(28)] == [
        tensors[1][slot].data_ptr() for slot in range(28)
    ]


def like(*shapes: tuple[int, ...], **kept: Any) -> Callable[[], list[torch.Tensor]]:
    return lambda: [torch.zeros(shape, **kept) for shape in shapes]


def second(tensor: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """A layer that is right, and then this one."""
    return lambda: [torch.zeros(tensor.shape, dtype=tensor.dtype), tensor]


def pair(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(shape) for shape in shapes)


FLASH = (2, 4, 3, 5, 8)
BYTES = {"dtype": torch.uint8}

WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("vllm-flash", like(FLASH), "unknown engine layout 'vllm-flash'; known are vllm-flash-nhd, "),
    ("vllm-flash-nhd", like(FLASH, (4, 3, 5, 8)), "layer 1 of vllm-flash-nhd must be L x [2, B, "),
    ("vllm-flash-nhd", like((3, 4, 3, 5, 8)), "layer 0 .* a dimension of 2 for K and V"),
    ("vllm-flashinfer-hnd", like((2, 4, 3, 5, 8)), "layer 0 .* a dimension of 2 for K and V"),
    ("trtllm", lambda: torch.zeros(4, 3, 1, 2, 5, 8), "the tensor .* a dimension of 2 for K and V"),
    ("vllm-flash-nhd", like(FLASH, (2, 5, 3, 5, 8)), r"layer 1 .* shape \(2, 5, 3, 5, 8\), the f"),
    ("vllm-flash-nhd", second(torch.zeros(FLASH, device="meta")), "layer 1 is on meta"),
    ("vllm-flash-nhd", lambda: [torch.zeros(FLASH), torch.zeros(FLASH).half()], "layer 1 .* dtype"),
    (
        "vllm-flash-nhd",
        second(torch.zeros(2, 4, 5, 3, 8).transpose(2, 3)),
        r"layer 1 .* strides \(480, 120, 8, 24, 1\), the first tensor",
    ),
    ("vllm-flash-nhd", second(torch.zeros(2, 4, 3, 8, 5).mT), "layer 1 .* last dimension must be"),
    ("vllm-flash-nhd", second(torch.zeros(2, 4, 3, 1, 8).expand(FLASH)), "layer 1 .* overlap"),
    (
        "mla",
        second(torch.zeros(99).as_strided((4, 3, 8), (16, 8, 1))),
        "layer 1 .* elements overlap",
    ),
    ("mla", like((4, 3, 8), (0, 3, 8)), "layer 1 of mla is empty"),
    ("mla", lambda: [torch.zeros(4, 3, 8), None], "layer 1 of mla must be a tensor, got None"),
    ("mla", lambda: torch.zeros(4, 3, 8), "mla is L x .*, got a tensor of shape"),
    ("mla", lambda: (t for t in [torch.zeros(4, 3, 8)]), "mla is L x .*, got <generator"),
    ("mla", list, "mla needs at least one layer"),
    ("mla", dict, "mla needs at least one layer"),
    ("vllm-lbhnc", lambda: torch.zeros(3, 4, 5, 3, 15), "the tensor .* K then V in its last dim"),
    ("vllm-lbhnc", like((4, 5, 3, 15)), "layer 0 .* K then V in its last dim"),
    ("vllm-lbhnc", like((4, 5, 3, 16), (4, 5, 3, 15)), r"layer 1 .* shape \(4, 5, 3, 15\)"),
    ("vllm-lbnhc", lambda: torch.zeros(3, 4, 5, 3, 16), "the tensor .* in the order L B N H F"),
    ("vllm-lbnhc", like((4, 5, 3, 16), (4, 5, 3, 16)), "layer 0 .* in the order B N H F"),
    ("vllm-cross-layer", like((4, 3, 2, 3, 5, 8)), r"is one tensor \[B, L, .*, got 1 of Tensor"),
    ("indexer", like((4, 3, 132)), r"layer 0 of indexer must be bytes \[B, N, values \+ 4\]"),
    ("indexer", like((4, 3, 4), **BYTES), r"layer 0 of indexer must be bytes"),
    (
        "indexer",
        second(torch.zeros(4, 3, 140, dtype=torch.uint8)[..., :132]),
        "layer 1 of indexer: each block must be contiguous",
    ),
    ("opaque", second(torch.zeros(4, 3, 10)[..., :8]), "layer 1: each block must be contiguous"),
    ("opaque", like((4, 3), (4,)), "layer 1 of opaque must be"),
    ("sglang-mla", like((12, 1, 8), (12, 2, 8)), "layer 1 of sglang-mla must have one head"),
    ("sglang-mha", like((12, 1, 8), (12, 1, 8)), "sglang-mha is a list of K and a list of V"),
    ("sglang-mha", lambda: [[torch.zeros(12, 1, 8)]], "a list of K and a list of V, got 1 of list"),
    (
        "sglang-mha",
        lambda: [pair((12, 1, 8), (12, 1, 8)), pair((12, 1, 8))],
        "2 layers of K, 1 of V",
    ),
    (
        "sglang-mha",
        lambda: [pair((12, 1, 8), (12, 1, 8)), pair((12, 1, 8), (12, 2, 8))],
        "layer 1, V of sglang-mha has shape",
    ),
    ("kv-tuples", like((4, 3, 5, 8)), r"layer 0 of kv-tuples must be a pair \(K, V\)"),
    (
        "kv-tuples",
        lambda: [pair((4, 3, 5, 8), (4, 3, 5, 8)), pair((4, 3, 5, 8))],
        r"layer 1 of kv-tuples must be a pair \(K, V\), got 1 of Tensor",
    ),
    (
        "kv-tuples-hnd",
        lambda: [pair((4, 3, 5, 8), (4, 3, 5, 8)), pair((4, 3, 5, 9), (4, 3, 5, 8))],
        r"layer 1, K of kv-tuples-hnd has shape \(4, 3, 5, 9\)",
    ),
]


@pytest.mark.parametrize(("layout", "make", "message"), WRONG)
def test_wrong_tensors_are_named_with_their_layer(
    layout: str, make: Callable[[], Any], message: str
) -> None:
    error = TypeError if "got None" in message else LayoutError
    if message.startswith("layer 1 of vllm-flash-nhd must be L x"):
        message = re.escape(message)
    with pytest.raises(error, match=message):
        PagedKVCache.of(layout, make())


@pytest.mark.parametrize("block_size", [0, -4, 5, 24])
def test_slots_must_be_whole_blocks(block_size: int) -> None:
    with pytest.raises(LayoutError, match=f"12 slots are not whole blocks of {block_size}"):
        PagedKVCache.of("sglang-mla", [torch.zeros(12, 1, 8)], block_size=block_size)


def test_another_block_size_is_refused() -> None:
    with pytest.raises(LayoutError, match="blocks have 3 slots, not 4"):
        PagedKVCache.of("mla", [torch.zeros(4, 3, 8)], block_size=4)


def test_more_slots_than_the_kernel_counts_are_refused() -> None:
    tensor = torch.empty(1 << 31, 1, 1, dtype=torch.uint8)  # never touched: no memory behind it
    with pytest.raises(LayoutError, match="2147483648 slots"):
        PagedKVCache.of("sglang-mla", [tensor])
    assert PagedKVCache.of("sglang-mla", [tensor[1:]]).num_slots == (1 << 31) - 1


def test_a_layout_error_is_a_value_error() -> None:
    assert issubclass(LayoutError, ValueError)
    assert set(ONE_PLANE) == {name for name, layout in LAYOUTS.items() if layout.num_planes == 1}
