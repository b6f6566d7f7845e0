"""Tensors of a cache that share bytes are refused; the reference marks every byte of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap import LayoutError, PagedKVCache
from kvheap.kernels.engine_layouts import LAYOUTS
from kvheap.kernels.tensor_dims import TensorDims
from kvheap.kernels.tensor_overlap import Extent, require_disjoint_tensors, steps_of

U8 = torch.uint8
SHARE = "share bytes, at 0x"


def refused(name: str, tensors: Any, labels: str, **facts: Any) -> None:
    with pytest.raises(LayoutError, match=rf"{labels} of {name} {SHARE}"):
        PagedKVCache.of(name, tensors, **facts)


class TestKAndV:
    def test_one_tensor_for_both(self) -> None:
        x, y = torch.zeros(9, 16, 2, 8), torch.zeros(9, 16, 2, 8)
        refused("kv-tuples", [(x, x)], "layer 0, K and layer 0, V")
        refused("kv-tuples", [(y, x), (x, x)], "layer 0, V and layer 1, K")
        refused("kv-tuples", [(x, y), (y, torch.zeros(9, 16, 2, 8))], "layer 0, V and layer 1, K")
        refused("sglang-mha", ([x.flatten(0, 1)], [x.flatten(0, 1)]), "layer 0, K and layer 0, V")

    def test_shifted(self) -> None:
        x = torch.zeros(9, 16, 2, 8)
        refused("kv-tuples", [(x[:8], x[1:])], "layer 0, K and layer 0, V")
        refused("kv-tuples", [(x[:, :15], x[:, 1:])], "layer 0, K and layer 0, V")
        flat = torch.zeros(16, 3, 8)
        refused("kv-tuples-slots", [(flat[:, :2], flat[:, 1:])], "layer 0, K and layer 0, V")

    def test_v_within_k(self) -> None:
        """As SGLang returns K and V of a latent."""
        latent = torch.zeros(64, 1, 576)
        with pytest.raises(LayoutError, match="use mla or sglang-mla"):
            PagedKVCache.of("sglang-mha", ([latent], [latent[..., :512]]))
        assert PagedKVCache.of("sglang-mla", [latent]).num_slots == 64

    def test_other_steps(self) -> None:
        """The same bytes with heads and slots the other way round; and in other blocks."""
        x = torch.zeros(8, 4, 4, 8)
        refused("kv-tuples", [(x, x.transpose(1, 2))], "layer 0, K and layer 0, V")
        pool = torch.zeros(4096)
        wide = pool.as_strided((4, 2, 1, 8), (64, 8, 8, 1))
        narrow = pool.as_strided((4, 2, 1, 8), (48, 8, 8, 1), 16)  # 16, 64, 112, 160
        refused("kv-tuples", [(wide, narrow)], "layer 0, K and layer 0, V")
        apart = pool.as_strided((4, 2, 1, 8), (128, 8, 8, 1), 32)  # 32, 160, 288, 416
        assert PagedKVCache.of("kv-tuples", [(wide, apart)]).num_blocks == 4


class TestLayers:
    @pytest.mark.parametrize("name", ["vllm-lbhnc", "mla", "vllm-flash-nhd", "opaque"])
    def test_shifted(self, name: str) -> None:
        shape = {"mla": (16, 24), "vllm-flash-nhd": (16, 2, 8), "opaque": (16,)}.get(
            name, (2, 16, 8)
        )
        pool = torch.zeros(9, *shape)
        if name == "vllm-flash-nhd":
            pool = torch.zeros(2, 9, *shape)
            refused(name, [pool[:, :8], pool[:, 1:]], "layer 0 and layer 1")
            return
        other = torch.zeros(8, *shape)
        refused(name, [pool[:8], pool[1:]], "layer 0 and layer 1")
        refused(name, [other, pool[:8], pool[1:]], "layer 1 and layer 2")

    def test_the_same_tensor_is_a_layer_that_shares_its_kv(self) -> None:
        x, k, v = torch.zeros(9, 2, 16, 8), torch.zeros(9, 16, 2, 8), torch.zeros(9, 16, 2, 8)
        assert PagedKVCache.of("vllm-lbhnc", [x, x, torch.zeros(9, 2, 16, 8)]).num_layers == 3
        assert PagedKVCache.of("kv-tuples", [(k, v), (k, v)]).num_layers == 2
        assert (
            PagedKVCache.of("sglang-mha-hnd", ([x, x], [k.view(9, 2, 16, 8)] * 2)).num_layers == 2
        )
        assert PagedKVCache.of("opaque", [x, k, x]).num_layers == 3

    def test_what_lies_between_each_other(self) -> None:
        """Layers in pages, heads outermost, planes in pages with padding: no byte is shared."""
        pages = torch.zeros(9, 3, 2, 16, 8)  # B L H N F
        assert PagedKVCache.of("vllm-blhnc", list(pages.unbind(1))).num_layers == 3
        heads = torch.zeros(2, 3, 9, 16, 8).permute(1, 2, 0, 3, 4)  # H L B N F
        assert PagedKVCache.of("vllm-packed", list(heads)).num_layers == 3
        slots = torch.zeros(2, 80, 3, 2, 8)  # of K and V: S L H C
        keys, values = (list(side.unbind(1)) for side in slots)
        assert PagedKVCache.of("sglang-mha", (keys, values)).num_layers == 3
        padded = torch.zeros(9, 3 * 40000, dtype=U8)
        views = [padded[:, at * 40000 :][:, : 64 * 584].unflatten(1, (64, 584)) for at in range(3)]
        assert PagedKVCache.of("values-scales", views, widths=(576, 8)).num_layers == 3

    def test_views_of_one_pool_for_layers_of_two_kinds(self) -> None:
        """Hybrid models give a block to attention or to a state, in padded pages of one pool."""
        pool = torch.zeros(9, 4096, dtype=U8)
        attention, conv, state = pool[:, :4000], pool[:, :96], pool[:, 96:3000]
        cache = PagedKVCache.of("opaque", [attention, (conv, state), attention])
        assert cache.num_planes == 4
        refused("opaque", [(pool[:, :100], pool[:, 96:200])], "layer 0, part 0 and layer 0, part 1")
        refused("opaque", [pool[:, :100], pool[:, 50:150]], "layer 0 and layer 1")

    def test_a_detected_cache_is_none(self) -> None:
        x = torch.zeros(9, 3, 16, 16)
        with pytest.raises(LayoutError, match=SHARE):
            PagedKVCache.detect(
                [x[:8], x[1:]], num_kv_heads=3, head_dim=8, block_size=16, backend="FLASH_ATTN"
            )
        with pytest.raises(LayoutError, match=SHARE):
            PagedKVCache.of_transformers([(x, x)])


def extents(pool: torch.Tensor, views: list[tuple[tuple[int, ...], tuple[int, ...], int]]) -> Any:
    """Each view of the pool as a tensor of its own layer, and the bytes that it marks."""
    found, marks = [], []
    for layer, (sizes, strides, offset) in enumerate(views):
        tensor = pool.as_strided(sizes, strides, offset)
        dims = TensorDims.of(LAYOUTS["vllm-packed"], tensor[None], f"layer {layer}")
        found.append(Extent(f"layer {layer}", layer, 0, tensor.data_ptr(), *steps_of(dims)))
        pool.zero_()
        tensor.fill_(1)
        marks.append(pool.clone())
    return found, marks


@st.composite
def strided(draw: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose elements do not overlap, in any order, perhaps with gaps."""
    strides = [0] * 4
    end = 1
    for dim in [3, *draw(st.permutations([0, 1, 2]))]:
        strides[dim] = end + (draw(st.sampled_from([0, 0, 0, 1, 3, 16])) if dim != 3 else 0)
        end = strides[dim] * sizes[dim]
    return tuple(strides)


