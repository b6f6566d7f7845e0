"""HostBuffer: where its bytes are, when they are committed and pinned, and when they go."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import platform
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvheap.memory import host_memory, host_registration
from kvheap.memory.host_memory import HostBuffer, numa_node_of_gpu
from kvheap.memory.host_registration import CudaHostRegistrar

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
libc = ctypes.CDLL(None, use_errno=True)


def is_mapped(pointer: int) -> bool:
    return mapping_line(pointer) is not None


def mapping_line(pointer: int, file: str = "maps") -> str | None:
    """The line of this address in /proc/self/maps or smaps."""
    for line in Path("/proc/self", file).read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2 and int(bounds[0], 16) <= pointer < int(bounds[1], 16):
            return line
    return None


def vm_flags(pointer: int) -> list[str]:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    start = mapping_line(pointer)
    for line in lines:
        if line == start:
            break
    return next(line for line in lines if line.startswith("VmFlags:")).split()[1:]


def resident_pages(buffer: HostBuffer) -> list[bool]:
    count = -(-buffer.size_bytes // PAGE)
    pages = (ctypes.c_ubyte * count)()
    size = ctypes.c_size_t(count * PAGE)
    assert libc.mincore(ctypes.c_void_p(buffer.data_ptr), size, pages) == 0
    return [bool(page & 1) for page in pages]


def anonymous_bytes() -> int:
    """Private memory of this process that is its own: pages that were only read are not."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise AssertionError("smaps_rollup says nothing of anonymous memory")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class FakeRegistrar:
    """Keeps what is registered, and refuses what CUDA would: overlaps, and unmapped memory."""

    def __init__(self, fail_register: int | None = None, fail_unregister: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[int, int]] = []
        self.threads: set[threading.Thread] = set()
        self.fail_register = fail_register
        self.fail_unregister = fail_unregister
        self.unregistered_unmapped = 0

    def register(self, pointer: int, num_bytes: int) -> None:
        self.threads.add(threading.current_thread())
        self.calls.append((pointer, num_bytes))
        if len(self.calls) - 1 == self.fail_register:
            raise RuntimeError("cudaErrorFake (77): no pages left")
        if pointer % PAGE or num_bytes % PAGE or not is_mapped(pointer + num_bytes - 1):
            raise AssertionError(f"not whole mapped pages: {pointer:#x}, {num_bytes}")
        for other, other_bytes in self.registered.items():
            if pointer < other + other_bytes and other < pointer + num_bytes:
                raise AssertionError(f"{pointer:#x} overlaps {other:#x}")
        self.registered[pointer] = num_bytes

    def unregister(self, pointer: int) -> None:
        if not is_mapped(pointer):
            self.unregistered_unmapped += 1
        if self.fail_unregister:
            self.fail_unregister -= 1
            raise RuntimeError(f"cudaErrorFake (78): {pointer:#x} stays")
        del self.registered[pointer]


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
            ({"size_bytes": 0}, "size_bytes must be positive"),
            ({"size_bytes": -1}, "size_bytes must be positive"),
            ({"size_bytes": 1 << 63}, "size_bytes must be positive and below"),
            ({"align_bytes": 0}, "power of two"),
            ({"align_bytes": 4097}, "power of two"),
            ({"align_bytes": -4096}, "power of two"),
            ({"huge_pages": "some"}, "huge_pages must be"),
            ({"huge_pages": "explicit", "fd": 0}, "cannot be had with fd"),
            ({"numa_node": -1}, "numa_node must be between 0 and 1023, got -1"),
            ({"numa_node": 1024}, "numa_node must be between 0 and 1023, got 1024"),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HostBuffer(**{"size_bytes": PAGE, **arguments})


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
            host_memory, "Path", lambda path: Path(path.replace("/sys/kernel/mm", str(tmp_path)))
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


