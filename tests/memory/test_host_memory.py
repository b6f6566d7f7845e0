"""HostBuffer: what is reserved, what is shared, and when the memory goes."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_memory_probes import (
    HUGE,
    PAGE,
    FakeRegistrar,
    is_mapped,
    mapping_line,
    resident_bytes,
    vm_flags,
)

from kvheap.memory.host_memory import HostBuffer


@pytest.fixture
def registrar() -> FakeRegistrar:
    return FakeRegistrar()


class TestReserve:
    def test_the_tensor_is_the_memory(self) -> None:
        buffer = HostBuffer(10_001)
        assert (buffer.tensor.dtype, buffer.tensor.shape) == (torch.uint8, (10_001,))
        assert buffer.tensor.data_ptr() == buffer.data_ptr
        assert (buffer.tensor.storage_offset(), buffer.device) == (0, torch.device("cpu"))
        assert (buffer.size_bytes, buffer.fd, buffer.closed) == (10_001, None, False)
        assert not buffer.tensor.any()
        buffer.tensor[-1] = 9
        assert buffer.tensor[-1] == 9

    @pytest.mark.parametrize("align_bytes", [1, 64, 4096, 1 << 16, HUGE, 1 << 30])
    @pytest.mark.parametrize("size_bytes", [1, PAGE, 3 * PAGE + 1, HUGE])
    def test_the_base_is_aligned(self, size_bytes: int, align_bytes: int) -> None:
        buffers = [HostBuffer(size_bytes, align_bytes=align_bytes) for _ in range(4)]
        for number, buffer in enumerate(buffers):
            assert buffer.data_ptr % align_bytes == 0
            assert buffer.tensor.data_ptr() == buffer.data_ptr
            buffer.tensor.fill_(number)
        assert all(buffer.tensor.eq(number).all() for number, buffer in enumerate(buffers))

    @pytest.mark.parametrize("size_bytes", [16 << 30, 1 << 40])
    def test_a_reservation_takes_no_memory(self, size_bytes: int) -> None:
        before = resident_bytes()
        try:
            buffer = HostBuffer(size_bytes, align_bytes=HUGE)
        except OSError as error:
            pytest.skip(f"no {size_bytes} bytes of address space here: {error}")
        assert resident_bytes() - before < 64 << 20
        assert "nr" in vm_flags(buffer.data_ptr)
        buffer.tensor[-1] = 1
        buffer.tensor[size_bytes // 2] = 2
        assert int(buffer.tensor[-1]) == 1
        assert resident_bytes() - before < 64 << 20

    def test_no_address_space_is_an_error(self) -> None:
        with pytest.raises(OSError, match="cannot reserve 2305843009213693952 bytes") as caught:
            HostBuffer(1 << 61)
        assert caught.value.errno == errno.ENOMEM

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 0}, "size must be positive"),
            ({"size": -1}, "size must be positive"),
            ({"size": 1 << 63}, "size must be positive and below"),
            ({"align_bytes": 0}, "power of two"),
            ({"align_bytes": 4097}, "power of two"),
            ({"align_bytes": -4096}, "power of two"),
            ({"huge_pages": "some"}, "huge_pages must be"),
            ({"huge_pages": "explicit", "fd": 0}, "does not work with fd"),
            ({"numa_node": -1}, "numa_node must be between 0 and 1023, got -1"),
            ({"numa_node": 1024}, "numa_node must be between 0 and 1023, got 1024"),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HostBuffer(**{"size": PAGE, **arguments})


class TestShared:
    def test_two_processes_see_one_memory(self) -> None:
        buffer = HostBuffer.shared(1 << 20, name="kvheap-test")
        fd = buffer.fd
        assert fd is not None
        buffer.tensor.fill_(1)
        child = textwrap.dedent(f"""
            from kvheap.memory.host_memory import HostBuffer
            buffer = HostBuffer(1 << 20, fd={fd})
            assert buffer.tensor.eq(1).all()
            buffer.tensor[1000:2000] = 2
            kept = buffer.tensor
            buffer.close()
            kept[5000] = 3
        """)
        subprocess.run([sys.executable, "-c", child], pass_fds=[fd], check=True, timeout=120)
        assert buffer.tensor[1000:2000].eq(2).all()
        assert buffer.tensor[5000] == 3
        assert int(buffer.tensor.int().sum()) == (1 << 20) + 1000 + 2
        assert "memfd:kvheap-test" in (mapping_line(buffer.data_ptr) or "")

    def test_the_descriptor_is_its_own(self) -> None:
        first = HostBuffer.shared(PAGE)
        assert first.fd is not None
        given = os.dup(first.fd)
        second = HostBuffer(PAGE, fd=given)
        os.close(given)
        own = second.fd
        assert own is not None
        third = HostBuffer(PAGE, fd=own)
        first.tensor[3] = 8
        assert second.tensor[3] == third.tensor[3] == 8
        second.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(own)
        dropped = third.fd
        assert dropped is not None
        del third
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(dropped)
        assert first.tensor[3] == 8

    def test_errors_leave_no_descriptor_open(self) -> None:
        gc.collect()  # what other tests have left
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ValueError, match="size must be positive"):
            HostBuffer.shared(0)
        with pytest.raises(ValueError, match="a shared mapping cannot be shifted"):
            HostBuffer.shared(PAGE, align_bytes=1 << 47)
        with pytest.raises(OSError, match="NUMA node 1023"):
            HostBuffer.shared(PAGE, numa_node=1023)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_file_that_is_too_small(self) -> None:
        buffer = HostBuffer.shared(PAGE)
        with pytest.raises(ValueError, match="the file has 4096 bytes, fewer than the 4097 "):
            HostBuffer(PAGE + 1, fd=buffer.fd)

    def test_a_file_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(PAGE))
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        try:
            with pytest.raises(PermissionError, match="cannot map 4096 bytes of the file"):
                HostBuffer(PAGE, fd=fd)
        finally:
            os.close(fd)


class TestClose:
    def test_everything_after_it_is_refused(self, registrar: FakeRegistrar) -> None:
        with HostBuffer(PAGE) as buffer:
            assert not buffer.closed
        assert buffer.closed
        uses: list[Callable[[], object]] = [
            lambda: buffer.tensor,
            lambda: buffer.data_ptr,
            lambda: buffer.fd,
            lambda: buffer.populate(0, PAGE),
            lambda: buffer.pin(0, PAGE, registrar=registrar),
        ]
        for use in uses:
            with pytest.raises(RuntimeError, match="the host buffer is closed"):
                use()
        buffer.close()
        assert "closed" in repr(buffer)
        assert registrar.calls == []

    def test_views_outlive_it(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(4 * PAGE)
        pointer, view = buffer.data_ptr, buffer.tensor[PAGE : 2 * PAGE].view(torch.int32)
        buffer.pin(0, 4 * PAGE, registrar=registrar)
        view.fill_(77)
        buffer.close()
        assert registrar.registered == {}
        assert is_mapped(pointer)
        assert view.eq(77).all()
        view.fill_(78)
        del view
        assert not is_mapped(pointer)

    def test_memory_goes_with_close(self) -> None:
        buffer = HostBuffer(4 * PAGE)
        pointer = buffer.data_ptr
        buffer.close()
        assert not is_mapped(pointer)

    def test_every_piece_is_tried(self) -> None:
        registrar = FakeRegistrar(fail_unregister=2)
        buffer = HostBuffer(5 * PAGE)
        pointer, view = buffer.data_ptr, buffer.tensor
        buffer.pin(0, 5 * PAGE, registrar=registrar, piece_bytes=PAGE)
        with pytest.raises(RuntimeError, match=r"cudaErrorFake \(78\)"):
            buffer.close()
        assert buffer.pinned_bytes == 2 * PAGE == sum(registrar.registered.values())
        assert buffer.closed
        buffer.close()
        del view
        # The finalizer tried again, with the memory still mapped, and then let it go.
        assert registrar.registered == {}
        assert registrar.unregistered_unmapped == 0
        assert not is_mapped(pointer)

    def test_what_stays_pinned_stays_mapped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[str] = []
        monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(str(args.exc_value)))
        registrar = FakeRegistrar(fail_unregister=1_000_000)
        buffer = HostBuffer(PAGE)
        pointer = buffer.data_ptr
        buffer.pin(0, PAGE, registrar=registrar)
        with pytest.raises(RuntimeError, match="stays"):
            buffer.close()
        del buffer
        gc.collect()
        gc.collect()
        assert told == [f"cudaErrorFake (78): {pointer:#x} stays"]
        assert is_mapped(pointer)
        assert registrar.unregistered_unmapped == 0


class TestDrop:
    def test_memory_is_unpinned_before_it_goes(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(4 * PAGE)
        pointer = buffer.data_ptr
        buffer.pin(0, 4 * PAGE, registrar=registrar, piece_bytes=PAGE)
        del buffer
        assert registrar.registered == {}
        assert registrar.unregistered_unmapped == 0
        assert not is_mapped(pointer)

    def test_a_view_keeps_memory_mapped_and_pinned(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(4 * PAGE)
        pointer, view = buffer.data_ptr, buffer.tensor[PAGE:]
        buffer.pin(0, 4 * PAGE, registrar=registrar)
        del buffer
        gc.collect()
        assert is_mapped(pointer)
        assert registrar.registered == {pointer: 4 * PAGE}
        view.fill_(3)
        del view
        assert registrar.registered == {}
        assert registrar.unregistered_unmapped == 0
        assert not is_mapped(pointer)

    def test_a_failed_pin_keeps_no_memory(self) -> None:
        registrar = FakeRegistrar(fail_register=1)
        buffer = HostBuffer(2 * PAGE)
        pointer = buffer.data_ptr
        gc.disable()
        try:
            with pytest.raises(RuntimeError, match="cannot pin") as caught:
                buffer.pin(0, 2 * PAGE, registrar=registrar, piece_bytes=PAGE)
            del caught, buffer
            assert not is_mapped(pointer)
        finally:
            gc.enable()

    def test_a_forked_child_leaves_the_parents_pages_alone(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(PAGE)
        buffer.pin(0, PAGE, registrar=registrar)
        pid = os.fork()
        if pid == 0:
            buffer.close()
            os._exit(0 if registrar.registered else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert buffer.pinned_bytes == PAGE

    def test_exit_calls_no_registrar_and_prints_nothing(self) -> None:
        """Whatever still holds the buffer and a view of it: the module, builtins, or a cycle."""
        program = textwrap.dedent("""
            import builtins, sys
            from kvheap.memory.host_memory import HostBuffer

            class Registrar:
                def __init__(self, held_by): self.held_by = held_by
                def register(self, pointer, num_bytes): pass
                def unregister(self, pointer, stream=sys.stdout):
                    when = "finalizing" if sys.is_finalizing() else "early"
                    stream.write(f"{self.held_by}: {when}")

            def pinned(held_by):
                buffer = HostBuffer(1 << 20)
                buffer.pin(0, 1 << 20, registrar=Registrar(held_by))
                return buffer, buffer.tensor

            buffer, view = pinned("module")
            builtins.kept = pinned("builtins")
            cycle = [pinned("cycle")]
            cycle.append(cycle)
            del cycle
        """)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
