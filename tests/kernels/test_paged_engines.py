"""Caches as their engines make and index them, copied token by token by their own indexing.

``parts(layer, slot)`` are the bytes of a token in the order in which a chunk with one plane keeps
them: head by head, plane by plane. Each is a view of the engine's tensors, made as the engine's
source makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kernel_paths import ON_ALL_PATHS, running, sample
from paged_reference import random_bytes
from paged_worlds import check_moves

import kvheap
from kvheap import BlockIds, LayoutError, MemoryFormat, PagedKVCache, TensorMemoryAllocator

U8, BF16 = torch.uint8, torch.bfloat16
Parts = Callable[[int, int], Sequence[torch.Tensor]]
BLOCKS, LAYERS = 5, 2


class Storage:
    """Storages of random bytes, and tensors in them."""

    def __init__(self, device: Any) -> None:
        self.device, self.parts = device, []
        self._random = torch.Generator().manual_seed(11)

    def tensor(
        self, shape: Sequence[int], dtype: torch.dtype = U8, strides: Sequence[int] = ()
    ) -> torch.Tensor:
        if not strides:
            strides = torch.empty(shape, device="meta").stride()
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = self.bytes_of((last + 17) * dtype.itemsize)
        return flat.view(dtype).as_strided(shape, strides, 16)

    def bytes_of(self, size: int) -> torch.Tensor:
        self.parts.append(random_bytes(size, self._random).to(self.device))
        return self.parts[-1]


def check_tokens(
    storage: Storage, cache: PagedKVCache, parts: Parts, chunk_tokens: int = 6
) -> None:
    """Store and load scattered and contiguous slots; compare every byte with ``parts``."""
    count = min(cache.num_slots, 11)
    scattered = torch.randperm(cache.num_slots, generator=torch.Generator().manual_seed(2))
    slot_lists = [scattered[:count].tolist(), list(range(cache.num_slots - count, cache.num_slots))]
    slot_lists.append([slot if i % 3 else -1 for i, slot in enumerate(slot_lists[0])])
    num_chunks = -(-count // chunk_tokens)
    shape = cache.chunk_layout(chunk_tokens, MemoryFormat.KV_MLA_FMT).shape
    chunk_bytes = torch.Size(shape).numel() * cache.dtype.itemsize
    buffer = storage.bytes_of(num_chunks * chunk_bytes + 64)
    heap = TensorMemoryAllocator(buffer, align_bytes=8)
    batch = heap.batched_allocate(shape, cache.dtype, num_chunks, MemoryFormat.KV_MLA_FMT)
    for slots in slot_lists:
        pairs = []
        for layer in range(cache.num_layers):
            for token, slot in enumerate(slots):
                chunk = batch[token // chunk_tokens].tensor
                row = chunk[0, layer, token % chunk_tokens].view(U8)
                for part in parts(layer, slot) if slot >= 0 else ():
                    assert part.dtype == U8
                    pairs.append((part, row[: part.numel()]))
                    row = row[part.numel() :]
                assert slot < 0 or not row.numel()
        check_moves(storage.parts, pairs, lambda: kvheap.store(cache, slots, batch))  # noqa: B023
        check_moves(
            storage.parts,
            [(target, source) for source, target in pairs],
            lambda: kvheap.load(batch, cache, slots),  # noqa: B023
        )


WIDTHS = [(576, 8), (512, 16), (256, 32), (128, 4), (7, 3)]
SHAPES = ["rows", "rows of one head", "pages"]


@ON_ALL_PATHS
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_values_then_scales(widths: tuple[int, int], path: str) -> None:
    at, forms = WIDTHS.index(widths), [(40, shape) for shape in SHAPES]
    for padding, shape in sample([*forms, (0, "rows")], path, at, count=1):
        check_values_then_scales(widths, padding, shape, path)


def check_values_then_scales(widths: tuple[int, int], padding: int, shape: str, path: str) -> None:
    values, scales = widths
    block_size = 64 if (values, shape, path) == (576, "pages", "cpu") else 5
    page = block_size * (values + scales)
    if shape == "pages":
        padding = min(padding, values + scales - 2)
    with running(path) as device:
        storage = Storage(device)
        pages = [
            storage.tensor((BLOCKS, page + padding), strides=(page + padding, 1))
            for _ in range(LAYERS)
        ]
        tensors = pages
        if shape != "pages":
            dims = (BLOCKS, block_size, values + scales)
            strides = (page + padding, values + scales, 1)
            tensors = [p.as_strided(dims, strides, p.storage_offset()) for p in pages]
            if shape == "rows of one head":
                tensors = [tensor.unsqueeze(1) for tensor in tensors]
        cache = PagedKVCache.of("values-scales", tensors, widths=widths, block_size=block_size)
        assert (cache.num_blocks, cache.block_size) == (BLOCKS, block_size)

        def parts(layer: int, slot: int) -> list[torch.Tensor]:
            # vLLM 0.33.0, quantize_and_insert_k_kernel; SGLang 0.5.23, KVLayout.row_addressing
            block, at = divmod(slot, block_size)
            scale = block_size * values + at * scales
            return [
                pages[layer][block, at * values : (at + 1) * values],
                pages[layer][block, scale : scale + scales],
            ]

        check_tokens(storage, cache, parts)


@ON_ALL_PATHS
@pytest.mark.parametrize("head_at", [1, 2])
def test_latents_with_a_dimension_of_one_head(head_at: int, path: str) -> None:
    with running(path) as device:
        storage = Storage(device)
        tensors = [storage.tensor((BLOCKS, 4, 9), BF16, (60, 9, 1)) for _ in range(LAYERS)]
        cache = PagedKVCache.of("mla", [tensor.unsqueeze(head_at) for tensor in tensors])
        check_tokens(storage, cache, lambda i, s: [tensors[i][s // 4, s % 4].view(U8)])


@ON_ALL_PATHS
@pytest.mark.parametrize("padding", [0, 6])
def test_pages_of_whole_rows(padding: int, path: str) -> None:
    """SGLang 0.5.23, ``KVLayout.V41_NEW``: each token's scales behind its data, pages as rows."""
    with running(path) as device:
        storage = Storage(device)
        strides = (4 * 29 + padding, 1)
        pages = [storage.tensor((BLOCKS, 4 * 29), strides=strides) for _ in range(LAYERS)]
        cache = PagedKVCache.of("mla", pages, block_size=4)
        check_tokens(storage, cache, lambda i, s: [pages[i][s // 4, s % 4 * 29 : s % 4 * 29 + 29]])


@ON_ALL_PATHS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", [132, 68])
def test_indexers(row: int, shape: str, path: str) -> None:
    with running(path) as device:
        storage = Storage(device)
        pages = [storage.tensor((BLOCKS, 4 * row)) for _ in range(LAYERS)]
        rows = [page.view(BLOCKS, 4, row) for page in pages]
        tensors = {
            "rows": rows,
            "rows of one head": [tensor.unsqueeze(1) for tensor in rows],
            "pages": pages,
        }[shape]
        block_size = None if row == 132 or shape != "pages" else 4
        cache = PagedKVCache.of("indexer", tensors, block_size=block_size)

        def parts(layer: int, slot: int) -> list[torch.Tensor]:
            # SGLang 0.5.23, IndexKeyCache.move: all keys of a page, then all scales
            page, at = divmod(slot, 4)
            keys, scales = pages[layer][page].split([4 * (row - 4), 4 * 4])
            return [keys.view(4, -1)[at], scales.view(4, -1)[at]]

        check_tokens(storage, cache, parts)


@ON_ALL_PATHS
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def test_rows_of_k_and_v_of_different_size(order: str, path: str) -> None:
    """vLLM 0.33.0, ``flash_attn_diffkv.py``: K and then V along the last dimension."""
    sizes = {"L": LAYERS, "B": BLOCKS, "H": 3, "N": 4, "C": 12 + 8}
    with running(path) as device:
        storage = Storage(device)
        physical = storage.tensor([sizes[dim] for dim in order], BF16)
        tensor = physical.permute([order.index(dim) for dim in "LBHNC"])
        name = f"vllm-{order.lower()}"
        cache = PagedKVCache.of(name, tensor, v_head_dim=8)
        assert [plane.row_bytes for plane in cache.planes] == [24, 16]
        assert cache.head_dim == 12

        def parts(layer: int, slot: int) -> list[torch.Tensor]:
            heads = tensor[layer][slot // 4, :, slot % 4].split([12, 8], dim=-1)
            return [side[head].view(U8) for head in range(3) for side in heads]

        check_tokens(storage, cache, parts)


@ON_ALL_PATHS
@pytest.mark.parametrize("layout", ["sglang-mha", "sglang-mha-hnd", "kv-tuples", "kv-tuples-hnd"])
def test_tensors_of_k_and_v_of_different_size(layout: str, path: str) -> None:
    """SGLang 0.5.23, ``MHATokenToKVPool._kv_buffer_shapes``: ``head_dim`` and ``v_head_dim``."""
    with running(path) as device:
        storage = Storage(device)
        dims = {
            "sglang-mha": lambda dim: (BLOCKS * 4, 3, dim),
            "sglang-mha-hnd": lambda dim: (BLOCKS, 3, 4, dim),
            "kv-tuples": lambda dim: (BLOCKS, 4, 3, dim),
            "kv-tuples-hnd": lambda dim: (BLOCKS, 3, 4, dim),
        }[layout]
        keys = [storage.tensor(dims(12), BF16) for _ in range(LAYERS)]
        values = [storage.tensor(dims(8), BF16) for _ in range(LAYERS)]
        tensors: Any = (keys, values)
        if layout.startswith("kv"):
            tensors = list(zip(keys, values, strict=True))
        cache = PagedKVCache.of(layout, tensors, block_size=4)

        def row(tensor: torch.Tensor, slot: int, head: int) -> torch.Tensor:
            if layout == "sglang-mha":
                return tensor[slot, head].view(U8)
            block, at = divmod(slot, 4)
            place = (block, head, at) if layout.endswith("hnd") else (block, at, head)
            return tensor[place].view(U8)

        def parts(layer: int, slot: int) -> list[torch.Tensor]:
            sides = (keys[layer], values[layer])
            return [row(side, slot, head) for head in range(3) for side in sides]

        check_tokens(storage, cache, parts)


def test_heads_of_k_and_v_of_different_size() -> None:
    storage = Storage("cpu")
    tensor = storage.tensor((LAYERS, BLOCKS, 4, 3, 20), BF16).transpose(2, 3)
    cache = PagedKVCache.of("vllm-lbnhc", tensor, v_head_dim=8)
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=U8))
    whole = heap.batched_store(cache, range(9), 9)
    assert (whole.fmt, whole.shape) == (MemoryFormat.KV_MLA_FMT, (1, LAYERS, 9, 60))
    part = heap.batched_allocate((1, LAYERS, 9, 20), BF16, 1, MemoryFormat.KV_MLA_FMT)
    kvheap.store(cache, range(9), part, heads=slice(1, 2))
    assert torch.equal(part[0].tensor.view(U8), whole[0].tensor[..., 20:40].view(U8))


TWO_SIZES: list[tuple[MemoryFormat, str]] = [
    (MemoryFormat.KV_2LTD, r"KV_2LTD holds K and V of one size.*\[24, 16\] bytes.*KV_MLA_FMT"),
    (MemoryFormat.KV_2TD, "KV_2TD holds K and V of one size"),
    (MemoryFormat.KV_2PHTLD, "KV_2PHTLD holds K and V of one size"),
]


@pytest.mark.parametrize(("fmt", "message"), TWO_SIZES, ids=lambda value: str(value)[:12])
def test_two_sizes_need_one_plane(fmt: MemoryFormat, message: str) -> None:
    keys, values = torch.zeros(20, 3, 12, dtype=BF16), torch.zeros(20, 3, 8, dtype=BF16)
    cache = PagedKVCache.of("sglang-mha", ([keys], [values]), block_size=4)
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=U8))
    with pytest.raises(ValueError, match=message):
        heap.batched_store(cache, range(8), 8, fmt)
    chunks = heap.batched_allocate((2, 1, 8, 30), BF16, 1, MemoryFormat.KV_2LTD)
    with pytest.raises(ValueError, match="planes of unequal size need chunks with one plane"):
        kvheap.store(cache, range(8), chunks)


