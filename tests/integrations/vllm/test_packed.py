"""Packed blocks, in which vLLM keeps the pages of all layers side by side: of each group its own.

vLLM plans and makes the caches and hands whole blocks to the worker; what is copied is compared
with vLLM's own views of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from vllm_cpu_scenes import locations
from vllm_groups import registered, scheduler_config, views, worker_config
from vllm_scenes import part_of_vllm

interface = part_of_vllm("vllm.v1.kv_cache_interface")
base = part_of_vllm("vllm.v1.kv_offload.base")
from kvheap.integrations.vllm.chunk_memory import HeapMemory  # noqa: E402
from kvheap.integrations.vllm.geometry import (  # noqa: E402
    groups_of,
    is_packed,
    joined,
    layer_pages,
    require_places,
    unpadded_page,
)
from kvheap.integrations.vllm.groups import ChunkGroup  # noqa: E402
from kvheap.integrations.vllm.pages import GroupPages  # noqa: E402
from kvheap.integrations.vllm.spec import require_same_bytes  # noqa: E402
from kvheap.integrations.vllm.worker import KVHeapWorker, group_pages  # noqa: E402

HEAP_BYTES = 8 << 20

Specs = dict[str, Any]


def full(heads: int, **other: Any) -> Any:
    given = {"block_size": 16, "head_size": 32, "dtype": torch.bfloat16} | other
    return interface.FullAttentionSpec(num_kv_heads=heads, **given)


def window(heads: int) -> Any:
    return interface.SlidingWindowSpec(
        block_size=16, num_kv_heads=heads, head_size=32, dtype=torch.bfloat16, sliding_window=64
    )


def state(values: int, page_bytes: int) -> Any:
    return interface.MambaSpec(
        block_size=16,
        shapes=((values,), (64,)),
        dtypes=(torch.float32, torch.bfloat16),
        page_size_padded=page_bytes,
        mamba_cache_mode="align",
    )


def deepseek_v4(num_layers: int = 6) -> Specs:
    """Windows, latents, an indexer and states with unlike, padded pages, as DeepSeek-V4 has."""
    specs: Specs = {}
    padded = {"num_kv_heads": 1, "alignment": 576}
    record = {"dtype": torch.uint8, "model_version": "deepseek_v4", "state_content_bytes": 584}
    for layer in range(num_layers):
        ratio = 4 if layer % 2 else 128
        specs[f"{layer}.swa"] = interface.SlidingWindowMLASpec(
            block_size=64, head_size=512, sliding_window=128, **record, **padded
        )
        specs[f"{layer}.latent"] = interface.MLAAttentionSpec(
            block_size=256, head_size=512, tokens_per_state=ratio, **record, **padded
        )
        if ratio == 4:
            specs[f"{layer}.indexer"] = interface.MLAAttentionSpec(
                block_size=256, head_size=132, dtype=torch.uint8, tokens_per_state=4, **padded
            )
        specs[f"{layer}.compressor"] = interface.SlidingWindowMLASpec(
            block_size=8, head_size=256, dtype=torch.float32, sliding_window=128, **padded
        )
    return specs


def numbered(*specs: Any) -> Specs:
    return {f"model.layers.{at}": spec for at, spec in enumerate(specs)}


PAGE = 2 * 2 * 16 * 32 * 2

MODELS: dict[str, Specs] = {
    "unlike heads": numbered(*[full(2), full(4), window(2)] * 2),
    "uneven": numbered(*[full(2)] * 3, *[window(2)] * 8),
    "states": numbered(*[full(2), state(900, PAGE), state(900, PAGE), state(900, PAGE)] * 2),
    "padded": numbered(*[full(2, page_size_padded=PAGE + 512), window(4)] * 2),
    "deepseek_v4": deepseek_v4(),
}


class Packed:
    """A worker over the packed caches of a model, as vLLM's connector hands them out."""

    def __init__(self, name: str, blocks_per_chunk: int, patch: pytest.MonkeyPatch) -> None:
        self.config = worker_config(MODELS[name], "BLHNC", 3 << 20)
        self.views = views(self.config, "BLHNC")
        self.caches = registered(self.config, "BLHNC", patch, self.views)
        self.blocks_per_chunk = blocks_per_chunk
        self.groups = groups_of(scheduler_config(self.config), blocks_per_chunk)
        self.pages = group_pages(self.caches, blocks_per_chunk, self.groups)
        self.memory = HeapMemory(HEAP_BYTES, pin=False)
        self.worker = KVHeapWorker(self.caches, self.memory, blocks_per_chunk, self.pages)
        self.memory.tensor.zero_()

    @property
    def block(self) -> torch.Tensor:
        """All bytes of all blocks, ``[B, bytes]``."""
        found: torch.Tensor = self.caches.tensors[0].tensor
        return found

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.block.copy_(
            torch.randint(-128, 128, self.block.shape, dtype=torch.int8, generator=generator)
        )

    def contents(self, group: int, block: int) -> dict[str, torch.Tensor]:
        """By layer of a group, what vLLM's view of it has in a block, as bytes."""
        found = {}
        for name in self.config.kv_cache_groups[group].layer_names:
            cache = interface.group_kernel_blocks(self.views[name], self.config.num_blocks)
            found[name] = cache[block].contiguous().view(torch.uint8).clone()
        return found

    def move(self, is_store: bool, job: int, ids: list[list[int]], chunks: Any) -> Any:
        blocks = base.GPULoadStoreSpec(list(chain(*ids)), [len(g) for g in ids], [0] * len(ids))
        if is_store:
            self.worker.submit_store(job, blocks, chunks)
        else:
            self.worker.submit_load(job, chunks, blocks)
        self.worker.wait({job})
        (result,) = self.worker.get_finished()
        return result