SIZES = st.tuples(*(st.integers(1, 4) for _ in range(4)))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_beside_a_mark_on_every_byte(data: st.DataObject) -> None:
    """Two or three views of one pool, of the same or other sizes and steps, anywhere."""
    pool = torch.zeros(40000, dtype=U8)
    sizes = data.draw(SIZES)
    strides = data.draw(strided(sizes))
    views = []
    for _ in range(data.draw(st.integers(2, 3))):
        if data.draw(st.integers(0, 3)) == 0:
            sizes = data.draw(SIZES)
            strides = data.draw(strided(sizes))
        views.append((sizes, strides, data.draw(st.integers(0, 300))))
    found, marks = extents(pool, views)
    overlap = False
    for one in range(len(views)):
        for two in range(one):
            is_same = found[one].start == found[two].start and (
                (found[one].steps, found[one].run_bytes) == (found[two].steps, found[two].run_bytes)
            )
            overlap |= not is_same and bool((marks[one] & marks[two]).any())
    if not overlap:
        require_disjoint_tensors(LAYOUTS["vllm-packed"], found)
        return
    with pytest.raises(LayoutError, match=SHARE) as caught:
        require_disjoint_tensors(LAYOUTS["vllm-packed"], found)
    named = [number for number in range(len(views)) if f"layer {number}" in str(caught.value)]
    assert len(named) == 2
    assert (marks[named[0]] & marks[named[1]]).any()
