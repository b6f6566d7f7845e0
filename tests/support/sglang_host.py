"""The host pools of SGLang: a page in each of their layouts, and where they keep each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang_scenes import HEADS, NUM_LAYERS, mha, part_of_sglang, pool

PAGE = 16

PAGE_LAYOUTS = {
    "layer_first",
    "page_first",
    "page_first_direct",
    "page_first_kv_split",  # of another accelerator
    "page_head",
    "page_unified",
}
"""SGLang's names of the layouts of pages on the host."""


@dataclass(frozen=True)
class HostPool:
    """A host pool and the device pool that it is for.

    Attributes:
        device: the device pool.
        host: the host pool.
        row: ``row(plane, layer, slot, head)`` of the host pool, as its shape says.
    """

    device: Any
    host: Any
    row: Callable[[int, int, int, int], torch.Tensor]

    def set_page(self, page: int, chunk: torch.Tensor) -> None:
        """Fill a page with a chunk's bytes, as SGLang does with those of a file."""
        if self.host.layout == "page_unified":
            self.host.kv_buffer[page].view(-1).copy_(chunk.reshape(-1))
            return
        self.host.set_from_flat_data_page(page * PAGE, chunk.reshape(-1))


def mha_host(layout: str, head_groups: int = 1) -> HostPool:
    device = mha()
    made = part_of_sglang("sglang.srt.mem_cache.pool_host.mha").MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=NUM_LAYERS,
        head_group_num=head_groups,
    )
    kv = made.kv_buffer
    rows: dict[str, Callable[[int, int, int, int], torch.Tensor]] = {
        "layer_first": lambda p, i, s, h: kv[p, i, s, h],
        "page_first": lambda p, i, s, h: kv[p, s, i, h],
        "page_first_direct": lambda p, i, s, h: kv[p, s // PAGE, i, s % PAGE, h],
        "page_head": lambda p, i, s, h: kv[p, s // PAGE, h, s % PAGE, i],
        "page_unified": lambda p, i, s, h: kv[
            s // PAGE, h * head_groups // HEADS, i, p, s % PAGE, h % (HEADS // head_groups)
        ],
    }
    return HostPool(device, made, rows[layout])


def mla_host(layout: str) -> HostPool:
    device = pool("MLATokenToKVPool", kv_lora_rank=512, qk_rope_head_dim=64)
    made = part_of_sglang("sglang.srt.mem_cache.pool_host.mla").MLATokenToKVPoolHost(
        device._mla_buffer_info(),
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=NUM_LAYERS,
        target_layer_num=NUM_LAYERS,
    )
    kv = made.kv_buffer
    rows: dict[str, Callable[[int, int, int, int], torch.Tensor]] = {
        "layer_first": lambda p, i, s, h: kv[i, s, 0],
        "page_first": lambda p, i, s, h: kv[s, i, 0],
        "page_first_direct": lambda p, i, s, h: kv[s // PAGE, i, s % PAGE, 0],
        "page_unified": lambda p, i, s, h: kv[s // PAGE, i, s % PAGE],
    }
    return HostPool(device, made, rows[layout])
