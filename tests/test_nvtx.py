"""NVTX ranges: which calls get one, that they nest and end, and that they are off by default."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvheap import PagedKVCache, TensorMemoryAllocator, nvtx, offload
from kvheap.kernels import paged_copy

ROOT = Path(__file__).parent.parent


class FakeRanges:
    """Notes ranges as texts, indented by how deep they are."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def range_push(self, msg: str) -> None:
        self.lines.append("  " * self.depth + msg.removeprefix("kvheap "))
        self.depth += 1

    def range_pop(self) -> None:
        self.depth -= 1


@pytest.fixture
def ranges() -> Iterator[FakeRanges]:
    fake = FakeRanges()
    nvtx.enable(fake)
    yield fake
    nvtx.disable()
    assert fake.depth == 0


def heap_of(pages: int) -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(pages * 4096, dtype=torch.uint8))


def functions() -> list[Any]:
    return [vars(owner)[name] for (owner, name), _ in nvtx.PLACES]


def test_transfers_and_copies_get_ranges(ranges: FakeRanges) -> None:
    near, far = heap_of(16), heap_of(16)
    source = torch.ones(3, 4096, dtype=torch.uint8)
    batch = near.batched_allocate([4096], torch.uint8, 3, source=source)
    offload(batch, into=far).transfer.result()
    near.batched_free(batch, out=torch.empty_like(source))
    assert ranges.lines == [
        "scatter of blocks",
        "transfer h2h by host, 12288 bytes, 1 runs",
        "gather of blocks",
    ]


def test_engine_copies_get_ranges(ranges: FakeRanges) -> None:
    layers = [torch.randn(2, 16, 16, 2, 8).half() for _ in range(2)]
    cache, heap = PagedKVCache.of("vllm-flash-nhd", layers), heap_of(16)
    slots = torch.randperm(cache.num_slots)[:40]
    batch = heap.batched_store(cache, slots, chunk_tokens=20)
    heap.batched_load(batch, cache, slots).result()
    assert ranges.lines == ["store of 40 tokens", "load of 40 tokens"]


def test_launches_are_named_after_their_kernels(
    ranges: FakeRanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernel:
        def __call__(self, **_: Any) -> None: ...

        class fn:  # noqa: N801
            __name__ = "_copy_tokens_kernel"

        def __getitem__(self, grid: object) -> Any:
            return lambda *_, **__: None

    class Variant:
        constants: dict[str, int] = {}  # noqa: RUF012
        num_warps = 4

    Kernel.fn.__name__ = "_copy_tokens_kernel"
    paged_copy.launch(Kernel(), Variant(), 7)
    assert ranges.lines == ["launch copy_tokens_kernel, 7 programs"]


def test_file_jobs_get_ranges(ranges: FakeRanges, tmp_path: Path) -> None:
    pytest.importorskip("lmdb", reason="needs kvheap[files]")
    from kvheap import BlockLayout, MemoryFormat
    from kvheap.files import FileTier

    heap = heap_of(16)
    layout = BlockLayout.of([4096], torch.uint8, MemoryFormat.BINARY)
    batch = heap.batched_allocate([4096], torch.uint8, 2, MemoryFormat.BINARY)
    with FileTier(tmp_path, 1 << 16, layout, namespace="n") as tier:
        tier.store([b"a", b"b"], batch).result()
        tier.load([b"a"], into=heap).result()
    found = [line for line in ranges.lines if line.strip().startswith("file")]
    assert found == ["file store of 2 chunks", "file load of 1 chunks"]


def test_a_range_ends_with_an_error(ranges: FakeRanges) -> None:
    near, far = heap_of(16), heap_of(16)
    batch = near.batched_allocate([4096], torch.uint8, 3)
    other = near.batched_allocate([4096], torch.uint8, 3)
    other.pin() if hasattr(other, "pin") else other[0].pin()
    with pytest.raises(Exception, match="in use"):
        offload(other, into=far, free=True)
    assert ranges.depth == 0
    assert len(batch) == 3


def test_it_is_off_by_default_and_again_when_disabled() -> None:
    before = functions()
    assert not nvtx.is_enabled()
    nvtx.enable(FakeRanges())
    nvtx.enable(FakeRanges())  # nothing
    assert all(new is not old for new, old in zip(functions(), before, strict=True))
    nvtx.disable()
    nvtx.disable()
    assert all(new is old for new, old in zip(functions(), before, strict=True))


def test_every_module_that_launches_kernels_is_marked() -> None:
    importing = {
        f"kvheap.kernels.{path.stem}"
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module == "kvheap.kernels.direct_launch"
        and "launch" in {alias.name for alias in node.names}
    }
    marked = {owner.__name__ for (owner, name), _ in nvtx.PLACES if name == "launch"}
    assert marked == importing


def test_every_caller_of_begin_is_marked() -> None:
    importing = {
        "kvheap." + ".".join(path.relative_to(ROOT / "allocator").with_suffix("").parts)
        for path in (ROOT / "allocator").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module == "kvheap.transfer.moves"
        and "begin" in {alias.name for alias in node.names}
    }
    marked = {owner.__name__ for (owner, name), _ in nvtx.PLACES if name == "begin"}
    assert marked == {*importing, "kvheap.transfer.moves"}


def test_torch_for_cpus_says_what_to_do() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has NVTX")
    with pytest.raises(RuntimeError, match=r"marks no NVTX ranges .*install a build for CUDA"):
        nvtx.enable()
    assert not nvtx.is_enabled()


@pytest.mark.parametrize(("value", "is_on"), [("", False), ("0", False), ("1", True)])
def test_the_environment_turns_it_on(
    value: str,
    is_on: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = FakeRanges()
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setenv("KVHEAP_NVTX", value)
    try:
        nvtx.enable_by_environment()
        assert nvtx.is_enabled() == is_on
    finally:
        nvtx.disable()

    class Broken(FakeRanges):
        def range_push(self, msg: str) -> None:
            raise RuntimeError("no NVTX")

    monkeypatch.setattr(torch.cuda, "nvtx", Broken())
    with caplog.at_level(logging.WARNING, "kvheap"):
        nvtx.enable_by_environment()
    assert not nvtx.is_enabled()
    assert bool(caplog.records) == is_on


def test_the_environment_is_read_at_import() -> None:
    program = (
        "import sys, torch\n"
        "class Fake:\n"
        "    range_push = range_pop = staticmethod(lambda *_: None)\n"
        "torch.cuda.nvtx = Fake\n"
        "import kvheap\n"
        "from kvheap import nvtx\n"
        "print(nvtx.is_enabled())"
    )
    import os

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KVHEAP_NVTX": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "True\n"
