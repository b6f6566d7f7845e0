"""One process keeps the books of shared bytes; all others have a view of them."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from forked_child import in_a_child

import kvheap
from kvheap import (
    BlockIds,
    ForeignObjectError,
    HostBuffer,
    HostMemoryAllocator,
    LifetimeError,
    MemoryBatch,
    MixedMemoryAllocator,
    PagedKVCache,
    PagedTensorMemoryAllocator,
    PrefixStore,
    TensorMemoryAllocator,
    offload,
    restore,
    store,
)
from kvheap.transfer import copy

PAGE = 4096
SIZE = 64 * PAGE

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def of_memfd(**options: Any) -> TensorMemoryAllocator:
    return HostMemoryAllocator(SIZE, shared=True, **options)


def of_shared_tensor(**options: Any) -> TensorMemoryAllocator:
    tensor = torch.zeros(SIZE, dtype=torch.uint8).share_memory_()
    return TensorMemoryAllocator(tensor, **options)


def of_anonymous_mapping(**options: Any) -> TensorMemoryAllocator:
    """Python's default is a shared mapping, of which torch knows nothing."""
    return TensorMemoryAllocator(
        torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.uint8), **options
    )


def of_mapped_file(**options: Any) -> TensorMemoryAllocator:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(SIZE)
        tensor = torch.from_file(file.name, shared=True, size=SIZE, dtype=torch.uint8)
    return TensorMemoryAllocator(tensor, **options)


def of_shared_pages(**options: Any) -> TensorMemoryAllocator:
    tensor = torch.zeros(SIZE, dtype=torch.uint8).share_memory_()
    return PagedTensorMemoryAllocator(tensor, [PAGE], torch.uint8, **options)