@ON_ALL_PATHS
@pytest.mark.parametrize(("row", "heads"), [(104, 3), (264, 2), (9, 3), (584, 1)])
def test_rows_as_they_are(row: int, heads: int, path: str) -> None:
    """vLLM 0.33.0: ``state_content_bytes`` of a head and slot, such as TurboQuant's."""
    with running(path) as device:
        storage = Storage(device)
        tensors = [storage.tensor((BLOCKS, 4, heads, row)).transpose(1, 2) for _ in range(LAYERS)]
        cache = PagedKVCache.of("vllm-packed", tensors)
        check_tokens(
            storage, cache, lambda i, s: [tensors[i][s // 4, head, s % 4] for head in range(heads)]
        )


@ON_ALL_PATHS
def test_scales_of_each_token_and_head(path: str) -> None:
    """vLLM 0.33.0, ``triton_attn.py``: ``[K | K scale | V | V scale]`` for each head and slot."""
    with running(path) as device:
        storage = Storage(device)
        tensor = storage.tensor((LAYERS, BLOCKS, 3, 4, 2 * (8 + 4)))
        cache = PagedKVCache.of("vllm-lbhnc", tensor)
        assert [plane.row_bytes for plane in cache.planes] == [12, 12]
        check_tokens(
            storage, cache, lambda i, s: [tensor[i, s // 4, head, s % 4] for head in range(3)]
        )


@ON_ALL_PATHS
@pytest.mark.parametrize("is_flat", [False, True], ids=["with a head", "without"])
def test_parts_of_unequal_width_and_dtype(is_flat: bool, path: str) -> None:
    """vLLM-Ascend's latent, rope and dsa, as LMCache 0.5.6 has them: NL_X_NP_X_NB_BS_ONE_HS."""
    kinds = [(512, BF16), (64, BF16), (128, torch.int8)]
    with running(path) as device:
        storage = Storage(device)
        layers = [
            [storage.tensor((BLOCKS, 4, 1, width), dtype) for width, dtype in kinds]
            for _ in range(LAYERS)
        ]
        given = [tuple(t.squeeze(2) if is_flat else t for t in layer) for layer in layers]
        cache = PagedKVCache.of("plane-tuples", given)
        assert (cache.dtype, cache.head_dim) == (U8, 2 * 512 + 2 * 64 + 128)
        check_tokens(storage, cache, lambda i, s: [t[s // 4, s % 4, 0].view(U8) for t in layers[i]])


def blocks_as_bytes(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """The memory of a dense block, in whatever order its dimensions are."""
    page = tensor[block]
    size = page.numel()
    return page.as_strided((size,), (1,), page.storage_offset()).view(U8)


class TestOpaque:
    @ON_ALL_PATHS
    def test_pages_of_different_size_and_dtype_for_each_layer(self, path: str) -> None:
        """A latent and an indexer's page share the ids of their blocks."""
        with running(path) as device:
            storage = Storage(device)
            layers = [
                (
                    storage.tensor((BLOCKS, 1, 4, 9), BF16, (50, 36, 9, 1)),
                    storage.tensor((BLOCKS, 4 * 132)),
                )
                for _ in range(LAYERS)
            ]
            cache = PagedKVCache.of("opaque", layers)
            assert (cache.num_layers, cache.num_planes, cache.dtype) == (LAYERS, 2, U8)
            check_tokens(
                storage, cache, lambda i, b: [blocks_as_bytes(part, b) for part in layers[i]]
            )

    @ON_ALL_PATHS
    def test_states_side_by_side_in_a_page(self, path: str) -> None:
        """vLLM 0.33.0's Mamba: conv and ssm state, views of one page of bytes."""
        with running(path) as device:
            storage = Storage(device)
            layers = []
            for _ in range(LAYERS):
                page = storage.tensor((BLOCKS, 400))
                conv = page[:, :60].view(BF16).unflatten(1, (3, 10))
                ssm = page[:, 64:384].view(torch.float32).unflatten(1, (2, 5, 8))
                layers.append([conv, ssm])
            cache = PagedKVCache.of("opaque", layers)
            assert [plane.row_bytes for plane in cache.planes] == [60, 320]
            check_tokens(
                storage, cache, lambda i, b: [blocks_as_bytes(part, b) for part in layers[i]]
            )

    @ON_ALL_PATHS
    def test_a_list_of_unlike_pages_is_one_layer(self, path: str) -> None:
        with running(path) as device:
            storage = Storage(device)
            pages = [
                storage.tensor((BLOCKS, 4, 9), BF16),
                storage.tensor((BLOCKS, 4 * 132)),
                storage.tensor((BLOCKS, 2, 5), torch.float32),
            ]
            cache = PagedKVCache.of("opaque", {f"layers.{i}": page for i, page in enumerate(pages)})
            assert (cache.num_layers, cache.num_planes) == (1, 3)
            check_tokens(storage, cache, lambda _, b: [blocks_as_bytes(page, b) for page in pages])

    @ON_ALL_PATHS
    def test_pages_of_one_size_and_two_dtypes_are_layers(self, path: str) -> None:
        with running(path) as device:
            storage = Storage(device)
            pages = [storage.tensor((BLOCKS, 6, 4), BF16), storage.tensor((BLOCKS, 48))]
            cache = PagedKVCache.of("opaque", pages)
            assert (cache.num_layers, cache.num_planes, cache.dtype) == (2, 1, U8)
            check_tokens(storage, cache, lambda i, b: [blocks_as_bytes(pages[i], b)])

    @ON_ALL_PATHS
    @pytest.mark.parametrize("order", ["LBHNC", "BLHNC", "LBNHC"])
    def test_one_tensor_of_all_layers(self, order: str, path: str) -> None:
        sizes = {"L": LAYERS, "B": BLOCKS, "H": 3, "N": 4, "C": 10}
        with running(path) as device:
            storage = Storage(device)
            physical = storage.tensor([sizes[dim] for dim in order], BF16)
            tensor = physical.permute([order.index(dim) for dim in "LBHNC"])
            cache = PagedKVCache.of("opaque", tensor)
            assert (cache.num_layers, cache.num_blocks) == (LAYERS, BLOCKS)
            check_tokens(storage, cache, lambda i, b: [blocks_as_bytes(tensor[i], b)])

    @ON_ALL_PATHS
    def test_a_transposed_view_of_a_dense_block(self, path: str) -> None:
        with running(path) as device:
            storage = Storage(device)
            tensors = [
                storage.tensor((BLOCKS, 4, 3, 10), BF16).permute(0, 2, 3, 1) for _ in range(LAYERS)
            ]
            cache = PagedKVCache.of("opaque", tensors)
            check_tokens(storage, cache, lambda i, b: [blocks_as_bytes(tensors[i], b)])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: torch.zeros(5, 3, 4), r"opaque is L x \[B, ...\].*got a tensor of shape"),
            (lambda: [torch.zeros(5, 3, 4, 8)[:, :, ::2]], "layer 0: each block must be contig"),
            (lambda: [torch.zeros(5, 3), torch.zeros(6, 4)], "must have the same B"),
            (lambda: [(torch.zeros(5, 3), torch.zeros(6, 4))], "must have the same B"),
            (lambda: [torch.zeros(5, 3), torch.zeros(0, 3)], "is empty.*leave out layers"),
            (lambda: [torch.zeros(5)], "layer 0 of opaque must be"),
            (lambda: [torch.zeros(3, 5, 2, 4, 8).permute(1, 0, 2, 3, 4)[:, :2]], "contiguous"),
        ],
    )  # fmt: skip
    def test_what_is_not_whole_blocks_is_refused(self, make: Any, message: str) -> None:
        with pytest.raises(LayoutError, match=message):
            PagedKVCache.of("opaque", make())


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("mla", torch.zeros(5, 64, 584, dtype=U8), {}, r"584 bytes.*values-scales, widths=\(576, 8\)"),
    ("mla", torch.zeros(5, 1, 64, 584, dtype=torch.int8), {}, "584 bytes.*values-scales"),
    ("mla", torch.zeros(5, 64, 132, dtype=U8), {}, "132 bytes.*use indexer"),
    ("sglang-mla", torch.zeros(320, 1, 584, dtype=U8), {}, "584 bytes.*values-scales"),
    ("indexer", torch.zeros(5, 64, 584, dtype=U8), {}, "up to 128 values.*use values-scales"),
    ("indexer", torch.zeros(5, 64 * 584, dtype=U8), {"block_size": 64}, "use values-scales"),
    ("indexer", torch.zeros(5, 64 * 132 + 4, dtype=U8), {}, "blocks of 8452 bytes.*block_size"),
    ("values-scales", torch.zeros(5, 64, 584, dtype=U8), {}, r"widths=\(values, scales\)"),
    ("values-scales", torch.zeros(5, 64, 584, dtype=U8), {"widths": (576, 0)}, r"widths=\(values"),
    ("values-scales", torch.zeros(5, 4, 584, dtype=U8), {"widths": (512, 16)}, "584 bytes, not 52"),
    ("values-scales", torch.zeros(5, 64, 292, dtype=BF16), {"widths": (288, 4)}, "must be bytes"),
    ("values-scales", torch.zeros(5, 37440, dtype=U8), {"widths": (576, 8)}, "padded blocks nee"),
    ("values-scales", torch.zeros(5, 100, dtype=U8), {"widths": (576, 8), "block_size": 4}, "not"),
    ("values-scales", torch.zeros(5, 2, 64, 584, dtype=U8), {"widths": (576, 8)}, "must be L x"),
    ("mla", torch.zeros(5, 4, 8), {"widths": (4, 4)}, "widths are for values-scales"),
    ("mla", torch.zeros(5, 4, 8), {"v_head_dim": 4}, "v_head_dim is for layouts with heads of V"),
    (
        "vllm-flashinfer-nhd",
        torch.zeros(5, 2, 4, 3, 16),
        {"v_head_dim": 8},
        "V of vllm-flashinfer-nhd has heads of 16 elements, not v_head_dim=8",
    ),
    ("vllm-lbhnc", torch.zeros(5, 3, 4, 16), {"v_head_dim": 16}, "cannot end in V of v_head_dim=1"),
    ("vllm-lbhnc", torch.zeros(5, 3, 4, 15), {}, "if V differs from K in size, give v_head_dim"),
    ("vllm-cpu", torch.zeros(5, 3, 4, 16), {"v_head_dim": 6}, "K and V have the same size"),
    ("plane-tuples", torch.zeros(5, 4, 1, 8), {}, "must be one or more tensors"),
    ("indexer", torch.zeros(0, 8448, dtype=U8), {}, "is empty.*leave out layers that keep nothing"),
    *(
        ("indexer", torch.zeros(5, 64 * row, dtype=U8), {"block_size": size}, "not blocks of ")
        for row, sizes in ((132, (32, 65, 80, 100, 124, 128)), (68, (32, 33, 63, 128)))
        for size in sizes
    ),
    *(
        (
            "values-scales",
            torch.zeros(5, page, dtype=U8),
            {"widths": (576, 8), "block_size": size},
            f"have room for 64 rows of 584.*block_size={size} does not fit",
        )
        for page in (37376, 37440)
        for size in (1, 32, 63)
    ),
]


@pytest.mark.parametrize(("layout", "tensor", "given", "message"), REFUSED)
def test_what_would_be_read_wrongly_is_refused(
    layout: str, tensor: torch.Tensor, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        PagedKVCache.of(layout, [tensor], **given)


NO_NUMBERS: list[Any] = [64.0, 0.5, True, "64", "x", (64,), torch.tensor(1.5)]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(
    ("layout", "tensor", "given"),
    [
        ("vllm-lbhnc", torch.zeros(5, 3, 4, 128), {"v_head_dim"}),
        ("sglang-mla", torch.zeros(64, 1, 8), {"block_size"}),
        ("mla", torch.zeros(5, 4, 8), {"v_head_dim", "block_size"}),
        ("values-scales", torch.zeros(5, 64, 584, dtype=U8), {"widths"}),
    ],
)
def test_numbers_are_integers(layout: str, tensor: Any, given: set[str], value: Any) -> None:
    for name in given:
        for number in ((value, 8), (576, value)) if name == "widths" else (value,):
            with pytest.raises(TypeError, match=f"{name}.* must be an integer, got"):
                PagedKVCache.of(layout, [tensor], **{name: number})


@pytest.mark.parametrize("widths", [584, "ab", (576,), (576, 8, 0), (), [[576, 8]]])
def test_widths_are_two(widths: Any) -> None:
    with pytest.raises(LayoutError, match=r"needs widths=\(values, scales\)"):
        PagedKVCache.of("values-scales", [torch.zeros(5, 64, 584, dtype=U8)], widths=widths)


def test_numbers_of_numpy_are_integers_too() -> None:
    pages = [torch.zeros(5, 64, 584, dtype=U8)]
    widths: Any = [np.int64(576), np.uint8(8)]
    cache = PagedKVCache.of("values-scales", pages, widths=widths, block_size=np.int32(64))
    assert [plane.row_bytes for plane in cache.planes] == [576, 8]


def test_layers_without_rows_are_refused() -> None:
    """SGLang 0.5.23 keeps 0 pages for layers that reuse the indexer of another."""
    tensors = [torch.zeros(5, 8448, dtype=U8), torch.zeros(0, 8448, dtype=U8)]
    with pytest.raises(LayoutError, match="layer 1 of indexer is empty"):
        PagedKVCache.of("indexer", tensors)


def test_some_layers_of_parts() -> None:
    storage = Storage("cpu")
    layers = [
        (storage.tensor((BLOCKS, 4, 1, 6)), storage.tensor((BLOCKS, 4, 1, 3))) for _ in range(3)
    ]
    cache = PagedKVCache.of("plane-tuples", layers)
    heap = TensorMemoryAllocator(torch.zeros(1 << 12, dtype=U8))
    batch = heap.batched_store(cache, BlockIds([2, 0]), 8, layers=range(1, 3))
    found = batch[0].tensor
    assert found.shape == (1, 2, 8, 9)
    for layer, slot in ((1, 8), (2, 3)):
        row = found[0, layer - 1, 0 if slot == 8 else 7]
        block, at = divmod(slot, 4)
        assert torch.equal(row, torch.cat([part[block, at, 0] for part in layers[layer]]))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((568, 16), "rows of 584 bytes have values of 576 bytes, then scales of 8"),
        ((8, 576), "rows of 584 bytes have values of 576 bytes"),
        ((583, 1), "rows of 584 bytes have values of 576 bytes"),
        ((520, 8), "rows of 528 bytes have values of 512 bytes, then scales of 16"),
        ((272, 16), "rows of 288 bytes have values of 256 bytes, then scales of 32"),
        ((66, 66), "rows of 132 bytes have values of 128 bytes, then scales of 4"),
        ((4, 64), "rows of 68 bytes have values of 64 bytes, then scales of 4"),
        ((8, 592), "the values come first, and have more bytes than their scales"),
        ((300, 300), "the values come first"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_page", [False, True])
def test_widths_of_the_same_sum(widths: tuple[int, int], message: str, is_page: bool) -> None:
    """What is known of records of this size, and of scales, is not what was told."""
    row = sum(widths)
    shape = (5, 64 * row) if is_page else (5, 64, row)
    with pytest.raises(LayoutError, match=re.escape(f"widths={widths}: {message}")):
        PagedKVCache.of(
            "values-scales", [torch.zeros(shape, dtype=U8)], widths=widths, block_size=64
        )


def test_widths_that_nothing_contradicts() -> None:
    """Rows of 600 bytes are of no known engine: only the caller can say where they are split."""
    pages = [torch.zeros(5, 64, 600, dtype=U8)]
    for widths in ((592, 8), (576, 24), (512, 88), (598, 2)):
        cache = PagedKVCache.of("values-scales", pages, widths=widths)
        assert tuple(plane.row_bytes for plane in cache.planes) == widths