class TestNuma:
    def test_memory_is_bound_to_the_node(self) -> None:
        try:
            buffer = HostBuffer(64 * PAGE, align_bytes=HUGE, numa_node=0)
        except OSError as error:
            pytest.skip(str(error))
        buffer.tensor.fill_(1)
        maps = Path("/proc/self/numa_maps")
        if not maps.exists():
            pytest.skip("this kernel has no numa_maps")
        start = (mapping_line(buffer.data_ptr) or "").split("-")[0]
        line = next(line for line in maps.read_text().splitlines() if line.startswith(start))
        assert line.split()[1] == "bind:0"

    def test_an_unknown_node_is_an_error(self) -> None:
        with pytest.raises(OSError, match="NUMA node 1023: "):
            HostBuffer(PAGE, numa_node=1023)

    def test_an_unknown_machine_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "abacus")
        with pytest.raises(OSError, match="not supported on abacus"):
            HostBuffer(PAGE, numa_node=0)

    @pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None)])
    def test_node_of_a_gpu(
        self, text: str, node: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        properties = types.SimpleNamespace(pci_domain_id=1, pci_bus_id=0xAB, pci_device_id=4)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        assert numa_node_of_gpu(0, sysfs=tmp_path) is None
        folder = tmp_path / "bus/pci/devices/0001:ab:04.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(text)
        assert numa_node_of_gpu(0, sysfs=tmp_path) == node

    def test_a_torch_without_pci_addresses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nothing = types.SimpleNamespace()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: nothing)
        with pytest.raises(RuntimeError, match="does not tell a GPU's PCI address"):
            numa_node_of_gpu(0)


@pytest.fixture(params=["kernel", "by hand"])
def populate_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by hand":

        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            raise OSError(errno.EINVAL, "as before Linux 5.14")

        monkeypatch.setattr(host_memory, "_madvise", refuse)


@pytest.mark.usefixtures("populate_way")
class TestPopulate:
    @pytest.mark.parametrize("threads", [None, 1, 3])
    def test_pages_become_resident_and_no_others(
        self, threads: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(host_memory, "POPULATE_SLICE_BYTES", 16 * PAGE)
        buffer = HostBuffer(200 * PAGE, align_bytes=1 << 16)
        buffer.populate(3 * PAGE + 7, 150 * PAGE + 1, threads=threads)
        resident = resident_pages(buffer)
        assert all(resident[3:151])
        assert not any(resident[:3] + resident[151:])

    def test_pages_are_memory_not_the_page_of_zeros(self) -> None:
        buffer = HostBuffer(64 << 20)
        before = anonymous_bytes()
        buffer.populate(0, 64 << 20)
        assert anonymous_bytes() - before > 60 << 20

    def test_the_last_part_of_a_page(self) -> None:
        buffer = HostBuffer(3 * PAGE + 5)
        buffer.populate(3 * PAGE + 1, 3 * PAGE + 5)
        assert resident_pages(buffer) == [False, False, False, True]
        buffer.populate(2, 2)
        assert resident_pages(buffer) == [False, False, False, True]
        buffer.populate(0, buffer.size_bytes)
        assert all(resident_pages(buffer))

    @pytest.mark.parametrize("make", [HostBuffer, HostBuffer.shared])
    def test_contents_stay(self, make: Callable[[int], HostBuffer]) -> None:
        buffer = make(64 * PAGE + 9)
        expected = torch.randint(0, 256, (buffer.size_bytes,), dtype=torch.uint8)
        buffer.tensor.copy_(expected)
        buffer.populate(0, buffer.size_bytes)
        assert torch.equal(buffer.tensor, expected)

    def test_shared_pages_become_resident(self) -> None:
        buffer = HostBuffer.shared(20 * PAGE + 1)
        assert buffer.fd is not None
        buffer.populate(4 * PAGE, 12 * PAGE)
        assert os.fstat(buffer.fd).st_blocks * 512 == 8 * PAGE


class TestPopulateErrors:
    @pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, PAGE + 1)])
    def test_a_wrong_range(self, start: int, end: int) -> None:
        buffer = HostBuffer(PAGE)
        with pytest.raises(ValueError, match="is not within the buffer's 4096 bytes"):
            buffer.populate(start, end)

    def test_no_threads(self) -> None:
        with pytest.raises(ValueError, match="threads must be positive, got 0"):
            HostBuffer(PAGE).populate(0, PAGE, threads=0)

    def test_no_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            raise OSError(errno.ENOMEM, "no memory")

        monkeypatch.setattr(host_memory, "_madvise", refuse)
        with pytest.raises(MemoryError, match=r"no memory for bytes \[0, 4096\)"):
            HostBuffer(PAGE).populate(0, 1)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_file_cut_short(self, threads: int) -> None:
        buffer = HostBuffer.shared(64 << 20)
        assert buffer.fd is not None
        os.ftruncate(buffer.fd, 0)
        with pytest.raises(OSError, match=r"cannot commit bytes \[\d+, \d+\) of .*Bad addr"):
            buffer.populate(0, 64 << 20, threads=threads)

    @pytest.mark.parametrize("threads", [1, 4])
    def test_the_first_error_ends_it(self, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also an error that nobody foresaw, whichever thread meets it."""
        calls: list[int] = []

        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            calls.append(pointer)
            if len(calls) == 6:
                raise IndexError("a bug")
            time.sleep(0.001)

        monkeypatch.setattr(host_memory, "_madvise", refuse)
        with pytest.raises(IndexError, match="a bug"):
            HostBuffer(1 << 36).populate(0, 1 << 36, threads=threads)
        assert 6 <= len(calls) < 1000  # of 4,096 slices

    def test_without_another_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when the interpreter is exiting."""

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        buffer, registrar = HostBuffer(64 << 20), FakeRegistrar()
        buffer.populate(0, 64 << 20, threads=8)
        assert all(resident_pages(buffer))
        assert buffer.pin(0, 64 << 20, registrar=registrar) == 64 << 20

    def test_interrupted_calls_are_made_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = [errno.EINTR, errno.EAGAIN, 0]

        def madvise(pointer: int, num_bytes: int, advice: int) -> int:
            code = answers.pop(0)
            ctypes.set_errno(code)
            return -1 if code else 0

        monkeypatch.setattr(host_memory, "_libc", types.SimpleNamespace(madvise=madvise))
        HostBuffer(PAGE).populate(0, PAGE)
        assert answers == []


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
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ValueError, match="size_bytes must be positive"):
            HostBuffer.shared(0)
        with pytest.raises(ValueError, match="a shared mapping cannot be shifted"):
            HostBuffer.shared(PAGE, align_bytes=1 << 47)
        with pytest.raises(OSError, match="NUMA node 1023"):
            HostBuffer.shared(PAGE, numa_node=1023)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_file_that_is_too_small(self) -> None:
        buffer = HostBuffer.shared(PAGE)
        with pytest.raises(ValueError, match="greater than file size"):
            HostBuffer(PAGE + 1, fd=buffer.fd)

    def test_a_file_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(PAGE))
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        try:
            with pytest.raises(PermissionError, match="cannot map 4096 bytes of the file"):
                HostBuffer(PAGE, fd=fd)
        finally:
            os.close(fd)


