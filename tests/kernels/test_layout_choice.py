"""Which engine layout is detected, by tensors and by what the engine knows; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvheap import LayoutError, PagedKVCache

U8, BF16 = torch.uint8, torch.bfloat16


def layers(*shape: int, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for _ in range(2)]


def latent(*shape: int) -> list[torch.Tensor]:
    """As vLLM registers it since 0.26: ``[B, 1, N, C]``."""
    return [tensor.unsqueeze(1) for tensor in layers(*shape)]


def known(heads: int, dim: int, block: int, **more: Any) -> dict[str, Any]:
    return {"num_kv_heads": heads, "head_dim": dim, "block_size": block, **more}


FOUND: list[tuple[str, Any, dict[str, Any], str]] = [
    (
        "two layers of pairs, V smaller than K",
        [(torch.zeros(5, 16, 3, 192), torch.zeros(5, 16, 3, 128)) for _ in range(2)],
        known(3, 192, 16, v_head_dim=128),
        "kv-tuples",
    ),
    (
        "three layers of pairs",
        [layers(5, 16, 3, 64) for _ in range(3)],
        known(3, 64, 16),
        "kv-tuples",
    ),
    (
        "three blocks of all layers",
        torch.zeros(3, 8, 2, 16, 3, 64),
        known(3, 64, 16),
        "vllm-cross-layer",
    ),
    ("mla of 4 dimensions", latent(5, 16, 576), known(1, 576, 16), "mla"),
    ("slots before the head", layers(5, 16, 1, 576), known(1, 576, 16), "mla"),
    ("mla, a backend of vLLM", latent(5, 16, 576), known(1, 576, 16, backend="FLASHMLA"), "mla"),
    (
        "one head of K and V",
        layers(5, 1, 16, 256),
        known(1, 128, 16, backend="FLASH_ATTN"),
        "vllm-lbhnc",
    ),
    (
        "half of a latent, told",
        layers(5, 1, 16, 576),
        known(1, 288, 16, backend="FLASH_ATTN"),
        "vllm-lbhnc",
    ),
    ("vLLM on a CPU", layers(5, 2, 16, 256), known(2, 128, 16, backend="CPU_ATTN"), "vllm-cpu"),
    (
        "triton, not on a CPU",
        layers(5, 2, 16, 256),
        known(2, 128, 16, backend="TRITON_ATTN"),
        "vllm-lbhnc",
    ),
    (
        "an order that is not vLLM's on a CPU",
        [t.transpose(1, 2) for t in layers(5, 16, 3, 256)],
        known(3, 128, 16),
        "vllm-lbnhc",
    ),
    (
        "V smaller than K",
        [t.transpose(1, 2) for t in layers(5, 16, 3, 320)],
        known(3, 192, 16, v_head_dim=128),
        "vllm-lbnhc",
    ),
    (
        "V smaller than K, in lists",
        (layers(48, 3, 192), layers(48, 3, 128)),
        known(3, 192, 16, v_head_dim=128),
        "sglang-mha",
    ),
    (
        "SGLang's HND",
        (3 * layers(5, 3, 16, 64), 3 * layers(5, 3, 16, 64)),
        known(3, 64, 16),
        "sglang-mha-hnd",
    ),
    ("an indexer of 4 dimensions", layers(5, 1, 64, 132, dtype=U8), known(1, 128, 64), "indexer"),
    ("an indexer of SGLang", layers(5, 64 * 132, dtype=U8), known(1, 128, 64), "indexer"),
    (
        "an indexer, by its backend",
        layers(5, 64, 132, dtype=U8),
        known(1, 132, 64, backend="DEEPSEEK_V32_INDEXER"),
        "indexer",
    ),
    (
        "DeepSeek-V4, by its dtype",
        layers(5, 64, 584, dtype=U8),
        known(1, 584, 64, kv_cache_dtype="fp8_ds_mla"),
        "values-scales",
    ),
    (
        "DeepSeek-V4 of 4 dimensions, its head size",
        layers(5, 1, 64, 584, dtype=U8),
        known(1, 512, 64),
        "values-scales",
    ),
    (
        "DeepSeek-V4 of SGLang, padded",
        layers(5, 37440, dtype=U8),
        known(1, 512, 64),
        "values-scales",
    ),
    (
        "fp8 pages of SGLang",
        layers(5, 64 * 512, dtype=torch.float8_e4m3fn),
        known(1, 512, 64),
        "mla",
    ),
    ("K without V", layers(80, 3, 64), known(3, 64, 16), "sglang-rows"),
    ("scales of slots", layers(80, 12, dtype=U8), known(1, 12, 16), "sglang-rows"),
    (
        "pairs of slots",
        [(tensor, tensor.clone()) for tensor in (*layers(80, 3, 64), *layers(80, 3, 64))],
        known(3, 64, 16),
        "kv-tuples-slots",
    ),
    (
        "DeepSeek-V4.1 of vLLM",
        layers(5, 64, 528, dtype=U8),
        known(1, 512, 64, kv_cache_dtype="fp8_ds_mla"),
        "mla",
    ),
    ("DeepSeek-V3.2", latent(5, 64, 656), known(1, 576, 64, kv_cache_dtype="fp8_ds_mla"), "mla"),
    ("NVFP4", layers(5, 6, 16, 72, dtype=U8), known(3, 128, 16), "vllm-nvfp4"),
    (
        "NVFP4, by its dtype",
        layers(5, 6, 16, 72, dtype=U8),
        known(3, 128, 16, kv_cache_dtype="nvfp4", backend="FLASHINFER"),
        "vllm-nvfp4",
    ),
    (
        "TurboQuant",
        layers(5, 3, 16, 104, dtype=U8),
        known(3, 128, 16, kv_cache_dtype="turboquant_k3v4_nc"),
        "vllm-packed",
    ),
    (
        "scales of each token and head",
        [tensor.transpose(1, 2) for tensor in layers(5, 16, 3, 2 * (128 + 4), dtype=U8)],
        known(3, 128, 16, kv_cache_dtype="fp8_per_token_head"),
        "vllm-lbnhc",
    ),
    (
        "scales of each token of a latent",
        layers(5, 1, 16, 576 + 8, dtype=torch.int8),
        known(1, 576, 16, kv_cache_dtype="int8_per_token_head", backend="TRITON_MLA"),
        "vllm-packed",
    ),
    (
        "V as large as K",
        [tensor.transpose(1, 2) for tensor in layers(5, 16, 3, 128)],
        known(3, 64, 16, v_head_dim=64),
        "vllm-lbnhc",
    ),
    ("two head slots", layers(5, 2, 16, 3 * 64), known(3, 64, 16, backend="B12X"), "vllm-packed"),
    (
        "SGLang's backend of any model",
        layers(80, 1, 576),
        known(1, 576, 16, backend="fa3"),
        "sglang-mla",
    ),
    (
        "SGLang's backend of latent attention",
        layers(80, 1, 576),
        known(1, 576, 16, backend="flashmla"),
        "sglang-mla",
    ),
]


@pytest.mark.parametrize(
    ("tensors", "facts", "name"), [x[1:] for x in FOUND], ids=[x[0] for x in FOUND]
)
def test_found(tensors: Any, facts: dict[str, Any], name: str) -> None:
    assert PagedKVCache.detect(tensors, **facts).layout.name == name


ASKED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("vLLM on a CPU or not", layers(5, 2, 16, 256), known(2, 128, 16), "vllm-lbhnc, vllm-cpu"),
    (
        "SGLang's name of a backend",
        layers(5, 2, 16, 256),
        known(2, 128, 16, kv_cache_dtype="auto"),
        "vllm-lbhnc, vllm-cpu",
    ),
    (
        "half of a latent",
        [t.transpose(1, 2) for t in layers(5, 16, 1, 576)],
        known(1, 288, 16),
        "mla",
    ),
    ("a row of 584 bytes", layers(5, 64, 584, dtype=U8), known(1, 584, 64), "values-scales, mla"),
    (
        "a row of 584 bytes, 4 dimensions",
        layers(5, 1, 64, 584, dtype=U8),
        known(1, 584, 64),
        "values-scales, mla",
    ),
    (
        "a row of 528 bytes",
        layers(5, 64, 528, dtype=torch.int8),
        known(1, 528, 64),
        "mla, values-scales",
    ),
    ("a row of 288 bytes", layers(5, 64, 288, dtype=U8), known(1, 288, 64), "mla, values-scales"),
    ("a row of 132 bytes", layers(5, 64, 132, dtype=U8), known(1, 132, 64), "indexer, mla"),
    (
        "a row of 584 bytes that may be a latent and its scales",
        layers(5, 1, 64, 584, dtype=torch.int8),
        known(1, 576, 64, backend="TRITON_MLA"),
        "values-scales, mla",
    ),
    (
        "two heads, or a slot for K and a slot for V",
        [tensor.transpose(1, 2) for tensor in layers(5, 16, 2, 128)],
        known(2, 64, 16),
        "vllm-lbnhc, vllm-packed",
    ),
    (
        "the same of a backend that may have both",
        [tensor.transpose(1, 2) for tensor in layers(5, 16, 2, 128)],
        known(2, 64, 16, backend="ROCM_AITER_FA"),
        "vllm-lbnhc, opaque",
    ),
    (
        "DeepSeek-V4.1 of SGLang, one way or the other",
        layers(5, 64 * 528, dtype=U8),
        known(1, 512, 64),
        "values-scales, mla",
    ),
    (
        "two layers of pairs of slots, or K and V of two layers",
        (layers(80, 3, 64), layers(80, 3, 64)),
        known(3, 64, 16),
        "sglang-mha, kv-tuples-slots",
    ),
    (
        "two layers of pairs, or K and V of two layers",
        (layers(5, 3, 16, 64), layers(5, 3, 16, 64)),
        known(3, 64, 16),
        "sglang-mha-hnd, kv-tuples-hnd",
    ),
    (
        "two layers of pairs with slots first, or K and V of two layers",
        (layers(5, 16, 3, 64), layers(5, 16, 3, 64)),
        known(3, 64, 16),
        "kv-tuples, sglang-mha",
    ),
    (
        "the same of a backend of vLLM",
        (layers(5, 16, 3, 64), layers(5, 16, 3, 64)),
        known(3, 64, 16, backend="FLASH_ATTN"),
        "kv-tuples, sglang-mha",
    ),
    (
        "two blocks of all layers, or K and V of pages of two layers",
        torch.zeros(2, 8, 2, 16, 3, 64),
        known(3, 64, 16),
        "vllm-cross-layer, a host pool of SGLang (not among the names)",
    ),
    (
        "the same with heads before slots",
        torch.zeros(2, 8, 2, 3, 16, 64),
        known(3, 64, 16),
        "trtllm, a host pool of SGLang (not among the names)",
    ),
    (
        "two blocks of all layers, or K and V of pages of two heads",
        torch.zeros(2, 8, 2, 16, 2, 64),
        known(2, 64, 16),
        "vllm-cross-layer, a host pool of SGLang (not among the names)",
    ),
]


@pytest.mark.parametrize(
    ("tensors", "facts", "names"), [x[1:] for x in ASKED], ids=[x[0] for x in ASKED]
)
def test_what_may_be_two_things_is_not_guessed(
    tensors: Any, facts: dict[str, Any], names: str
) -> None:
    with pytest.raises(
        LayoutError, match="several engine layouts fit, choose one by name"
    ) as caught:
        PagedKVCache.detect(tensors, **facts)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert names in lines[0]
    assert "backend=" in lines[2]


@pytest.mark.parametrize(
    "backend", ["CUSTOM", "FOO", "NO_ATTENTION", "MAMBA2", "MINIMAX_M3_SPARSE"]
)
@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        (layers(6, 2, 16, 128), known(2, 64, 16)),
        (layers(6, 3, 16, 128), known(3, 64, 16)),
        (layers(6, 1, 16, 576), known(1, 288, 16)),
        ([t.transpose(1, 2) for t in layers(6, 16, 2, 128)], known(2, 64, 16)),
    ],
)
def test_a_backend_that_is_not_known_tells_nothing(
    tensors: Any, facts: dict[str, Any], backend: str
) -> None:
    for told in ({}, {"backend": backend}):
        with pytest.raises(LayoutError, match="several engine layouts fit"):
            PagedKVCache.detect(tensors, **facts, **told)


NONE: list[tuple[str, Any, dict[str, Any]]] = [
    ("NVFP4 as K and V", layers(5, 6, 16, 72, dtype=U8), known(6, 36, 16)),
    (
        "a CPU's backend and another order",
        [t.transpose(1, 2) for t in layers(5, 16, 3, 256)],
        known(3, 128, 16, backend="CPU_ATTN"),
    ),
    (
        "K and V with a backend of latent attention",
        layers(2, 5, 16, 3, 64),
        known(3, 64, 16, backend="TRITON_MLA"),
    ),
    (
        "a latent with a backend of K and V",
        latent(5, 16, 576),
        known(1, 576, 16, backend="FLASH_ATTN"),
    ),
    (
        "another size of V",
        [t.transpose(1, 2) for t in layers(5, 16, 3, 320)],
        known(3, 192, 16, v_head_dim=64),
    ),
    (
        "fp8 rows of NVFP4's dtype",
        layers(5, 6, 16, 64, dtype=U8),
        known(3, 128, 16, kv_cache_dtype="nvfp4"),
    ),
    ("rows of a width that no indexer has", layers(5, 64, 100, dtype=U8), known(1, 96, 64)),
    ("pages of such rows", layers(5, 64 * 100, dtype=U8), known(1, 96, 64)),
    ("rows of another width", layers(5, 64, 600, dtype=U8), known(1, 512, 64)),
    ("no tensors", [], known(1, 8, 4)),
    ("text", "abc", known(1, 8, 4)),
    ("an empty layer", layers(0, 16, 576), known(1, 576, 16)),
]


@pytest.mark.parametrize(("tensors", "facts"), [x[1:] for x in NONE], ids=[x[0] for x in NONE])
def test_none(tensors: Any, facts: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match=r"no engine layout fits H, C, N = \(") as caught:
        PagedKVCache.detect(tensors, **facts)
    assert len(str(caught.value).splitlines()) == 3
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("told", [{"kv_cache_dtype": BF16}, {"backend": object}])
def test_names_are_text(told: Any) -> None:
    with pytest.raises(TypeError, match="must be the engine's name of it, a str, got"):
        PagedKVCache.detect(latent(5, 16, 576), **known(1, 576, 16, **told))


def test_a_backend_that_mixes_tokens_is_named() -> None:
    with pytest.raises(LayoutError, match="ROCM_ATTN mixes the tokens of a block: use opaque"):
        PagedKVCache.detect(layers(5, 2, 64, 192), **known(3, 64, 64, backend="ROCM_ATTN"))


def test_a_message_says_what_was_known_and_what_nearly_fits() -> None:
    tensors = layers(2, 5, 16, 3, 64)
    with pytest.raises(LayoutError) as caught:
        PagedKVCache.detect(tensors, **known(4, 64, 16, backend="FLASH_ATTN"))
    assert str(caught.value) == (
        "no engine layout fits H, C, N = (4, 64, 16), backend='FLASH_ATTN':\n"
        "vllm-flash-nhd: H, C, N would be (3, 64, 16); vllm-flash-hnd: blocks have 3 slots, not "
        "16\n"
        "PagedKVCache.of(name, tensors) tells more about one engine layout"
    )


@pytest.mark.parametrize("value", [64.0, True, "64", None, (64,)])
@pytest.mark.parametrize("name", ["num_kv_heads", "head_dim", "block_size", "v_head_dim"])
@pytest.mark.parametrize("dtype", [None, "int4_per_token_head"])
def test_numbers_are_integers(name: str, value: Any, dtype: str | None) -> None:
    facts = known(3, 64, 16, kv_cache_dtype=dtype) | {name: value}
    for tensors in (layers(5, 3, 16, 128), layers(5, 64, 584, dtype=U8), [layers(80, 3, 64)] * 3):
        if name == "v_head_dim" and value is None:
            continue
        with pytest.raises(TypeError, match=f"{name} must be an integer, got "):
            PagedKVCache.detect(tensors, **facts)


@pytest.mark.parametrize("name", ["num_kv_heads", "head_dim"])
@pytest.mark.parametrize("value", [64.0, True, "64"])
def test_numbers_of_transformers_are_integers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, got "):
        PagedKVCache.of_transformers([layers(2, 3, 16, 64)], **{name: value})


@pytest.mark.parametrize("layout", ["sglang-mha", "sglang-mha-hnd"])
@pytest.mark.parametrize("tensors", [(1, 2), ([torch.zeros(80, 3, 64)], None), ("ab", "cd")])
def test_lists_of_k_and_v_are_lists(layout: str, tensors: Any) -> None:
    with pytest.raises(LayoutError, match=f"{layout} is a list of K and a list of V, got"):
        PagedKVCache.of(layout, tensors)