def grown_by_shared_memory(**options: Any) -> TensorMemoryAllocator:
    heap = TensorMemoryAllocator(torch.zeros(SIZE // 2, dtype=torch.uint8), **options)
    heap.add_buffer(torch.zeros(SIZE // 2, dtype=torch.uint8).share_memory_())
    return heap


def of_private_mapping(**options: Any) -> TensorMemoryAllocator:
    return HostMemoryAllocator(SIZE, **options)


def of_private_tensor(**options: Any) -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(SIZE, dtype=torch.uint8), **options)


SHARED = [
    of_memfd,
    of_shared_tensor,
    of_anonymous_mapping,
    of_mapped_file,
    of_shared_pages,
    grown_by_shared_memory,
]
PRIVATE = [of_private_mapping, of_private_tensor]

Make = Callable[..., TensorMemoryAllocator]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child has none of the threads that OpenMP's parallel loops wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def filled(heap: TensorMemoryAllocator, num_blocks: int = 8) -> MemoryBatch:
    values = torch.arange(num_blocks, dtype=torch.uint8)[:, None].expand(-1, PAGE).contiguous()
    batch = heap.batched_allocate([PAGE], torch.uint8, num_blocks, source=values)
    assert batch is not None
    return batch


def values_of(batch: Any) -> list[int]:
    for obj in batch:
        assert (obj.tensor == obj.tensor[0]).all()
    return [int(obj.tensor[0]) for obj in batch]


def require_unchanged(heap: TensorMemoryAllocator, batch: MemoryBatch) -> None:
    assert values_of(batch) == list(range(len(batch)))
    assert heap.stats().allocated_bytes == len(batch) * PAGE
    assert heap.memcheck()


def cache_of_kv() -> PagedKVCache:
    return PagedKVCache.of("vllm-flash-nhd", [torch.ones(2, 4, 16, 2, 16).half()])


def changes(heap: TensorMemoryAllocator, batch: MemoryBatch) -> dict[str, Callable[[], object]]:
    """Everything that changes the books or the bytes of a heap."""
    blocks = torch.full((8, PAGE), 99, dtype=torch.uint8)
    near = TensorMemoryAllocator(torch.zeros(SIZE, dtype=torch.uint8))
    source = near.batched_allocate([PAGE], torch.uint8, 8)
    assert source is not None
    kv = heap.view([0], [2, 1, 32, 32], torch.float16)
    shape = [PAGE]

    def pin_and_free() -> None:
        batch[2].pin()
        try:
            batch[2].ref_count_down()
            batch[2].unpin()
        finally:
            assert batch[2].is_valid()

    return {
        "allocate": lambda: heap.allocate(shape, torch.uint8),
        "batched_allocate": lambda: heap.batched_allocate(shape, torch.uint8, 2),
        "from a source": lambda: heap.batched_allocate(shape, torch.uint8, 8, source=blocks),
        "partly": lambda: heap.batched_allocate(shape, torch.uint8, 999, allow_partial=True),
        "mixed": lambda: MixedMemoryAllocator(heap).allocate(shape, torch.uint8),
        "free": lambda: heap.free(batch[1]),
        "batched_free": lambda: heap.batched_free(batch),
        "free into": lambda: heap.batched_free(batch, out=torch.empty_like(blocks)),
        "batched_evict": lambda: heap.batched_evict(batch),
        "last reference": lambda: batch[1].ref_count_down(),
        "last pin": pin_and_free,
        "detach": batch.detach,
        "add_buffer": lambda: heap.add_buffer(torch.zeros(PAGE, dtype=torch.uint8)),
        "batched_store": lambda: heap.batched_store(cache_of_kv(), BlockIds([1, 2]), 32),
        "store": lambda: store(cache_of_kv(), BlockIds([1, 2]), kv),
        "store to objects": lambda: store(cache_of_kv(), BlockIds([1, 2]), kv[:]),
        "offload to it": lambda: offload(source, into=heap),
        "offload and free": lambda: offload(batch, into=near, free=True),
        "copy to it": lambda: copy((blocks, batch)),
        "copy to objects": lambda: copy((blocks[:2], batch[:2])),
        "prefix store": lambda: PrefixStore(heap, batch.layout).store(["a"], blocks[:1]),
    }


def outcomes(heap: TensorMemoryAllocator, batch: MemoryBatch) -> dict[str, str]:
    """What each change raises, and how its message begins."""
    return {name: outcome_of(change) for name, change in changes(heap, batch).items()}


def outcome_of(change: Callable[[], object]) -> str:
    try:
        change()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize(
    ("make", "options"),
    [(of_memfd, {}), (of_memfd, {"debug": True}), *((make, {"scrub": True}) for make in SHARED)],
)
class TestFork:
    def test_a_child_changes_nothing(self, make: Make, options: dict[str, Any]) -> None:
        with make(**options) as heap:
            batch = filled(heap)
            found = in_a_child(lambda: (os.getpid(), outcomes(heap, batch)))
            child, answers = found
            for name, answer in answers.items():
                assert answer.startswith(f"ForeignProcessError: process {child} cannot"), name
                assert f": process {os.getpid()} keeps the books of this heap" in answer, name
            require_unchanged(heap, batch)
            assert not heap.is_view_only

    def test_a_child_reads(self, make: Make, options: dict[str, Any]) -> None:
        with make(**options) as heap:
            batch = filled(heap)

            def read() -> tuple[list[list[int]], int, bool, bool, int]:
                near = TensorMemoryAllocator(torch.zeros(SIZE, dtype=torch.uint8))
                back = restore(batch, into=near)
                assert back is not None
                out = torch.empty(8, PAGE, dtype=torch.uint8)
                copy((heap.view(batch.metadata), out)).result()
                batch[3].ref_count_up()
                batch[3].ref_count_down()
                stats = heap.stats()
                seen = [values_of(blocks) for blocks in (batch, back)] + [out[:, 7].tolist()]
                room = heap.max_batch([PAGE], torch.uint8)
                heap.close()
                return seen, stats.allocated_bytes, stats.view_only, heap.is_view_only, room

            seen, allocated, view_only, is_view_only, room = in_a_child(read)
            assert seen == [list(range(8))] * 3
            assert (allocated, view_only, is_view_only, room) == (8 * PAGE, True, True, 0)
            require_unchanged(heap, batch)
            assert not heap.stats().view_only

    def test_what_a_child_drops_stays(self, make: Make, options: dict[str, Any]) -> None:
        """Neither freed in the child's books, nor wiped; and a lease that ends there likewise."""
        with make(**options) as heap:
            batch = filled(heap)
            held = [batch, filled(heap, 4)]
            held[1][0].pin(ttl=0.01)
            held[1][0].ref_count_down()

            def drop() -> int:
                while held[1][0].pin_count:
                    continue
                held.pop()
                heap.leaks()
                before = heap.stats().allocated_bytes
                heap.lifetime.reclaimer.settle(limit=None)
                heap.close()
                return before

            assert in_a_child(drop) == 12 * PAGE
            others = heap.view(held[1].addresses, [PAGE], torch.uint8)
            assert values_of(others) == [0, 1, 2, 3]
            assert values_of(batch) == list(range(8))

    def test_a_child_of_a_child(self, make: Make, options: dict[str, Any]) -> None:
        with make(**options) as heap:
            batch = filled(heap)

            def ask() -> tuple[bool, str]:
                return heap.is_view_only, outcomes(heap, batch)["allocate"]

            is_view_only, answer = in_a_child(lambda: in_a_child(ask))
            assert is_view_only
            assert f": process {os.getpid()} keeps" in answer

    def test_the_parent_goes_on(self, make: Make, options: dict[str, Any]) -> None:
        with make(**options) as heap:
            batch = filled(heap)
            in_a_child(lambda: outcomes(heap, batch) and None)
            other = filled(heap, 4)
            heap.batched_free(batch)
            assert values_of(other) == [0, 1, 2, 3]
            heap.batched_free(other)
            assert heap.stats().allocated_bytes == 0
            assert heap.memcheck()


@pytest.mark.parametrize("make", PRIVATE)
def test_a_private_heap_is_the_childs_own(make: Make) -> None:
    with make(scrub=True) as heap:
        batch = filled(heap)

        def use() -> tuple[bool, dict[str, str], list[int]]:
            answers = outcomes(heap, filled(heap))
            heap.batched_free(batch)
            return heap.is_view_only, answers, [values_of(filled(heap, 4))[3]]

        is_view_only, answers, values = in_a_child(use)
        assert not is_view_only
        assert answers["batched_allocate"] == answers["store"] == answers["offload to it"] == "done"
        assert values == [3]
        require_unchanged(heap, batch)


def test_a_view_may_be_for_filling() -> None:
    """The owner allocates for a child; the child says so, and fills the blocks."""
    with of_memfd() as heap:
        batch = filled(heap)
        target = heap.batched_allocate([2, 1, 32, 32], torch.float16, 1)
        assert target is not None

        def fill() -> list[str]:
            blocks = torch.full((8, PAGE), 99, dtype=torch.uint8)
            copy((blocks, heap.view(batch.metadata, writable=True))).result()
            view = heap.view(target.metadata, writable=True)
            store(cache_of_kv(), BlockIds([1, 2]), view)
            refused = []
            for change in (lambda: heap.batched_free(view), lambda: heap.free(view[0])):
                with pytest.raises(ForeignObjectError) as caught:
                    change()
                refused.append(type(caught.value).__name__)
            return refused

        assert in_a_child(fill) == ["ForeignObjectError"] * 2
        assert values_of(batch) == [99] * 8
        assert target[0].tensor is not None
        assert (target[0].tensor == 1).all()


def test_a_view_for_reading_in_ones_own_heap() -> None:
    heap = of_private_tensor()
    batch = filled(heap)
    blocks = torch.full((8, PAGE), 99, dtype=torch.uint8)
    with pytest.raises(ForeignObjectError, match="make it with writable=True"):
        copy((blocks, heap.view(batch.metadata, writable=False)))
    require_unchanged(heap, batch)
    copy((blocks, heap.view(batch.metadata))).result()
    assert values_of(batch) == [99] * 8
    with pytest.raises(TypeError, match="writable"):
        heap.view(batch.metadata, writable=1)  # type: ignore[arg-type]


# -- a second process ------------------------------------------------------------------------------

ATTACHED = {
    "descriptor": "HostMemoryAllocator.attach(fd, size)",
    "path": "HostMemoryAllocator.attach(f'/proc/{owner}/fd/{fd}', size)",
    "host buffer": "HostMemoryAllocator(size, host_buffer=HostBuffer(size, fd=fd))",
    "tensor": "TensorMemoryAllocator(HostBuffer(size, fd=fd).tensor)",
    "told": "TensorMemoryAllocator(torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8), "
    "view_only=True)",
}

WORKER = """
import json, mmap, sys, torch
from kvheap import *
fd, size, owner, metadata = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
metadata = MemoryBatchMetadata.from_dict(json.loads(metadata))
with {attached} as heap:
    view = heap.view(metadata)
    values = [int(obj.tensor[5]) for obj in view]
    errors = []
    blocks = torch.full((8, 4096), 99, dtype=torch.uint8)
    near = TensorMemoryAllocator(blocks.clone())
    source = near.batched_allocate([4096], torch.uint8, 8)
    for change in (
        lambda: heap.allocate([4096], torch.uint8),
        lambda: heap.batched_free(view),
        lambda: offload(source, into=heap),
        lambda: kvheap.transfer.copy((blocks, view)),
        lambda: heap.add_buffer(torch.zeros(4096, dtype=torch.uint8)),
    ):
        try:
            change()
        except ForeignObjectError as error:
            errors.append(type(error).__name__)
        else:
            errors.append("done")
    print(json.dumps([values, errors, heap.stats().view_only, heap.memcheck()]))
"""


@pytest.mark.parametrize("how", ATTACHED)
def test_a_process_that_attaches(how: str) -> None:
    with HostMemoryAllocator(SIZE, shared=True) as heap:
        batch = filled(heap)
        fd = heap.host_buffer.fd
        assert fd is not None
        code = "import kvheap, kvheap.transfer" + WORKER.replace("{attached}", ATTACHED[how])
        arguments = [str(fd), str(SIZE), str(os.getpid()), json.dumps(batch.metadata.to_dict())]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        values, errors, view_only, in_order = json.loads(done.stdout)
        assert values == list(range(8))
        refused = "ForeignProcessError"
        assert errors == [refused, "ForeignObjectError", refused, refused, refused]
        assert view_only
        assert in_order
        require_unchanged(heap, batch)


def _allocate_in(tensor: torch.Tensor, view_only: bool | None, answers: Any) -> None:
    """In a process that was spawned, or forked, with a tensor of its parent's."""
    heap = TensorMemoryAllocator(tensor, view_only=view_only)
    try:
        answers.put(heap.allocate([PAGE], torch.uint8).address)  # type: ignore[union-attr]
    except ForeignObjectError as error:
        answers.put(type(error).__name__)


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_a_shared_tensor_knows_who_made_it(strategy: str) -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        tensor = torch.zeros(SIZE, dtype=torch.uint8).share_memory_()
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    assert not TensorMemoryAllocator(tensor).is_view_only

    def ask() -> list[bool]:
        return [
            TensorMemoryAllocator(tensor, view_only=view_only).is_view_only
            for view_only in (None, True, False)
        ]

    assert in_a_child(ask) == [True, True, False]


def test_a_new_heap_of_a_child_over_its_parents_bytes() -> None:
    with of_memfd() as heap:
        shared = heap.buffer
        private = torch.zeros(SIZE, dtype=torch.uint8)

        def ask() -> list[bool]:
            heaps = [TensorMemoryAllocator(tensor) for tensor in (shared, shared[PAGE:], private)]
            with HostMemoryAllocator(SIZE, shared=True) as own:
                return [each.is_view_only for each in (*heaps, own)]

        assert in_a_child(ask) == [True, True, False, False]


def test_a_shared_tensor_that_was_sent() -> None:
    context = torch.multiprocessing.get_context("fork")
    tensor = torch.zeros(SIZE, dtype=torch.uint8).share_memory_()
    answers = context.SimpleQueue()
    for view_only, expected in ((None, "ForeignProcessError"), (False, 0)):
        child = context.Process(target=_allocate_in, args=(tensor, view_only, answers))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert answers.get() == expected


def test_whose_a_file_is_must_be_said() -> None:
    block = shared_memory.SharedMemory(create=True, size=SIZE)
    try:
        tensor = torch.frombuffer(block.buf, dtype=torch.uint8, count=SIZE)
        heap = TensorMemoryAllocator(tensor, view_only=True)
        with pytest.raises(
            kvheap.ForeignProcessError, match="another process or heap keeps the books"
        ):
            heap.allocate([PAGE], torch.uint8)
        batch = filled(TensorMemoryAllocator(tensor))
        assert values_of(heap.view(batch.metadata)) == list(range(8))
        attached = HostMemoryAllocator.attach(Path("/dev/shm") / block.name.lstrip("/"), SIZE)
        with attached:
            assert values_of(attached.view(batch.metadata)) == list(range(8))
            assert attached.is_view_only
        heap.close()
        del batch, tensor, heap
    finally:
        block.close()
        block.unlink()


def test_the_books_of_a_file_of_ones_own() -> None:
    fd = os.memfd_create("own")
    try:
        os.ftruncate(fd, SIZE)
        buffer = HostBuffer(SIZE, fd=fd)
        assert buffer.is_attached
        with HostMemoryAllocator(SIZE, host_buffer=buffer, view_only=False) as heap:
            require_unchanged(heap, filled(heap))
    finally:
        os.close(fd)
    with HostBuffer.shared(SIZE) as buffer:
        assert not buffer.is_attached
    with HostBuffer(SIZE) as buffer:
        assert not buffer.is_attached


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("/nonexistent/heap", FileNotFoundError),
        (1.5, TypeError),
        (None, TypeError),
        (10**6, OSError),
    ],
)
def test_files_that_cannot_be_attached(file: Any, error: type[Exception]) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(error):
        HostMemoryAllocator.attach(file, SIZE)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_is_too_small(tmp_path: Path) -> None:
    path = tmp_path / "heap"
    path.write_bytes(bytes(PAGE))
    with pytest.raises(ValueError, match=f"the file has {PAGE} bytes, fewer than the {SIZE} "):
        HostMemoryAllocator.attach(path, SIZE)


def test_the_error_travels() -> None:
    error = kvheap.ForeignProcessError("free blocks", 7, 8)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.action, again.owner_pid, again.pid) == ("free blocks", 7, 8)
    assert "process 8 cannot free blocks: process 7 keeps the books" in str(error)


def test_a_view_has_counts_of_its_own() -> None:
    """What ``is_valid`` of a view cannot know: the owner has freed the block."""
    with of_memfd() as heap:
        batch = filled(heap)
        view = heap.view(batch.metadata)
        heap.batched_free(batch)
        assert not batch[0].is_valid()
        assert view[0].is_valid()
        with pytest.raises(LifetimeError):
            batch[0].ref_count_up()
