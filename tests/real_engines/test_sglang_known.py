"""Whether the installed SGLang has pools or layouts that the cases do not know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from engine_sources import assert_known, classes_from, folder_of
from sglang_host import PAGE_LAYOUTS, mha_host
from sglang_pools import POOLS
from sglang_scenes import part_of_sglang

VERSION = "SGLang 0.5.23"

DEVICE_POOLS = {
    "DSATokenToKVPool": "DSA-index",
    "DeepSeekV4IndexerPool": "V4-indexer",
    "DeepSeekV4SingleKVPool": "V4-v4",
    "DeepSeekV4UniformFP8KVPool": "V4-uniform_fp8",
    "MHATokenToKOnlyPool": "K",
    "MHATokenToKVPool": "MHA",
    "MHATokenToKVPoolFP4": "MHA-fp4",
    "MHATokenToKVPoolMXFP8": "MHA-mxfp8",
    "MLATokenToKVPool": "MLA",
    "MLATokenToKVPoolFP4": "MLA-fp4",
    "MiniMaxM3Nvfp4IndexKPool": "MHA-nvfp4-pages",
    "MiniMaxM3Nvfp4MainKVPool": "MHA-nvfp4-pages",
    "UnifiedDraftKVPool": "MHA-unified",
    "UnifiedMHATokenToKVPool": "MHA-unified",
    "UnifiedMLATokenToKVPool": "MHA-unified",
    # The buffers of the class that they derive from.
    "HiSparseC4DevicePool": "V4-v4",
    "HiSparseDSATokenToKVPool": "DSA-index",
    "HiSparseMHAMainPool": "MHA",
    "LayerSplitDSATokenToKVPool": "DSA-index",
    "PageInterleaveDSATokenToKVPool": "DSA-index",
    "PageInterleaveMHATokenToKVPool": "MHA",
    "PageInterleaveMLATokenToKVPool": "MLA",
    # Pools of pools.
    "BaseSWAKVPool": None,
    "DeepSeekV4TokenToKVPool": None,
    "HybridLinearKVPool": None,
    "MiniMaxM3Nvfp4KVPool": None,
    "MiniMaxSparseKVPool": None,
    "QSATokenToKVPool": None,
    "SWAKVPool": None,
    "UnifiedDraftSWAKVPool": None,
    "UnifiedHybridLinearKVPool": None,
    "UnifiedSWAKVPool": None,
    # Without buffers.
    "NoOpMHATokenToKVPool": None,
    "PageMajorMHATokenToKVPool": None,
}
"""The case that has a pool's buffers; None if it has none of its own."""

HOST_POOLS = {
    "AsymmetricMHATokenToKVPoolHost",
    "DSAIndexerPoolHost",
    "DeepSeekV4PagedHostPool",
    "DeepSeekV4StateHostPool",
    "HiSparseMHATokenToKVPoolHost",
    "MHATokenToKOnlyPoolHost",
    "MHATokenToKVPoolHost",
    "MHATokenToKVPoolMXFP8Host",
    "MLATokenToKVPoolHost",
    "MambaPoolHost",
    "MiniMaxM3Nvfp4IndexKPoolHost",
    "MiniMaxM3Nvfp4MainKVPoolHost",
    "QSAIndexerPoolHost",
    "UnifiedPageEnvelopeHostPool",
}

DEVICE_LAYOUTS = {
    "NHD": "MHA",
    "HND": "MHA-hnd",
    "VECTORIZED_5D": "MHA-vectorized_5d",
    "PAGED_NHD": None,  # of another accelerator
}

V4_LAYOUTS = {
    "V4": "V4-v4",
    "V41": "V4-v41",
    "V41_FP4": "V4-v41_fp4",
    "V41_NEW": "V4-v41_new",
    "V41_FP4_NEW": "V4-v41_fp4_new",
    "UNIFORM_FP8": "V4-uniform_fp8",
}


def sources() -> Path:
    """The sources of SGLang's memory caches."""
    part_of_sglang("sglang")
    return folder_of("sglang") / "srt" / "mem_cache"


def test_every_pool_has_a_case() -> None:
    folder = sources()
    assert_known("pools on devices", classes_from(folder, "KVCache"), DEVICE_POOLS, VERSION)
    assert_known("pools on the host", classes_from(folder, "HostKVCache"), HOST_POOLS, VERSION)


def test_every_layout_on_devices_has_a_case() -> None:
    layouts = part_of_sglang("sglang.srt.mem_cache.device_pool_info").KVBufferLayout
    assert_known("layouts of K and V", layouts.__members__, DEVICE_LAYOUTS, VERSION)
    layouts = part_of_sglang("sglang.kernels.ops.attention.dsv4.kv_layout").KVLayout
    assert_known("layouts of DeepSeek-V4", layouts.__members__, V4_LAYOUTS, VERSION)


def test_every_layout_of_the_host_has_a_format() -> None:
    folder = sources() / "pool_host"
    found = {
        node.comparators[0].value
        for path in (folder / "mha.py", folder / "mla.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        and ast.unparse(node.left) == "self.layout"
        and isinstance(node.comparators[0], ast.Constant)
    }
    assert_known("layouts of pages on the host", found, PAGE_LAYOUTS, VERSION)
    with pytest.raises(ValueError, match="Unsupported layout"):
        mha_host("no such layout")


@pytest.mark.parametrize("table", [DEVICE_POOLS, DEVICE_LAYOUTS, V4_LAYOUTS])
def test_the_lists_name_cases(table: dict[str, str | None]) -> None:
    assert {case for case in table.values() if case} <= POOLS.keys()
