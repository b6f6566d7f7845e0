"""NUMA nodes: memory bound to one, and the one of a GPU."""

from __future__ import annotations

import platform
import types
from pathlib import Path

import pytest
import torch
from host_memory_probes import HUGE, PAGE, mapping_line

from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.numa import cpus_nearby, numa_node_of_gpu


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
        with pytest.raises(RuntimeError, match="does not report a GPU's PCI address"):
            numa_node_of_gpu(0)


def test_the_cpus_of_a_node(tmp_path: Path) -> None:
    node = tmp_path / "devices/system/cpu/cpu5/node1"
    assert cpus_nearby({1, 5, 9}, 5, sysfs=tmp_path) == {1, 5, 9}
    node.mkdir(parents=True)
    (node / "cpulist").write_text("4-6,12-13,15\n")
    assert cpus_nearby({1, 5, 9, 12, 14, 15}, 5, sysfs=tmp_path) == {5, 12, 15}
    assert cpus_nearby({1, 9}, 5, sysfs=tmp_path) == {1, 9}
    assert cpus_nearby({1, 9}, 6, sysfs=tmp_path) == {1, 9}
    assert cpus_nearby({0}) == {0}
