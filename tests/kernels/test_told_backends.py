"""What a backend or a dtype says about a cache: one that may keep it in several ways says less.

The tensors are built by hand, as the code of vLLM 0.33.0 makes them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvheap import LayoutError, PagedKVCache, TensorMemoryAllocator

U8 = torch.uint8


def layers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for _ in range(3)]


def known(heads: int, dim: int, block: int, **more: Any) -> dict[str, Any]:
    return {"num_kv_heads": heads, "head_dim": dim, "block_size": block, **more}


def asked(tensors: Any, other: str, **facts: Any) -> None:
    with pytest.raises(LayoutError, match=rf"several engine layouts fit.*{other}"):
        PagedKVCache.detect(tensors, **facts)


class TestRowsAsWideAsThoseOfNVFP4:
    """Bytes of K and V with a float32 behind each: 2 x (32 + 4) = 72, which NVFP4 has for 128."""

    CASES = (
        ("int4_per_token_head", 64),
        ("int8_per_token_head", 32),
        ("fp8_per_token_head", 32),
        ("int4_per_token_head", 136),  # 144 bytes, as NVFP4 has for 256
        ("fp8", 72),
        ("fp8_e4m3", 36),
    )

    @staticmethod
    def widths(dtype: str, head_dim: int) -> tuple[int, int]:
        """Bytes of K, and of the scale behind it (``triton_attn.py``, ``customize_spec``)."""
        if not dtype.endswith("_per_token_head"):
            return head_dim, 0
        return head_dim // 2 if dtype.startswith("int4") else head_dim, 4

    @pytest.mark.parametrize("heads", [1, 2, 3, 4])
    @pytest.mark.parametrize("order", ["BHNC", "BNHC"])
    @pytest.mark.parametrize(("dtype", "head_dim"), CASES)
    def test_told_dtypes(self, dtype: str, head_dim: int, order: str, heads: int) -> None:
        values, scale = self.widths(dtype, head_dim)
        side = values + scale
        shape = {"B": 6, "H": heads, "N": 16, "C": 2 * side}
        made = torch.randint(0, 256, [3, *(shape[letter] for letter in order)], dtype=U8)
        tensors = list(made if order == "BHNC" else made.transpose(2, 3))
        facts = known(heads, head_dim, 16, kv_cache_dtype=dtype, backend="TRITON_ATTN")
        cache = PagedKVCache.detect(tensors, **facts)
        assert [plane.row_bytes for plane in cache.planes] == [side, side]
        heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=U8))
        batch = heap.batched_store(cache, [21, 40], 2)
        assert batch is not None
        for layer, tensor in enumerate(tensors):
            for at, (block, offset) in enumerate(((1, 5), (2, 8))):
                row = tensor[block, :, offset]
                for plane, of_plane in enumerate((row[:, :side], row[:, side:])):
                    assert torch.equal(batch[0].tensor[plane, layer, at], of_plane.reshape(-1))

    @pytest.mark.parametrize("told", [{}, {"kv_cache_dtype": "auto"}, {"backend": "TRITON_ATTN"}])
    def test_not_told(self, told: dict[str, str]) -> None:
        """Half of such a row may be the size of a head; of NVFP4, it is not."""
        tensors = layers(6, 4, 16, 72, dtype=U8)
        for head_dim, more in ((64, {}), (36, {}), (36, {"v_head_dim": 36})):
            with pytest.raises(LayoutError, match="kv_cache_dtype"):
                PagedKVCache.detect(tensors, **known(4, head_dim, 16, **more), **told)

    def test_by_name(self) -> None:
        tensors = layers(6, 4, 16, 72, dtype=U8)
        with pytest.raises(LayoutError, match=r"NVFP4 of head dim 128.*v_head_dim=36"):
            PagedKVCache.of("vllm-lbhnc", tensors)
        cache = PagedKVCache.of("vllm-lbhnc", tensors, v_head_dim=36)
        assert [plane.row_bytes for plane in cache.planes] == [36, 36]

    def test_of_nvfp4_itself(self) -> None:
        tensors = layers(6, 4, 16, 72, dtype=U8)
        for facts in ({"kv_cache_dtype": "nvfp4"}, {"backend": "FLASHINFER"}, {}):
            cache = PagedKVCache.detect(tensors, **known(2, 128, 16, **facts))
            assert cache.layout.name == "vllm-nvfp4"


class TestBackendsThatMayShuffle:
    @pytest.mark.parametrize("backend", ["ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"])
    def test_two_slots_may_be_k_and_v(self, backend: str) -> None:
        asked(layers(6, 2, 16, 128), "opaque", **known(2, 64, 16, backend=backend))
        apart = torch.zeros(3, 2, 6, 16, 128, dtype=torch.bfloat16)  # slots outermost: LHBNC
        tensors = [tensor.transpose(0, 1) for tensor in apart]
        asked(tensors, "opaque", **known(2, 64, 16, backend=backend))

    @pytest.mark.parametrize("backend", ["ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"])
    @pytest.mark.parametrize("shape", [(2, 6, 16, 3, 64), (2, 6, 3, 16, 64), (6, 2, 16, 3, 64)])
    def test_k_and_v_in_a_dimension_of_their_own(self, backend: str, shape: Any) -> None:
        """As the second one views them, or earlier versions kept them."""
        asked(layers(*shape), "opaque", **known(3, 64, 16, backend=backend))
        assert PagedKVCache.detect(layers(*shape), **known(3, 64, 16)).num_heads == 3

    @pytest.mark.parametrize("backend", ["ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"])
    def test_other_numbers_of_heads_tell(self, backend: str) -> None:
        for heads in (1, 3, 4):
            facts = known(heads, 64, 16, backend=backend)
            cache = PagedKVCache.detect(layers(6, heads, 16, 128), **facts)
            assert cache.layout.name == "vllm-lbhnc"

    def test_a_backend_of_amd_calls_itself_flash_attn(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors, facts = layers(6, 2, 16, 128), known(2, 64, 16, backend="FLASH_ATTN")
        assert PagedKVCache.detect(tensors, **facts).layout.name == "vllm-lbhnc"
        monkeypatch.setattr(torch.version, "hip", "7.1")
        asked(tensors, "opaque", **facts)
        assert PagedKVCache.detect(tensors, **{**facts, "backend": "TRITON_ATTN"}).num_heads == 2
        apart = layers(2, 6, 16, 3, 64)
        for told in ({}, {"backend": "FLASH_ATTN"}, {"backend": "CUSTOM"}):
            asked(apart, "opaque", **known(3, 64, 16, **told))
        assert PagedKVCache.detect(apart, **known(3, 64, 16, backend="FLASHINFER")).num_heads == 3

    @pytest.mark.parametrize("shape", [(6, 1, 64, 132), (6, 64, 132), (6, 64 * 132)])
    @pytest.mark.parametrize("told", [{}, {"backend": "DEEPSEEK_V32_INDEXER"}])
    def test_indexers_of_amd_are_tiled(
        self, shape: Any, told: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors, facts = layers(*shape, dtype=U8), known(1, 128, 64, **told)
        assert PagedKVCache.detect(tensors, **facts).layout.name == "indexer"
        monkeypatch.setattr(torch.version, "hip", "7.1")
        asked(tensors, "opaque", **facts)

    @pytest.mark.parametrize("version", ["V4", "V41"])
    def test_indexers_that_are_always_shuffled(self, version: str) -> None:
        backend = f"DEEPSEEK_{version}_ROCM_MXFP4_INDEXER"
        with pytest.raises(LayoutError, match=f"{backend} mixes the tokens .* use opaque"):
            PagedKVCache.detect(layers(6, 1, 64, 68, dtype=U8), **known(1, 64, 64, backend=backend))

    def test_a_name_that_keeps_no_cache(self) -> None:
        asked(layers(6, 3, 16, 128), "vllm-cpu", **known(3, 64, 16, backend="TORCH_SDPA"))


class TestNVFP4OfOtherBackends:
    @pytest.mark.parametrize(
        "backend", ["MINIMAX_M3_SPARSE", "CUTLASS_MSA", "TRITON_MSA", "FLASH_ATTN", "TRITON_ATTN"]
    )
    def test_those_that_keep_it_otherwise_or_not_at_all(self, backend: str) -> None:
        """MiniMax M3 keeps the slot of V of a head beside that of K."""
        tensors, facts = layers(6, 6, 128, 72, dtype=U8), known(3, 128, 128, backend=backend)
        with pytest.raises(LayoutError, match=f"{backend} does not keep NVFP4 .* use opaque"):
            PagedKVCache.detect(tensors, **facts, kv_cache_dtype="nvfp4")
        with pytest.raises(LayoutError):
            PagedKVCache.detect(tensors, **facts)

    @pytest.mark.parametrize("told", [{}, {"backend": "CUSTOM"}, {"kv_cache_dtype": "nvfp4"}])
    def test_what_looks_the_same_is_asked(self, told: dict[str, str]) -> None:
        asked(layers(6, 6, 128, 72, dtype=U8), "vllm-nvfp4, opaque", **known(3, 128, 128, **told))
        facts = known(3, 128, 128, backend="FLASHINFER")
        found = PagedKVCache.detect(layers(6, 6, 128, 72, dtype=U8), **facts)
        assert found.layout.name == "vllm-nvfp4"
        for shape, dim in (((6, 6, 64, 72), 128), ((6, 6, 128, 36), 64)):  # it has no others
            found = PagedKVCache.detect(layers(*shape, dtype=U8), **known(3, dim, shape[2], **told))
            assert found.layout.name == "vllm-nvfp4"