@pytest.fixture(
    params=[(name, n) for name in MODELS for n in (1, 2)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packed]:
    made = Packed(*request.param, monkeypatch)
    yield made
    made.worker.shutdown()


def test_vllm_hands_out_whole_blocks(packed: Packed) -> None:
    """What this file stands on: one tensor, of which every group refers to all."""
    assert is_packed(packed.config)
    assert is_packed(scheduler_config(packed.config))
    assert len(packed.caches.tensors) == 1
    whole = packed.config.kv_cache_tensors[0].block_stride
    assert [[ref.page_size_bytes for ref in refs] for refs in packed.caches.group_data_refs] == [
        [whole]
    ] * len(packed.groups)


def test_both_sides_allocate_the_same(packed: Packed) -> None:
    assert packed.groups == groups_of(packed.config, packed.blocks_per_chunk)
    require_same_bytes(packed.pages, tuple(packed.groups))
    require_places(packed.config, packed.views)


def test_a_group_takes_its_own_pages(packed: Packed) -> None:
    """At least what its layers fill, at most their padded pages; a group less than a block."""
    whole = packed.config.kv_cache_tensors[0].block_stride * packed.blocks_per_chunk
    for at, group in enumerate(packed.groups):
        spec = packed.config.kv_cache_groups[at].kv_cache_spec
        specs = [
            getattr(spec, "kv_cache_specs", {}).get(name, spec)
            for name in packed.config.kv_cache_groups[at].layer_names
        ]
        least = packed.blocks_per_chunk * sum(unpadded_page(of) for of in specs)
        most = packed.blocks_per_chunk * sum(of.page_size_bytes for of in specs)
        assert least <= group.chunk_bytes <= most <= whole
        assert group.chunk_bytes <= least * (1 + 1 / 32)
    assert min(group.chunk_bytes for group in packed.groups) < whole


def test_what_was_stored_is_loaded_elsewhere(packed: Packed) -> None:
    """Layer by layer, and blocks that are not loaded stay as they are."""
    n, counts = packed.blocks_per_chunk, range(len(packed.groups))
    ids = [[1 + (2 * g + i) % 6 for i in range(2 * n)] for g in counts]
    chunks = locations([group.chunk_bytes for group in packed.groups for _ in range(2)])
    packed.fill(1)
    result = packed.move(True, 1, ids, chunks)
    assert result.success
    assert result.transfer_size == 2 * sum(group.chunk_bytes for group in packed.groups)
    expected = [[packed.contents(g, block) for block in ids[g]] for g in counts]
    for group in counts:  # one at a time: a block is one group's
        packed.fill(2 + group)
        before = packed.block.clone()
        target = [7 + i for i in range(2 * n)]
        only = [target if g == group else [] for g in counts]
        held = type(chunks)(chunks.addresses[2 * group :][:2], chunks.sizes[2 * group :][:2])
        assert packed.move(False, 2 + group, only, held).success
        for block, layers in zip(target, expected[group], strict=True):
            for name, data in packed.contents(group, block).items():
                assert torch.equal(data, layers[name]), name
        others = [b for b in range(len(before)) if b not in target]
        assert torch.equal(packed.block[others], before[others])


def test_nothing_beside_the_chunks_is_written(packed: Packed) -> None:
    n, counts = packed.blocks_per_chunk, range(len(packed.groups))
    chunks = locations([group.chunk_bytes for group in packed.groups])
    packed.fill(1)
    packed.memory.tensor.fill_(0xA5)
    ids = [[1 + g] * 1 + [7] * (n - 1) for g in counts]
    assert packed.move(True, 1, ids, chunks).success
    is_chunk = torch.zeros(HEAP_BYTES, dtype=torch.bool)
    for address, size in zip(chunks.addresses, chunks.sizes, strict=True):
        is_chunk[address : address + size] = True
    assert bool((packed.memory.tensor[~is_chunk] == 0xA5).all())


def test_pages_elsewhere_are_an_error_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Packed("unlike heads", 1, monkeypatch)
    moved = replace(
        made.config,
        kv_cache_tensors=[
            replace(tensor, offset=tensor.offset + 64) for tensor in made.config.kv_cache_tensors
        ],
    )
    with pytest.raises(ValueError, match=r"page of layer model.layers.\d begins at byte"):
        require_places(moved, made.views)
    smaller = {name: view[:, :, :, :16] for name, view in made.views.items()}
    require_places(made.config, smaller)  # it is the place that counts
    made.worker.shutdown()


def test_a_layer_with_more_than_is_kept_is_an_error_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scheduler knows one layer's padding, which need not be that of another one."""
    made = Packed("padded", 1, monkeypatch)
    real, name = layer_pages, next(iter(made.views))

    def shorter(config: Any, group_id: int) -> dict[str, tuple[int, int]]:
        return {
            layer: (offset, size - (layer == name))
            for layer, (offset, size) in real(config, group_id).items()
        }

    monkeypatch.setattr("kvheap.integrations.vllm.geometry.layer_pages", shorter)
    with pytest.raises(ValueError, match=rf"page of layer {name} has \d+ bytes, of which \d+"):
        require_places(made.config, made.views)
    made.worker.shutdown()


class TestPieces:
    @pytest.mark.parametrize(
        ("pages", "expected"),
        [
            ([], ()),
            ([(0, 10)], ((0, 10),)),
            ([(0, 10), (10, 5)], ((0, 15),)),
            ([(10, 5), (0, 10)], ((0, 15),)),
            ([(0, 6400), (6500, 6400)], ((0, 12900),)),
            ([(0, 6400), (6501, 6400)], ((0, 6400), (6501, 6400))),
            ([(0, 6400), (6500, 6399)], ((0, 6400), (6500, 6399))),
            ([(0, 640), (650, 640), (1300, 640)], ((0, 1940),)),
        ],
    )
    def test_neighbours_are_one(self, pages: Any, expected: Any) -> None:
        assert joined(pages) == expected

    def test_groups_must_be_the_engines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = Packed("unlike heads", 1, monkeypatch)
        with pytest.raises(ValueError, match="has 2 KV cache groups, the scheduler 1"):
            group_pages(made.caches, 1, made.groups[:1])
        wide = [replace(group, pieces=((0, 1 << 20),)) for group in made.groups]
        with pytest.raises(ValueError, match="a page is a part of its block"):
            group_pages(made.caches, 1, wide)
        made.worker.shutdown()

    def test_unpacked_tensors_have_no_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = worker_config(numbered(*[full(2)] * 2), "LBHNC")
        caches = registered(config, "LBHNC", monkeypatch)
        group = ChunkGroup("full", 2 * PAGE, 0, ((0, PAGE),))
        with pytest.raises(ValueError, match="packed blocks has 2 tensors"):
            group_pages(caches, 1, [group])
        pages: list[GroupPages] = group_pages(caches, 1, groups_of(config, 1))
        require_same_bytes(pages, tuple(groups_of(config, 1)))
