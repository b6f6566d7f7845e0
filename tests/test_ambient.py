"""Settings of torch that belong to the caller change no result: the main path under each one."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvheap import (
    BlockIds,
    HostMemoryAllocator,
    MemoryFormat,
    PagedKVCache,
    TensorMemoryAllocator,
    offload,
    restore,
)
from kvheap.transfer import CopyPlan, copy

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "nothing": contextlib.nullcontext,
    "a default device": default_device,
    "with a device": lambda: torch.device("meta"),
    "a default dtype": default_dtype,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": deterministic,
}


class Inputs:
    """Tensors of a caller, made before the setting is in force."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.buffer = torch.zeros(1 << 20, dtype=torch.uint8)
        self.chunks = torch.randn(12, 2, 3, 16, 8, generator=generator)
        self.out = torch.zeros_like(self.chunks)
        self.layers = [
            torch.randn(2, 16, 4, 2, 8, generator=generator).bfloat16() for _ in range(3)
        ]
        self.loaded = [torch.zeros_like(layer) for layer in self.layers]
        self.slots = torch.randperm(64, generator=generator)[:40]
        self.bytes = torch.arange(4096).to(torch.uint8)
        self.copied = torch.zeros(4096, dtype=torch.uint8)


def main_path(inputs: Inputs) -> list[torch.Tensor]:
    """Everything a caller does with a heap; what it read, in order."""
    found: list[torch.Tensor] = []
    heap = TensorMemoryAllocator(inputs.buffer, align_bytes=512, scrub=True)
    batch = heap.batched_allocate(
        inputs.chunks.shape[1:], inputs.chunks.dtype, 12, source=inputs.chunks
    )
    assert batch is not None
    found += [obj.tensor.clone() for obj in batch]  # type: ignore[union-attr]
    some = [batch[7], batch[2]]
    found.append(heap.batched_evict(some))
    with HostMemoryAllocator(1 << 20) as far:
        rest = [batch[i] for i in (0, 1, 3, 4)]
        away = offload(rest, far)
        assert away is not None
        back = restore(away, heap)
        assert back is not None
        back.transfer.result()  # type: ignore[union-attr]
        found += [obj.tensor.clone() for obj in back]  # type: ignore[union-attr]
        heap.batched_free(back)
        far.batched_free(away)
    heap.batched_free([batch[i] for i in range(12) if i not in (7, 2)], out=inputs.out[:10])
    found.append(inputs.out[:10].clone())
    cache = PagedKVCache.of("vllm-flash-nhd", inputs.layers)
    target = PagedKVCache.of("vllm-flash-nhd", inputs.loaded)
    for slots in (inputs.slots, inputs.slots.numpy(), inputs.slots.tolist()):
        for fmt in (MemoryFormat.KV_2LTD, MemoryFormat.KV_T2D):
            stored = heap.batched_store(cache, slots, 16, fmt)
            assert stored is not None
            heap.batched_load(stored, target, slots)
            heap.batched_free(stored)
            found += [layer.clone() for layer in inputs.loaded]
    blocks = BlockIds(np.arange(5))
    converted = heap.batched_store(cache, blocks, 8, convert=True)
    assert converted is not None
    heap.batched_load(converted, target, blocks, convert=True)
    found += [layer.clone() for layer in inputs.loaded]
    found.append(heap.batched_evict(converted))
    plan = CopyPlan.of_addresses(inputs.bytes, inputs.copied, [0, 100, 900], [9, 2000, 3000], 64)
    copy(plan).result()
    found.append(inputs.copied.clone())
    assert heap.stats().allocated_bytes == 0
    assert heap.leaks() == ()
    return found


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    return main_path(Inputs())


@pytest.mark.parametrize("setting", AMBIENT.values(), ids=AMBIENT.keys())
def test_settings_of_the_caller_change_no_result(
    setting: Callable[[], contextlib.AbstractContextManager[object]],
    expected: list[torch.Tensor],
) -> None:
    inputs = Inputs()
    with setting():
        found = main_path(inputs)
    assert len(found) == len(expected) > 20
    for tensor, wanted in zip(found, expected, strict=True):
        assert tensor.device == CPU
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_caller_gets_the_same(expected: list[torch.Tensor]) -> None:
    """The graph is cut at each call of kvheap, which is not traced."""

    def twice(inputs: Inputs) -> list[torch.Tensor]:
        doubled = inputs.bytes + inputs.bytes
        found = main_path(inputs)
        return [*found, doubled]

    *found, doubled = torch.compile(twice, backend="eager")(Inputs())
    assert torch.equal(doubled, 2 * Inputs().bytes)
    assert len(found) == len(expected)
    for tensor, wanted in zip(found, expected, strict=True):
        assert torch.equal(tensor, wanted)


FACTORIES = {"arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand"} | {
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}
"""Functions of torch that make a tensor on the default device if none is named."""


def factories_without_device(text: str) -> list[str]:
    """The calls of factories in a source that name no device."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) in {("torch", name) for name in FACTORIES}
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    """Also those that only a GPU's path makes."""
    sources = [*(ROOT / "allocator").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = {path.name: factories_without_device(path.read_text()) for path in sources}
    assert {name: calls for name, calls in found.items() if calls} == {}
    assert len(factories_without_device("torch.empty(3); torch.zeros(2, device=d)")) == 1
