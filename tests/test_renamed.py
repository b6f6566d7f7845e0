"""Arguments that were renamed: the old name works, and says what the new one is."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_tiers import LAYOUT
from small_heaps import heap_of

from kvheap import HostBuffer, LazyMemoryAllocator, MemoryBatch, PrefixStore
from kvheap.renamed import renamed

PAGE = 4096


def grown(**how: Any) -> bool:
    with LazyMemoryAllocator(PAGE, 2 * PAGE, pin="no") as heap:
        return heap.wait_until_grown(**how)


def blocks() -> MemoryBatch:
    batch = heap_of(2).batched_allocate([PAGE], torch.uint8, 1)
    assert batch is not None
    return batch


def moved(**how: Any) -> int:
    batch = blocks()
    store: PrefixStore[str] = PrefixStore(heap_of(2), batch.layout)
    flight = store.offload(["a"], **dict.fromkeys(how, batch))
    flight.complete()
    return len(store)


CASES: dict[str, tuple[Callable[..., Any], str, str, Any]] = {
    "LazyMemoryAllocator.wait_until_grown": (grown, "timeout", "timeout_s", 30),
    "HostBuffer": (lambda **how: HostBuffer(**how).size_bytes, "size_bytes", "size", 100),
    "HostBuffer.shared": (
        lambda **how: HostBuffer.shared(**how).size_bytes,
        "size_bytes",
        "size",
        100,
    ),
    "PrefixStore.offload": (moved, "blocks", "batch", None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_old_name_works_and_warns(name: str) -> None:
    call, old, new, value = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call(**{new: value})
    message = rf"^{name}\({old}=\) is now {name}\({new}=\): the old name goes with kvheap 0\.3$"
    with pytest.warns(DeprecationWarning, match=message) as found:
        assert call(**{old: value}) == expected
    assert [warning.filename for warning in found] == [__file__]
    with pytest.raises(TypeError, match=f"{name}.* got {new} twice, once by its old name {old}"):
        call(**{old: value, new: value})


def test_a_tier_of_files(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    pytest.importorskip("xxhash")
    from kvheap.files import FileTier

    how: Any = {"namespace": "a model"}
    with (
        pytest.warns(DeprecationWarning, match=r"FileTier\(order=\) is now FileTier\(policy=\)"),
        FileTier(tmp_path / "a", 1 << 20, LAYOUT, order="arc", **how) as tier,
    ):
        assert tier.layout == LAYOUT
    with FileTier(tmp_path / "b", 1 << 20, LAYOUT, policy="arc", **how):
        pass


def test_the_signature_is_that_of_the_new_names() -> None:
    assert list(inspect.signature(HostBuffer).parameters)[0] == "size"
    assert "timeout_s" in inspect.signature(LazyMemoryAllocator.wait_until_grown).parameters


def test_what_is_wrong_with_other_arguments_stays() -> None:
    @renamed(old="new")
    def function(new: int, other: int = 2) -> int:
        return new * other

    assert (function(3), function(new=3, other=1)) == (6, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'older'"):
        function(older=3)  # type: ignore[call-arg]
    with (
        pytest.warns(DeprecationWarning, match="old"),
        pytest.raises(TypeError, match="multiple values for argument 'new'"),
    ):
        function(3, old=3)  # type: ignore[call-arg]
