"""CudaHostRegistrar: its calls into CUDA, and their errors."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from host_memory_probes import HUGE, PAGE

from kvheap.memory import registrar as registrar_module
from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.numa import numa_node_of_gpu
from kvheap.memory.registrar import CudaHostRegistrar
from kvheap.transfer import CopyPlan, copy


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
            registrar_module, "ctypes", types.SimpleNamespace(CDLL=lambda name: process)
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
            for piece in buffer.tensor.split(1 << 20):
                on_device = piece.to("cuda", non_blocking=True)
                torch.cuda.synchronize()
                assert torch.equal(on_device.cpu(), piece)

        with HostBuffer(PAGE) as buffer:
            assert not buffer.tensor.is_pinned()

    def test_one_copy_cannot_straddle_two_registrations_but_a_transfer_can(self) -> None:
        with HostBuffer(2 << 20, align_bytes=HUGE) as buffer:
            buffer.pin(0, 2 << 20, piece_bytes=1 << 20)
            buffer.tensor.random_()
            on_device = torch.zeros_like(buffer.tensor, device="cuda")
            # If a driver learns to do it, allocators of pinned memory need no walls any more.
            with pytest.raises(RuntimeError, match="invalid argument"):
                on_device.copy_(buffer.tensor, non_blocking=True)
            plan = CopyPlan.between(buffer.tensor[None], on_device[None])
            copy(plan, torch.cuda.Stream(), path="copy_engine").result()
            assert torch.equal(on_device.cpu(), buffer.tensor)

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