class TestPin:
    def test_pieces_are_registered_on_another_thread(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(10 * PAGE + 5, align_bytes=1 << 16)
        pinned = buffer.pin(PAGE, buffer.size_bytes, registrar=registrar, piece_bytes=4 * PAGE)
        assert pinned == buffer.pinned_bytes == 9 * PAGE + 5
        pieces = [(PAGE, 5 * PAGE), (5 * PAGE, 9 * PAGE), (9 * PAGE, 10 * PAGE + 5)]
        assert buffer.pinned_ranges == pieces
        assert registrar.calls == [
            (buffer.data_ptr + PAGE, 4 * PAGE),
            (buffer.data_ptr + 5 * PAGE, 4 * PAGE),
            (buffer.data_ptr + 9 * PAGE, 2 * PAGE),
        ]
        assert threading.current_thread() not in registrar.threads
        assert buffer.pin(0, PAGE, registrar=registrar) == PAGE
        assert buffer.pinned_ranges == [(0, PAGE), *pieces]
        assert buffer.pin(2 * PAGE, 2 * PAGE, registrar=registrar) == 0
        buffer.close()
        assert registrar.registered == {}
        assert (buffer.pinned_bytes, buffer.pinned_ranges) == (0, [])

    def test_pieces_are_64_gib_at_most(self, registrar: FakeRegistrar) -> None:
        with HostBuffer((130 << 30) + 1) as buffer:
            buffer.pin(0, buffer.size_bytes, registrar=registrar)
            assert [size for _, size in registrar.calls] == [64 << 30, 64 << 30, (2 << 30) + PAGE]

    @pytest.mark.parametrize("number", [0, 2, 4])
    def test_a_piece_that_fails_undoes_the_call(self, number: int) -> None:
        registrar = FakeRegistrar(fail_register=number + 1)
        buffer = HostBuffer(8 * PAGE)
        buffer.pin(0, PAGE, registrar=registrar)
        message = (
            rf"cannot pin bytes \[{PAGE * (number + 1)}, {PAGE * (number + 2)}\) of the buffer, "
            rf"piece {number + 1} of 5: cudaErrorFake \(77\): no pages left; {PAGE * number} bytes "
            rf"pinned before it in this call were unpinned, {PAGE} bytes of the buffer are pinned$"
        )
        with pytest.raises(RuntimeError, match=message) as caught:
            buffer.pin(PAGE, 6 * PAGE, registrar=registrar, piece_bytes=PAGE)
        assert "cudaErrorFake" in str(caught.value.__cause__)
        assert buffer.pinned_ranges == [(0, PAGE)]
        assert registrar.registered == {buffer.data_ptr: PAGE}
        assert buffer.pin(PAGE, 6 * PAGE, registrar=registrar) == 5 * PAGE

    def test_an_undo_that_fails_is_told_and_kept(self) -> None:
        registrar = FakeRegistrar(fail_register=2, fail_unregister=1)
        buffer = HostBuffer(8 * PAGE)
        with pytest.raises(
            RuntimeError, match=r"4096 bytes pinned before.*failed: cudaErrorFake \(78\)"
        ):
            buffer.pin(0, 4 * PAGE, registrar=registrar, piece_bytes=PAGE)
        assert buffer.pinned_ranges == [(0, PAGE)]
        assert list(registrar.registered) == [buffer.data_ptr]
        buffer.close()
        assert registrar.registered == {}

    def test_other_errors_undo_the_call_too(self) -> None:
        class Broken(FakeRegistrar):
            def register(self, pointer: int, num_bytes: int) -> None:
                if self.calls:
                    raise TypeError("a bug")
                super().register(pointer, num_bytes)

        registrar = Broken()
        buffer = HostBuffer(2 * PAGE)
        with pytest.raises(TypeError, match="a bug"):
            buffer.pin(0, 2 * PAGE, registrar=registrar, piece_bytes=PAGE, allow_unpinned=True)
        assert (buffer.pinned_bytes, registrar.registered) == (0, {})

    def test_allow_unpinned_leaves_a_piece_out(self) -> None:
        registrar = FakeRegistrar(fail_register=1)
        buffer = HostBuffer(3 * PAGE + 1)
        pinned = buffer.pin(
            0, 3 * PAGE + 1, registrar=registrar, piece_bytes=PAGE, allow_unpinned=True
        )
        assert pinned == buffer.pinned_bytes == 2 * PAGE + 1
        assert buffer.pinned_ranges == [(0, PAGE), (2 * PAGE, 3 * PAGE), (3 * PAGE, 3 * PAGE + 1)]

    def test_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        buffer = HostBuffer(PAGE)
        with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
            buffer.pin(0, PAGE)
        assert buffer.pin(0, PAGE, allow_unpinned=True) == buffer.pinned_bytes == 0

    @pytest.mark.parametrize(
        ("start", "end", "piece_bytes", "message"),
        [
            (0, 5 * PAGE, PAGE, "is not within the buffer"),
            (1, PAGE, PAGE, "start and end must be multiples of 4096"),
            (0, PAGE + 1, PAGE, "start and end must be multiples of 4096"),
            (0, PAGE, 0, "piece_bytes must be a positive multiple of 4096, got 0"),
            (0, PAGE, PAGE + 1, "piece_bytes must be a positive multiple"),
            (PAGE, 3 * PAGE, PAGE, r"bytes \[8192, 12288\) are pinned already"),
        ],
    )
    def test_wrong_arguments(
        self, start: int, end: int, piece_bytes: int, message: str, registrar: FakeRegistrar
    ) -> None:
        buffer = HostBuffer(4 * PAGE)
        buffer.pin(2 * PAGE, 4 * PAGE, registrar=registrar)
        with pytest.raises(ValueError, match=message):
            buffer.pin(start, end, registrar=registrar, piece_bytes=piece_bytes)
        assert buffer.pinned_ranges == [(2 * PAGE, 4 * PAGE)]
        assert len(registrar.calls) == 1

    def test_an_interrupted_caller_leaves_nothing_pinned(self) -> None:
        """The signal comes while the first of three pieces is being registered."""

        class SignalError(Exception):
            pass

        class Slow(FakeRegistrar):
            def register(self, pointer: int, num_bytes: int) -> None:
                super().register(pointer, num_bytes)
                if len(self.calls) == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                assert go_on.wait(60)

        def interrupt(number: int, frame: object) -> None:
            raise SignalError

        go_on, registrar = threading.Event(), Slow()
        buffer = HostBuffer(3 * PAGE)
        before = signal.signal(signal.SIGUSR1, interrupt)
        try:
            with pytest.raises(SignalError):
                buffer.pin(0, 3 * PAGE, registrar=registrar, piece_bytes=PAGE)
            go_on.set()
            buffer.close()  # waits for the worker
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert len(registrar.calls) == 1
        assert registrar.registered == {}

    def test_a_random_history(self) -> None:
        rng = random.Random(20)
        registrar = FakeRegistrar()
        buffer = HostBuffer(64 * PAGE - 100)
        pages: set[int] = set()
        for _ in range(150):
            first = rng.randrange(64)
            last = min(64, first + rng.randint(1, 6))
            end = min(last * PAGE, buffer.size_bytes)
            fails = rng.random() < 0.3
            registrar.fail_register = len(registrar.calls) + rng.randrange(3) if fails else None
            try:
                buffer.pin(first * PAGE, end, registrar=registrar, piece_bytes=2 * PAGE)
            except (ValueError, RuntimeError):
                pass
            else:
                assert not pages & set(range(first, last))
                pages |= set(range(first, last))
            held = {page for start, end in buffer.pinned_ranges for page in covered(start, end)}
            assert held == pages
            assert sum(registrar.registered.values()) == len(pages) * PAGE
            tail = 100 if 63 in pages else 0
            assert buffer.pinned_bytes == len(pages) * PAGE - tail
        assert len(pages) > 20


def covered(start: int, end: int) -> range:
    return range(start // PAGE, -(-end // PAGE))


class TestThreads:
    def test_pins_of_many_threads(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(40 * PAGE)

        def pin_some(number: int) -> None:
            for page in range(number, 40, 4):
                buffer.pin(page * PAGE, (page + 1) * PAGE, registrar=registrar)

        threads = [threading.Thread(target=pin_some, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert buffer.pinned_ranges == [(page * PAGE, (page + 1) * PAGE) for page in range(40)]
        buffer.close()
        assert registrar.registered == {}

    def test_close_waits_for_a_pin_and_looking_does_not(self) -> None:
        class Slow(FakeRegistrar):
            def register(self, pointer: int, num_bytes: int) -> None:
                begun.set()
                assert go_on.wait(60)
                super().register(pointer, num_bytes)

        begun, go_on, registrar = threading.Event(), threading.Event(), Slow()
        buffer = HostBuffer(PAGE)
        pinning = threading.Thread(
            target=buffer.pin, args=(0, PAGE), kwargs={"registrar": registrar}
        )
        pinning.start()
        assert begun.wait(60)
        assert (buffer.pinned_bytes, buffer.pinned_ranges) == (0, [])
        closing = threading.Thread(target=buffer.close)
        closing.start()
        while not buffer.closed:
            time.sleep(0.001)
        assert closing.is_alive()
        go_on.set()
        closing.join()
        pinning.join()
        assert (len(registrar.calls), registrar.registered) == (1, {})


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

    @pytest.mark.parametrize("held_by", ["module", "builtins", "cycle"])
    def test_exit_calls_no_registrar_and_prints_nothing(self, held_by: str) -> None:
        program = textwrap.dedent(f"""
            import builtins, sys
            from kvheap.memory.host_memory import HostBuffer

            class Registrar:
                def register(self, pointer, num_bytes): pass
                def unregister(self, pointer, stream=sys.stdout):
                    stream.write("finalizing" if sys.is_finalizing() else "early")

            buffer = HostBuffer(1 << 20)
            buffer.pin(0, 1 << 20, registrar=Registrar())
            view = buffer.tensor
            if {held_by!r} == "builtins":
                builtins.kept = buffer
                del buffer, view
            if {held_by!r} == "cycle":
                cycle = [buffer]
                cycle.append(cycle)
                del buffer, view
        """)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class FakeCudart:
    """What torch.cuda.cudart() gives, with the answers set beforehand."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.code = 0

    def cudaHostRegister(self, *arguments: int) -> int:
        self.calls.append(("register", *arguments))
        return self.code

    def cudaHostUnregister(self, *arguments: int) -> int:
        self.calls.append(("unregister", *arguments))
        return self.code

    def cudaError(self, code: int) -> int:
        return code

    def cudaGetErrorString(self, code: int) -> str:
        return f"text of {code}"


class TestCudaHostRegistrar:
    @pytest.fixture
    def cudart(self, monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
        cudart = FakeCudart()

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            def __enter__(self) -> None:
                cudart.calls.append(("device", self.index))

            def __exit__(self, *error: object) -> None:
                cudart.calls.append(("device back",))

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "device", Device)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        return cudart

    def test_calls_are_portable_and_on_the_callers_device(self, cudart: FakeCudart) -> None:
        buffer = HostBuffer(2 * PAGE)
        pointer = buffer.data_ptr
        assert buffer.pin(0, 2 * PAGE) == 2 * PAGE
        buffer.close()
        assert cudart.calls == [
            ("device", 3),
            ("register", pointer, 2 * PAGE, 1),
            ("device back",),
            ("device", 3),
            ("unregister", pointer),
            ("device back",),
        ]

    @pytest.mark.parametrize(
        ("code", "name"),
        [(712, "cudaErrorHostMemoryAlreadyRegistered"), (2, "cudaErrorMemoryAllocation")],
    )
    def test_codes_become_errors(self, cudart: FakeCudart, code: int, name: str) -> None:
        cudart.code = code
        registrar = CudaHostRegistrar(1)
        with pytest.raises(RuntimeError, match=rf"cudaHostRegister: {name} \({code}\): text of"):
            registrar.register(PAGE, PAGE)
        with pytest.raises(RuntimeError, match=rf"cudaHostUnregister: {name} \({code}\): text of"):
            registrar.unregister(PAGE)
        assert cudart.calls[-1] == ("device back",)

    def test_an_unknown_code(self, cudart: FakeCudart) -> None:
        cudart.code = 12345
        with pytest.raises(RuntimeError, match=r"a CUDA error \(12345\): text of 12345"):
            CudaHostRegistrar().register(PAGE, PAGE)

    def test_an_error_is_not_left_for_the_next_launch(
        self, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forgotten: list[bool] = []
        process = types.SimpleNamespace(cudaGetLastError=lambda: forgotten.append(True))
        monkeypatch.setattr(
            host_registration, "ctypes", types.SimpleNamespace(CDLL=lambda name: process)
        )
        registrar = CudaHostRegistrar()
        registrar.register(PAGE, PAGE)
        assert forgotten == []
        cudart.code = 2
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            registrar.register(PAGE, PAGE)
        assert forgotten == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGpu:
    def test_copies_see_pinned_memory(self) -> None:
        with HostBuffer(4 << 20, align_bytes=HUGE) as buffer:
            buffer.populate(0, 4 << 20)
            assert not buffer.tensor.is_pinned()
            assert buffer.pin(0, 4 << 20, piece_bytes=1 << 20) == 4 << 20
            assert buffer.tensor.is_pinned()
            buffer.tensor.random_()
            on_device = buffer.tensor.to("cuda", non_blocking=True)  # across all four pieces
            torch.cuda.synchronize()
            assert torch.equal(on_device.cpu(), buffer.tensor)
        with HostBuffer(PAGE) as buffer:
            assert not buffer.tensor.is_pinned()

    def test_a_double_registration_is_an_error_and_leaves_no_trace(self) -> None:
        registrar = CudaHostRegistrar()
        with HostBuffer(PAGE) as buffer:
            buffer.pin(0, PAGE)
            with pytest.raises(RuntimeError, match="cudaErrorHostMemoryAlreadyRegistered"):
                registrar.register(buffer.data_ptr, PAGE)
            torch.ones(1, device="cuda").add_(1)
            torch.cuda.synchronize()

    def test_the_node_of_this_gpu(self) -> None:
        node = numa_node_of_gpu()
        assert node is None or Path(f"/sys/devices/system/node/node{node}").exists()
