"""Huge pages: asked for, or an error."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from host_memory_probes import HUGE, PAGE, FakeRegistrar, vm_flags

from kvheap import LazyMemoryAllocator, PinMemoryAllocator
from kvheap.memory import host_mapping, pages
from kvheap.memory.host_memory import HostBuffer


class TestHugePages:
    def test_transparent_pages_are_asked_for(self) -> None:
        try:
            buffer = HostBuffer(3 * HUGE + 5, huge_pages="transparent")
        except RuntimeError as error:
            pytest.skip(str(error))
        assert buffer.data_ptr % HUGE == 0
        assert "hg" in vm_flags(buffer.data_ptr)
        assert "hg" in vm_flags(buffer.data_ptr + buffer.size_bytes - 1)
        assert "hg" not in vm_flags(HostBuffer(HUGE).data_ptr)

    @pytest.mark.parametrize("shared", [False, True])
    def test_transparent_pages_switched_off_are_an_error(
        self, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "transparent_hugepage").mkdir()
        name = "shmem_enabled" if shared else "enabled"
        (tmp_path / "transparent_hugepage" / name).write_text("always madvise [never]\n")
        monkeypatch.setattr(
            pages, "Path", lambda path: Path(path.replace("/sys/kernel/mm", str(tmp_path)))
        )
        with pytest.raises(RuntimeError, match=r"switched off: .*always madvise \[never\]"):
            (HostBuffer.shared if shared else HostBuffer)(PAGE, huge_pages="transparent")

    def test_transparent_pages_if_possible(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if pages.why_no_transparent_huge_pages(shared=False) is None:
            buffer = HostBuffer(3 * HUGE + 5, huge_pages="if possible")
            assert buffer.data_ptr % HUGE == 0
            assert "hg" in vm_flags(buffer.data_ptr)
        (tmp_path / "transparent_hugepage").mkdir()
        (tmp_path / "transparent_hugepage" / "enabled").write_text("always madvise [never]\n")
        monkeypatch.setattr(
            pages, "Path", lambda path: Path(path.replace("/sys/kernel/mm", str(tmp_path)))
        )
        assert "hg" not in vm_flags(HostBuffer(PAGE, huge_pages="if possible").data_ptr)

    def test_a_kernel_that_refuses_the_advice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            raise OSError(errno.EINVAL, "not here")

        monkeypatch.setattr(host_mapping, "madvise", refuse)
        monkeypatch.setattr(host_mapping, "why_no_transparent_huge_pages", lambda shared: None)
        monkeypatch.setattr(host_mapping, "require_transparent_huge_pages", lambda shared: None)
        assert HostBuffer(PAGE, huge_pages="if possible").size_bytes == PAGE
        with pytest.raises(OSError, match="not here"):
            HostBuffer(PAGE, huge_pages="transparent")

    @pytest.mark.parametrize("heap_class", [PinMemoryAllocator, LazyMemoryAllocator])
    def test_pinned_heaps_ask_for_them(
        self, heap_class: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if pages.why_no_transparent_huge_pages(shared=False) is not None:
            pytest.skip("the system has switched transparent huge pages off")
        sizes = [2 * HUGE] if heap_class is PinMemoryAllocator else [HUGE, 2 * HUGE]
        with heap_class(*sizes, registrar=FakeRegistrar()) as heap:
            assert "hg" in vm_flags(heap.host_buffer.data_ptr)
        with heap_class(*sizes, registrar=FakeRegistrar(), huge_pages="none") as heap:
            assert "hg" not in vm_flags(heap.host_buffer.data_ptr)
        with LazyMemoryAllocator(HUGE, 2 * HUGE, pin="no") as heap:
            assert "hg" not in vm_flags(heap.host_buffer.data_ptr)

    def test_too_few_explicit_pages_are_an_error(self) -> None:
        with pytest.raises(OSError, match=r"explicit huge pages .*HugePages_Total: \d+") as caught:
            HostBuffer(1 << 46, huge_pages="explicit")
        assert caught.value.errno == errno.ENOMEM
        assert str(1 << 46) in str(caught.value)

    def test_explicit_pages(self) -> None:
        try:
            buffer = HostBuffer(HUGE + 1, huge_pages="explicit")
        except OSError as error:
            pytest.skip(str(error))
        assert "ht" in vm_flags(buffer.data_ptr)
        buffer.populate(0, buffer.size_bytes)
        buffer.tensor.fill_(1)
