"""Huge pages: asked for, or an error."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from host_memory_probes import HUGE, PAGE, vm_flags

from kvheap.memory import pages
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
